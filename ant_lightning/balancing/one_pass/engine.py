"""Task gradients from one forward and one backward pass over the whole batch."""

from __future__ import annotations

import sys
import weakref
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ant_lightning.balancing.agreement import together
from ant_lightning.balancing.engines import Engine, check_whole, new_rows
from ant_lightning.balancing.one_pass import layer_rules  # noqa: F401 - fills the table of rules
from ant_lightning.balancing.one_pass.leaves import Leaves
from ant_lightning.balancing.one_pass.task_parameters import TaskParameter, state
from ant_lightning.balancing.weight_factors import has_small_factors
from ant_lightning.errors import ConfigError, UnsupportedError
from ant_lightning.randomness import undisturbed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from ant_lightning.balancing.gradients import DenseTaskGradients
    from ant_lightning.balancing.one_pass.leaves import Receiver
    from ant_lightning.balancing.task_batch import TaskBatch

T = TypeVar("T")

# Steps in which mixing is checked. A layer behind a weight that is still 0 has no gradient to
# check, so later steps try again; a layer that no loss depends on must not keep them trying.
_MOST_CHECKS = 10


class SortedLosses:
    """The losses of a batch that is sorted by task, the tasks with most samples first.

    Attributes:
        tasks: Tasks that this rank has samples of, by descending number of samples, `m` of them.
        sizes: Their numbers of samples, in the same order. A compiled network so sees the same
            sizes in each step, even if the odd sample goes to other tasks.
        rows: The samples, as rows of the batch, `[b]`.
    """

    def __init__(self, batch: TaskBatch, leaves: Leaves) -> None:
        self.batch, self._leaves = batch, leaves
        starts = batch.starts
        counts = {task: starts[task + 1] - starts[task] for task in batch.present}
        self.tasks = sorted(counts, key=lambda task: -counts[task])
        self.sizes = tuple(counts[task] for task in self.tasks)
        self.rows = torch.cat([batch.order[starts[t] : starts[t + 1]] for t in self.tasks])
        leaves.prepare(batch.shared, len(self.tasks))
        # Not the parameters: as arguments of `autograd.grad` they would call for a rule.
        self._edges = [torch.autograd.graph.get_gradient_edge(p) for p in batch.shared]

    @contextmanager
    def watched(self, spare: Mapping[int, Tensor] | None = None) -> Iterator[None]:
        """Run the network, and its backward pass, inside this context.

        Args:
            spare: For some parameters, memory for the gradients of the tasks, `[m, *shape]`.
        """
        shared = self.batch.shared
        classes = [type(p) for p in shared]
        state.sizes = self.sizes
        try:
            for index, p in enumerate(shared):
                p.leaf, p.factors = self._leaves.of(index)  # type: ignore[attr-defined]
                p.spare = None if spare is None else spare.get(index)  # type: ignore[attr-defined]
                p.__class__ = TaskParameter
            yield
        finally:
            for p, before in zip(shared, classes, strict=True):
                p.__class__ = before
                for name in ("leaf", "factors", "spare"):
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
        self, values: Tensor, weights: Tensor, receiver: Receiver, *, retain_graph: bool = False
    ) -> None:
        """Differentiate `sum_s weights[s] values[s]`, inside `watched`.

        Raises:
            UnsupportedError: If a parameter was used in a way that no rule covers.
        """
        leaves = self._leaves.every
        loss = (values * weights.to(values.dtype)).sum() * self.batch.loss_scale
        self._leaves.begin(receiver, self.batch.loss_scale)
        with torch.autocast(loss.device.type, enabled=False):
            inputs: list[Any] = [*leaves, *self._edges]
            found = torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=retain_graph)
        self._leaves.end()
        # A gradient of a parameter itself means a use that torch did not tell us of.
        others = [list(g.shape) for g in found[len(leaves) :] if g is not None]
        if others:
            raise UnsupportedError(
                "engine: one pass needs every parameter to be an argument of a function of torch, "
                f"found another use of parameters of shape {others[0]} ({len(others)} in all)"
            )


class OnePass(Engine):
    """One pass over the whole batch, in which each layer sums its gradient for each task.

    The network is called as often as in ordinary training, compiled or not. For the weight of each
    layer, one product becomes `k` products of a smaller inner size. Tasks of equal size share a
    call. Memory above that of vanilla training: the gradients of the tasks, `k p` numbers.

    A linear layer that meets at most 256 positions, over the samples of all ranks, keeps two
    factors in place of its `k` gradients if they are smaller than one. In a DiT these layers are
    the modulations, a third of its parameters.

    There are rules for linear, convolution, embedding, layer-, RMS- and group-norm layers, and a
    general one for parameters that are added to, multiplied by or concatenated with something that
    has the batch as its first dimension, or first combined with each other.

    Samples must not mix (as batch norm does). The first calls check this: the loss of one task
    must have a gradient of zero at the parameters of all others. They repeat it until a gradient
    has reached each parameter, but at most 10 times.
    """

    def __init__(self) -> None:
        self._leaves = Leaves()
        # For which the next three hold. Weak: an engine must not keep a network alive.
        self._parameters: list[weakref.ref[nn.Parameter]] = []
        self._missing: set[int] = set()  # places of parameters that are not checked yet
        self._layers: dict[int, tuple[int, int]] = {}  # uses, and positions for each sample
        self._num_checks = 0
        self._unknown = True  # whether something is to be checked, on any rank
        self._checking = False  # whether this step is one of the first, in which ranks agree

    def task_gradients(
        self, batch: TaskBatch, rows: DenseTaskGradients | None = None
    ) -> DenseTaskGradients:
        """Gradients of all tasks, from one pass.

        Raises:
            UnsupportedError: If a parameter is used in a way that no rule covers, or samples mix.
            ConfigError: If the batch is to be computed in parts.
        """
        losses = self.prepare(batch)
        gradients = rows or new_rows(batch)
        factored = self._factored(batch)
        self._leaves.factor({index: n * len(batch) for index, n in factored.items()})
        weights = losses.mean_weights()

        def differentiate() -> None:
            try:
                losses.differentiate(values, weights, gradients)
            finally:
                if self._checking and batch.reduction.world_size > 1:
                    gradients.close()  # other ranks wait for what this one has not sent

        with losses.watched(self._spare(batch, gradients, len(losses.tasks))):
            values = self._tried(lambda: batch.evaluate(losses.rows), batch)
            gradients.begin(
                losses.tasks,
                samples=batch.samples,
                factored=factored,
                sample_tasks=batch.tasks_of(losses.rows),
            )
            self._tried(differentiate, batch)
        batch.record(losses.rows, values)
        return gradients

    def _tried(self, attempt: Callable[[], T], batch: TaskBatch) -> T:
        """The result of `attempt`; a refusal is one of all ranks, if they still agree on it."""
        attempt = partial(_compiled_whole, attempt)
        if self._checking or batch.reduction.world_size == 1:
            return together(attempt, batch)
        try:
            return attempt()
        except UnsupportedError as error:
            # In each step, agreement would make the host wait between forward and backward pass.
            raise ConfigError(
                f"{error}; several ranks can fall back on the loop in their first steps only, "
                "found this in a later one; use the loop from the start"
            ) from error

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
        known = [parameter() for parameter in self._parameters]
        if [*map(id, known)] != [*map(id, batch.shared)]:  # some may be thawed
            self._parameters, self._num_checks = [weakref.ref(p) for p in batch.shared], 0
            self._missing, self._layers = set(range(len(batch.shared))), {}
            self._unknown = True
        losses = SortedLosses(batch, self._leaves)
        self._checking = self._unknown and self._num_checks < _MOST_CHECKS
        if self._checking:
            together(lambda: self._check(losses), batch)
            self._agree(batch)
        return losses

    def _check(self, losses: SortedLosses) -> None:
        """Check mixing, if some parameter is not checked yet and this batch has several tasks."""
        # The uses of each layer too are known from a check.
        due = not self._layers or (self._missing and len(losses.tasks) > 1)
        self._num_checks += bool(due) or losses.batch.reduction.world_size > 1
        if due:
            self._check_samples_do_not_mix(losses)

    def _agree(self, batch: TaskBatch) -> None:
        """Make what the next steps depend on equal on all ranks."""
        if batch.reduction.world_size == 1:
            self._unknown = bool(self._missing)
            return
        found = [self._layers.get(id(p), (0, 0)) for p in batch.shared]
        table = torch.tensor(
            [[uses == 1, n, n * n] for uses, n in found] + [[bool(self._missing)] * 3]
        )
        ranks, table = batch.reduction.world_size, table.to(batch.shared[0].device)
        *sums, (unknown, _, _) = batch.reduction.all_reduce_(table).tolist()
        self._unknown = unknown > 0
        for p, (uses, _), (once, total, squares) in zip(batch.shared, found, sums, strict=True):
            same = once == ranks and total * total == ranks * squares
            self._layers[id(p)] = uses, total // ranks if same else 0

    def _check_samples_do_not_mix(self, losses: SortedLosses) -> None:
        """Differentiate the loss of the first task: any gradient at the others is mixing."""
        batch, reached = losses.batch, _Reached()
        first = torch.arange(len(batch)) < losses.sizes[0]
        state.uses, state.positions = {}, {}
        self._leaves.factor({})
        try:
            # Eagerly, where uses can be counted and no graph is compiled that is used only once.
            with undisturbed(batch.shared[0].device), eagerly(), losses.watched():
                weights = first.double().to(batch.tasks.device, non_blocking=True)
                losses.differentiate(batch.evaluate(losses.rows), weights, reached)
            uses, positions = state.uses, state.positions
        finally:
            state.uses = None
        self._layers = {key: (count, positions.get(key, 0)) for key, count in uses.items()}
        by_first, by_others = reached.answers()
        if any(by_others):
            raise UnsupportedError(
                "engine: one pass needs layers whose first dimension is the batch and that do not "
                "mix samples; found a sample's loss that depends on another sample"
            )
        if len(losses.tasks) > 1:
            pairs = zip(reached.indices, by_first, strict=True)
            self._missing.difference_update(index for index, was in pairs if was)

    def _factored(self, batch: TaskBatch) -> dict[int, int]:
        """Weights whose factors are smaller than one gradient, and positions for each sample."""
        samples = batch.num_on_all_ranks  # all ranks must decide alike
        found = {}
        for index, p in enumerate(batch.shared):
            uses, positions = self._layers.get(id(p), (0, 0))
            # The gradient of a weight that is used twice is a sum over both uses; its Gramian would
            # need the products of the factors of one use with those of the other.
            if uses == 1 and positions and has_small_factors(positions * samples, p):
                found[index] = positions
        return found

    def _spare(
        self, batch: TaskBatch, gradients: DenseTaskGradients, num_tasks: int
    ) -> dict[int, Tensor]:
        """Memory of the last step for weights that are used once."""
        found = {}
        for index, p in enumerate(batch.shared):
            if self._layers.get(id(p), (0, 0))[0] == 1:
                block = gradients.spare(index, num_tasks)
                if block is not None:
                    found[index] = block
        return found


class _Reached:
    """For each parameter: whether the gradients of the first task, and of others, are not 0."""

    def __init__(self) -> None:
        self.indices: list[int] = []
        self._found: list[Tensor] = []

    def receive(self, index: int, block: Tensor) -> None:
        """Look at the gradients of one parameter."""
        # NaN != 0 is true: an overflow must not be taken for a dependence between samples.
        tasks = ((block != 0) & block.isfinite()).reshape(len(block), -1).any(1)
        self.indices.append(index)
        self._found.append(torch.stack([tasks[0], tasks[1:].any()]))

    def receive_factors(self, index: int, left: Tensor, right: Tensor) -> None:
        """Not called: the check is made without factors."""
        raise AssertionError

    def answers(self) -> tuple[list[bool], list[bool]]:
        """Of each of `indices`: reached by the first task, and by others."""
        if not self._found:
            return [], []
        first, others = torch.stack(self._found).T.cpu().tolist()
        return first, others


def _compiled_whole(attempt: Callable[[], T]) -> T:
    """The result of `attempt`; what the compiler cannot take is a refusal."""
    try:
        return attempt()
    except Exception as error:
        compiler = sys.modules.get("torch._dynamo.exc")
        if compiler is None or not isinstance(error, compiler.TorchDynamoException):
            raise
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedError(
            f"engine: one pass needs a network that compiles with task gradients, found: {reason}"
        ) from error


def eagerly() -> AbstractContextManager[object]:
    """Context in which compiled networks run as they were written."""
    # Only where something may be compiled: the import takes a second.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance
