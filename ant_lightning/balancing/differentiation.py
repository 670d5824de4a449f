"""Differentiation and sums over ranks, for whole and for sharded parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ant_lightning.balancing.gradients import (
    DenseTaskGradients,
    ShardedTaskGradients,
    assign_gradients,
    reduce_gradients_,
)
from ant_lightning.balancing.shards import is_sharded, local_part
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from ant_lightning.balancing.reduction import Reduction

__all__ = ["Differentiation", "ShardedDifferentiation", "differentiation"]


class Differentiation:
    """Differentiates parameters that each rank has as a whole.

    No pass is collective, so ranks may make different numbers of passes.

    Args:
        parameters: What losses are differentiated with respect to.
        reduction: How sums over ranks are made.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], reduction: Reduction) -> None:
        self.parameters = parameters
        self.reduction = reduction

    def new_rows(self, num_tasks: int) -> DenseTaskGradients:
        """Buffers for the gradients of `k` tasks."""
        return DenseTaskGradients(num_tasks, self.parameters, reduction=self.reduction)

    def num_passes(self, counts: Sequence[int], size: int | None) -> list[int]:
        """Number of passes over each group, of at most `size` samples each.

        Args:
            counts: Number of samples of each group.
            size: Largest number of samples in a pass; `None` for no limit.
        """
        return [-(-count // (size or max(count, 1))) for count in counts]

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Gradient of each parameter on this rank; add up those of all passes for `finish`."""
        # Not `backward`: it runs the hooks on the leaves in which DistributedDataParallel reduces.
        found = torch.autograd.grad(
            loss, self.parameters, allow_unused=True, materialize_grads=True
        )
        # An embedding with `sparse=True` has sparse gradients; rows and sums over ranks are dense.
        return [g.to_dense() if g.is_sparse else g for g in found]

    def finish(self, gradients: Sequence[Tensor]) -> Tensor:
        """Write the sum over ranks into `.grad` and return its L2 norm."""
        assign_gradients(self.parameters, gradients)
        reduce_gradients_(self.parameters, reduction=self.reduction)
        return torch.nn.utils.get_total_norm(
            [p.grad for p in self.parameters if p.grad is not None]
        )


class ShardedDifferentiation(Differentiation):
    """Differentiates parameters that FSDP2 (`fully_shard`) shards over all ranks.

    `autograd.grad` does not see such parameters. A backward pass leaves this rank's part of the
    gradient, averaged over ranks, in `.grad`. Every pass is collective, so all ranks make the same
    number of passes; a rank without samples passes one sample, whose loss does not count.

    Raises:
        ConfigError: If a parameter is not in equal parts on all ranks.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], reduction: Reduction) -> None:
        super().__init__(parameters, reduction)
        for p in parameters:
            placements: tuple[Any, ...] = getattr(p, "placements", ())
            sharded = len(placements) == 1 and placements[0].is_shard()
            if not sharded or p.device_mesh.size() != reduction.world_size:  # type: ignore[attr-defined]
                raise ConfigError(
                    "parameters: if one is sharded, each must be, over all "
                    f"{reduction.world_size} ranks and one dimension of the mesh, found "
                    f"{placements or 'a whole one'}"
                )

    def new_rows(self, num_tasks: int) -> DenseTaskGradients:
        """Buffers for this rank's parts of the gradients of `k` tasks."""
        return ShardedTaskGradients(num_tasks, self.parameters, reduction=self.reduction)

    def num_passes(self, counts: Sequence[int], size: int | None) -> list[int]:
        """Maximum over ranks: every FSDP2 pass is collective."""
        own = super().num_passes(counts, size)
        # Each rank fills its own row of a table of zeros, so the sum over ranks is a gather.
        table = torch.zeros(
            self.reduction.world_size, len(own), device=local_part(self.parameters[0]).device
        )
        table[self.reduction.rank] = torch.tensor(own, dtype=table.dtype)
        most: list[int] = self.reduction.all_reduce_(table).amax(0).int().tolist()
        return most

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """This rank's part of each parameter's gradient, already summed over ranks."""
        # `backward` adds to `.grad`, so it is emptied before and after.
        for p in self.parameters:
            p.grad = None
        # FSDP2 averages over ranks; times their number this is the sum.
        (loss * self.reduction.world_size).backward()  # type: ignore[no-untyped-call]
        parts = []
        for p in self.parameters:
            parts.append(torch.zeros_like(local_part(p)) if p.grad is None else local_part(p.grad))
            p.grad = None
        return parts

    def finish(self, gradients: Sequence[Tensor]) -> Tensor:
        """Write `.grad` and return its L2 norm over all ranks."""
        assign_gradients(self.parameters, gradients)
        # The passes have summed the gradients over ranks. Only the squared norms of the parts are
        # left to add up. A small parameter may have no elements on this rank.
        norms = torch._foreach_norm([g for g in gradients if g.numel()], dtype=torch.float32)
        squares = [norm.double().square() for norm in norms]
        start = torch.zeros((), dtype=torch.float64, device=gradients[0].device)
        return self.reduction.all_reduce_(sum(squares, start)).sqrt()


def differentiation(parameters: Sequence[nn.Parameter], reduction: Reduction) -> Differentiation:
    """The differentiation for these parameters."""
    kind = ShardedDifferentiation if is_sharded(parameters) else Differentiation
    return kind(parameters, reduction)
