"""Task gradients from one forward and one backward pass over the whole batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import CheckpointError

from ant_lightning.balancing.engines import Engine, UnsupportedError, check_whole, new_rows
from ant_lightning.balancing.factors import FactoredTaskGradients, Factors, layers_to_factor
from ant_lightning.balancing.groups import Groups
from ant_lightning.balancing.parameters import same_tensors
from ant_lightning.balancing.taps import Taps
from ant_lightning.randomness import undisturbed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from ant_lightning.balancing.batch import TaskBatch
    from ant_lightning.balancing.gradients import DenseTaskGradients, TaskGradients
    from ant_lightning.balancing.taps import Layer

__all__ = ["BlockWriter", "OnePass", "TappedLosses"]

_MOST_PROOFS = 10


class TappedLosses:
    """The losses of samples, with the layers of the network tapped.

    Args:
        batch: The batch.
        rows: The samples, `[n]`.

    Attributes:
        values: Their losses, `[n]`.
    """

    def __init__(self, batch: TaskBatch, rows: Tensor) -> None:
        self.batch = batch
        self.taps = Taps(batch.shared, len(rows))
        self.rows = rows
        with self.taps:
            self.values = batch.evaluate(self.rows)

    def backward(
        self,
        weights: Tensor,
        receive: Callable[[Layer, Tensor, Tensor], None],
        *,
        retain_graph: bool = False,
    ) -> None:
        """Pass each layer's part of the gradient of `sum_s weights[s] values[s]` to `receive`.

        Raises:
            UnsupportedError: If a parameter was used outside the tapped layers.
        """
        self.taps.receive = receive
        loss = (self.values * weights.to(self.values.dtype)).sum() * self.batch.loss_scale
        try:
            with torch.autocast(loss.device.type, enabled=False):
                _, *others = torch.autograd.grad(
                    loss,
                    [self.taps.token, *self.batch.shared],
                    allow_unused=True,
                    retain_graph=retain_graph,
                )
        except CheckpointError as error:
            raise UnsupportedError(
                "engine: one pass needs a network without gradient checkpointing, found "
                "layers that are computed again in the backward pass"
            ) from error
        shapes = [list(g.shape) for g in others if g is not None]
        if shapes:
            raise UnsupportedError(
                "engine: one pass needs every parameter in a linear, convolution, embedding, "
                "layer-norm or group-norm layer whose input has the batch as its first dimension; "
                f"found another use of parameters of shape {shapes[0]} ({len(shapes)} in all)"
            )

    def mean_weights(self) -> Tensor:
        """Weights with which the losses of each task add up to their mean, over all ranks."""
        batch = self.batch
        return batch.per_sample(1 / batch.num_samples.clamp(min=1), self.rows)


class BlockWriter:
    """Writes the gradients of groups of samples as the layers give them.

    Args:
        parameters: All parameters.
        blocks: One `[m, *shape]` for each, written to.
        groups: The `m` groups.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], blocks: Sequence[Tensor], groups: Groups
    ) -> None:
        self._blocks = {id(p): block for p, block in zip(parameters, blocks, strict=True)}
        self._missing = dict(self._blocks)
        self._groups = groups

    def __call__(self, layer: Layer, inputs: Tensor, grad: Tensor) -> None:
        """Write the gradients of weight and bias, or add them to those of an earlier use."""
        block = self._missing.get(id(layer.weight))
        out = block if block is not None and block.dtype == grad.dtype else None
        self._put(layer.weight, layer.weight_gradients(inputs, grad, self._groups, out))
        if layer.bias is not None:
            free = self._missing.get(id(layer.bias))
            self._put(layer.bias, layer.bias_gradients(grad, self._groups, free))

    def finish(self) -> None:
        """Set the gradients of parameters that were not used to zero."""
        for block in self._missing.values():
            block.zero_()

    def _put(self, parameter: nn.Parameter, values: Tensor) -> None:
        block = self._blocks[id(parameter)]
        if self._missing.pop(id(parameter), None) is None:
            block.add_(values.view(block.shape))
        elif values.data_ptr() != block.data_ptr():
            block.copy_(values.view(block.shape))


class OnePass(Engine):
    """One pass over the whole batch, in which each layer sums its gradient for each task.

    It makes as many calls as ordinary training, and `k` products of a smaller inner size for each
    layer's weight, written where the rows are kept; the activations are those of one pass over
    the whole batch. Tasks may have different sizes; equal ones share a call. On one rank, layers
    that meet at most 256 positions in all have no rows if the two factors of their gradient take
    less than one of it: in a DiT the modulations, a third of its parameters. With several ranks
    the rows of a rank's tasks are there as a whole, `k p` numbers, until they are summed.

    It needs every trained parameter in a linear, convolution, embedding, layer-norm or group-norm
    layer that is given the batch as its first dimension, and samples that do not mix (no batch
    norm). Both are checked: the first in every call; the second in the first calls, on two samples
    of different tasks, by the gradient of the loss of one, which must be zero at the other
    wherever it passes a layer, until each layer was reached by a gradient, at most 10 times.
    Networks compiled by `torch.compile` and gradient checkpointing need `Loop`.
    """

    def __init__(self) -> None:
        self._parameters: Sequence[nn.Parameter] = ()  # parameters of the layers that were checked
        self._proven: set[int] = set()
        self._all_proven = False
        self._num_proofs = 0

    def task_gradients(
        self, batch: TaskBatch, rows: DenseTaskGradients | None = None
    ) -> TaskGradients:
        """All rows together.

        Raises:
            UnsupportedError: If the network does not fit.
            ConfigError: If the batch is to be computed in parts.
        """
        check_whole(batch, "OnePass")
        present = batch.present
        groups = Groups([*(batch.starts[task] for task in present), len(batch)])
        self.prove(batch)
        losses = TappedLosses(batch, groups.layout(batch.order))
        self.remember(losses)
        gradients = rows or new_rows(batch)
        # Only on one rank: the products of factors need the samples of all ranks.
        factored = layers_to_factor(losses.taps) if batch.reduction.world_size == 1 else []
        apart = {id(p) for layer in factored for p in layer.parameters}
        dense = [p for p in batch.shared if id(p) not in apart]
        factors: dict[int, Factors] = {}

        def fill(blocks: list[Tensor]) -> None:
            writer = BlockWriter(dense, blocks, groups)

            def receive(layer: Layer, inputs: Tensor, grad: Tensor) -> None:
                if id(layer.weight) in apart:
                    found = Factors.of(layer, inputs, grad, batch.loss_scale)
                    factors[id(layer.weight)] = found
                else:
                    writer(layer, inputs, grad)

            losses.backward(losses.mean_weights(), receive)
            writer.finish()
            if batch.is_scaled and blocks:
                torch._foreach_div_(blocks, batch.loss_scale)

        gradients.write_together(present, fill, dense)
        batch.record(losses.rows, losses.values)
        if not factored:
            return gradients
        unreached = [layer for layer in factored if id(layer.weight) not in factors]
        every = [*factors.values(), *(Factors.zero(layer, losses.values) for layer in unreached)]
        return FactoredTaskGradients(gradients, every, batch.tasks_of(losses.rows))

    def prove(self, batch: TaskBatch) -> None:
        """Check that no layer mixes samples, until every layer has been checked.

        Uses two samples, before the pass over the batch, so that the peak memory is that of the
        pass. `losses` is asked for these two samples again in the pass.

        Raises:
            UnsupportedError: If a layer mixes samples.
        """
        if not same_tensors(batch.shared, self._parameters):  # some may be thawed
            self._parameters, self._proven = batch.shared, set()
            self._all_proven, self._num_proofs = False, 0
        if self._all_proven or len(batch.present) < 2 or self._num_proofs >= _MOST_PROOFS:
            return
        self._num_proofs += 1
        layers, found = [], []

        def watch(layer: Layer, inputs: Tensor, grad: Tensor) -> None:
            reached = ((grad != 0) & grad.isfinite()).reshape(len(grad), -1).any(1)
            layers.append(layer)
            found.append(reached)

        one_each = [batch.starts[task] for task in batch.present[:2]]
        with undisturbed(batch.shared[0].device):
            pair = TappedLosses(batch, batch.order[one_each])
        first = torch.tensor([1.0, 0.0]).to(pair.values.device, non_blocking=True)
        pair.backward(first, watch)
        reached, mixed = torch.stack(found).T.cpu().tolist()
        for layer, was_reached in zip(layers, reached, strict=True):
            if was_reached:
                self._proven.update(id(p) for p in layer.parameters)
        if any(mixed):
            raise UnsupportedError(
                "engine: one pass needs layers whose first dimension is the batch and that do not "
                "mix samples; found a sample's loss that depends on another sample"
            )

    def remember(self, losses: TappedLosses) -> None:
        """Record whether all layers have been checked; a call need not use every layer."""
        self._all_proven = self._proven.issuperset(losses.taps.num_uses)
