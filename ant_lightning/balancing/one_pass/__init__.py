"""The gradients of all tasks from one forward and one backward pass."""

from ant_lightning.balancing.one_pass.engine import OnePass
from ant_lightning.balancing.one_pass.low_memory import LowMemory

__all__ = ["LowMemory", "OnePass"]
