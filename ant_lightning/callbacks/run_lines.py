"""Lines that tell the user what a run starts from and where its files are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L

from ant_lightning.callbacks.base import RunCallback, callback_of
from ant_lightning.callbacks.ema import EMA
from ant_lightning.models.backbone import backbone_name
from ant_lightning.models.settings_checks import warn_of_random_base
from ant_lightning.runtime.checkpoints import Checkpoints
from ant_lightning.runtime.run_record import run_folder

if TYPE_CHECKING:
    from collections.abc import Sequence


class RunLines(RunCallback):
    """Prints where a run and its checkpoint are, and which weights an evaluation uses.

    The command line installs it, so that it also warns of what only settings can be blamed for.

    Args:
        called: What the user calls the command, by default as the Trainer does: `diagnose` is a
            validation.
        changes: Lines about settings that a resumed run takes instead of the checkpoint's; printed
            when the checkpoint has been accepted.
    """

    module_type = L.LightningModule  # also an autoencoder

    def __init__(self, called: str | None = None, changes: Sequence[str] = ()) -> None:
        super().__init__()
        self.called = called
        self.changes = changes
        self._trained = False
        self._has_table = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warn of an adapter on random weights, which a module made of settings may have."""
        if getattr(pl_module, "adapter", None) is not None and pl_module.init_from is None:
            warn_of_random_base(pl_module.backbone)  # type: ignore[arg-type]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the network, the steps and the folder."""
        self._trained = True
        for line in self.changes:
            _print(trainer, line)
        backbone: Any = pl_module.backbone
        every = sum(p.numel() for p in backbone.parameters())
        count = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
        some = "" if 2 * count > every else f" trained of {_count(every)}"
        kind = trainer.strategy.root_device.type
        devices = kind if trainer.world_size == 1 else f"{trainer.world_size} x {kind}"
        start = f"step {trainer.global_step}"
        if trainer.ckpt_path:
            start += f" of {_shown(trainer.ckpt_path)}"
        steps = trainer.estimated_stepping_batches
        end = f" to {steps:.0f}" if steps < float("inf") else ""
        folder = _shown(run_folder(trainer))
        _print(
            trainer,
            f"fit: {backbone_name(backbone)} with {_count(count)}{some} parameters on {devices}, "
            f"from {start}{end}, in {folder}",
        )
        first = _first_validation(trainer)
        if trainer.enable_validation and trainer.global_step < steps < first < float("inf"):
            _print(
                trainer,
                f"fit: the first validation would be at step {first:.0f}, so this run shows no "
                "pictures or scores; trainer.val_check_interval sets it",
            )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Print the last checkpoint."""
        if stage != "fit":
            return
        saved = callback_of(trainer, Checkpoints)
        path = saved and (saved.last_model_path or saved.best_model_path)
        where = f"checkpoint {_shown(path)}" if path else "no checkpoint was written"
        # Lightning skips `on_train_start` if the checkpoint already has all steps.
        ended = "ended" if self._trained else "nothing left to train, the checkpoint is"
        _print(trainer, f"fit: {ended} at step {trainer.global_step}, {where}")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print which weights an evaluation uses; validations of `fit` print nothing."""
        command = trainer.state.fn
        if command is None or command == "fit":
            return
        initial = getattr(pl_module, "init_from", None)
        weights = f"weights of {initial}" if initial else "untrained weights, without a ckpt_path"
        if trainer.ckpt_path:
            ema = callback_of(trainer, EMA)
            averaged = "averaged (EMA) " if ema is not None and ema.num_updates else ""
            steps = getattr(pl_module, "trained_steps", 0)
            weights = f"{averaged}weights of {_shown(trainer.ckpt_path)}"
            weights += f" at step {steps}" if steps else ""
        _print(trainer, f"{self.called or command.value}: {weights}")
        loop = {"validate": trainer.validate_loop, "test": trainer.test_loop}.get(command.value)
        if loop is not None and loop.verbose:  # Lightning's table has 16 digits and "DataLoader 0"
            self._has_table, loop.verbose = True, False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the values that an evaluation has measured."""
        if self._has_table:
            self._has_table = False
            for name, value in sorted(trainer.callback_metrics.items()):
                if name != "step":
                    _print(trainer, f"{name:34} {float(value):.6g}")

    on_test_end = on_validation_end
    on_test_start = on_validation_start
    on_predict_start = on_validation_start


def _first_validation(trainer: L.Trainer) -> float:
    """The step of a run's first validation; 0 if it has none, or has them by the clock."""
    epochs_before = (trainer.check_val_every_n_epoch or 1) - 1
    interval = trainer.val_check_batch or 0
    return interval and epochs_before * trainer.num_training_batches + interval


def _shown(path: str | Path) -> str:
    """The path as the user would type it: relative if it is below the working directory."""
    here = Path.cwd()
    if "://" not in str(path) and Path(path).is_relative_to(here):
        return str(Path(path).relative_to(here))
    return str(path)


def _count(number: int) -> str:
    """The number with three digits: 330 K, 1.23 M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _print(trainer: L.Trainer, line: str) -> None:
    if trainer.is_global_zero:
        print(line, flush=True)
