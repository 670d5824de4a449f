"""Finds mistakes in a command line and its files before PyTorch and Lightning are imported.

Importing them takes many times longer than noticing a missing file. What is refused here, the
parser or the objects would refuse as well. What this check does not understand is left to them.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ant_lightning
from ant_lightning.cli.bounds import check_bounds
from ant_lightning.cli.config_files import FLAGS, HELP, check_config_file, config_paths
from ant_lightning.cli.diagnose import validation
from ant_lightning.cli.extractor_weights import check_extractor, scores_of
from ant_lightning.cli.logger_names import is_known_logger, missing_package
from ant_lightning.cli.merged_settings import (
    appended,
    check_form,
    loaded,
    merge,
    merged_settings,
)
from ant_lightning.cli.messages import needed, no_such_setting, unknown_class
from ant_lightning.cli.records import record_of
from ant_lightning.cli.renamed import refuse_old_names
from ant_lightning.cli.run_arguments import check_runs, run_arguments
from ant_lightning.cli.source_names import arguments_of, choices_of, numbers_of
from ant_lightning.cli.trainer_settings import check_run_settings, check_trainer_settings
from ant_lightning.data.class_map import class_numbers, read_class_map
from ant_lightning.errors import ConfigError, found_at

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

# Groups of settings whose class is always the same.
_RUN_GROUPS = {"ema": "EMA", "checkpoint": "Checkpoints", "samples": "SampleWriter"}
_ENCODE_GROUPS = {"first_stage": "FirstStage", "cache": "LatentWriter", "text": "TextWriter"}
_OF_MODELS = {
    "optimization": "Optimization",
    "sampling": "Sampling",
    "tasks": "Tasks",
    "timesteps": "TimestepSampling",
}
_GROUPS = {"trainer": "Trainer", **_RUN_GROUPS, **_ENCODE_GROUPS}
_OF_OPTIMIZERS = dict.fromkeys(("lr", "weight_decay"), "a number")
_OF_RUNS = ("app", "export", "report", "sweep")
# Settings whose short names mean our classes, unless the user brings their own.
_OURS = re.compile(r"model|data|model\..*\b(balancer|clustering|schedule|sampler|loss_weighting)")
# Packages whose classes a setting may name, each with the extra of ours that installs it.
_EXTRAS = {"torchjd": "torchjd", "transformers": "transformers", "peft": "peft"}
# Importing another package may add classes, which then have short names too.
_KNOWN_PACKAGES = {"ant_lightning", "lightning", "torch", "torchvision", "torchjd", "diffusers"}


def first_look(arguments: Sequence[str]) -> None:
    """Look for mistakes in the arguments of a command.

    Raises:
        ConfigError: If there is one; names the setting or file, the rule and the value found.
    """
    command, *args = arguments
    if command in _OF_RUNS:
        _look_at_runs(command, args)
    if command in {"configs", *_OF_RUNS} or (command == "diagnose" and set(args) & HELP):
        return  # they take no settings of a run
    own: frozenset[str] = frozenset()
    if command == "diagnose":  # it is `validate` with a callback
        own = arguments_of("Diagnosis") or own
        command, args = "validate", validation(args)[1]
    if not set(args) & FLAGS:
        check_form(args)
    known = top_settings(command)
    for path in config_paths(args):
        check_config_file(path, known=known, inside=_paths_inside(known or ()))
    settings = merged_settings(args)
    if own and settings and isinstance(settings.get("trainer"), dict):
        settings["trainer"]["callbacks"] = None  # `diagnose` has its own
    asked = bool(set(args) & FLAGS)
    if command == "score" and not asked and settings is not None:
        _check_score(settings)
    if known is None or settings is None:
        return
    refuse_old_names(settings)
    _check_names(settings, known, own)
    check_run_settings(settings)
    if isinstance(settings.get("trainer"), dict):
        check_trainer_settings(settings["trainer"])
    _check_classes(settings)
    _check_appended(args)
    missing = [name for name in ("data", "model") if settings.get(name) is None]
    if missing and command != "encode" and not asked:
        raise ConfigError(needed(", ".join(missing)))
    if asked:
        return
    _check_values(command, settings)


def _check_values(command: str, settings: dict[str, Any]) -> None:
    """Check bounds, choices, paths and what is installed."""
    of_model = settings.get("model")
    inner = of_model if isinstance(of_model, dict) else {}
    groups = [(group, kind, settings.get(group)) for group, kind in _GROUPS.items()]
    groups += [(f"model.{group}", kind, inner.get(group)) for group, kind in _OF_MODELS.items()]
    check_bounds([*groups, *_class_paths(settings, "")])
    if command == "predict":  # which has no logger
        _check_classes_to_draw(settings)
    else:
        _check_packages(settings.get("trainer"))
    try:
        # `predict` makes no scores.
        _check_paths(settings | {"scores": False} if command == "predict" else settings)
    except ConfigError as error:
        if re.match(r"trainer\.callbacks\S*\.extractor\.", str(error)):
            raise ConfigError(f"{error}; --scores false leaves the scores out") from error
        raise
    check_extractor(command, settings)


def _check_paths(settings: dict[str, Any]) -> None:
    """Check the paths of data, networks, extractors of features and initial weights."""
    # Imported here: it imports NumPy, which `configs` can do without.
    from ant_lightning.cli.path_settings import check_archive, check_paths  # noqa: PLC0415

    check_archive(settings.get("images"))  # of `score`
    names = ("data", "model", "text", "metrics")
    groups: dict[str, Any] = {name: settings[name] for name in names if name in settings}
    trainer = settings.get("trainer")
    if isinstance(trainer, dict) and settings.get("scores") is not False:
        groups["trainer.callbacks"] = trainer.get("callbacks")
    check_paths(_class_paths(groups, ""))
    model = settings.get("model")
    initial = model.get("init_from") if isinstance(model, dict) else None
    # A checkpoint replaces the initial weights, whose file may then be elsewhere.
    if isinstance(initial, str) and not settings.get("ckpt_path") and not Path(initial).exists():
        raise ConfigError(
            f"model.init_from: must be a checkpoint or a folder of diffusers, {found_at(initial)}"
        )


def _check_score(settings: dict[str, Any]) -> None:
    """Check what `score` needs, and its paths."""
    # Imported here: it imports NumPy, which `configs` can do without.
    from ant_lightning.cli.path_settings import check_sizes  # noqa: PLC0415

    if settings.get("data") is None:
        raise ConfigError(
            "data: needed, to compare with its images, found nothing; give the --config of a run, "
            "such as RUN/config.yaml"
        )
    images, clip = settings.get("images"), settings.get("clip")
    if isinstance(images, str) and not Path(images).exists():
        raise ConfigError(f"images: must be a folder or an npz file, {found_at(images)}")
    if isinstance(clip, str) and not Path(clip, "config.json").is_file():
        raise ConfigError(f"clip: must be a folder with config.json, {found_at(clip)}")
    _check_paths({name: settings.get(name) for name in ("data", "metrics", "images")})
    data, given = settings["data"], settings.get("metrics")
    metrics = (scores_of(settings.get("trainer")) or {}) | (
        given if isinstance(given, dict) else {}
    )
    has_data = isinstance(data, dict) and metrics.get("reference") in {None, "train"}
    if isinstance(images, str) and has_data:
        check_sizes(images, data)
    check_extractor("score", settings)


def top_settings(command: str) -> list[str] | None:
    """Top-level names allowed in a command's config; `None` if unknown."""
    if command == "score":  # it takes the config of a run, and ignores most of it
        return None
    if command == "encode":
        return sorted({"config", "print_config", "data", "device", *_ENCODE_GROUPS})
    method = arguments_of("Trainer", command)
    if method is None:
        return None
    # Arguments of the Trainer's method that are no settings: the command line passes the objects.
    handed_over = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}
    own = {"config", "print_config", "seed_everything", "trainer", "model", "data", "scores"}
    return sorted(own | {*_RUN_GROUPS} | (method - handed_over))


def _look_at_runs(command: str, args: Sequence[str]) -> None:
    """Check the arguments of a command that takes runs, and the paths in the record of a sweep."""
    if command == "report":
        check_runs(command, [each for each in args if not each.startswith("-")])
        return
    chosen = run_arguments(command, args)
    if command == "sweep":
        recorded: dict[str, Any] = {}
        merge(recorded, record_of(Path(chosen["run"])))
        checked = {"data": recorded.get("data")}
        if chosen["extractor"] is None:
            checked["trainer"] = recorded.get("trainer")
        _check_paths(checked)
        check_extractor("sweep", recorded, chosen["extractor"])


def _check_names(settings: dict[str, Any], known: Sequence[str], own: Iterable[str] = ()) -> None:
    """Check the names at the top, and those inside groups whose class is fixed.

    `own` are other options of the command, to suggest.
    """
    # `arguments_of` is None for a class whose source does not tell: then any name passes.
    inside = {g: arguments_of(kind) for g, kind in _GROUPS.items() if g in known}
    paths = [*known, *own, *_paths_inside(known)]
    for group, inner in settings.items():
        if group not in known:
            raise ConfigError(no_such_setting(group, paths))
        names = inside.get(group)
        if group in inside and not isinstance(inner, dict | str):  # a text is the name of a file
            raise ConfigError(f"{group}: must hold settings by name, found {inner}")
        if isinstance(inner, dict) and names is not None and "class_path" not in inner:  # a file
            for name in inner.keys() - names:
                raise ConfigError(no_such_setting(f"{group}.{name}", paths))
            _check_numbers(group, _GROUPS[group], inner)


def _paths_inside(known: Iterable[str]) -> list[str]:
    """The settings inside those groups whose class is fixed."""
    groups = [(group, arguments_of(kind)) for group, kind in _GROUPS.items() if group in known]
    return [f"{group}.{name}" for group, names in groups for name in names or ()]


def _check_numbers(setting: str, kind: str, given: Mapping[str, Any]) -> None:
    """Check that no word stands where a number must; all else is left to the parser."""
    for name, rule in (_OF_OPTIMIZERS if kind.startswith("torch.") else numbers_of(kind)).items():
        value = given.get(name)
        if isinstance(value, str) and _is_word(value):
            raise ConfigError(f"{setting}.{name}: must be {rule}, found {value}")
        if rule == "a whole number" and isinstance(value, float) and value % 1:
            raise ConfigError(f"{setting}.{name}: must be {rule}, found {value}")
        if kind.startswith("torch.") and isinstance(value, int | float) and value < 0:
            raise ConfigError(f"{setting}.{name}: must be at least 0, found {value}")


def _is_word(text: str) -> bool:
    """Whether a text means a text to YAML and to Python."""
    try:
        float(text)
    except ValueError:
        return bool(re.fullmatch(r"\w[\w .-]*", text)) and isinstance(loaded(text), str)
    return False


def _check_classes(settings: dict[str, Any]) -> None:
    """Check the names of our classes and of their arguments."""
    _check_loggers(settings.get("trainer"))
    _check_places(list(_class_paths(settings, "")))


def _check_appended(args: Sequence[str]) -> None:
    """Check the classes that options add to lists."""
    for name, value in appended(args):
        given = [{"class_path": value}] if isinstance(value, str) else value
        for each in given if isinstance(given, list) else [given]:
            added: dict[str, Any] = {}
            merge(added, {"class_path": each} if isinstance(each, str) else each)
            _check_places(list(_class_paths(added, name)))


def _check_places(places: Sequence[tuple[str, str, dict[str, Any]]]) -> None:
    for setting, found, _ in places:
        package = found.split(".")[0]
        if package in _EXTRAS and package != found and find_spec(package) is None:
            install = f"pip install 'ant-lightning[{_EXTRAS[package]}]'"
            raise ConfigError(f"{setting}: {found} needs a package, found none; {install}")
    others = [(s, f) for s, f, _ in places if "." in f and f.split(".")[0] not in _KNOWN_PACKAGES]
    for setting, found in others:
        if re.fullmatch(r"\w+(\.\w+)+", found) and not _is_importable(found):
            package = found.split(".")[0]
            raise ConfigError(f"{setting}: no module is called {package!r}, found {found}")
    if others:
        return
    for setting, found, inner in places:
        name = found.rpartition(".")[-1]
        if setting.endswith("optimizer") and found.startswith("torch.optim."):
            _check_numbers(setting, found, inner)
        ours = found.startswith("ant_lightning.") or is_known_logger(found)
        short = _OURS.fullmatch(setting) and found.isidentifier() and not Path(found).exists()
        if not ours and not short:
            continue
        if name not in ant_lightning.__all__ and not is_known_logger(found):
            raise ConfigError(unknown_class(setting, found))
        known = arguments_of(name)
        for each in inner.keys() - {"class_path", "dict_kwargs"} - (known or inner.keys()):
            paths = [f"{setting}.{argument}" for argument in known or ()]
            raise ConfigError(no_such_setting(f"{setting}.{each}", paths, owner=name))
        _check_numbers(setting, name, inner)


def _is_importable(found: str) -> bool:
    """Whether the package of a class is here, or a file of this name is."""
    package = found.split(".", maxsplit=1)[0]
    here = [Path(found), Path(package), Path(f"{package}.py")]
    return any(path.exists() for path in here) or find_spec(package) is not None


def _check_loggers(trainer: object) -> None:
    """Check short names of loggers; the classes of Lightning's end in `Logger`."""
    given = trainer.get("logger") if isinstance(trainer, dict) else None
    for each in given if isinstance(given, list) else [given]:
        if isinstance(each, dict) and each and not each.keys() & {"class_path", "init_args"}:
            raise ConfigError(f"trainer.logger.{min(each)}: needs a logger, found none")
        name = each.get("class_path") if isinstance(each, dict) else each
        if not isinstance(name, str) or not name.isidentifier() or name.endswith("Logger"):
            continue
        if not Path(name).exists():  # a file would be its settings
            raise ConfigError(unknown_class("trainer.logger", name))


def _check_packages(trainer: object) -> None:
    """Check that the packages of the loggers are installed."""
    given = trainer.get("logger") if isinstance(trainer, dict) else None
    for each in given if isinstance(given, list) else [given]:
        name = each.get("class_path") if isinstance(each, dict) else each
        install = missing_package(name)
        if install:
            raise ConfigError(
                f"trainer.logger: {name} needs a package, found none; pip install {install}"
            )


def _check_classes_to_draw(settings: Mapping[str, Any]) -> None:
    """Check the names of classes against those that the run of the checkpoint has written down."""
    samples, path = settings.get("samples"), Path(str(settings.get("ckpt_path")))
    classes = samples.get("classes") if isinstance(samples, dict) else None
    folders = (path, path.parent, path.parent.parent)
    maps = [each / "class_map.json" for each in folders if (each / "class_map.json").is_file()]
    if maps and isinstance(classes, list) and all(type(each) in (int, str) for each in classes):
        names = read_class_map(maps[0])
        class_numbers(classes, names, num_classes=len(names), most=len(names))


def _class_paths(value: Any, setting: str) -> Iterator[tuple[str, str, dict[str, Any]]]:  # noqa: ANN401
    """The setting, class and inner settings of each class that is named."""
    if isinstance(value, dict):
        kind = value.get("class_path")
        if isinstance(kind, str):
            yield setting, kind, value
        words = choices_of(kind.removeprefix("ant_lightning.")) if isinstance(kind, str) else {}
        for name, inner in value.items():
            if name in words:  # such as `EDMSampler.schedule`, which is no class
                continue
            yield from _class_paths(inner, f"{setting}.{name}" if setting else str(name))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            flat: dict[str, Any] = {}
            merge(flat, inner)
            yield from _class_paths(flat, f"{setting}[{i}]")
    elif isinstance(value, str) and _OURS.fullmatch(setting):
        yield setting, value, {}
