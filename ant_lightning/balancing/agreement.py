"""Attempts that all ranks make at the same place of a step: they succeed on all or on none."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch

from ant_lightning.errors import UnsupportedError, message_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from ant_lightning.balancing.task_batch import TaskBatch

T = TypeVar("T")

_MOST_BYTES = 1000  # of a message


def together(attempt: Callable[[], T], batch: TaskBatch) -> T:
    """The result of `attempt`, if it succeeds on every rank; on one process, `attempt()`.

    Every rank calls this at the same place of a step. It sends two numbers for each rank, and the
    host waits for them. `attempt` itself must not wait for other ranks.

    Raises:
        UnsupportedError: On all ranks, if a rank raised one: the message of the first such rank.
        RuntimeError: If another rank raised another error; this rank's own error comes first.
    """
    ranks, rank, device = batch.reduction.world_size, batch.reduction.rank, batch.shared[0].device
    if ranks == 1:
        return attempt()
    error: Exception | None = None
    try:
        found = attempt()
    except Exception as raised:  # whatever it is, the other ranks must not wait for this one
        error = raised
    refused = isinstance(error, UnsupportedError)
    text = b"" if error is None else message_of(error).encode()[:_MOST_BYTES]
    table = torch.zeros(ranks, 2, dtype=torch.int64)
    if error is not None:
        table[rank] = torch.tensor([1 if refused else 2, len(text)])
    kinds, lengths = batch.reduction.all_reduce_(table.to(device)).T.tolist()
    if not any(kinds):
        return found
    first = kinds.index(max(kinds))
    letters = torch.zeros(lengths[first], dtype=torch.int64)
    if rank == first:
        letters += torch.tensor([*text], dtype=torch.int64)
    sent = bytes(batch.reduction.all_reduce_(letters.to(device)).tolist())
    if error is not None and not refused:
        raise error
    message = sent.decode(errors="replace")
    if max(kinds) == 2:
        raise RuntimeError(f"rank {first} failed, and all ranks stop: {message}") from error
    raise UnsupportedError(message) from error
