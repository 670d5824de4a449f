"""LightningCLI with what every run of this package has: EMA, checkpoints, one-line errors."""

from __future__ import annotations

from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

import lightning as L
from jsonargparse import ArgumentError, Namespace, set_dumper, set_loader
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from yaml import YAMLError

from ant_lightning.callbacks.dashboard import Dashboard
from ant_lightning.callbacks.ema import EMA
from ant_lightning.callbacks.progress import TrainingProgress
from ant_lightning.callbacks.run_lines import RunLines
from ant_lightning.callbacks.sample_writer import SampleWriter
from ant_lightning.cli.class_help import with_classes_around
from ant_lightning.cli.config_files import (
    check_config_file,
    config_paths,
    dump_yaml,
    import_named_classes,
    load_yaml,
    plain_settings,
)
from ant_lightning.cli.derived_settings import about_sizes, derived_settings
from ant_lightning.cli.messages import first_config_error, one_line
from ant_lightning.cli.run_folder import (
    RunFolder,
    check_writable,
    choose_run_folder,
    stored_settings,
)
from ant_lightning.cli.setting_paths import SettingPaths
from ant_lightning.cli.trainer_settings import (
    check_run_settings,
    check_trainer_settings,
    trainer_error,
)
from ant_lightning.data.module import ImageDataModule
from ant_lightning.errors import CheckpointWriteError, ConfigError
from ant_lightning.models.resumed_settings import changed_line
from ant_lightning.runtime.changed_settings import changed_settings, flat_settings, trained_settings
from ant_lightning.runtime.checkpoint_files import checkpoint_of_run, read_whole_checkpoint
from ant_lightning.runtime.checkpoints import Checkpoints
from ant_lightning.runtime.loggers import prepare_loggers
from ant_lightning.runtime.quiet import keep_quiet
from ant_lightning.runtime.run_files import remove_empty_run
from ant_lightning.runtime.run_record import RunRecord

if TYPE_CHECKING:
    from collections.abc import Sequence

# The parser then reads every YAML value through our checks.
set_loader("yaml", load_yaml, exceptions=(YAMLError,))
set_dumper("yaml", dump_yaml)


# How a command is called, and what it does.
_HELP = {
    "fit": (
        "--config NAME",
        "Trains. `ant-lightning configs` lists the configs; later ones and options override "
        "earlier ones.",
    ),
    "validate": (
        "RUN",
        "Measures losses and scores of the newest checkpoint in the folder of a run. `--scores "
        "false` leaves the scores out.",
    ),
    "test": ("RUN", "As `validate`, logged as test/loss, test/fid, ..."),
    "predict": (
        "RUN",
        "Writes images of the newest checkpoint in the folder of a run. `--num_images` is short "
        "for `--samples.num_images`.",
    ),
}
_CKPT_PATH = "a checkpoint, the folder of a run, or `last`: the newest of this run"


class AntCLI(LightningCLI):
    """The command line.

    `ema`, `checkpoint` and `samples` are settings of their own, not entries of
    `trainer.callbacks`: a later `--config` that replaces this list must not drop them.
    """

    def __init__(self, *args: Any, command: str, called: str, **kwargs: Any) -> None:
        self.command = command
        self.called = called
        self.run_folder: RunFolder | None = None
        self.changes: list[str] = []
        self.paths = SettingPaths()
        try:
            with self.paths:
                super().__init__(*args, **kwargs)
        except BaseException:  # also Ctrl-C between choosing the folder and the first step
            if self.run_folder is not None:
                remove_empty_run(self.run_folder.made)
            raise

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the command that was asked for: making a parser takes longer than parsing."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the settings of the callbacks that every run has."""
        parser.add_lightning_class_args(EMA, "ema")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.add_lightning_class_args(SampleWriter, "samples")
        parser.add_argument(
            "--scores", type=bool, default=True, help="false leaves GenerationMetrics out"
        )
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.filename": "step_{step}"})
        # `RunLines` replaces Lightning's summary, whose FLOPs are 0 under manual optimization.
        parser.set_defaults({"trainer.enable_model_summary": False})

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        """Load checkpoints with `weights_only`, so that they cannot run code; say what it does."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.set_defaults({"weights_only": True})
        given, parser.description = _HELP[subcommand]
        parser.usage = f"ant-lightning {subcommand} {given} [options]"
        parser._option_string_actions["--ckpt_path"].help = _CKPT_PATH
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:  # noqa: ANN401
        """Parse what `main` was given, without Lightning's advice to let it read `sys.argv`."""
        options = self._subcommand_parsers[args[0]]._option_string_actions
        try:
            self.config = parser.parse_args(args)
        except Exception as error:  # only the parser runs here: the arguments are wrong
            raise first_config_error(error, options) from error
        config = self.config[args[0]]
        # jsonargparse accepts None or a number where a group of settings belongs.
        for name in ("trainer", "ema", "checkpoint", "samples"):
            if not isinstance(config.get(name), Namespace):
                raise ConfigError(f"{name}: must hold settings by name, found {config.get(name)!r}")
        check_run_settings(config)

    def _parse_ckpt_path(self) -> None:
        """Skip Lightning's: it lets the hyperparameters of a checkpoint override settings.

        Our modules compare the two and report differences.
        """

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Make the Trainer, with our progress bar in place of Lightning's and our own callbacks."""
        chosen = self._get(self.config_init, "trainer").callbacks
        chosen = list(chosen) if isinstance(chosen, list) else [chosen]  # the Trainer adds to it
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except ConfigError:
            raise
        except Exception as error:  # whatever the Trainer raises, the settings caused it
            settings = self._get(self.config, "trainer")
            raise trainer_error(error, settings) from error
        prepare_loggers(trainer.loggers)
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for i, callback in enumerate(callbacks):
            if isinstance(callback, ProgressBar) and callback not in chosen:
                callbacks[i] = TrainingProgress()
        callbacks.insert(0, RunLines(self.called, self.changes))  # before a bar is drawn
        callbacks.append(Dashboard())
        if self.run_folder is not None:
            record = RunRecord(
                self.run_folder.path,
                command=self.called,
                text=self._record,
                settings=trained_settings(self.config_dump),
                made=self.run_folder.made,
            )
            callbacks.insert(0, record)  # first: the others ask it for the folder
        # Checked now, because otherwise a run would train until its first save fails.
        dirpath = self._get(self.config_init, "checkpoint").dirpath
        check_writable(trainer, {"checkpoint.dirpath": dirpath})
        return trainer

    def _add_instantiators(self) -> None:
        super()._add_instantiators()
        # After Lightning's own for the model and the data, which save_hyperparameters needs.
        self.parser.add_instantiator(self.paths, object)

    def instantiate_classes(self) -> None:
        """Make the objects; if one refuses a setting, report its own message."""
        try:
            super().instantiate_classes()
        except Exception as error:  # constructors of what the settings name
            raise first_config_error(error) from error
        if type(self.model) is L.LightningModule:  # what an empty mapping makes
            raise ConfigError("model.class_path: needed, found none")
        # Lightning's instantiators made these two, so `paths` does not know them yet.
        for name, made in {"model": self.model, "data": self.datamodule}.items():
            given = self.paths.settings[name].get("init_args")  # a class may have none
            self.paths.remember(made, vars(given) if given else {})

    def before_instantiate_classes(self) -> None:
        """Check the Trainer's flags, choose the run folder, and dump its record of settings."""
        self.paths.settings = config = self.config[self.command]
        path = str(config.ckpt_path or "last")
        if path != "last" and Path(path).is_dir():  # of a run
            path = config.ckpt_path = str(checkpoint_of_run(Path(path), with_shards=False)[0])
        named = path != "last" and "://" not in path
        # Raises if it is damaged. No rank puts the shards of all ranks together.
        content = read_whole_checkpoint(Path(path), with_shards=False) if named else None
        check_trainer_settings(config.trainer)
        # The record has the settings as given, without the folder chosen below: a command that
        # starts from the record must create a new run in a new folder.
        self._dump_config()
        given = config.clone()
        if content is not None and self.command == "fit":
            self.changes = _changes(content, Path(path), self.config_dump)
        self.run_folder = choose_run_folder(config, self.command, self.config_dump, content)
        if self.command == "predict":  # a logger would leave an empty file or an empty offline run
            config.trainer.logger = False
        is_local = config.ckpt_path and "://" not in config.ckpt_path
        evaluated = str(Path(config.ckpt_path).absolute()) if is_local else config.ckpt_path
        if not config.scores or self.command == "predict":  # which measures nothing
            callbacks = config.trainer.callbacks or []
            # Before they are made, as an extractor may ask for weights that are not here.
            chosen = callbacks if isinstance(callbacks, list) else [callbacks]
            config.trainer.callbacks = [each for each in chosen if not _is_scores(each)]
            if self.command in {"validate", "test"} and config.trainer.callbacks != chosen:
                print(f"{self.called}: no scores, as `scores` is false in the settings of the run")
        given.ckpt_path = None if self.command == "fit" else evaluated
        self._record = self._dumped(given)

    def _dump_config(self) -> None:
        """Keep the settings as given, linked ones too, as plain values."""
        if not hasattr(self, "config_dump"):
            text = self._dumped(self.config[self.command], with_links=True)
            self.config_dump = plain_settings(text)

    def _dumped(self, config: Namespace, *, with_links: bool = False) -> str:
        """Settings as YAML; the parser has checked them, and again would take as long."""
        dumped: str = self._parser(self.command).dump(
            config, skip_none=False, skip_link_targets=not with_links, skip_validation=True
        )
        return dumped


# The module compares and applies these itself, in `resume_with_settings`.
_MODULES_OWN = (
    "model.optimization.optimizer",
    "model.optimization.lr_scheduler",
    "model.optimization.warmup_steps",
    "model.tasks.balancer.lr",
    "model.tasks.balancer.weights",
)
# These only matter at the start of a run: a checkpoint holds weights and PCGrad's random state.
_START_ONLY = ("model.init_from", "model.init_weights")


def _is_scores(callback: Any) -> bool:  # noqa: ANN401 - the parser's namespace, or an object
    return str(getattr(callback, "class_path", "")).rpartition(".")[2] == "GenerationMetrics"


def _changes(content: dict[str, Any], path: Path, config: dict[str, Any]) -> list[str]:
    """A line for each setting that differs from the resumed run's."""
    stored = stored_settings(content, path)
    if stored is None:
        return []
    balancer = flat_settings(config).get("model.tasks.balancer")
    lines = []
    for name, (then, now) in changed_settings(stored, config).items():
        if not name.startswith(_MODULES_OWN):
            is_drawn = name == "model.tasks.balancer.seed" and balancer == "PCGrad"
            kept = is_drawn or name in _START_ONLY
            effect = "has no effect in a resumed run" if kept else "from now on"
            lines.append(changed_line(name, then, now, effect=effect))
    return lines


def _restoring(error: BaseException) -> bool:
    """Whether the error was raised while Lightning restored a checkpoint."""
    frames = [frame.f_code for frame, _ in walk_tb(error.__traceback__)]
    return any(
        code.co_filename.endswith("checkpoint_connector.py") and "restore" in code.co_name
        for code in frames
    )


def run(args: Sequence[str], *, called: str | None = None) -> AntCLI:
    """Parse `args` and run the command.

    Args:
        args: The command and its options.
        called: What the user calls it, in lines and in the name of its record.

    Raises:
        ConfigError: If an argument, or a file that one names, is wrong.
    """
    keep_quiet(args[0])
    for path in config_paths(args):  # before the parser is made, which takes longer
        check_config_file(path)
    args = with_classes_around(args)
    import_named_classes(args)
    derived = derived_settings(args[1:])
    args = [*args, *derived]
    try:
        return AntCLI(
            L.LightningModule,
            ImageDataModule,
            command=args[0],
            called=called or args[0],
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,  # `RunRecord` keeps the settings
            auto_configure_optimizers=False,  # an optimizer is a setting of the model
            seed_everything_default=0,
            # An abbreviated option is a mistake.
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False},
            args=list(args),
        )
    except (ArgumentError, MisconfigurationException) as error:
        raise ConfigError(one_line(str(error))) from error
    except ConfigError as error:
        found = about_sizes(error, args[1:], derived)
        if found is error:
            raise
        raise found from error
    except CheckpointWriteError:
        raise
    except Exception as error:  # torch and Lightning raise anything for parts that do not fit
        if not _restoring(error):
            raise
        said = " ".join(str(error).split())[:300]
        raise ConfigError(
            "ckpt_path: must be a whole checkpoint of a run with these settings, found one that "
            f"cannot be resumed ({type(error).__name__}: {said})"
        ) from error
