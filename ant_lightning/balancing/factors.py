"""Task gradients of layers with few positions, kept as two factors in place of a row.

The gradient of a layer's weight is a sum of outer products of the output gradient `l_s` and the
input `r_s`: `W_i = sum_s l_s r_s^T` over the positions s of task i. With few positions these
factors are smaller than one gradient. The Gramian needs only their dot products,
`<W_i, W_j> = sum_s sum_t (l_s . l_t) (r_s . r_t)` over s of task i and t of task j. The
combination is one product of the weighted factors. In a DiT the modulation layers have one
position for each sample, and a third of its parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from ant_lightning.balancing.gradients import TaskGradients, assign_gradients, full_precision

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor, nn

    from ant_lightning.balancing.gradients import DenseTaskGradients

__all__ = ["FactoredTaskGradients", "Factors"]


class Factors(NamedTuple):
    """The weight gradient of a layer that is used once, `sum_s left[s]^T right[s]`.

    Attributes:
        weight: The weight.
        left: Output gradient, `[b n, o]`, for `n` positions of each of `b` samples.
        right: Input, `[b n, i]`.
    """

    weight: nn.Parameter
    left: Tensor
    right: Tensor


class FactoredTaskGradients(TaskGradients):
    """Rows of most parameters, and factors of the others.

    Args:
        rows: Task gradients of the parameters that have no factors.
        factors: Factors of each other weight, for the mean losses of the tasks.
        tasks: Task of each sample, `[b]`.
    """

    def __init__(
        self, rows: DenseTaskGradients, factors: list[Factors], tasks: Int[Tensor, " b"]
    ) -> None:
        self._rows = rows
        self._factors = factors
        self._tasks = tasks

    def gramian(self) -> Float[Tensor, "k k"]:
        """`G[i, j] = g_i . g_j`, float64; before `combine_`."""
        total = self._rows.gramian()
        # Dot products of all pairs of positions, summed over the layers with the same number of
        # positions for each sample. They are summed over tasks only once for all these layers.
        products: dict[int, Tensor] = {}
        with full_precision(self._tasks.device):
            for _, left, right in self._factors:
                inner = (left @ left.mT).mul_(right @ right.mT)
                known = products.get(len(left))
                products[len(left)] = inner.double() if known is None else known.add_(inner)
        every = torch.arange(len(total), device=self._tasks.device)
        for count, inner in products.items():
            # `members[i, s]` is 1 if position s is of task i.
            tasks = self._tasks.repeat_interleave(count // len(self._tasks))
            members = (tasks == every[:, None]).double()
            total += members @ inner @ members.mT
        return total

    def combine_(self, task_weights: Float[Tensor, " k"], *, scale: Tensor | float = 1.0) -> None:
        """Write `scale * sum_i task_weights[i] g_i` into every parameter's `.grad`, once."""
        self._rows.combine_(task_weights, scale=scale)
        per_sample = (task_weights.to(self._tasks.device) * scale)[self._tasks]
        with full_precision(self._tasks.device):
            for weight, left, right in self._factors:
                count = len(left) // len(self._tasks)
                weights = per_sample.to(left.dtype).repeat_interleave(count)
                product = (left * weights[:, None]).mT @ right
                if product.stride() != weight.stride():  # fused optimizers want the same
                    product = torch.empty_like(weight, dtype=product.dtype).copy_(product)
                assign_gradients([weight], [product])

    def release(self) -> None:
        """Free the factors, and release the rows."""
        self._factors = []
        self._rows.release()
