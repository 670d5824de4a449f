"""Which folder a command works in, and which checkpoint `--ckpt_path last` means.

Every run has its own folder, `<save_dir>/<name>/<version>`, with any logger or none. It holds the
checkpoints, the settings (`config.yaml`), pictures and tables.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from lightning_utilities.core.rank_zero import rank_zero_warn

from ant_lightning.cli.config_files import load_yaml
from ant_lightning.cli.renamed import with_new_names
from ant_lightning.cli.run_versions import RunVersions
from ant_lightning.errors import ConfigError
from ant_lightning.runtime.changed_settings import changed_settings
from ant_lightning.runtime.checkpoint_files import furthest_whole
from ant_lightning.runtime.run_files import RUN_MARK, new_folders, newest_record

if TYPE_CHECKING:
    from collections.abc import Mapping

    import lightning as L


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, and the folders that are made for this command; see `remove_empty_run`."""

    path: Path
    made: tuple[Path, ...]


def choose_run_folder(
    config: Any,  # noqa: ANN401 - the parser's namespace
    command: str,
    settings: Mapping[str, Any],
    content: Mapping[str, Any] | None = None,
) -> RunFolder | None:
    """Choose the folder, and set loggers, checkpoints and `ckpt_path` in `config` accordingly.

    - `ckpt_path: last` is replaced by the checkpoint with the most steps in this run's own folder.
      That is the folder of the logger's `version` or, without one, any version with the same
      settings. If there is no checkpoint, `fit` starts from the beginning: a cluster's scheduler
      repeats the same command, so the first start has `last` too.
    - Other commands work in the run folder of their checkpoint. A run that `last` resumes stays in
      its own folder, even if `checkpoint.dirpath` is elsewhere.
    - A `fit` that does not resume gets a new folder; `fast_dev_run` gets none.

    Args:
        config: The parser's namespace of the command.
        command: The name of the command.
        settings: The configuration as plain values.
        content: Content of the checkpoint that `ckpt_path` names; `None` if it names none.

    Raises:
        ConfigError: If `last` finds only runs with other settings, or no checkpoint (for commands
            that need one), or a new run would write into another run's folder.
    """
    place = RunVersions.of(config)
    dirpath = config.checkpoint.get("dirpath")
    is_last = config.ckpt_path == "last"
    if is_last:
        folders = [Path(dirpath)] if dirpath else [each / "checkpoints" for each in place.runs()]
        found = _last(folders or [place.root], settings, needed=command != "fit")
        path, content = found or (None, None)
        config.ckpt_path = path and str(path)
    # The folder of the checkpoint's run, even if this command's logger would log elsewhere.
    own = _run_of(Path(config.ckpt_path), content) if content is not None else None
    if config.trainer.get("fast_dev_run"):
        return None
    if command == "fit" and not is_last:
        _check_free(place, dirpath, own, config.ckpt_path)
        own = None  # a run with changed settings is another run
    made: tuple[Path, ...] = ()
    if place.version is not None:
        own = place.root / place.version
        made = new_folders(own)
    elif own is None or not os.access(own, os.W_OK):
        above = new_folders(place.root)
        own = place.reserve()
        made = (own, *above)
    place.bind(own)
    if command == "fit" and not dirpath:
        config.checkpoint.dirpath = str(own / "checkpoints")
    return RunFolder(own, made)


def stored_settings(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    """The settings of the run that wrote a checkpoint, in today's names; `None` if unknown.

    Runs of version 0.1 store them only in the `config.yaml` of their folder.
    """
    saved = checkpoint.get("ant_lightning")
    found = saved.get("settings") if isinstance(saved, dict) else None
    record = newest_record(path.parent.parent)
    if not isinstance(found, dict) and record is not None:
        # A record that cannot be read counts as unknown settings.
        with suppress(OSError, ValueError, yaml.YAMLError):
            found = load_yaml(record.read_text(encoding="utf8"))
    is_run = isinstance(found, dict) and isinstance(found.get("model"), dict)
    return with_new_names(found) if is_run else None


def check_writable(trainer: L.Trainer, folders: Mapping[str, str | Path | None]) -> None:
    """Check, before training starts, that logs and checkpoints can be written.

    Raises:
        ConfigError: If a folder is not writable; names the folder and the reason.
    """
    places = [("trainer.logger.save_dir", logger.save_dir) for logger in trainer.loggers]
    for setting, folder in [*places, *folders.items()]:
        if not trainer.is_global_zero or folder is None or "://" in str(folder):
            continue
        # The folder may not exist yet: its nearest existing parent decides.
        existing = Path(folder)
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        try:
            with tempfile.TemporaryFile(dir=existing) as file:
                file.write(b"0")
        except OSError as error:
            raise ConfigError(
                f"{setting}: must be a folder that can be written to, found {folder} "
                f"({error.strerror})"
            ) from error


def _last(
    folders: list[Path], settings: Mapping[str, Any], *, needed: bool
) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint with the most steps of runs with these settings, and its content."""
    others: list[tuple[dict[str, tuple[Any, Any]], Path]] = []

    def has_same_settings(path: Path, content: Mapping[str, Any]) -> bool:
        stored = stored_settings(content, path)
        changed = {} if stored is None else changed_settings(stored, settings)
        if changed:
            others.append((changed, path))
        return not changed

    paths = [path for folder in folders for path in folder.glob("*.ckpt")]
    found = furthest_whole(paths, accept=has_same_settings, with_shards=False)
    if found is not None:
        return found
    if others:
        # Report the run with the fewest differences: it is most likely the one that was meant.
        changed, path = min(others, key=lambda each: len(each[0]))
        name, pair = next(iter(changed.items()))
        then, now = pair
        raise ConfigError(
            f"ckpt_path: 'last' must be of a run with the same {name}, found {then} in {path} and "
            f"{now} here; to resume with a changed setting give the path of the checkpoint, to "
            "train a separate run give another trainer.logger.version"
        )
    places = ", ".join(str(folder) for folder in folders)
    if needed:
        raise ConfigError(f"ckpt_path: 'last' needs a checkpoint, found none in {places}")
    rank_zero_warn(
        f"ckpt_path: there is no checkpoint in {places}; training starts from the beginning"
    )
    return None


def _check_free(
    place: RunVersions, dirpath: str | None, resumed: Path | None, checkpoint: str | None
) -> None:
    """Refuse to start a run in the folder of another, or where another keeps its checkpoints."""
    # A run may go on in the folder of the checkpoint that it starts from.
    inside = {path.resolve() for path in (resumed, checkpoint and Path(checkpoint).parent) if path}
    version = None if place.version is None else place.root / place.version
    beside = Path(dirpath) if dirpath and "://" not in str(dirpath) else None
    for setting, folder, patterns in (
        ("trainer.logger.version", version, ("*.ckpt", "checkpoints/*.ckpt", RUN_MARK)),
        ("checkpoint.dirpath", beside, ("*.ckpt", "checkpoints/*.ckpt")),
    ):
        files = [each for pattern in patterns if folder for each in folder.glob(pattern)]
        if folder and files and folder.resolve() not in inside:
            raise ConfigError(
                f"{setting}: must be free for a new run, found {min(files)}; resume that run with "
                f"--ckpt_path last, or choose another {setting.rpartition('.')[-1]}"
            )


def _run_of(checkpoint: Path, content: Mapping[str, Any]) -> Path | None:
    """The folder of the run that wrote a checkpoint, if it is still there.

    It must hold what only runs write: a folder called `checkpoints` may lie anywhere.
    """
    saved = content.get("ant_lightning")
    stored = saved.get("run_folder") if isinstance(saved, dict) else None
    if isinstance(stored, str):  # relative to the checkpoint: a run may have been moved
        folder = Path(os.path.normpath(checkpoint.absolute().parent / stored))
        return _shortened(folder) if (folder / RUN_MARK).is_file() else None
    folder = checkpoint.absolute().parent.parent  # of version 0.1
    logs = any(next(folder.glob(each), None) for each in ("events.out.tfevents*", "metrics.csv"))
    is_run = checkpoint.absolute().parent.name == "checkpoints" and logs
    return _shortened(folder) if is_run and newest_record(folder) else None


def _shortened(folder: Path) -> Path:
    """Relative to the working folder if it lies below, as settings name it."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder
