"""`Auto`: chooses an engine by the cost of a forward pass over one task."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from ant_lightning.balancing.agreement import together
from ant_lightning.balancing.engines import Engine, Loop
from ant_lightning.balancing.local_parts import is_sharded
from ant_lightning.balancing.one_pass import LowMemory, OnePass
from ant_lightning.balancing.one_pass.engine import eagerly
from ant_lightning.errors import ConfigError, UnsupportedError
from ant_lightning.randomness import undisturbed

if TYPE_CHECKING:
    from ant_lightning.balancing.gradients import DenseTaskGradients, TaskGradients
    from ant_lightning.balancing.task_batch import TaskBatch

EngineName = Literal["auto", "loop", "one_pass", "low_memory"]

# Thresholds (in total, for each parameter) on the multiplications of a forward pass over one task.
# Above both, the loop is as fast as one pass. Measured on a CPU: with 330 for each parameter the
# loop runs at 0.93 and one pass at 0.95 of vanilla's speed; with 1300 both run at vanilla's speed.
# On an H200, with 1.1e12 in total, the loop runs at 0.81 (call overhead) and one pass at 0.95. The
# threshold for each parameter on a GPU is an estimate.
_CPU = (1e9, 600)
_OTHERS = (1e13, 8192)
_ADAPTER = 0.1


class Auto(Engine):
    """`OnePass` where it is faster and supported, otherwise `Loop`.

    The loop holds the activations of one task, a k-th of those of `OnePass`. It is as fast once a
    forward pass over one task has 1e9 multiplications in total and 600 for each parameter (on a
    GPU 1e13 and 8192, the latter an estimate). Multiplications are counted once, in a forward pass
    over two samples before the first call; those of attention are left out. The loop is also used
    for networks that `OnePass` does not support (detected in the first steps, and said once), for
    sharded parameters, and for batches that are computed in parts. All ranks make the same choice:
    what one of them finds unsupported is so for all.

    Args:
        trained_share: Share of the network's weights that is trained. Below a tenth, as with an
            adapter, one pass holds next to nothing for each task, and the loop is never faster.

    Attributes:
        used: The engine of the last call; the loop before the first.
        reason: Why `OnePass` is not used, or `None`.
    """

    def __init__(self, trained_share: float = 1.0) -> None:
        self.trained_share = trained_share
        self._one_pass = OnePass()
        self._loop = Loop()
        self._per_sample: float | None = None
        self.used: Engine = self._loop
        self.reason: str | None = None

    def task_gradients(
        self, batch: TaskBatch, rows: DenseTaskGradients | None = None
    ) -> TaskGradients:
        """Task gradients by the chosen engine."""
        possible = self.reason is None and not batch.in_parts and not is_sharded(batch.shared)
        if possible and not self._bound_by_sums(batch):
            try:
                self.used = self._one_pass
                return self.used.task_gradients(batch, rows)
            except UnsupportedError as error:
                # On all ranks. `OnePass` is not tried again: each try costs a forward pass.
                self.reason = str(error)
                if batch.reduction.rank == 0:
                    warnings.warn(f"{error}; auto uses the loop from now on", stacklevel=2)
        self.used = self._loop
        return self.used.task_gradients(batch, rows)

    def _bound_by_sums(self, batch: TaskBatch) -> bool:
        """Whether a pass over one task is long enough to hide the call overhead of the loop."""
        if self.trained_share < _ADAPTER:
            return False
        # Counted, not timed: a resumed run then makes the same choice. Means over ranks, whose
        # samples may differ in size and number.
        ranks = batch.reduction.world_size
        if self._per_sample is None:
            self._per_sample = own = together(lambda: multiplications(batch), batch)
            if ranks > 1:  # the host waits, once
                total = torch.tensor(own, dtype=torch.float64, device=batch.shared[0].device)
                self._per_sample = float(batch.reduction.all_reduce_(total)) / ranks
        of_task = self._per_sample * batch.num_on_all_ranks / (ranks * batch.num_tasks)
        in_all, for_each = _CPU if batch.shared[0].device.type == "cpu" else _OTHERS
        return of_task >= max(in_all, for_each * sum(p.numel() for p in batch.shared))


_ENGINES: dict[str, type[Engine]] = {
    "auto": Auto,
    "loop": Loop,
    "one_pass": OnePass,
    "low_memory": LowMemory,
}


def make_engine(name: EngineName, trained_share: float = 1.0) -> Engine:
    """A new engine; `trained_share` is for `Auto`.

    Raises:
        ConfigError: If there is no engine of that name.
    """
    if name not in _ENGINES:
        raise ConfigError(f"engine: must be one of {sorted(_ENGINES)}, found {name!r}")
    return Auto(trained_share) if name == "auto" else _ENGINES[name]()


# `mm` and `addmm` are the linear layers.
_LAYERS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution}


@torch.no_grad()
def multiplications(batch: TaskBatch) -> float:
    """Number of multiplications of a forward pass over one sample, without side effects.

    The random generators are restored. Autocast's cache is off, because it would hold copies of
    the weights until the step is over.
    """
    rows, counter = batch.order[:2], FlopCounterMode(display=False)
    caching = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        # A counter cannot look into a compiled network.
        with undisturbed(batch.shared[0].device), warnings.catch_warnings(), eagerly(), counter:
            # The counter's hooks on modules end with it.
            warnings.filterwarnings("ignore", "Using `torch.compile.*global hooks", UserWarning)
            batch.evaluate(rows)
    finally:
        torch.set_autocast_cache_enabled(caching)
    flops = counter.get_flop_counts().get("Global", {})
    # The counter counts a multiplication and its addition as two operations.
    return sum(flops.get(layer, 0) for layer in _LAYERS) / 2 / len(rows)
