"""Task gradients from one forward and one backward pass over the whole batch."""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ant_lightning.balancing.engines import Engine, UnsupportedError, check_whole, new_rows
from ant_lightning.balancing.factors import FactoredTaskGradients, Factors
from ant_lightning.balancing.one_pass import layers  # noqa: F401 - fills the table of rules
from ant_lightning.balancing.one_pass.task_parameters import TaskParameter, state
from ant_lightning.balancing.parameters import same_tensors
from ant_lightning.randomness import undisturbed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ant_lightning.balancing.batch import TaskBatch
    from ant_lightning.balancing.gradients import DenseTaskGradients, TaskGradients

__all__ = ["OnePass", "SortedLosses"]

# Steps in which mixing is checked. A layer behind a weight that is still 0 has no gradient to
# check, so later steps try again; a layer that no loss depends on must not keep them trying.
_MOST_CHECKS = 10
# Largest number of positions of a layer with factors, over all samples. On a CPU the products of
# factors with 200 positions cost as much as reading five rows; on a GPU it takes more positions.
_MOST_POSITIONS = 256


class SortedLosses:
    """The losses of a batch that is sorted by task, the tasks with most samples first.

    Attributes:
        tasks: Tasks that this rank has samples of, by descending number of samples, `m` of them.
        sizes: Their numbers of samples: in the same order, so that a compiled network sees the
            same sizes in each step even if other tasks get the odd sample.
        rows: The samples, as rows of the batch, `[b]`.
    """

    def __init__(self, batch: TaskBatch, leaves: Leaves) -> None:
        self.batch, self.leaves = batch, leaves
        starts = batch.starts
        counts = {task: starts[task + 1] - starts[task] for task in batch.present}
        self.tasks = sorted(counts, key=lambda task: -counts[task])
        self.sizes = tuple(counts[task] for task in self.tasks)
        self.rows = torch.cat([batch.order[starts[t] : starts[t + 1]] for t in self.tasks])
        leaves.prepare(batch.shared, len(self.tasks))
        # Not the parameters: as arguments of `autograd.grad` they would call for a rule.
        self._edges = [torch.autograd.graph.get_gradient_edge(p) for p in batch.shared]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Run the network, and its backward pass, inside this context."""
        classes = [type(p) for p in self.batch.shared]
        state.sizes = self.sizes
        try:
            for p, leaf in zip(self.batch.shared, self.leaves.dense, strict=True):
                p.leaf, p.__class__ = leaf, TaskParameter  # type: ignore[attr-defined]
                p.left, p.right = self.leaves.factors.get(id(p), (None, None))  # type: ignore[attr-defined]
            yield
        finally:
            for p, before in zip(self.batch.shared, classes, strict=True):
                p.__class__ = before
                for name in ("leaf", "left", "right"):
                    vars(p).pop(name, None)
            # The network may have kept a view, for instance in an attribute.
            for view in state.views:
                vars(view).pop("leaf", None)
                view.__class__ = Tensor
            state.views.clear()

    def mean_weights(self) -> Tensor:
        """Weight of each sample, `[b]`: 1 over the number of samples of its task on all ranks."""
        return self.batch.per_sample(1 / self.batch.num_samples.clamp(min=1), self.rows)

    def differentiate(
        self,
        values: Tensor,
        weights: Tensor,
        receive: Callable[[int, Tensor], None],
        *,
        retain_graph: bool = False,
    ) -> None:
        """Differentiate `sum_s weights[s] values[s]`; gradients go to `receive` as they arrive.

        `receive(index, block)` is given the gradients of parameter `index` for each task,
        `[m, *shape]`, multiplied by `loss_scale`. Inside `watched`.

        Raises:
            UnsupportedError: If a parameter was used in a way that no rule covers.
        """
        loss = (values * weights.to(values.dtype)).sum() * self.batch.loss_scale
        self.leaves.receive = receive
        # A gradient of a parameter itself means a use that torch did not tell us of.
        try:
            with torch.autocast(loss.device.type, enabled=False):
                found = torch.autograd.grad(
                    loss,
                    [*self.leaves.all, *self._edges],
                    allow_unused=True,
                    retain_graph=retain_graph,
                )
        finally:
            self.leaves.receive = None
        others = [list(g.shape) for g in found[len(self.leaves.all) :] if g is not None]
        if others:
            raise UnsupportedError(
                "engine: one pass needs every parameter to be an argument of a function of torch, "
                f"found another use of parameters of shape {others[0]} ({len(others)} in all)"
            )


class Leaves:
    """What the gradients of the tasks go to: for each parameter a leaf `[m, *shape]`, or factors.

    Attributes:
        dense: The leaf of each parameter: the parameter itself, expanded without a copy.
        factors: Leaves of the two factors of a layer's weight gradient, by the weight's id.
        receive: Called with the place of a parameter and its gradients `[m, *shape]`.
        receive_factor: Called with the id of a weight, 0 or 1, and a factor.
    """

    def __init__(self) -> None:
        self.dense: list[Tensor] = []
        self.factors: dict[int, tuple[Tensor, Tensor]] = {}
        self.receive: Callable[[int, Tensor], None] | None = None
        self.found_factors: dict[tuple[int, int], Tensor] = {}
        self._made_for: list[object] = []

    @property
    def all(self) -> list[Tensor]:
        """All leaves."""
        return [*self.dense, *(each for pair in self.factors.values() for each in pair)]

    def prepare(self, parameters: Sequence[nn.Parameter], num_tasks: int) -> None:
        """Make the leaves, unless they are those of the last step."""
        # Kept over the steps: a CUDA graph reads parameters from the same place in each.
        key = [num_tasks, *((id(p), p.data_ptr(), p.dtype, p.stride()) for p in parameters)]
        if key == self._made_for:
            return
        self._made_for, self.factors = key, {}
        self.dense = [p.detach().expand(num_tasks, *p.shape).requires_grad_() for p in parameters]
        for index, leaf in enumerate(self.dense):
            self._watch(leaf, lambda grad, index=index: self._arrived(index, grad))

    def factor(self, positions: dict[nn.Parameter, int]) -> None:
        """Make leaves for the factors of these weights, which meet so many positions."""
        shapes = {key: len(pair[0]) for key, pair in self.factors.items()}
        if shapes == {id(p): count for p, count in positions.items()}:
            return
        self.factors = {}
        for p, count in positions.items():
            zero = torch.zeros(
                (), dtype=torch.promote_types(p.dtype, torch.float32), device=p.device
            )
            left, right = (zero.expand(count, size).detach().requires_grad_() for size in p.shape)
            key, pair = id(p), (left, right)
            self.factors[key] = pair
            for place, leaf in enumerate(pair):
                self._watch(
                    leaf, lambda grad, key=key, place=place: self._factor_arrived(key, place, grad)
                )

    def _arrived(self, index: int, grad: Tensor) -> Tensor:
        assert self.receive is not None
        self.receive(index, grad)
        # In its place autograd keeps one number, so that `receive` may free the gradient.
        return grad.new_zeros(()).expand(grad.shape)

    def _factor_arrived(self, key: int, place: int, grad: Tensor) -> Tensor:
        self.found_factors[key, place] = grad
        return grad.new_zeros(()).expand(grad.shape)

    @staticmethod
    def _watch(leaf: Tensor, hook: Callable[[Tensor], Tensor]) -> None:
        leaf.register_hook(hook)
        if leaf.is_cuda and "torch._dynamo" in sys.modules:
            sys.modules["torch._dynamo"].mark_static_address(leaf)


class OnePass(Engine):
    """One pass over the whole batch, in which each layer sums its gradient for each task.

    The network is called as often as in ordinary training, compiled or not. For the weight of each
    layer, one product becomes `k` products of a smaller inner size. Tasks of equal size share a
    call. Memory above that of vanilla training: the rows, `k p` numbers.

    A linear layer with at most 256 positions over all samples has no rows if the two factors of its
    gradient are smaller than one gradient (on one rank). In a DiT these are the modulations, a
    third of its parameters.

    There are rules for linear, convolution, embedding, layer-, RMS- and group-norm layers, and a
    general one for parameters that are added to, multiplied by or concatenated with something that
    has the batch as its first dimension, or first combined with each other.

    Samples must not mix (as batch norm does). The first calls check this: the loss of one task
    must have a gradient of zero at the parameters of all others. They repeat it until a gradient
    has reached each parameter, but at most 10 times.
    """

    def __init__(self) -> None:
        self._leaves = Leaves()
        self._parameters: Sequence[nn.Parameter] = ()  # for which the next three hold
        self._missing: set[int] = set()  # places of parameters that are not checked yet
        self._layers: dict[int, tuple[int, int]] = {}  # uses and positions for each sample
        self._num_checks = 0

    def task_gradients(
        self, batch: TaskBatch, rows: DenseTaskGradients | None = None
    ) -> TaskGradients:
        """Gradients of all tasks, from one pass.

        Raises:
            UnsupportedError: If a parameter is used in a way that no rule covers, or samples mix.
            ConfigError: If the batch is to be computed in parts.
        """
        losses = self.prepare(batch)
        gradients = rows or new_rows(batch)
        one_rank = batch.reduction.world_size == 1
        self._leaves.factor(self._factored(batch) if one_rank else {})
        apart = self._leaves.factors
        with losses.watched():
            values = batch.evaluate(losses.rows)
            gradients.begin(
                losses.tasks,
                samples=batch.samples,
                apart=[index for index, p in enumerate(batch.shared) if id(p) in apart],
            )

            def receive(index: int, block: Tensor) -> None:
                gradients.receive(index, block / batch.loss_scale if batch.is_scaled else block)

            losses.differentiate(values, losses.mean_weights(), receive)
        batch.record(losses.rows, values)
        if not apart:
            return gradients
        found, self._leaves.found_factors = self._leaves.found_factors, {}
        factors = []
        for p in batch.shared:
            if (id(p), 0) in found:  # otherwise no loss depends on the layer
                left, right = found[id(p), 0], found[id(p), 1]
                if batch.is_scaled:
                    left = left / batch.loss_scale
                factors.append(Factors(p, left, right))
            elif id(p) in apart:
                p.grad = torch.zeros_like(p)
        return FactoredTaskGradients(gradients, factors, batch.tasks_of(losses.rows))

    def prepare(self, batch: TaskBatch) -> SortedLosses:
        """Sort the batch, and check that samples do not mix, until all parameters are checked.

        Raises:
            UnsupportedError: If samples mix, or a parameter has no rule.
        """
        check_whole(batch, "OnePass")
        for p in batch.shared:
            if type(p) not in {nn.Parameter, Tensor}:
                raise UnsupportedError(
                    f"engine: one pass needs parameters of the class Parameter, found {type(p)}"
                )
        if not same_tensors(batch.shared, self._parameters):  # some may be thawed
            self._parameters, self._num_checks = batch.shared, 0
            self._missing, self._layers = set(range(len(batch.shared))), {}
        losses = SortedLosses(batch, self._leaves)
        if self._missing and len(losses.tasks) > 1 and self._num_checks < _MOST_CHECKS:
            self._num_checks += 1
            self._check_samples_do_not_mix(losses)
        return losses

    def _check_samples_do_not_mix(self, losses: SortedLosses) -> None:
        """Differentiate the loss of the first task: any gradient at the others is mixing."""
        batch, indices, found = losses.batch, [], []

        def watch(index: int, block: Tensor) -> None:
            # NaN != 0 is true: an overflow must not be taken for a dependence between samples.
            tasks = ((block != 0) & block.isfinite()).reshape(len(block), -1).any(1)
            indices.append(index)
            found.append(torch.stack([tasks[0], tasks[1:].any()]))

        state.uses, state.positions = {}, {}
        self._leaves.factor({})
        first = torch.arange(len(batch), device=batch.tasks.device) < losses.sizes[0]
        try:
            # Eagerly, where uses can be counted and no graph is compiled that is used only once.
            with undisturbed(batch.shared[0].device), _eagerly(), losses.watched():
                losses.differentiate(batch.evaluate(losses.rows), first.double(), watch)
            self._layers = {
                key: (count, state.positions.get(key, 0)) for key, count in state.uses.items()
            }
        finally:
            state.uses = None
        if not found:
            return
        reached, mixed = torch.stack(found).T.cpu().tolist()
        if any(mixed):
            raise UnsupportedError(
                "engine: one pass needs layers whose first dimension is the batch and that do not "
                "mix samples; found a sample's loss that depends on another sample"
            )
        self._missing.difference_update(i for i, was in zip(indices, reached, strict=True) if was)

    def _factored(self, batch: TaskBatch) -> dict[nn.Parameter, int]:
        """Weights whose factors are smaller than one gradient, and their positions."""
        found = {}
        for p in batch.shared:
            uses, positions = self._layers.get(id(p), (0, 0))
            # The gradient of a weight that is used twice is a sum over both uses; its Gramian would
            # need the products of the factors of one use with those of the other.
            total = positions * len(batch)
            if uses == 1 and 0 < total <= _MOST_POSITIONS and total * sum(p.shape) <= p.numel():
                found[p] = total
        return found


def _eagerly():  # type: ignore[no-untyped-def]  # noqa: ANN202
    """Context in which compiled networks run as they were written."""
    # Only where something may be compiled: the import takes a second.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
