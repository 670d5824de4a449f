"""Sums and products over the samples of each task, for a batch that is sorted by task.

`sizes` are the numbers of samples of the tasks, in descending order. Consecutive tasks of the same
size share one call. The sizes are Python ints, so a compiled network sees constants.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def _runs(sizes: Sequence[int]) -> Iterator[tuple[slice, slice, int]]:
    """Tasks of equal size: their slice of the tasks, of the samples, and their number."""
    task = sample = 0
    for size, members in groupby(sizes):
        count = len(list(members))
        yield slice(task, task + count), slice(sample, sample + count * size), count
        task, sample = task + count, sample + count * size


def sums(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Sums of `values [b, ...]` over the samples of each task, `[m, ...]`, in float32 at least."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    parts = [
        values[samples].unflatten(0, (count, -1)).sum(1, dtype=dtype)
        for _, samples, count in _runs(sizes)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def products(
    left: Tensor, right: Tensor, sizes: Sequence[int], out: Tensor | None = None
) -> Tensor:
    """`P[i] = sum_s left[s]^T right[s]` over the samples s of task i, `[m, o, c]`.

    Args:
        left: `[b, n, o]`.
        right: `[b, n, c]`.
        sizes: Number of samples of each task.
        out: Memory for the result, if it fits.
    """
    if torch.compiler.is_compiling():  # a compiler does not take `out`
        if len(set(sizes)) > 1:
            result: Tensor = _products(left, right, list(sizes))
            return result
        left, right = (each.unflatten(0, (len(sizes), -1)).flatten(1, 2) for each in (left, right))
        return torch.bmm(left.mT, right)
    return _products_of_runs(left, right, sizes, out)


def _products_of_runs(
    left: Tensor, right: Tensor, sizes: Sequence[int], out: Tensor | None = None
) -> Tensor:
    # Each call writes to its place in the result: `cat` would copy all of it.
    result, shape = out, (len(sizes), left.shape[-1], right.shape[-1])
    if result is None or result.shape != shape or result.dtype != left.dtype:
        result = left.new_empty(shape)
    for tasks, samples, count in _runs(sizes):
        a, b = (each[samples].flatten(0, 1).unflatten(0, (count, -1)) for each in (left, right))
        torch.bmm(a.mT, b, out=result[tasks])
    return result


@torch.library.custom_op("ant_lightning::products", mutates_args=())
def _products(left: Tensor, right: Tensor, sizes: list[int]) -> Tensor:
    """`_products_of_runs` as one operation."""
    return _products_of_runs(left, right, sizes)


@_products.register_fake
def _(left: Tensor, right: Tensor, sizes: list[int]) -> Tensor:
    return left.new_empty(len(sizes), left.shape[-1], right.shape[-1])


def samples_of(sizes: Sequence[int], device: torch.device) -> Tensor:
    """The place among the tasks of each sample, `[b]`."""
    parts = [torch.full((size,), task, device=device) for task, size in enumerate(sizes)]
    return torch.cat(parts)


class _ExpandToSamples(torch.autograd.Function):
    @staticmethod
    def forward(ctx, leaf: Tensor, value: Tensor, sizes: tuple[int, ...]) -> Tensor:  # type: ignore[no-untyped-def, override]  # noqa: ANN001
        ctx.sizes = sizes
        return value.expand(sum(sizes), *value.shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def, override]  # noqa: ANN001
        return sums(grad, ctx.sizes), None, None


def expand_to_samples(leaf: Tensor, value: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """A parameter for each sample, `[b, *shape]`, without a copy.

    Args:
        leaf: What each task's gradient goes to, `[m, *shape]`.
        value: The parameter, `[*shape]`, a constant.
        sizes: Number of samples of each task.
    """
    expanded: Tensor = _ExpandToSamples.apply(leaf, value, sizes)
    return expanded
