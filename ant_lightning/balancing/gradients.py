"""Task gradients; a training step uses only their Gramian and one linear combination."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ant_lightning.balancing.parameters import is_dense, same_tensors
from ant_lightning.balancing.reduction import padded_length
from ant_lightning.balancing.shards import from_local
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from jaxtyping import Float
    from torch import Tensor, nn

    from ant_lightning.balancing.reduction import Reduction

__all__ = [
    "DenseTaskGradients",
    "TaskGradients",
    "dot_products",
    "full_precision",
    "reduce_gradients_",
]

# Columns whose dot products are summed in the rows' dtype; the sums of the chunks are added in
# float64. From 1,024 to 131,072 columns make no difference in time (docs/benchmarks.md).
_CHUNK = 1 << 16
# Columns that are combined at a time. Larger on a GPU, where a combination of 130M parameters in
# parts of the CPU's size made 370 calls.
_COMBINED_ON_CPU, _COMBINED = 1 << 20, 1 << 24


class TaskGradients(ABC):
    """The gradients `g_1 .. g_k` of `k` task losses with respect to the same parameters.

    A training step uses only `gramian` and `combine_`; how and where the numbers are kept is up to
    the implementation.
    """

    @abstractmethod
    def gramian(self) -> Float[Tensor, "k k"]:
        """`G[i, j] = g_i . g_j`, float64, over the samples of all ranks."""

    @abstractmethod
    def combine_(self, task_weights: Float[Tensor, " k"], *, scale: Tensor | float = 1.0) -> None:
        """Write `scale * sum_i task_weights[i] g_i` into every parameter's `.grad`.

        Call it once, and last: it may overwrite the gradients.
        """

    def release(self) -> None:
        """Free what only `combine_` needs. Call it last, whether or not `combine_` was called."""
        return


class DenseTaskGradients(TaskGradients):
    """One row of `p` numbers for each task; each rank keeps a shard of every row.

    The rows are float32 whatever the parameters are (float64 if one is float64). With `N` ranks a
    row is summed over ranks by one reduce-scatter as soon as its task is done, while the next
    task is computed. The Gramian of the shards is all-reduced (k x k numbers), and the combination
    is gathered from its shards. In total this sends (k + 1) / 2 times the bytes of an all-reduce
    of one gradient.

    Args:
        num_tasks: `k`.
        parameters: The shared parameters, `p` numbers in total. Memory is allocated when rows are
            first written, and reused in every step until other parameters are bound.
        reduction: How sums over ranks are made.
        num_full: With several ranks, the number of whole rows that a rank holds at a time. With
            two, one is sent while the next is computed.

    Attributes:
        keep: Whether `release` keeps the buffers for the next rows.
    """

    def __init__(
        self,
        num_tasks: int,
        parameters: Sequence[nn.Parameter],
        *,
        reduction: Reduction,
        num_full: int = 2,
    ) -> None:
        self.num_tasks = num_tasks
        self.reduction = reduction
        self.keep = True
        self._num_full = num_tasks if reduction.world_size == 1 else min(num_full, num_tasks)
        self._pending: list[Callable[[], None]] = []  # waits for the row sent from each buffer
        self._spent = False  # whether a combination has overwritten the first row
        self.parameters: list[nn.Parameter] = []
        self._empty = torch.empty(0)
        self.bind(parameters)

    def bind(self, parameters: Sequence[nn.Parameter]) -> None:
        """Use these parameters from now on: some may have been frozen or thawed."""
        if not parameters:
            raise ConfigError("parameters: at least one that needs a gradient is needed, found 0")
        # A cast such as `.double()` changes the dtype but not the parameter objects.
        dtype = _sums_dtype(parameters)
        if same_tensors(parameters, self.parameters) and dtype == self._empty.dtype:
            return
        self.parameters = list(parameters)
        self._empty = torch.empty(0, dtype=dtype, device=self.parameters[0].device)
        self._held: list[nn.Parameter] = []  # parameters of the current rows
        self._drop()

    def _drop(self) -> None:
        """Forget the buffers; memory that a `.grad` is a view of lives on until that goes."""
        self._full = self._shards = self._empty
        self._views: list[list[Tensor]] = []  # of each whole row
        self._blocks: list[Tensor] = []  # of all rows together

    def _hold(self, parameters: Sequence[nn.Parameter]) -> None:
        """Begin new rows of these parameters, in the existing buffers if they fit."""
        self._spent = False
        if self._views and same_tensors(parameters, self._held):
            return
        ranks, num_full = self.reduction.world_size, self._num_full
        length = padded_length(sum(p.numel() for p in parameters), ranks)
        self._drop()
        self._full = self._empty.new_zeros(num_full, length)
        # Zeros, not empty: the padding at the end of a row must not add to the Gramian.
        if ranks == 1:
            self._shards = self._full
        else:
            self._shards = self._empty.new_zeros(self.num_tasks, length // ranks)
        self._held = list(parameters)
        self._views = [_views(row, self._held) for row in self._full]
        self._pending = [_nothing] * num_full

    def write(self, task: int, gradients: Iterator[Sequence[Tensor]]) -> None:
        """Set row `task` to the sum over all ranks of `gradients`, a tensor for each parameter."""
        self._hold(self.parameters)
        slot = task % len(self._full)
        self._pending[slot]()  # this buffer may still be sending the row of an earlier task
        # A rank without samples of the task sends zeros: the reduce-scatter is collective.
        if not self._accumulate(slot, gradients):
            self._full[slot].zero_()
        self._pending[slot] = self.reduction.reduce_scatter(self._shards[task], self._full[slot])

    def write_together(
        self,
        tasks: Sequence[int],
        fill: Callable[[list[Tensor]], None],
        parameters: Sequence[nn.Parameter] | None = None,
    ) -> None:
        """Set the rows of `tasks`, ascending, together; the other rows become zero.

        Args:
            tasks: Tasks that this rank has samples of, `m` of them.
            fill: Called once with a tensor `[m, *shape]` for each parameter, and fills them.
            parameters: Parameters that have rows, by default all; `combine_` ignores the others.
        """
        self._hold(self.parameters if parameters is None else parameters)
        self._grow(len(tasks))
        if not self._blocks or len(self._blocks[0]) != len(tasks):
            self._blocks = _blocks(self._full[: len(tasks)], self._held)
        fill(self._blocks)
        self._spread(tasks)

    def _spread(self, tasks: Sequence[int]) -> None:
        """Move whole rows `0 .. m-1` to the places of `tasks`, and sum them over ranks."""
        if self.reduction.world_size == 1:
            # The last row first: `tasks` ascends, so a row moves to a later place or stays, and
            # none is overwritten before it has moved.
            for slot, task in reversed(list(enumerate(tasks))):
                if slot != task:
                    self._full[task].copy_(self._full[slot])
            for task in set(range(self.num_tasks)).difference(tasks):
                self._full[task].zero_()
            return
        # Every rank sends a row for every task, since each reduce-scatter is collective.
        empty = torch.zeros_like(self._full[0])
        full = {task: self._full[slot] for slot, task in enumerate(tasks)}
        waits = [
            self.reduction.reduce_scatter(self._shards[task], full.get(task, empty))
            for task in range(self.num_tasks)
        ]
        for wait in waits:
            wait()

    def _accumulate(self, slot: int, gradients: Iterator[Sequence[Tensor]]) -> bool:
        """Set a whole row to the sum of `gradients`; return whether there are any."""
        empty = True
        for each in gradients:
            if empty:
                torch._foreach_copy_(self._views[slot], list(each))
            else:
                torch._foreach_add_(self._views[slot], list(each))
            empty = False
        return not empty

    def _grow(self, num_full: int) -> None:
        """Allocate whole rows up to this number."""
        missing = num_full - len(self._full)
        if missing <= 0:
            return
        new = self._full.new_zeros(missing, self._full.shape[1])
        self._full = torch.cat([self._full, new])
        self._pending += [_nothing] * missing
        self._views = [_views(row, self._held) for row in self._full]
        self._blocks = []

    def _finish(self) -> None:
        """Wait until this rank's shard of every row has arrived."""
        for wait in self._pending:
            wait()

    def gramian(self) -> Float[Tensor, "k k"]:
        """`G[i, j] = g_i . g_j`, float64, over the samples of all ranks; before `combine_`."""
        assert not self._spent, "gramian was called after combine_"
        self._finish()
        return self.reduction.all_reduce_(dot_products(self._shards))

    def combine_(self, task_weights: Float[Tensor, " k"], *, scale: Tensor | float = 1.0) -> None:
        """Write `scale * sum_i task_weights[i] g_i` into the `.grad` of every parameter with rows.

        The combination overwrites the first whole row, so call this once after the rows were
        written.
        """
        assert not self._spent, "combine_ was called twice"
        self._spent = True
        # The first whole row is the output: a buffer of its own would take another p numbers.
        weights = (task_weights.to(self._shards.device) * scale).to(self._shards.dtype)
        with full_precision(self._shards.device):
            if self.reduction.world_size == 1:
                on_cpu = self._shards.device.type == "cpu"
                # In parts: `mv` must not write into its input, so each takes a temporary.
                for part in self._shards.split(_COMBINED_ON_CPU if on_cpu else _COMBINED, dim=1):
                    part[0].copy_(torch.mv(part.mT, weights))
            else:
                shard = torch.mv(self._shards.mT, weights)
                self.reduction.all_gather(self._full[0], shard)
        assign_gradients(self._held, self._views[0])

    def release(self) -> None:
        """Free the buffers unless `keep` is set."""
        if not self.keep:
            self._drop()

    def rows(self) -> Float[Tensor, "k p"]:
        """This rank's shard of every row; whole rows on one process. Valid before `combine_`."""
        assert not self._spent, "rows was called after combine_"
        self._finish()
        return self._shards


def reduce_gradients_(parameters: Sequence[nn.Parameter], *, reduction: Reduction) -> None:
    """Replace each parameter's `.grad` by its sum over ranks; a missing one counts as zero."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if reduction.world_size == 1:
        return
    # One all-reduce of one flat vector, in float32 at least: a sum over ranks in bfloat16 would
    # round at every rank.
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.empty(
        sum(p.numel() for p in parameters),
        dtype=_sums_dtype(parameters),
        device=parameters[0].device,
    )
    views = _views(flat, parameters)
    torch._foreach_copy_(views, gradients)
    reduction.all_reduce_(flat)
    assign_gradients(parameters, views)


def assign_gradients(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Set the `.grad` of each parameter, in its own dtype.

    For a sharded parameter, the value is this rank's part.
    """
    for p, value in zip(parameters, values, strict=True):
        p.grad = from_local(value.to(p.dtype), p)


def _nothing() -> None:
    """Return at once: the buffer was not sent yet."""


def _sums_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    """Dtype for sums over all gradients: float64 if any parameter is float64, else float32."""
    double = any(p.dtype == torch.float64 for p in parameters)
    return torch.float64 if double else torch.float32


def _stride(p: Tensor) -> tuple[int, ...]:
    """Strides that autograd gives the gradient of `p`: those of `p`, row-major if not dense."""
    # With equal strides (channels-last, transposed), copies and the optimizer run over contiguous
    # memory.
    if is_dense(p):
        return p.stride()
    return torch.empty(p.shape, device="meta").stride()


def _views(flat: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """`flat` cut into tensors of the parameters' shapes and memory layouts."""
    views, start = [], 0
    for p in parameters:
        views.append(flat[start : start + p.numel()].as_strided(p.shape, _stride(p)))
        start += p.numel()
    return views


def _blocks(rows: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """`rows [m, p]` cut into one tensor `[m, *shape]` for each parameter, in its memory layout."""
    blocks, start = [], 0
    for p in parameters:
        part = rows[:, start : start + p.numel()]
        blocks.append(part.as_strided((len(rows), *p.shape), (rows.stride(0), *_stride(p))))
        start += p.numel()
    return blocks


def dot_products(rows: Tensor) -> Tensor:
    """Dot products of `rows [k, p]`, `[k, k]` float64.

    Chunks of the columns are summed in the rows' dtype, and the chunks' sums in float64.
    """
    num_tasks, length = rows.shape
    num_chunks = length // _CHUNK
    with full_precision(rows.device):
        tail = rows[:, num_chunks * _CHUNK :]
        total = (tail @ tail.mT).double()
        if num_chunks:
            body = rows[:, : num_chunks * _CHUNK].view(num_tasks, num_chunks, _CHUNK)
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
