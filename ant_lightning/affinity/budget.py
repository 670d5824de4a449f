"""How a memory budget is spent on the rows of gradients and on the products made from them."""

from __future__ import annotations

from dataclasses import dataclass

from ant_lightning.affinity.gram import BYTES_PER_NUMBER
from ant_lightning.errors import ConfigError

__all__ = ["MemoryPlan", "plan_memory"]

_WORK_BYTES = 1 << 28  # of a slice of columns; larger ones are not faster
_LEAST_COLUMNS = 256  # narrower slices would spend their time opening files
_MIXING_BYTES = 4 << 24  # of the blocks that a sketch has in hand


@dataclass(frozen=True)
class MemoryPlan:
    """Whether rows stay in memory, and how large a slice of their columns may be.

    Attributes:
        in_memory: False if the rows must go to disk.
        work_bytes: Memory of a slice of columns.
    """

    in_memory: bool
    work_bytes: int


def plan_memory(
    budget_bytes: int | None,
    *,
    num_points: int,
    num_own: int,
    num_parameters: int,
    sketch_dim: int | None,
) -> MemoryPlan:
    """Choose for `num_points` timesteps of which this rank has `num_own`.

    Args:
        budget_bytes: What may be used; None keeps rows in memory.
        num_points: `n`.
        num_own: Timesteps of this rank.
        num_parameters: `p`.
        sketch_dim: `m`, or None for whole rows.

    Raises:
        ConfigError: If the budget is below what one timestep and the products need.
    """
    if budget_bytes is None:
        return MemoryPlan(in_memory=True, work_bytes=_WORK_BYTES)
    width = sketch_dim or num_parameters
    column_bytes = 2 * num_points * BYTES_PER_NUMBER
    products = 3 * (2 * num_points) ** 2 * 8
    least_work = column_bytes * min(width, _LEAST_COLUMNS)
    one_timestep = 12 * num_parameters
    if sketch_dim is not None:
        one_timestep = 6 * num_parameters + _MIXING_BYTES
    least = max(one_timestep, products + least_work)
    if budget_bytes < least:
        raise ConfigError(
            f"memory_budget_bytes: must be at least {least} ({num_parameters} parameters, "
            f"{num_points} timesteps), found {budget_bytes}"
        )
    rows = num_own * (8 * width if sketch_dim is None else 4 * width)
    in_memory = rows + least <= budget_bytes
    free = budget_bytes - products - (rows if in_memory else 0)
    return MemoryPlan(in_memory=in_memory, work_bytes=max(least_work, min(_WORK_BYTES, free)))
