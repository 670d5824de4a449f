"""Lines that tell the user what a run starts from and where its files are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L

from ant_lightning.callbacks.ema import EMA
from ant_lightning.runtime.checkpoints import Checkpoints
from ant_lightning.runtime.run_record import run_folder

if TYPE_CHECKING:
    from typing import Any

__all__ = ["RunLines"]


class RunLines(L.Callback):
    """Prints where a run and its checkpoint are, and which weights an evaluation uses."""

    def __init__(self) -> None:
        self._trained = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the network, the steps and the folder."""
        self._trained = True
        backbone = pl_module.backbone
        count = sum(p.numel() for p in backbone.parameters() if p.requires_grad)  # type: ignore[union-attr,misc]
        start = f"step {trainer.global_step}"
        if trainer.ckpt_path:
            start += f" of {_shown(trainer.ckpt_path)}"
        steps = trainer.estimated_stepping_batches
        end = f" to {steps:.0f}" if steps < float("inf") else ""
        _say(
            trainer,
            f"fit: {type(backbone).__name__} with {_count(count)} parameters on "
            f"{_devices(trainer)}, from {start}{end}, in {_shown(run_folder(trainer))}",
        )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Print the last checkpoint."""
        if stage != "fit":
            return
        saved = next((each for each in _callbacks(trainer) if isinstance(each, Checkpoints)), None)
        path = saved and (saved.last_model_path or saved.best_model_path)
        where = f"checkpoint {_shown(path)}" if path else "no checkpoint was written"
        ended = "ended" if self._trained else "nothing left to train, the checkpoint is"
        _say(trainer, f"fit: {ended} at step {trainer.global_step}, {where}")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print which weights an evaluation uses; validations of `fit` print nothing."""
        command = trainer.state.fn
        if command is not None and command != "fit":
            _say(trainer, f"{command.value}: {_weights(trainer, pl_module)}")

    on_test_start = on_validation_start
    on_predict_start = on_validation_start


def _weights(trainer: L.Trainer, pl_module: Any) -> str:  # noqa: ANN401 - each module has its own
    """Where the weights come from."""
    initial = getattr(pl_module, "init_from", None)
    if not trainer.ckpt_path:
        return f"weights of {initial}" if initial else "untrained weights, as there is no ckpt_path"
    averages = any(isinstance(each, EMA) and each.num_updates for each in _callbacks(trainer))
    steps = getattr(pl_module, "trained_steps", 0)
    at = f" at step {steps}" if steps else ""
    return f"{'averaged (EMA) ' if averages else ''}weights of {_shown(trainer.ckpt_path)}{at}"


def _shown(path: str | Path) -> str:
    """The path as the user would type it: relative if it is below the working directory."""
    here, local = Path.cwd(), "://" not in str(path)
    if local and Path(path).is_absolute() and Path(path).is_relative_to(here):
        return str(Path(path).relative_to(here))
    return str(path)


def _devices(trainer: L.Trainer) -> str:
    kind = trainer.strategy.root_device.type
    return kind if trainer.world_size == 1 else f"{trainer.world_size} x {kind}"


def _count(number: int) -> str:
    """The number with three digits: 330 K, 1.23 M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _callbacks(trainer: L.Trainer) -> list[L.Callback]:
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def _say(trainer: L.Trainer, line: str) -> None:
    if trainer.is_global_zero:
        print(line, flush=True)
