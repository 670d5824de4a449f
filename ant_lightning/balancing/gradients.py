"""Task gradients; a training step uses only their Gramian and one linear combination."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from ant_lightning.balancing.buckets import memory_strides, views_of
from ant_lightning.balancing.local_parts import from_local
from ant_lightning.balancing.parameters import same_tensors
from ant_lightning.balancing.products import CHUNK, dot_products, full_precision
from ant_lightning.balancing.weight_factors import WeightFactors
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from jaxtyping import Float, Int
    from torch import Tensor, nn

    from ant_lightning.balancing.buckets import ArrivalOrder
    from ant_lightning.balancing.reduction import Reduction


class TaskGradients(ABC):
    """The gradients `g_1 .. g_k` of `k` task losses with respect to the same parameters.

    A training step uses only `gramian` and `combine_`; how and where the numbers are kept is up to
    the implementation.
    """

    @abstractmethod
    def gramian(self, of: Collection[int] | None = None) -> Float[Tensor, "k k"]:
        """`G[i, j] = g_i . g_j`, float64, over the samples of all ranks.

        Args:
            of: Indices of the parameters that count, the same on all ranks; by default all.
        """

    @abstractmethod
    def combine_(self, task_weights: Float[Tensor, " k"], *, scale: Tensor | float = 1.0) -> None:
        """Write `scale * sum_i task_weights[i] g_i` into every parameter's `.grad`.

        Call it once, and last: it may overwrite the gradients.
        """

    def release(self) -> None:
        """Free what only `combine_` needs. Call it last, whether or not `combine_` was called."""
        return


class DenseTaskGradients(TaskGradients):
    """The gradient of each task for each parameter, a block `[k, *shape]`, on one process.

    Blocks are float32 whatever the parameters are (float64 if one is float64). An engine gives them
    in one of two ways:

    - From one backward pass: `begin` after the forward pass, then `receive` once for each parameter
      as soon as its block is known. A block is kept as it is, without a copy, until `combine_`. A
      parameter without a block has gradients of zero. A layer that meets few positions gives
      factors in place of a block, by `receive_factors`.
    - Task after task: `write`, which copies into buffers that are reused in every step.

    Args:
        num_tasks: `k`.
        parameters: The shared parameters, `p` numbers in total.
        reduction: Of one process; `ReducedTaskGradients` is for several.

    Attributes:
        keep: Whether `release` keeps the buffers of `write` for the next step.
    """

    order: ArrivalOrder | None = None  # that of several ranks

    def __init__(
        self, num_tasks: int, parameters: Sequence[nn.Parameter], *, reduction: Reduction
    ) -> None:
        self.num_tasks = num_tasks
        self.reduction = reduction
        self.keep = True
        self.parameters: list[nn.Parameter] = []
        self._empty = torch.empty(0)
        self._open = self._spent = False
        self._factored: dict[int, int] = {}
        self.bind(parameters)

    def bind(self, parameters: Sequence[nn.Parameter]) -> None:
        """Use these parameters from now on: some may have been frozen or thawed."""
        if not parameters:
            raise ConfigError("parameters: must have at least one that needs a gradient, found 0")
        # A cast such as `.double()` changes the dtype but not the parameter objects.
        dtype = sums_dtype(parameters)
        if same_tensors(parameters, self.parameters) and dtype == self._empty.dtype:
            return
        self.parameters = list(parameters)
        self._empty = torch.empty(0, dtype=dtype, device=self.parameters[0].device)
        self._drop()

    def _drop(self) -> None:
        """Forget the buffers; memory that a `.grad` is a view of lives on until that goes."""
        self._factors = WeightFactors(self.num_tasks, self._empty)
        self._rows = self._empty  # of `write`, [k, p]
        self._row_views: list[list[Tensor]] = []
        self._blocks: dict[int, Tensor] = {}
        self._matrices: list[tuple[list[int], Tensor]] = []
        self._spare: dict[int, Tensor] = {}  # large blocks of the last step, to be used again

    def spare(self, index: int, num_tasks: int) -> Tensor | None:
        """A block `[m, *shape]` of the last step that may be overwritten, if one was kept.

        New memory is slow on a CPU: the kernel clears each page when it is first written.
        """
        block, p = self._spare.pop(index, None), self.parameters[index]
        if block is None or len(block) != num_tasks:
            return None
        strides = (p.numel(), *memory_strides(p))
        return block.as_strided((num_tasks, *p.shape), strides, block.storage_offset())

    def begin(
        self,
        tasks: Sequence[int] | None = None,
        *,
        samples: Float[Tensor, "N k"] | None = None,
        apart: Sequence[int] = (),
        factored: Mapping[int, int] | None = None,
        sample_tasks: Int[Tensor, " b"] | None = None,
    ) -> None:
        """Begin the gradients of a new step; every rank calls this after its forward pass.

        Args:
            tasks: Task of each row of the blocks of this step, each at most once; by default
                `0 .. k-1`. Tasks without a row have gradients of zero.
            samples: Number of samples of each task on each rank (`TaskBatch.samples`).
            apart: Indices of parameters without a block in this step, which `gramian` and
                `combine_` leave out; the same on every rank.
            factored: Indices of weights that have factors in place of a block, and the positions
                that each meets for a sample (`has_small_factors`); the same on every rank.
            sample_tasks: Task of each sample of this rank, in the order of the factors.
        """
        self._tasks = list(range(self.num_tasks) if tasks is None else tasks)
        self._from_one_pass = tasks is not None
        factored = factored or {}
        self._apart = {*apart, *factored}
        self._factors = WeightFactors(self.num_tasks, self._empty, sample_tasks)
        self._factored = dict(factored)
        self._blocks, self._matrices = {}, []
        self._open, self._spent = True, False
        found = len(self._tasks)
        self._inner = torch.zeros(found, found, dtype=torch.float64, device=self._empty.device)
        self._begun(samples, sample_tasks)

    def _begun(self, samples: Tensor | None, sample_tasks: Tensor | None) -> None:
        """What a subclass for several ranks does at the end of `begin`."""

    def receive(self, index: int, block: Float[Tensor, "m ..."]) -> None:
        """Take the gradients of one parameter, for the tasks of `begin`.

        Call it in the course of the backward pass, once for each parameter that has a gradient, in
        any order. Do not change the block afterwards.

        Args:
            index: Which of the parameters.
            block: `[m, *shape]`; row j is the gradient of the loss of task `tasks[j]`, a mean over
                the samples of all ranks.
        """
        assert self._open, "receive was called before begin"
        assert index not in self._blocks, "receive was called twice for a parameter"
        self._blocks[index] = flat = self._flat(index, block)
        if flat.shape[1] >= CHUNK:  # now, while it is in the cache
            self._inner += dot_products(flat)

    def receive_factors(
        self, index: int, left: Float[Tensor, "bn o"], right: Float[Tensor, "bn i"]
    ) -> None:
        """Take the factors of one weight: its gradient is `left^T right`, a sum over positions.

        Call it in the course of the backward pass, once for each weight of `factored`.

        Args:
            index: Which of the parameters.
            left: Gradients of the layer's output, of losses that are means over the samples of
                all ranks; `n` positions for each of `b` samples, those of a sample together.
            right: Inputs of the layer.
        """
        assert self._open, "receive_factors was called before begin"
        self._factors.put(index, left, right)

    def _flat(self, index: int, block: Tensor) -> Tensor:
        """`block` as a matrix `[m, n]` whose rows have the memory layout of the parameter."""
        p, rows = self.parameters[index], len(block)
        strides = (p.numel(), *memory_strides(p))
        block = block.to_dense() if block.is_sparse else block
        block = block.detach().to(self._empty.dtype)
        if any(
            size > 1 and a != b
            for size, a, b in zip(block.shape, block.stride(), strides, strict=True)
        ):
            wanted = torch.empty_strided(
                block.shape, strides, dtype=block.dtype, device=block.device
            )
            block = wanted.copy_(block)
        return block.as_strided((rows, p.numel()), (p.numel(), 1), block.storage_offset())

    def write(self, task: int, gradients: Iterator[Sequence[Tensor]]) -> None:
        """Set the gradients of `task` to the sum of `gradients`, a tensor for each parameter.

        Call it for every task, in order; without samples of the task, `gradients` is empty.
        """
        if not self._open:
            self.begin()
        if not self._row_views:
            self._rows = self._empty.new_zeros(
                self.num_tasks, sum(p.numel() for p in self.parameters)
            )
            self._row_views = [views_of(row, self.parameters) for row in self._rows]
        first = True
        for each in gradients:
            (torch._foreach_copy_ if first else torch._foreach_add_)(
                self._row_views[task], list(each)
            )
            first = False
        if first:
            self._rows[task].zero_()
        self._matrices = [([*range(len(self.parameters))], self._rows)]

    def close(self) -> None:
        """Join small blocks to one matrix; each large one stays a matrix of its own."""
        if not self._open:
            return
        self._open = False
        if self._matrices:  # of `write`
            self._inner += dot_products(self._rows)
        small = []
        for index, block in self._blocks.items():
            if block.shape[1] < CHUNK:
                small.append(index)
            else:
                self._matrices.append(([index], block))
        if small:
            joined = torch.cat([self._blocks[index] for index in small], dim=1)
            self._matrices.append((small, joined))
            self._inner += dot_products(joined)
        self._blocks = {}

    def gramian(self, of: Collection[int] | None = None) -> Float[Tensor, "k k"]:
        """`G[i, j] = g_i . g_j`, float64; before `combine_`."""
        assert not self._spent, "gramian was called after combine_"
        self.close()
        inner = self._inner if of is None else self._inner_of(of)
        of_factors = self._factors.gramian(
            index for index in self._factors.indices if of is None or index in of
        )
        if self._tasks == [*range(self.num_tasks)]:
            return inner + of_factors
        places = torch.tensor(self._tasks).to(inner.device, non_blocking=True)
        of_factors[places[:, None], places] += inner
        return of_factors

    def _inner_of(self, of: Collection[int]) -> Tensor:
        """Dot products of the blocks of some parameters."""
        total = torch.zeros_like(self._inner)
        for indices, matrix in self._matrices:
            parts = matrix.split([self.parameters[index].numel() for index in indices], dim=1)
            for index, part in zip(indices, parts, strict=True):
                if index in of:
                    total += dot_products(part)
        return total

    def combine_(self, task_weights: Float[Tensor, " k"], *, scale: Tensor | float = 1.0) -> None:
        """Write `scale * sum_i task_weights[i] g_i` into the `.grad` of every parameter, once."""
        assert not self._spent, "combine_ was called twice"
        self.close()
        self._spent = True
        weights = (task_weights.to(self._empty.device) * scale).to(self._empty.dtype)
        found = self._combine_factors(weights)
        if self._tasks != [*range(self.num_tasks)]:
            weights = weights[torch.tensor(self._tasks).to(weights.device, non_blocking=True)]
        missing = set(range(len(self.parameters))).difference(self._apart).union(self._factored)
        # A block is freed as soon as its combination is made, unless it is used again.
        while self._matrices:
            indices, matrix = self._matrices.pop()
            if self.keep and len(indices) == 1 and matrix is not self._rows:
                self._spare[indices[0]] = matrix
            with full_precision(matrix.device):
                combined = torch.mv(matrix.mT, weights)
            self._assign(indices, views_of(combined, [self.parameters[i] for i in indices]))
            missing.difference_update(indices)
        missing.difference_update(found)
        self._assign([*missing], [torch.zeros_like(self.parameters[i]) for i in missing])

    def _combine_factors(self, weights: Tensor) -> list[int]:
        """Set the `.grad` of weights that have factors, and return their indices."""
        indices = self._factors.indices
        for index in indices:
            p = self.parameters[index]
            product = self._factors.combined(index, weights).view(p.shape)
            if product.stride() != memory_strides(p):  # fused optimizers want the same
                product = torch.empty_strided(
                    p.shape, memory_strides(p), dtype=product.dtype, device=p.device
                ).copy_(product)
            self._assign([index], [product])
        return indices

    def _assign(self, indices: Sequence[int], values: Sequence[Tensor]) -> None:
        """Set the `.grad` of some parameters."""
        assign_gradients([self.parameters[index] for index in indices], values)

    def release(self) -> None:
        """Free blocks and factors, and the buffers unless `keep` is set."""
        self._blocks, self._matrices = {}, []
        self._factors = WeightFactors(self.num_tasks, self._empty)
        self._open = False
        if not self.keep:
            self._drop()

    def rows(self) -> Float[Tensor, "k p"]:
        """The gradients as rows, in the order of the parameters. Valid before `combine_`."""
        assert not self._spent, "rows was called after combine_"
        assert not self._factored, "rows was called, but some weights have factors"
        self.close()
        if [indices for indices, _ in self._matrices] == [[*range(len(self.parameters))]]:
            return self._matrices[0][1]
        sizes = [p.numel() for p in self.parameters]
        rows = self._empty.new_zeros(self.num_tasks, sum(sizes))
        parts = rows.split(sizes, dim=1)
        for indices, matrix in self._matrices:
            found = matrix.split([sizes[index] for index in indices], dim=1)
            for index, part in zip(indices, found, strict=True):
                parts[index][self._tasks] = part
        return rows


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
        dtype=sums_dtype(parameters),
        device=parameters[0].device,
    )
    views = views_of(flat, parameters)
    torch._foreach_copy_(views, gradients)
    reduction.all_reduce_(flat)
    assign_gradients(parameters, views)


def assign_gradients(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Set the `.grad` of each parameter, in its own dtype.

    For a sharded parameter, the value is this rank's part.
    """
    for p, value in zip(parameters, values, strict=True):
        p.grad = from_local(value.to(p.dtype), p)


def sums_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    """Dtype for sums over all gradients: float64 if any parameter is float64, else float32."""
    double = any(p.dtype == torch.float64 for p in parameters)
    return torch.float64 if double else torch.float32
