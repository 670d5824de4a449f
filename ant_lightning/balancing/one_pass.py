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

# Steps in which mixing is checked. A layer behind a weight that is still 0 has no gradient to
# check, so later steps try again; a layer that no loss depends on
# must not keep them trying forever.
_MOST_CHECKS = 10


class TappedLosses:
    """The losses of some samples, computed while the layers of the network are tapped.

    Args:
        batch: The batch.
        rows: The samples, as rows of the batch, `[n]`.

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
        """Differentiate `sum_s weights[s] values[s]`; each tapped layer calls `receive`.

        `receive(layer, inputs, grad)` is given the layer's input and the gradient of its output,
        multiplied by `loss_scale`.

        Raises:
            UnsupportedError: If a parameter was used outside the tapped layers, or a layer is
                computed again in the backward pass.
        """
        self.taps.receive = receive
        loss = (self.values * weights.to(self.values.dtype)).sum() * self.batch.loss_scale
        # Tapped layers treat their parameters as constants. The token makes autograd visit every
        # tap; a gradient of a parameter itself means that it was used somewhere else too.
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
        """Weight of each sample, `[n]`: 1 over the number of samples of its task on all ranks."""
        batch = self.batch
        return batch.per_sample(1 / batch.num_samples.clamp(min=1), self.rows)


class BlockWriter:
    """Writes each layer's gradients for the groups of samples, in the course of a backward pass.

    Args:
        parameters: Parameters that have a block.
        blocks: The gradients of each parameter, `[m, *shape]`; they are written here.
        groups: The `m` groups.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], blocks: Sequence[Tensor], groups: Groups
    ) -> None:
        self._blocks = {id(p): block for p, block in zip(parameters, blocks, strict=True)}
        self._missing = dict(self._blocks)  # blocks that still have old numbers
        self._groups = groups

    def __call__(self, layer: Layer, inputs: Tensor, grad: Tensor) -> None:
        """Write the gradients of weight and bias, or add them to those of an earlier use."""
        # The first use may write directly into the block; a later one must be added to it.
        block = self._missing.get(id(layer.weight))
        out = block if block is not None and block.dtype == grad.dtype else None
        self._put(layer.weight, layer.weight_gradients(inputs, grad, self._groups, out))
        if layer.bias is not None:
            free = self._missing.get(id(layer.bias))
            self._put(layer.bias, layer.bias_gradients(grad, self._groups, free))

    def finish(self) -> None:
        """Set the gradients of parameters that no layer has used to zero."""
        for block in self._missing.values():
            block.zero_()

    def _put(self, parameter: nn.Parameter, values: Tensor) -> None:
        """Copy `values` into the parameter's block, or add them after the first use."""
        block = self._blocks[id(parameter)]
        if self._missing.pop(id(parameter), None) is None:
            block.add_(values.view(block.shape))
        elif values.data_ptr() != block.data_ptr():  # equal if the layer wrote into the block
            block.copy_(values.view(block.shape))


class OnePass(Engine):
    """One pass over the whole batch, in which each layer sums its gradient for each task.

    The network is called as often as in ordinary training. For the weight of each layer, one
    product becomes `k` products of a smaller inner size, written directly into the rows. The
    activations are those of one pass over the whole batch. Tasks may have different sizes; tasks of
    equal size share a call.

    On one rank, a layer with at most 256 positions over all samples has no rows if the two factors
    of its gradient are smaller than one gradient. In a DiT these layers are the modulations, a
    third of its parameters. On several ranks, a rank holds whole rows of its tasks, up to `k p`
    numbers, until they are summed over ranks.

    `OnePass` makes two demands on the network, and checks both:

    - Every trained parameter is in a linear, convolution, embedding, layer-norm or group-norm layer
      whose input has the batch as its first dimension. Every call checks this.
    - Samples do not mix (no batch norm). The first calls check this on two samples of different
      tasks: the loss of one must have a gradient of zero at the other in every layer. They repeat
      it until a gradient has reached each layer, but at most 10 times.

    Networks compiled by `torch.compile` and gradient checkpointing need `Loop`.
    """

    def __init__(self) -> None:
        self._parameters: Sequence[nn.Parameter] = ()  # for which the next three hold
        self._proven: set[int] = set()  # ids of parameters whose layer does not mix samples
        self._all_proven = False
        self._num_checks = 0

    def task_gradients(
        self, batch: TaskBatch, rows: DenseTaskGradients | None = None
    ) -> TaskGradients:
        """Gradients of all tasks, from one pass.

        Raises:
            UnsupportedError: If the network does not meet the conditions of `OnePass`.
            ConfigError: If the batch is to be computed in parts.
        """
        check_whole(batch, "OnePass")
        # Only tasks with samples on this rank: an empty group would end the sharing of calls.
        present = batch.present
        groups = Groups([*(batch.starts[task] for task in present), len(batch)])
        self.check_samples_do_not_mix(batch)
        losses = TappedLosses(batch, groups.by_group(batch.order))
        self.remember(losses)
        gradients = rows or new_rows(batch)
        # Only on one rank: on several, the products would need the factors of all ranks.
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

        gradients.write_together(present, fill, dense, samples=batch.samples)
        batch.record(losses.rows, losses.values)
        if not factored:
            return gradients
        # A layer that was used but has no influence on a loss: its tap was never called.
        unreached = [layer for layer in factored if id(layer.weight) not in factors]
        every = [*factors.values(), *(Factors.zero(layer, losses.values) for layer in unreached)]
        return FactoredTaskGradients(gradients, every, batch.tasks_of(losses.rows))

    def check_samples_do_not_mix(self, batch: TaskBatch) -> None:
        """Check that no layer mixes samples, until every layer has been checked.

        Passes two samples of different tasks, before the pass over the batch so that the peak
        memory is that of the latter, which asks `losses` for these two samples again. A check on
        the graph of the whole batch would save this pass, but would have to keep that graph.

        Raises:
            UnsupportedError: If a layer mixes samples.
        """
        if not same_tensors(batch.shared, self._parameters):  # some may be thawed
            self._parameters, self._proven = batch.shared, set()
            self._all_proven, self._num_checks = False, 0
        if self._all_proven or len(batch.present) < 2 or self._num_checks >= _MOST_CHECKS:
            return
        self._num_checks += 1
        layers, found = [], []

        def watch(layer: Layer, inputs: Tensor, grad: Tensor) -> None:
            # NaN != 0 is true: an overflow must not be taken for a dependence between samples.
            reached = ((grad != 0) & grad.isfinite()).reshape(len(grad), -1).any(1)
            layers.append(layer)
            found.append(reached)

        one_each = [batch.starts[task] for task in batch.present[:2]]
        with undisturbed(batch.shared[0].device):
            pair = TappedLosses(batch, batch.order[one_each])
        # Only the loss of the first sample is differentiated: any gradient at the second is mixing.
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
