"""Arguments of the commands that take runs: `app`, `export`, `report` and `sweep`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from jsonargparse import ArgumentParser

import ant_lightning
from ant_lightning.cli.messages import first_config_error, unknown_class
from ant_lightning.cli.parts import TRUST
from ant_lightning.cli.records import record_file
from ant_lightning.errors import ConfigError
from ant_lightning.runtime.run_files import (
    RUN_OR_CHECKPOINT,
    found_runs,
    has_checkpoint,
    newest_record,
    no_run,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Format = Literal["diffusers", "official", "safetensors", "torch"]
_RUN = {"type": str, "help": "folder of a run"}
_RUN_OR_CHECKPOINT = {"type": str, "help": "folder of a run, or a checkpoint"}
_TEXT = str | None
# Written here and not where they are used, so that help and mistakes need not wait for imports.
_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "app": {
        "runs": {"type": str, "nargs": "+", "help": "folders of runs, or checkpoints"},
        "--host": {"type": str, "default": "127.0.0.1", "help": "address to listen at"},
        "--port": {"type": int, "default": 7860, "help": "port to listen at"},
        "--device": {"type": str, "default": "cpu", "help": "cpu, cuda, .."},
        "--trust": TRUST,
    },
    "export": {
        "run": _RUN_OR_CHECKPOINT,
        "--to": {"type": Format | None, "help": "needed; `diffusers` is a pipeline's folder"},
        "--output": {"type": _TEXT, "help": "the folder; by default exports/TO in the run's"},
        "--weights": {
            "type": Literal["ema", "live"],
            "default": "ema",
            "help": "the moving average, or the live weights",
        },
        "--first_stage": {
            "type": _TEXT,
            "help": "folder of the first stage of a run on cached latents",
        },
        "--experts": {
            "type": list[str] | None,
            "help": "checkpoints of specialists of intervals, between which the model switches",
        },
        "--merge_weights": {
            "type": list[float] | None,
            "help": "a weight for each of them, to merge them into one network instead",
        },
        "--source": {
            "type": _TEXT,
            "help": "folder of the pipeline that has text encoders and tokenizers; by default the "
            "one that the run's settings name",
        },
        "--config": {
            "type": _TEXT,
            "help": "settings of the run, if they are not stored with it",
        },
        "--trust": TRUST,
        "--push_to_hub": {"type": _TEXT, "help": "owner/name on the hub"},
    },
    "sweep": {
        "run": _RUN,
        "--guidance": {"type": float, "nargs": "+", "help": "guidance scales"},
        "--ema": {"type": float, "nargs": "+", "help": "lengths of the average (ema.lengths)"},
        "--num_images": {"type": int | None, "help": "by default as in the run"},
        "--extractor": {
            "type": _TEXT,
            "help": "class of the network that scores, such as ant_lightning.ShapesFeatures; by "
            "default as in the run",
        },
        "--accelerator": {"type": str, "default": "auto", "help": "cpu, gpu, .."},
        "--trust": TRUST,
    },
}


def run_arguments(command: str, args: Sequence[str]) -> dict[str, Any]:
    """The arguments of `app`, `export` or `sweep`, without the command's name.

    With `--help` it prints what there is, and exits.

    Raises:
        ConfigError: If one is missing, unknown or wrong, or a run is not there.
    """
    parser = ArgumentParser(
        prog=f"ant-lightning {command}", exit_on_error=False, allow_abbrev=False
    )
    for name, settings in _OPTIONS[command].items():
        parser.add_argument(name, **settings)
    try:
        chosen: dict[str, Any] = parser.parse_args(list(args)).as_dict()
    except Exception as error:  # the parser has errors of several kinds
        # `--config` is that of the run: it would not give what is missing here.
        options = parser._option_string_actions.keys() - {"--config"}
        found = first_config_error(error, options)
        if "element" in str(error):  # of several after one option
            rule = "must be numbers with spaces between them, as in --guidance 1 1.5 2"
            found = ConfigError(str(found).replace("must be a number", rule))
        raise found from error
    if command == "export" and chosen["to"] is None:
        raise ConfigError(f"to: needed, one of {', '.join(get_args(Format))}, found nothing")
    if command == "sweep":
        _check_sweep(chosen)
    check_runs(command, chosen["runs"] if command == "app" else [chosen["run"]])
    if command == "app" and find_spec("gradio") is None:
        raise ConfigError(
            "app: needs pip install 'ant-lightning[app]', found No module named 'gradio'"
        )
    return chosen


def check_runs(command: str, runs: Sequence[str]) -> None:
    """Check that the runs are there, with what the command needs.

    Raises:
        ConfigError: If one is not.
    """
    needs_record = command in {"report", "sweep"}
    what = "the folder of a run" if needs_record else RUN_OR_CHECKPOINT
    for run in map(Path, runs):
        if not run.exists():
            raise no_run(run, "nothing", what)
    for run in map(Path, runs):
        if needs_record:
            record_file(run)
        elif not has_checkpoint(run) and (found_runs(run) or newest_record(run)):
            raise no_run(run, "no checkpoint in it", what)


def _check_sweep(chosen: Mapping[str, Any]) -> None:
    if not (chosen["guidance"] or chosen["ema"]):
        raise ConfigError(
            "guidance: needs values, as in --guidance 1 1.5 2, or --ema does; found none"
        )
    extractor = chosen["extractor"] or ""
    name = extractor.removeprefix("ant_lightning.")
    if name.isidentifier() and name not in ant_lightning.__all__:
        raise ConfigError(unknown_class("metrics.extractor", extractor))
