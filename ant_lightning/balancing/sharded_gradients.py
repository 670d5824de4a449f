"""Differentiation and task gradients of parameters that FSDP2 (`fully_shard`) shards.

With replicas (HSDP) the mesh is `[replicas, shards]`: a parameter is sharded over the ranks of each
replica, and ranks at the same place of different replicas hold the same part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ant_lightning.balancing.differentiation import Differentiation
from ant_lightning.balancing.gradients import DenseTaskGradients, assign_gradients
from ant_lightning.balancing.local_parts import is_sharded, local_part
from ant_lightning.balancing.parameters import same_tensors
from ant_lightning.balancing.reduction import Reduction
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from jaxtyping import Float
    from torch import Tensor, nn


class ShardedTaskGradients(DenseTaskGradients):
    """Task gradients of parameters that FSDP2 shards: `k p / N` numbers on each rank.

    A row has this rank's part of each parameter's gradient. The backward passes of FSDP2 have
    already summed these parts over ranks and replicas, so only the Gramian is communicated here.

    Args:
        num_tasks: `k`.
        parameters: The shared parameters, each in parts on all ranks.
        reduction: How sums over ranks are made.
    """

    def __init__(
        self, num_tasks: int, parameters: Sequence[nn.Parameter], *, reduction: Reduction
    ) -> None:
        self._sharded: list[nn.Parameter] = []  # before the base class, which calls `bind`
        # The base class reduces nothing: to it, this rank's parts are whole parameters.
        super().__init__(num_tasks, parameters, reduction=Reduction())
        self._ranks = reduction

    def bind(self, parameters: Sequence[nn.Parameter]) -> None:
        """Use this rank's parts of these parameters from now on."""
        # `local_part` makes new tensors in each call, so the comparison is of the parameters.
        if not same_tensors(parameters, self._sharded):
            self._sharded = list(parameters)
            super().bind([local_part(p) for p in parameters])  # type: ignore[misc]

    def gramian(self, of: Collection[int] | None = None) -> Float[Tensor, "k k"]:
        """`G[i, j] = g_i . g_j`, float64, summed over the parts."""
        return sum_of_parts(super().gramian(of), self._sharded[0], self._ranks)

    def _assign(self, indices: Sequence[int], values: Sequence[Tensor]) -> None:
        """Set `.grad` of the sharded parameters: no optimizer reads that of their parts."""
        assign_gradients([self._sharded[index] for index in indices], values)


class ShardedDifferentiation(Differentiation):
    """Differentiates parameters that FSDP2 (`fully_shard`) shards over all ranks, or over replicas.

    `autograd.grad` does not see such parameters. A backward pass leaves this rank's part of the
    gradient, averaged over all ranks, in `.grad`. Every pass is collective, so all ranks make the
    same number of passes; a rank without samples passes one sample, whose loss does not count.

    Raises:
        ConfigError: If a parameter is not in parts on all ranks, or in parts on those of each
            replica.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], reduction: Reduction) -> None:
        super().__init__(parameters, reduction)
        self._last: list[Tensor | None] = []  # sharded gradients of the last pass
        for p in parameters:
            kinds = ["shard" if each.is_shard() else "copy" for each in _placements(p)]
            known = kinds in (["shard"], ["copy", "shard"])
            if not known or p.device_mesh.size() != reduction.world_size:  # type: ignore[attr-defined]
                raise ConfigError(
                    "parameters: if one is sharded, each must be, over all "
                    f"{reduction.world_size} ranks and a mesh [shards] or [replicas, shards], "
                    f"found {_placements(p) or 'a whole one'}"
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
        self._last = []
        for p in self.parameters:
            p.grad = None
        # FSDP2 averages over ranks; times their number this is the sum.
        (loss * self.reduction.world_size).backward()  # type: ignore[no-untyped-call]
        self._last = [p.grad for p in self.parameters]
        for p in self.parameters:
            p.grad = None
        pairs = zip(self._last, self.parameters, strict=True)
        return [torch.zeros_like(local_part(p)) if g is None else local_part(g) for g, p in pairs]

    def last_gradients(self, loss: Tensor, before: Sequence[Tensor] = ()) -> list[Tensor]:
        """`gradients(loss)` plus `before`; FSDP2 overlaps its sums itself."""
        found = self.gradients(loss)
        if before:
            torch._foreach_add_(found, list(before))
        return found

    def finish(self, gradients: Sequence[Tensor]) -> Tensor:
        """Write `.grad` and return its L2 norm over all ranks."""
        # Where FSDP2 has made the sharded tensor already, it is taken: another takes 0.03 ms each.
        missing = []
        for p, last, value in zip(self.parameters, self._last, gradients, strict=True):
            if last is not None and local_part(last).data_ptr() == value.data_ptr():
                p.grad = last
            else:
                missing.append((p, value))
        assign_gradients([p for p, _ in missing], [value for _, value in missing])
        self._last = []
        # The passes have summed the gradients over ranks. Only the squared norms of the parts are
        # left to sum. A small parameter may have no elements on this rank.
        norms = torch._foreach_norm([g for g in gradients if g.numel()], dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float64, device=gradients[0].device)
        if norms:
            total = torch.stack(norms).double().square().sum()
        return sum_of_parts(total, self.parameters[0], self.reduction).sqrt()


def sum_of_parts(value: Tensor, sharded: Tensor, reduction: Reduction) -> Tensor:
    """Sum over the parts of the sharded tensors, of each part once; in place.

    Summed over all ranks and divided by the number of replicas, and not over the ranks of one
    replica: replicas that add in another order would round their weights differently, and their
    parameters would part without a word.
    """
    mesh = sharded.device_mesh  # type: ignore[attr-defined]
    num_replicas = mesh.size(0) if mesh.ndim == 2 else 1
    return reduction.all_reduce_(value).div_(num_replicas)


def _placements(p: Tensor) -> tuple[Any, ...]:
    return getattr(p, "placements", ())


def differentiation(parameters: Sequence[nn.Parameter], reduction: Reduction) -> Differentiation:
    """The differentiation for these parameters."""
    kind = ShardedDifferentiation if is_sharded(parameters) else Differentiation
    return kind(parameters, reduction)
