"""Exponential moving average of the backbone's weights, which evaluation and sampling use."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning as L
import torch

from ant_lightning.balancing.shards import from_full, full_tensor, local_part
from ant_lightning.errors import ConfigError
from ant_lightning.modules.sharding import reshard

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from ant_lightning.modules import MultiTaskDiffusion

__all__ = ["EMA", "averaged_weights"]


class EMA(L.Callback):
    """Keeps `m <- d m + (1 - d) w` of the backbone's weights `w` after every optimizer step.

    With warm-up `d = min(decay, (1 + n) / (10 + n))` at the n-th update, so that a short run is
    not held back by its initial weights. Validation, test and prediction run on the averages; the
    live weights are put back afterwards, also after an exception, and are what a checkpoint holds.
    A skipped step does not move the averages. The state is a dict of float32 tensors in the
    callback's part of the checkpoint, not a second copy of the model in its `state_dict`.

    Args:
        decay: `d`, from 0 (no averaging) up to but not 1.
        warmup: Whether `d` starts small.

    Raises:
        ConfigError: If `decay` is out of range.
    """

    def __init__(self, *, decay: float = 0.9999, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"ema.decay: must be at least 0 and below 1, found {decay}")
        self.decay = decay
        self.warmup = warmup
        self.num_updates = 0
        self._averages: dict[str, Tensor] = {}
        self._live: dict[str, Tensor] | None = None
        self._last_step = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:  # type: ignore[override]
        """Start from the weights, unless a checkpoint brought averages."""
        self._bind(pl_module)
        self._last_step = trainer.global_step

    # A strategy that shards the model loads the averages of a checkpoint later than that.
    on_train_start = on_fit_start  # type: ignore[assignment]

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, *args: Any, **kwargs: Any
    ) -> None:
        """Follow the step that was made, if one was made."""
        if trainer.global_step == self._last_step or pl_module.last_step_skipped:
            self._last_step = trainer.global_step
            return
        self._last_step = trainer.global_step
        self.num_updates += 1
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.num_updates) / (10 + self.num_updates))
        weights = _weights(pl_module)
        torch._foreach_lerp_(
            [self._averages[name] for name in weights],
            [w.detach().float() for w in weights.values()],
            1 - decay,
        )

    @contextmanager
    def averaged(self, pl_module: MultiTaskDiffusion) -> Iterator[None]:
        """Inside, the backbone has the averaged weights."""
        if self._live is not None:  # an evaluation loop swapped them already
            yield
            return
        self._swap_in(pl_module)
        try:
            yield
        finally:
            self._swap_out(pl_module)

    @contextmanager
    def live(self, pl_module: MultiTaskDiffusion) -> Iterator[None]:
        """Inside, the backbone has the weights that are trained."""
        swapped = self._live is not None
        self._swap_out(pl_module)
        try:
            yield
        finally:
            if swapped:
                self._swap_in(pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:  # type: ignore[override]
        """Evaluate the averages."""
        self._swap_in(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:  # type: ignore[override]
        """Go on training the live weights."""
        self._swap_out(pl_module)

    on_test_start = on_validation_start  # type: ignore[assignment]
    on_test_end = on_validation_end  # type: ignore[assignment]
    on_predict_start = on_validation_start  # type: ignore[assignment]
    on_predict_end = on_validation_end  # type: ignore[assignment]

    def on_exception(  # type: ignore[override]
        self,
        trainer: L.Trainer,
        pl_module: MultiTaskDiffusion,
        exception: BaseException,
    ) -> None:
        """An evaluation that failed must not leave the averages in the model."""
        self._swap_out(pl_module)

    def on_save_checkpoint(  # type: ignore[override]
        self,
        trainer: L.Trainer,
        pl_module: MultiTaskDiffusion,
        checkpoint: dict[str, Any],
    ) -> None:
        """A checkpoint that is written during an evaluation holds the live weights as well."""
        for name, weight in (self._live or {}).items():
            checkpoint["state_dict"][f"backbone.{name}"] = full_tensor(weight)

    def state_dict(self) -> dict[str, Any]:
        """The averages and how many updates made them."""
        averages = {name: full_tensor(value) for name, value in self._averages.items()}
        return {"averages": averages, "num_updates": self.num_updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the averages of a checkpoint; they are bound to the model when it starts."""
        self._averages = {name: value.clone() for name, value in state_dict["averages"].items()}
        self.num_updates = int(state_dict["num_updates"])

    def _bind(self, pl_module: MultiTaskDiffusion) -> None:
        """Have one average for each weight, on its device."""
        weights = _weights(pl_module)
        if self._averages and {n: v.shape for n, v in self._averages.items()} != {
            n: w.shape for n, w in weights.items()
        }:
            raise ConfigError("ckpt_path: its EMA weights are those of another backbone")
        start = self._averages or weights
        self._averages = {
            name: from_full(
                start[name].detach().to(weight.device, torch.float32, copy=not self._averages),
                weight,
            )
            for name, weight in weights.items()
        }

    def _swap_in(self, pl_module: MultiTaskDiffusion) -> None:
        if self._live is not None:
            return
        self._bind(pl_module)
        weights = _weights(pl_module)
        self._live = {name: w.detach().clone() for name, w in weights.items()}
        _copy(self._averages, weights)

    def _swap_out(self, pl_module: MultiTaskDiffusion) -> None:
        if self._live is not None:
            reshard(pl_module)
            _copy(self._live, _weights(pl_module))
            self._live = None


@contextmanager
def averaged_weights(trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> Iterator[None]:
    """Inside, `pl_module` has its EMA weights if the trainer keeps them."""
    callback = next((c for c in trainer.callbacks if isinstance(c, EMA)), None)  # type: ignore[attr-defined]
    if callback is None:
        yield
        return
    with callback.averaged(pl_module):
        yield


def _weights(pl_module: MultiTaskDiffusion) -> dict[str, Tensor]:
    """The trainable weights of the backbone by name."""
    named = pl_module.backbone.named_parameters()
    return {name: p for name, p in named if p.requires_grad}


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    names = list(target)
    torch._foreach_copy_(
        [local_part(target[n]) for n in names], [local_part(source[n]) for n in names]
    )
