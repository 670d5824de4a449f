"""Products of task gradients in full precision."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

# Columns whose dot products are summed in the rows' dtype; the sums of the chunks are added in
# float64. From 1,024 to 131,072 columns make no difference in time (docs/benchmarks.md).
CHUNK = 1 << 16


def dot_products(rows: Tensor) -> Tensor:
    """Dot products of `rows [k, p]`, `[k, k]` float64.

    Chunks of the columns are summed in the rows' dtype, and the chunks' sums in float64.
    """
    length = rows.shape[1]
    num_chunks = length // CHUNK
    with full_precision(rows.device):
        tail = rows[:, num_chunks * CHUNK :]
        total = (tail @ tail.mT).double()
        if num_chunks:
            body = rows[:, : num_chunks * CHUNK].unflatten(1, (num_chunks, CHUNK))
            chunks = body.transpose(0, 1)
            total += torch.bmm(chunks, chunks.mT).sum(0, dtype=torch.float64)
    return total


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Context without TF32, bfloat16 and autocast: the Gramian needs full float32 products.

    The settings are global to the process; they are restored when the context ends.
    """
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        # A training step calls this inside the autocast of mixed precision, which would cast the
        # matrix products.
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value
