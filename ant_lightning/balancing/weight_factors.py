"""Task gradients of weights that meet few positions, kept as two factors in place of a block.

The gradient of a layer's weight is a sum of outer products of the output gradient `l_s` and the
input `r_s`: `W_i = sum_s l_s r_s^T` over the positions s of task i. With few positions these
factors are smaller than one gradient. The Gramian needs only their dot products,
`<W_i, W_j> = sum_s sum_t (l_s . l_t) (r_s . r_t)` over s of task i and t of task j. The
combination is one product of the weighted factors. In a DiT the modulation layers have one
position for each sample, and a third of its parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ant_lightning.balancing.products import full_precision

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jaxtyping import Float, Int
    from torch import Tensor

# Largest number of positions, over all samples. On a CPU the products of factors with 200 positions
# cost as much as reading five rows; on a GPU it takes more positions.
_MOST_POSITIONS = 256


def has_small_factors(num_positions: int, weight: Tensor) -> bool:
    """Whether factors are cheaper than the gradients of a layer's weight `[o, ...]`.

    Args:
        num_positions: Positions that the layer meets, over the samples of all ranks.
        weight: The weight; a layer that is used once.

    Examples:
        >>> from ant_lightning.balancing.weight_factors import has_small_factors
        >>> has_small_factors(40, torch.empty(384, 384)), has_small_factors(2560, torch.empty(9, 9))
        (True, False)
    """
    rows = weight.shape[0]
    columns = weight.numel() // max(rows, 1)
    small = num_positions * (rows + columns) <= rows * columns
    return 0 < num_positions <= _MOST_POSITIONS and small


class WeightFactors:
    """The factors of some weights, for the same samples.

    Args:
        num_tasks: `k`.
        like: Of the dtype and on the device of the sums.
        sample_tasks: Task of each sample, `[b]`; not needed without factors.

    Attributes:
        sample_tasks: Task of each sample.
    """

    def __init__(
        self, num_tasks: int, like: Tensor, sample_tasks: Int[Tensor, " b"] | None = None
    ) -> None:
        self.num_tasks = num_tasks
        self.sample_tasks = sample_tasks
        self._like = like
        self._pairs: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def indices(self) -> list[int]:
        """Weights that have factors."""
        return [*self._pairs]

    def put(self, index: int, left: Float[Tensor, "bn o"], right: Float[Tensor, "bn i"]) -> None:
        """Keep the factors of a weight; the positions of a sample are together."""
        assert index not in self._pairs, "a weight was given factors twice"
        self._pairs[index] = left.detach().to(self._like.dtype), right.detach().to(self._like.dtype)

    def gramian(self, indices: Iterable[int]) -> Float[Tensor, "k k"]:
        """The part of the Gramian that these weights have, float64."""
        # Dot products of all pairs of positions, summed over the weights with the same number of
        # positions. They are summed over tasks only once for all these weights.
        products: dict[int, Tensor] = {}
        with full_precision(self._like.device):
            for index in indices:
                left, right = self._pairs[index]
                inner = (left @ left.mT).mul_(right @ right.mT)
                known = products.get(len(left))
                products[len(left)] = inner.double() if known is None else known.add_(inner)
        total = torch.zeros(
            self.num_tasks, self.num_tasks, dtype=torch.float64, device=self._like.device
        )
        every = torch.arange(self.num_tasks, device=self._like.device)
        for count, inner in products.items():
            # `members[i, s]` is 1 if position s is of task i.
            members = (self._position_tasks(count) == every[:, None]).double()
            total += members @ inner @ members.mT
        return total

    def combined(self, index: int, weights: Float[Tensor, " k"]) -> Float[Tensor, "o i"]:
        """The sum of a weight's task gradients, weighted."""
        left, right = self._pairs[index]
        with full_precision(self._like.device):
            return (left * weights[self._position_tasks(len(left))][:, None]).mT @ right

    def _position_tasks(self, count: int) -> Tensor:
        """Task of each of `count` positions."""
        assert self.sample_tasks is not None, "factors need the task of each sample"
        return self.sample_tasks.repeat_interleave(count // max(len(self.sample_tasks), 1))
