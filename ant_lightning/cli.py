"""LightningCLI with what every run of this package has: EMA, checkpoints, one-line errors."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import lightning as L
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import ant_lightning.balancing
import ant_lightning.clustering
import ant_lightning.diffusion
import ant_lightning.metrics  # noqa: F401 - short class names in YAML are looked up among imports
from ant_lightning.callbacks import (
    EMA,
    Checkpoints,
    Dashboard,
    GenerationMetrics,
    SampleWriter,
    TrainingProgress,
)
from ant_lightning.data import ImageDataModule
from ant_lightning.errors import ConfigError, FileError
from ant_lightning.files import read_torch
from ant_lightning.messages import one_line
from ant_lightning.modules import StoredImages
from ant_lightning.run_folder import check_writable, resume_from_last

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["AntCLI", "run"]


class AntCLI(LightningCLI):
    """The command line.

    `ema`, `checkpoint` and `samples` are settings of their own and not entries of
    `trainer.callbacks`: a later `--config` may replace that list and cannot lose them.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The callbacks that every run has."""
        parser.add_lightning_class_args(EMA, "ema")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.add_lightning_class_args(SampleWriter, "samples")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.filename": "step_{step}"})

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        """Checkpoints cannot run code; `test` can score images that were drawn before."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.set_defaults({"weights_only": True})
        if subcommand == "test":
            text = "score this folder or npz file of images in place of a checkpoint's"
            parser.add_argument("--images", type=str | None, default=None, help=text)
        return parser

    def before_test(self) -> None:
        """With `--images`, put the stored images where the model is."""
        path = self.config.test.images
        if path is None:
            return
        if self.config.test.ckpt_path is not None:
            raise ConfigError(
                f"images: must not be given with ckpt_path, found {path} and "
                f"{self.config.test.ckpt_path}"
            )
        callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(each, GenerationMetrics) for each in callbacks):
            raise ConfigError(
                f"images: trainer.callbacks needs GenerationMetrics to score {path}, found none"
            )
        # The others want a backbone.
        kept = (GenerationMetrics, ProgressBar)
        callbacks[:] = [each for each in callbacks if isinstance(each, kept)]
        self.model = StoredImages(path)
        self.trainer.limit_test_batches = 1

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:  # noqa: ANN401
        """Parse what `main` was given, without Lightning's advice to let it read `sys.argv`."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """A checkpoint never overrides a setting; the modules compare and report instead."""

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Put our progress bar where Lightning's would be, and the page of TensorBoard."""
        trainer = super().instantiate_trainer(**kwargs)
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for i, callback in enumerate(callbacks):
            if isinstance(callback, ProgressBar):
                callbacks[i] = TrainingProgress()
        callbacks.append(Dashboard())
        check_writable(trainer, self._get(self.config_init, "checkpoint").dirpath)
        return trainer

    def instantiate_classes(self) -> None:
        """Make the objects; a setting that one of them refuses is reported in its own words."""
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:
            raise _first_config_error(error) from error

    def before_instantiate_classes(self) -> None:
        """Refuse Trainer flags that manual optimization cannot honour, naming ours."""
        config = self.config[self.config.subcommand]
        _check_checkpoint(config)
        resume_from_last(config, self.config.subcommand)
        settings = config.trainer
        ours = {
            "gradient_clip_val": (None, "model.clip_grad_norm"),
            "gradient_clip_algorithm": (None, "model.clip_grad_norm"),
            "accumulate_grad_batches": (1, "model.accumulate_grad_batches"),
        }
        for name, (neutral, replacement) in ours.items():
            value = settings.get(name)
            if value not in (None, neutral):
                raise ConfigError(
                    f"trainer.{name}: the step of every method is made by the module, so use "
                    f"{replacement} in its place, found {value}"
                )


def _check_checkpoint(config: Any) -> None:  # noqa: ANN401 - a namespace of the parser
    """Refuse a checkpoint that is not there, is damaged or would run code, before anything starts.

    Raises:
        ConfigError: Naming the setting or the file.
    """
    if config.get("weights_only") is not True:
        raise ConfigError(
            "weights_only: must be true, as a checkpoint of ours needs no code to be read, found "
            f"{config.get('weights_only')}; for other files use model.init_from"
        )
    path = config.get("ckpt_path")
    if not path or path in {"last", "best", "hpc"}:
        return
    if not Path(path).exists():
        raise ConfigError(f"ckpt_path: must be a file or folder that exists, found {path}")
    if Path(path).is_file():
        read_torch(path, setting="ckpt_path")


def _first_config_error(error: BaseException) -> ConfigError:
    """Our own error if the parser wrapped one, else the parser's as one of ours."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ConfigError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return ConfigError(one_line(str(error)))


def run(args: Sequence[str]) -> AntCLI:
    """Parse `args` and run the command.

    Raises:
        ConfigError: For anything wrong with the arguments or the files they name.
    """
    try:
        return AntCLI(
            L.LightningModule,
            ImageDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            parser_kwargs={"exit_on_error": False},
            save_config_kwargs={"overwrite": True},
            args=list(args),
        )
    except (ArgumentError, MisconfigurationException) as error:
        raise ConfigError(one_line(str(error))) from error
    except UnpicklingError as error:  # of `last`: a file that is named was looked at before
        raise FileError(
            "ckpt_path: refused, reading the last checkpoint would run code, or it is damaged; "
            "delete it and resume from the one before"
        ) from error
