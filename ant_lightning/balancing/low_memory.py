"""Task gradients without rows: the Gramian first, then a second backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ant_lightning.balancing.engines import Engine, check_whole
from ant_lightning.balancing.gradients import (
    TaskGradients,
    assign_gradients,
    dot_products,
    reduce_gradients_,
)
from ant_lightning.balancing.groups import Groups
from ant_lightning.balancing.one_pass import BlockWriter, OnePass, TappedLosses

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn

    from ant_lightning.balancing.batch import TaskBatch
    from ant_lightning.balancing.gradients import DenseTaskGradients
    from ant_lightning.balancing.taps import Layer

__all__ = ["LowMemory"]

_SHARE = 8  # a slice of a layer's task gradients, of all tasks, has at most p / _SHARE numbers


class LowMemory(Engine):
    """The Gramian layer by layer, then the weighted sum of the losses differentiated once more.

    One forward and two backward passes over the whole batch. A layer's task gradients are made as
    in `OnePass`, but in slices over its outputs, of at most `p / 8` numbers for all tasks. Each
    slice is added to the Gramian and dropped. For a parameter that is used more than once, the
    gradients of all `k` tasks are held until its last use. The activations stay until the second
    backward pass. The network must meet the conditions of `OnePass`. With several ranks the slices
    are all-reduced, which with the combination sends `k + 1` times the bytes of one gradient.
    """

    def __init__(self) -> None:
        self._one_pass = OnePass()

    def task_gradients(
        self, batch: TaskBatch, rows: DenseTaskGradients | None = None
    ) -> _StreamedTaskGradients:
        """The Gramian, and the graph for the second pass.

        Raises:
            UnsupportedError: If the network does not fit.
            ConfigError: If the batch is to be computed in parts.
        """
        check_whole(batch, "LowMemory")
        groups = Groups(batch.starts)
        self._one_pass.check_samples_do_not_mix(batch)
        losses = TappedLosses(batch, groups.by_group(batch.order))
        self._one_pass.remember(losses)
        adder = _GramianAdder(losses, groups)
        losses.backward(losses.mean_weights(), adder, retain_graph=True)
        batch.record(losses.rows, losses.values)
        return _StreamedTaskGradients(losses, adder.gramian)


class _GramianAdder:
    """Adds the dot products of each layer's task gradients to the Gramian, in a backward pass."""

    def __init__(self, losses: TappedLosses, groups: Groups) -> None:
        self._batch = losses.batch
        self._groups = groups
        self._most = max(1, sum(p.numel() for p in self._batch.shared) // _SHARE)
        self._uses_left = dict(losses.taps.num_uses)
        self._held: dict[int, Tensor] = {}  # sums so far of parameters that will be used again
        device = self._batch.shared[0].device
        self.gramian = torch.zeros(len(groups), len(groups), dtype=torch.float64, device=device)

    def __call__(self, layer: Layer, inputs: Tensor, grad: Tensor) -> None:
        """Add one use of a layer."""
        weight, groups = layer.weight, self._groups
        pieces = [grad]
        # Only for a weight that is used once: dot products are additive over slices of a gradient,
        # but not over the uses that add up to it.
        once = self._uses_left[id(weight)] == 1 and id(weight) not in self._held
        if once and layer.channel_dim is not None:
            num = -(-len(groups) * weight.numel() // self._most)
            num = min(num, grad.shape[layer.channel_dim])
            pieces = list(grad.tensor_split(num, dim=layer.channel_dim))
        # The last slice goes through `_take`, which counts the use.
        for piece in pieces[:-1]:
            self._add(layer.weight_gradients(inputs, piece, groups, None))
        self._take(weight, layer.weight_gradients(inputs, pieces[-1], groups, None))
        if layer.bias is not None:
            self._take(layer.bias, layer.bias_gradients(grad, groups))

    def _take(self, parameter: nn.Parameter, block: Tensor) -> None:
        """Count a use of a parameter; add its block to the Gramian if it was the last use."""
        key = id(parameter)
        if key in self._held:
            block = block + self._held.pop(key)
        self._uses_left[key] -= 1
        if self._uses_left[key]:
            self._held[key] = block
        else:
            self._add(block)

    def _add(self, block: Tensor) -> None:
        """Add the dot products of a block `[k, ...]` of task gradients, summed over ranks first."""
        flat = block.flatten(1)
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        if self._batch.is_scaled:
            flat = flat / self._batch.loss_scale
        # Every rank takes part in every slice: their number depends on `k` and the layer's shape.
        if self._batch.reduction.world_size > 1:
            flat = self._batch.reduction.all_reduce_(flat.contiguous())
        self.gramian += dot_products(flat)


class _StreamedTaskGradients(TaskGradients):
    """A Gramian, and the losses; the gradient of their weighted sum is the combination."""

    def __init__(self, losses: TappedLosses, gramian: Tensor) -> None:
        self._losses: TappedLosses | None = losses
        self._gramian = gramian

    def gramian(self) -> Float[Tensor, "k k"]:
        """`G[i, j] = g_i . g_j`, float64, over the samples of all ranks."""
        return self._gramian

    def combine_(self, task_weights: Float[Tensor, " k"], *, scale: Tensor | float = 1.0) -> None:
        """Write `scale * sum_i task_weights[i] g_i` into every parameter's `.grad`, once."""
        losses = self._losses
        assert losses is not None, "combine_ was called after release"
        batch = losses.batch
        for p in batch.shared:
            p.grad = None
        dtypes = [torch.promote_types(p.dtype, torch.float32) for p in batch.shared]
        blocks = [
            torch.empty_like(p, dtype=dtype)[None]
            for p, dtype in zip(batch.shared, dtypes, strict=True)
        ]
        # One group with all samples: the tasks differ only in the weights of their samples.
        writer = BlockWriter(batch.shared, blocks, Groups([0, len(batch)]))
        weights = task_weights.to(batch.num_samples) / batch.num_samples.clamp(min=1)
        losses.backward(batch.per_sample(weights, losses.rows), writer)
        writer.finish()
        # The pass has multiplied the gradient by `loss_scale` already.
        if isinstance(scale, torch.Tensor) or scale != batch.loss_scale:
            torch._foreach_mul_(blocks, scale / batch.loss_scale)
        assign_gradients(batch.shared, [block[0] for block in blocks])
        reduce_gradients_(batch.shared, reduction=batch.reduction)

    def release(self) -> None:
        """Free the graph and the activations."""
        self._losses = None
