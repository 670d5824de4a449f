"""What the steps of a run share: the engine, and the buffers in which gradients are made."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from ant_lightning.balancing.buckets import ArrivalOrder
from ant_lightning.balancing.local_parts import is_sharded
from ant_lightning.balancing.one_pass import LowMemory
from ant_lightning.balancing.placed_gradients import PlacedTaskGradients

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from ant_lightning.balancing.base import Balancer
    from ant_lightning.balancing.differentiation import Differentiation
    from ant_lightning.balancing.engines import Engine
    from ant_lightning.balancing.gradients import DenseTaskGradients
    from ant_lightning.balancing.reduction import Reduction
    from ant_lightning.balancing.task_batch import TaskBatch


class Buffers:
    """An engine, and the buffers of the steps that it makes.

    Args:
        engine: How task gradients are computed. It keeps what it learns about a network.
        placed: Whether ranks have samples of few tasks.

    Attributes:
        differentiation: That of the last step, to be given to the batch of the next.
    """

    def __init__(self, engine: Engine, *, placed: bool = False) -> None:
        self.engine = engine
        self.placed = placed
        self.differentiation: Differentiation | None = None
        self._rows: DenseTaskGradients | None = None
        self._asleep: list[weakref.ref[Tensor]] = []
        self._reduction: Reduction | None = None
        self._known: dict[str, list[int]] = {}  # orders of arrival of an earlier run

    def orders(self) -> dict[str, list[int]]:
        """The orders of arrival that the next step uses, for a resumed run; on rank 0."""
        found = {**self._known}  # what no step has used yet
        if self._rows is not None and self._rows.order is not None:
            found["rows"] = self._rows.order.known()
        if self.differentiation is not None:
            buckets, known = self.differentiation.buckets, self.differentiation.known_order
            found["gradients"] = [*known] if buckets is None else buckets.order.known()
        return {kind: order for kind, order in found.items() if order}

    def load_orders(self, orders: Mapping[str, Sequence[int]]) -> None:
        """Begin with these orders, the same on all ranks."""
        self._known = {kind: [*each] for kind, each in orders.items()}

    def adopt(self, differentiation: Differentiation) -> None:
        """Keep what a batch is differentiated by, for the batches after it."""
        self.differentiation = differentiation
        if "gradients" in self._known:
            differentiation.known_order = self._known.pop("gradients")

    def rows(self, batch: TaskBatch, balancer: Balancer) -> DenseTaskGradients | None:
        """Buffers for task gradients; `None` if this step, or the engine, has no use for them."""
        if not balancer.refresh_due or isinstance(self.engine, LowMemory):
            return None
        if self._rows is None or self._rows.num_tasks != batch.num_tasks:
            if self.placed and batch.reduction.world_size > 1:
                self._rows = PlacedTaskGradients(
                    batch.num_tasks, batch.shared, reduction=batch.reduction
                )
            else:
                self._rows = batch.differentiation.new_rows(batch.num_tasks)
            known = self._known.pop("rows", ())
            if known and self._rows.order is not None:
                self._rows.order = ArrivalOrder(len(batch.shared), batch.reduction, known)
        self._rows.bind(batch.shared)
        # If most steps need no task gradients, free the buffers after use, so that they take no
        # memory beside the activations of those steps.
        self._rows.keep = balancer.update_every == 1
        return self._rows

    def sleep(self, batch: TaskBatch) -> None:
        """Hold no parameter until `wake`, so that a network may go while its buffers are kept."""
        if is_sharded(batch.shared):
            self.drop()
            return
        self.differentiation, self._reduction = batch.differentiation, batch.reduction
        self._asleep = [weakref.ref(p) for p in batch.shared]
        self._set_parameters([])

    def wake(
        self, shared: Sequence[nn.Parameter], reduction: Reduction, *, given: bool
    ) -> Reduction:
        """Take the buffers of the last step up again, if they are for these parameters and ranks.

        Args:
            shared: Parameters of the next step.
            reduction: How it sums over ranks.
            given: Whether this object is the user's; one that was made by default may be replaced.

        Returns:
            The reduction of the buffers.
        """
        old = self._reduction
        ranks = reduction.world_size, reduction.rank
        if given:
            same = old is reduction
        else:
            by_default = type(old) is type(reduction) and getattr(old, "group", None) is None
            same = by_default and (old.world_size, old.rank) == ranks  # type: ignore[union-attr]
        known = [each() for each in self._asleep]
        if old is not None and same and [*map(id, known)] == [*map(id, shared)]:
            self._set_parameters(shared)
            return old
        self.drop()
        return reduction

    def drop(self) -> None:
        """Forget the buffers."""
        self.differentiation = self._rows = self._reduction = None
        self._asleep = []

    def _set_parameters(self, parameters: Sequence[nn.Parameter]) -> None:
        if self.differentiation is not None:
            self.differentiation.parameters = list(parameters)
            if self.differentiation.buckets is not None:
                self.differentiation.buckets.parameters = list(parameters)
        if self._rows is not None:
            self._rows.parameters = list(parameters)
