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
    from torch import Tensor

    from ant_lightning.balancing.gradients import DenseTaskGradients
    from ant_lightning.balancing.taps import Layer, Taps

__all__ = ["FactoredTaskGradients", "Factors", "layers_to_factor"]

# Largest number of positions, over all samples. On a CPU the products of factors with 200 positions
# cost as much as reading five rows; on a GPU it takes more positions.
_MOST_POSITIONS = 256


class Factors(NamedTuple):
    """The weight gradient of a layer that is used once, `sum_s left[s]^T right[s]` over samples.

    Attributes:
        layer: The layer.
        left: Output gradient, `[b, n, o]`, for `n` positions of each sample.
        right: Input, `[b, n, i]`.
    """

    layer: Layer
    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, layer: Layer, inputs: Tensor, grad: Tensor, loss_scale: Tensor | float) -> Factors:
        """Factors from a layer's inputs and `grad`, its output gradient times `loss_scale`."""
        assert layer.factors is not None
        dtype = torch.promote_types(grad.dtype, torch.float32)
        left, right = layer.factors(inputs.to(dtype), grad.to(dtype))
        if isinstance(loss_scale, torch.Tensor) or loss_scale != 1.0:
            left = left / loss_scale  # not in place: other layers may share this gradient
        return cls(layer, left, right)

    @classmethod
    def zero(cls, layer: Layer, like: Tensor) -> Factors:
        """Factors without positions, for a layer that no loss depends on: its gradient is 0."""
        _, rows, columns = layer.factor_sizes
        left, right = (like.new_zeros(len(like), 0, size) for size in (rows, columns))
        return cls(layer, left, right)


def layers_to_factor(taps: Taps) -> list[Layer]:
    """Layers that are used once and whose factors are smaller than one gradient."""
    found = []
    for layer in taps.layers:
        # The gradient of a weight that is used twice is a sum over both uses; its Gramian would
        # need the products of the factors of one use with those of the other.
        if layer.factors is None or any(taps.num_uses[id(p)] > 1 for p in layer.parameters):
            continue
        each, rows, columns = layer.factor_sizes
        positions = taps.num_samples * each
        if positions <= _MOST_POSITIONS and positions * (rows + columns) <= rows * columns:
            found.append(layer)
    return found


class FactoredTaskGradients(TaskGradients):
    """Rows of most parameters, and factors of the others.

    Args:
        rows: Task gradients of the parameters that have no factors.
        factors: Factors of each other layer, for the mean losses of the tasks.
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
            for layer, left, right in self._factors:
                lefts, rights = left.flatten(0, 1), right.flatten(0, 1)
                inner = rights @ rights.mT
                # The bias gradient is sum_s l_s: the bias acts as one more input that is always 1.
                if layer.bias is not None:
                    inner += 1
                inner *= lefts @ lefts.mT
                known = products.get(left.shape[1])
                products[left.shape[1]] = inner.double() if known is None else known.add_(inner)
        every = torch.arange(len(total), device=self._tasks.device)
        for count, inner in products.items():
            # `members[i, s]` is 1 if position s is of task i.
            members = (self._tasks.repeat_interleave(count) == every[:, None]).double()
            total += members @ inner @ members.mT
        return total

    def combine_(self, task_weights: Float[Tensor, " k"], *, scale: Tensor | float = 1.0) -> None:
        """Write `scale * sum_i task_weights[i] g_i` into every parameter's `.grad`, once."""
        self._rows.combine_(task_weights, scale=scale)
        per_sample = (task_weights.to(self._tasks.device) * scale)[self._tasks]
        with full_precision(self._tasks.device):
            for layer, left, right in self._factors:
                weighted = (left * per_sample.to(left.dtype)[:, None, None]).flatten(0, 1)
                product = (weighted.mT @ right.flatten(0, 1)).view(layer.weight.shape)
                if product.stride() != layer.weight.stride():  # fused optimizers want the same
                    product = torch.empty_like(layer.weight, dtype=product.dtype).copy_(product)
                values = [product]
                if layer.bias is not None:
                    values.append(weighted.sum(0).view(layer.bias.shape))
                assign_gradients(layer.parameters, values)

    def release(self) -> None:
        """Free the factors, and release the rows."""
        self._factors = []
        self._rows.release()
