"""The interface of the engines, which compute task gradients, and the loop over tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from ant_lightning.balancing.local_parts import is_sharded
from ant_lightning.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from ant_lightning.balancing.gradients import DenseTaskGradients, TaskGradients
    from ant_lightning.balancing.task_batch import TaskBatch


class Engine(ABC):
    """Computes the gradients of the tasks' mean losses; all engines give the same result."""

    @abstractmethod
    def task_gradients(
        self, batch: TaskBatch, rows: DenseTaskGradients | None = None
    ) -> TaskGradients:
        """Gradients of the mean loss of each task; records the losses of all samples in `batch`.

        Args:
            batch: The samples of this rank.
            rows: Buffers that are reused, by an engine that needs any.
        """


class Loop(Engine):
    """A forward and a backward pass over the samples of each task in turn.

    The samples of the tasks are disjoint, so this is the arithmetic of one pass in `k` times as
    many calls, with the activations of one task at a time. It works with any network, and with
    `torch.compile`, accumulation and gradient checkpointing.
    """

    def task_gradients(
        self, batch: TaskBatch, rows: DenseTaskGradients | None = None
    ) -> DenseTaskGradients:
        """Row i is the sum of the gradients of the parts of task i."""
        gradients = rows or new_rows(batch)

        # A generator: `write` adds up one part before the next is computed, so the gradients of at
        # most one part exist beside the row.
        def parts(task: int, passes: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
            count = batch.num_samples[task].clamp(min=1)
            for part in passes:
                losses = batch.losses_of(part)
                grads = batch.gradients_of(losses.sum() / count.to(losses.dtype))
                # The loss scale protects the backward pass in float16. Rows are float32, and the
                # Gramian must not contain it.
                if batch.is_scaled:
                    torch._foreach_div_(grads, batch.loss_scale)
                yield grads

        gradients.begin(samples=batch.samples)
        groups = [batch.order[start:stop] for start, stop in pairwise(batch.starts)]
        for task, passes in enumerate(batch.passes(groups)):
            gradients.write(task, parts(task, passes))
        return gradients


def new_rows(batch: TaskBatch) -> DenseTaskGradients:
    """Buffers for the gradients of a batch."""
    return batch.differentiation.new_rows(batch.num_tasks)


def check_whole(batch: TaskBatch, engine: str) -> None:
    """Refuse sharded parameters and a batch that is computed in parts.

    Raises:
        ConfigError: If the batch is computed in parts.
        UnsupportedError: If a parameter is sharded.
    """
    if is_sharded(batch.shared):
        raise UnsupportedError(
            f"engine: {engine} needs whole parameters, found some that are sharded over ranks"
        )
    if batch.in_parts:
        raise ConfigError(
            f"micro_batch_size: the engine {engine} needs the whole batch of {len(batch)} in one "
            f"pass, found {batch.micro_batch_size}; Loop computes it in parts"
        )
