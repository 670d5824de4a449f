"""The samples of one call, sorted by task, and their losses."""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from ant_lightning.balancing.sharded_gradients import differentiation as new_differentiation
from ant_lightning.errors import ConfigError, check_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from ant_lightning.balancing.base import Balancer
    from ant_lightning.balancing.differentiation import Differentiation
    from ant_lightning.balancing.reduction import Reduction

    # One loss for each row, or a pair of these and something else for each.
    Losses = Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]


class TaskBatch:
    """One batch of samples and an index, `order`, that sorts it by task; no sample is moved.

    Args:
        losses: Called with some rows of the batch; returns one loss for each, or a pair of these
            and something else for each.
        tasks: Task of each sample of this rank, `[b]`.
        balancer: Determines the number of tasks.
        num_tasks: Number of tasks without a balancer; by default the largest task + 1.
        shared: The result of `trained_parameters`.
        reduction: How sums over ranks are made.
        micro_batch_size: Largest number of samples in one forward pass; `None` for no limit.
        loss_scale: Losses are multiplied by this in a backward pass.
        differentiation: That of the run, which keeps the buckets of several ranks; by default new.
        names: Name of each parameter of `shared`, if they are known.

    Attributes:
        order: Rows of the batch, those of task 0 first, `[b]`.
        starts: Task i has the rows `order[starts[i]:starts[i + 1]]`; `k + 1` ints.
        tasks: Task of each sample, on the parameters' device.
        samples: Samples of each task on each rank, `[N, k]` float64.
        num_samples: Samples of each task on all ranks, `[k]` float64.
        values: The recorded losses, `[b]` float64, in the original order of the batch.
        aux: What `losses` returned beside the losses, `[b, ...]`, detached; `None` for nothing.

    Raises:
        ConfigError: If the tasks are not one integer in `0 .. k-1` for each sample.
    """

    def __init__(
        self,
        losses: Losses,
        tasks: Tensor,
        balancer: Balancer | None,
        num_tasks: int | None,
        shared: Sequence[nn.Parameter],
        *,
        reduction: Reduction,
        micro_batch_size: int | None = None,
        loss_scale: Tensor | float = 1.0,
        differentiation: Differentiation | None = None,
        names: Sequence[str] = (),
    ) -> None:
        check_whole(1, micro_batch_size=micro_batch_size)
        if not callable(losses):
            raise ConfigError(
                "losses: must be a function that is given some rows of the batch and returns the "
                f"loss of each, found {type(losses).__name__}"
            )
        if not torch.is_grad_enabled():
            raise ConfigError("losses: gradients are needed, found torch.no_grad around the call")
        if not isinstance(tasks, torch.Tensor):
            raise ConfigError(f"tasks: must be a tensor, found {type(tasks).__name__}")
        if tasks.ndim != 1 or not len(tasks) or tasks.is_floating_point() or tasks.is_complex():
            found = f"{tasks.dtype} of shape {list(tasks.shape)}"
            raise ConfigError(f"tasks: one integer for each sample is needed, found {found}")
        on_host = tasks.cpu().long()  # as an index, uint8 would be a mask and int16 an error
        largest = int(on_host.max())
        self.num_tasks = balancer.num_tasks if balancer else num_tasks or largest + 1
        if int(on_host.min()) < 0 or largest >= self.num_tasks:
            raise ConfigError(
                f"tasks: each must be in 0 .. {self.num_tasks - 1}, "
                f"found {int(on_host.min())} .. {largest}"
            )
        device = shared[0].device
        # Counted and sorted on the host: `starts` are Python ints, and reading them from an
        # accelerator would make the host wait.
        counts = torch.bincount(on_host, minlength=self.num_tasks)
        self.starts: list[int] = [0, *counts.cumsum(0).tolist()]
        self.order = on_host.argsort(stable=True).to(tasks.device, non_blocking=True)
        self.tasks = on_host.to(device, non_blocking=True)
        # Each rank fills its own row of a table of zeros, so the sum over ranks is a gather. The
        # last column says whether a rank's batch is computed in parts.
        in_parts = micro_batch_size is not None and micro_batch_size < len(tasks)
        table = torch.zeros(reduction.world_size, self.num_tasks + 1, dtype=torch.float64)
        table[reduction.rank, :-1], table[reduction.rank, -1] = counts, float(in_parts)
        self._own_row = table[reduction.rank]
        self._table = reduction.all_reduce_(table.to(device, non_blocking=True))
        self.samples = self._table[:, :-1]
        self.num_samples = self.samples.sum(0)
        self.shared = shared
        self.names = tuple(names)
        self.differentiation = differentiation or new_differentiation(shared, reduction)
        self.differentiation.bind(shared)
        self.reduction = reduction
        self.micro_batch_size = micro_batch_size
        self.loss_scale = loss_scale
        self.aux: Tensor | None = None
        self._losses = losses
        self._sums = torch.zeros(self.num_tasks, dtype=torch.float64, device=device)
        self.values = torch.zeros(len(tasks), dtype=torch.float64, device=device)

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def present(self) -> list[int]:
        """The tasks that this rank has samples of, ascending."""
        spans = enumerate(pairwise(self.starts))
        return [task for task, (start, stop) in spans if stop > start]

    @cached_property
    def _table_on_host(self) -> Tensor:
        """Samples of each task on each rank, and whether it has parts; a wait on several ranks."""
        return self._own_row[None] if self.reduction.world_size == 1 else self._table.cpu()

    @property
    def in_parts(self) -> bool:
        """Whether the batch does not fit into one forward pass on some rank."""
        return self.micro_batch_size is not None and bool(self._table_on_host[:, -1].any())

    @property
    def num_on_all_ranks(self) -> int:
        """Number of samples of all ranks."""
        return int(self._table_on_host[:, :-1].sum())

    @property
    def is_scaled(self) -> bool:
        """Whether gradients have to be divided by `loss_scale`."""
        return isinstance(self.loss_scale, torch.Tensor) or self.loss_scale != 1.0

    def passes(self, groups: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """Cut each group of rows into nearly equal pieces of at most `micro_batch_size`.

        For sharded parameters the number of pieces is the maximum over ranks, so a piece may be
        empty; see `losses_of`.
        """
        counts = [len(rows) for rows in groups]
        nums = self.differentiation.num_passes(counts, self.micro_batch_size)
        return [
            rows.tensor_split(num) if num else () for rows, num in zip(groups, nums, strict=True)
        ]

    def gradients_of(self, loss: Tensor) -> list[Tensor]:
        """Gradients of `loss_scale * loss`, one tensor for each parameter of `shared`."""
        return self.differentiation.gradients(loss * self.loss_scale)

    def last_gradients_of(self, loss: Tensor, before: Sequence[Tensor]) -> list[Tensor]:
        """`gradients_of` the last pass of a step plus `before`; for `differentiation.finish`."""
        return self.differentiation.last_gradients(loss * self.loss_scale, before)

    def tasks_of(self, rows: Tensor) -> Tensor:
        """The task of each of `rows`."""
        return self.tasks[rows.to(self.tasks.device, non_blocking=True)]

    def per_sample(self, task_values: Tensor, rows: Tensor) -> Tensor:
        """The entry of `task_values [k]` that belongs to the task of each of `rows`."""
        return task_values[self.tasks_of(rows)]

    def evaluate(self, rows: Tensor) -> Tensor:
        """One loss for each of `rows`, in float32 at least; what is beside it is kept in `aux`."""
        found = self._losses(rows)
        values, aux = found if isinstance(found, tuple) else (found, None)
        if not isinstance(values, torch.Tensor):
            raise ConfigError(f"losses: must return a tensor, found {type(values).__name__}")
        if values.shape != rows.shape:
            raise ConfigError(
                f"losses: one value for each row is needed, shape {list(rows.shape)}, "
                f"found {list(values.shape)}"
            )
        if torch.is_grad_enabled() and not values.requires_grad:
            raise ConfigError(
                "losses: must depend on the parameters, found values without a graph (detach, or "
                "torch.no_grad?)"
            )
        if aux is not None:
            self._keep(rows, aux.detach())
        return values.float() if values.dtype in {torch.float16, torch.bfloat16} else values

    def _keep(self, rows: Tensor, aux: Tensor) -> None:
        if aux.shape[:1] != rows.shape:
            raise ConfigError(
                f"losses: what is returned beside the losses must have a first dimension of "
                f"{len(rows)}, one entry for each row, found shape {list(aux.shape)}"
            )
        if self.aux is None:
            self.aux = aux.new_zeros(len(self), *aux.shape[1:])
        self.aux[rows.to(aux.device, non_blocking=True)] = aux

    def record(self, rows: Tensor, values: Tensor) -> None:
        """Keep the losses of `rows` for the report."""
        rows = rows.to(self.values.device, non_blocking=True)
        known = values.detach().to(self._sums)
        self._sums.index_add_(0, self.tasks[rows], known)
        self.values[rows] = known

    def losses_of(self, rows: Tensor, *, again: bool = False) -> Tensor:
        """Evaluate and record the losses of `rows`.

        A pass is made even without rows, because other ranks may be waiting for it.

        Args:
            rows: Samples of this rank.
            again: Whether their losses have been recorded before.
        """
        if not len(rows):
            # An empty slice of a real loss: its sum is 0 but still has a graph, so the backward
            # pass takes part in the collectives of FSDP2.
            found = self._losses(self.order[:1])
            return (found[0] if isinstance(found, tuple) else found)[:0].float()
        values = self.evaluate(rows)
        if not again:
            self.record(rows, values)
        return values

    @torch.no_grad()
    def losses_now(self) -> Tensor:
        """Mean loss of each task over all ranks, `[k]` float64, at the weights of now.

        Makes the forward passes again; neither the recorded losses nor `aux` change.
        """
        sums, self.aux, kept = torch.zeros_like(self._sums), None, self.aux
        (passes,) = self.passes([torch.arange(len(self), device=self.order.device)])
        for rows in passes:
            values = self.losses_of(rows, again=True)
            if len(rows):
                sums.index_add_(0, self.tasks_of(rows), values.to(sums))
        self.aux = kept
        return self.reduction.all_reduce_(sums) / self.num_samples

    def mean_losses(self) -> Tensor:
        """Mean loss of each task over the samples of all ranks, `[k]`.

        Call it once, after all losses were recorded: it sums over ranks in place, and a second
        call would sum again. A task without samples has 0 / 0, a NaN.
        """
        return self.reduction.all_reduce_(self._sums) / self.num_samples

    def is_finite(self, *values: Tensor) -> bool:
        """Whether the losses and `values` are finite on all ranks.

        Call it after `mean_losses`: all ranks then hold the same sums and agree. `values` must be
        equal on all ranks too.
        """
        # One transfer to the host for all checks.
        every = [self._sums.isfinite().all(), *(v.isfinite().all() for v in values)]
        return bool(torch.stack(every).all())
