"""The choice of an engine by the work of a pass over one task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ant_lightning.balancing.engines import Engine, Loop, UnsupportedError
from ant_lightning.balancing.one_pass import OnePass
from ant_lightning.balancing.shards import is_sharded
from ant_lightning.randomness import undisturbed

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ant_lightning.balancing.batch import TaskBatch
    from ant_lightning.balancing.gradients import DenseTaskGradients, TaskGradients

__all__ = ["Auto", "multiplications"]

# Multiplications of a forward pass over one task, in all and for each parameter, from which on the
# loop is as fast as one pass. Measured on a CPU: at 330 for each it has 0.93 of vanilla's speed and
# one pass 0.95, at 1300 both are as fast as vanilla. On an H200 the loop has 0.81 at 1.1e12 in all,
# for its calls, and one pass 0.95; what a GPU needs for each parameter is an estimate.
_CPU = (1e9, 600)
_OTHERS = (1e13, 8192)


class Auto(Engine):
    """`Loop` where its passes are bound by their sums, `OnePass` where it is faster and works.

    The loop holds the activations of one task, a k-th of those of `OnePass`, and takes no
    longer once a pass over one task has 1e9 multiplications, and 600 for each parameter (1e13 and
    8192 on a GPU, where its calls count for more: an estimate). They are counted before the first
    call, in a forward pass over two samples, and are not those of attention. `OnePass` cannot work
    if the network does not fit, which is found in the first steps and remembered, if parameters
    are sharded or the batch is computed in parts.

    Attributes:
        used: The engine of the last call; before the first, the loop.
        reason: Why `OnePass` was given up, or None.
    """

    def __init__(self) -> None:
        self._one_pass = OnePass()
        self._loop = Loop()
        self._per_sample: float | None = None
        self.used: Engine = self._loop
        self.reason: str | None = None

    def task_gradients(
        self, batch: TaskBatch, rows: DenseTaskGradients | None = None
    ) -> TaskGradients:
        """By the engine that the rule chooses."""
        possible = self.reason is None and not batch.in_parts and not is_sharded(batch.shared)
        if possible and not self._bound_by_sums(batch):
            try:
                self.used = self._one_pass
                return self.used.task_gradients(batch, rows)
            except UnsupportedError as error:
                self.reason = str(error)
        self.used = self._loop
        return self.used.task_gradients(batch, rows)

    def _bound_by_sums(self, batch: TaskBatch) -> bool:
        if self._per_sample is None:
            self._per_sample = multiplications(batch)
        of_task = self._per_sample * len(batch) / batch.num_tasks
        in_all, for_each = _CPU if batch.shared[0].device.type == "cpu" else _OTHERS
        return of_task >= max(in_all, for_each * sum(p.numel() for p in batch.shared))


class _Counter(TorchFunctionMode):
    """Adds up the multiplications of linear and convolution layers."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401 - torch's signature
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        output = func(*args, **(kwargs or {}))
        if func in _LAYERS or func in _TRANSPOSED:
            weight: Tensor = args[1] if len(args) > 1 else (kwargs or {})["weight"]
            # Every position of the maps with the weight's first number of channels uses all of it.
            maps = output if func in _LAYERS else args[0]
            self.total += weight.numel() * (maps.numel() // len(weight))
        return output


_LAYERS = {F.linear, F.conv1d, F.conv2d, F.conv3d}
_TRANSPOSED = {F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}


@torch.no_grad()
def multiplications(batch: TaskBatch) -> float:
    """Those of a forward pass over one sample, which leaves nothing behind.

    Neither in the random generators nor in autocast's cache, where copies of the weights would be
    held until the step is over.
    """
    rows, counter = batch.order[:2], _Counter()
    caching = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with undisturbed(batch.shared[0].device), counter:
            batch.evaluate(rows)
    finally:
        torch.set_autocast_cache_enabled(caching)
    return counter.total / len(rows)
