"""Running statistics of batch and instance norm: one update per step, for any number of passes."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch
from torch.nn.modules.batchnorm import _NormBase

from ant_lightning.balancing.reduction import default_reduction

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

T = TypeVar("T")


class RunningStatistics:
    """Updates the running statistics of a network once per step, as one pass over the batch would.

    A step runs the network once for each task or part of the batch. Every pass starts from the
    statistics before the step; their changes are averaged over all passes and ranks, weighted by
    the number of samples. (If an engine first runs a trial on two samples, the average includes
    them.)

    Args:
        network: The network in training. Without such layers every method is a no-op.
    """

    def __init__(self, network: nn.Module) -> None:
        norms = [m for m in network.modules() if isinstance(m, _NormBase)]
        self._layers = [m for m in norms if m.track_running_stats]
        self._before: list[Tensor] = []
        self._changes: list[Tensor] = []  # change times number of samples, summed over passes
        self._num_samples = 0

    def once(self, losses: Callable[[Tensor], T]) -> Callable[[Tensor], T]:
        """Start a step and wrap its `losses`; end the step with `keep` or `restore`."""
        if not self._layers:
            return losses
        self._before = [b.clone() for b in self._buffers()]
        self._changes = [b.new_zeros(b.shape) for b in self._before]
        self._num_samples = 0

        def one_pass(rows: Tensor) -> T:
            self.restore()
            values = losses(rows)
            if torch.is_grad_enabled():  # passes without gradients are not training
                for change, after, before in self._zipped():
                    change.add_(after - before, alpha=len(rows))
                self._num_samples += len(rows)
            return values

        return one_pass

    def keep(self) -> None:
        """Set the statistics to the average over passes and ranks, weighted by samples."""
        if not self._layers:
            return
        # One collective for all sums; the count travels as the last number.
        count = self._changes[0].new_tensor([self._num_samples], dtype=torch.float64)
        sums = torch.cat([*(change.double().flatten() for change in self._changes), count])
        sums = default_reduction().all_reduce_(sums)
        means = (sums[:-1] / sums[-1]).split([change.numel() for change in self._changes])
        for mean, (_, buffer, before) in zip(means, self._zipped(), strict=True):
            buffer.data.copy_(before + mean.view(before.shape))

    def restore(self) -> None:
        """Reset the statistics to their values before the step."""
        for _, buffer, before in self._zipped():
            # `data` hides the write from autograd: no backward pass in training uses them.
            buffer.data.copy_(before)

    def _buffers(self) -> list[Tensor]:
        names = ("running_mean", "running_var", "num_batches_tracked")
        found = [getattr(layer, name) for layer in self._layers for name in names]
        return [b for b in found if b is not None]

    def _zipped(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        return list(zip(self._changes, self._buffers(), self._before, strict=True))
