"""The pipeline folder that a run came from: its text encoders and tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ant_lightning.data.text.encoder import TextEncoder, encoder_identity
from ant_lightning.errors import ConfigError, FileError
from ant_lightning.files.json_file import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping

_INDEX = "model_index.json"
# Settings of a run that may name a pipeline's folder, or one below it.
_NAMED_BY = (
    ("model", "backbone", "folder"),
    ("model", "process", "folder"),
    ("model", "first_stage", "source"),
)


class PipelineSource(NamedTuple):
    """A pipeline folder of diffusers.

    Attributes:
        folder: Where it is.
        listed: The content of its `model_index.json`.
        max_length: Tokens of a caption in the last text encoder of the run, if its cache is there.
    """

    folder: Path
    listed: Mapping[str, Any]
    max_length: int | None


def pipeline_source(
    settings: Mapping[str, Any], class_name: str, given: str | None = None
) -> PipelineSource | str:
    """The pipeline that a run came from, or the reason why it is not known.

    Args:
        settings: Those of the run. Its backbone, process or first stage may name a folder of the
            pipeline, and its data the cache of embeddings, whose encoders the pipeline must have.
        class_name: The class that the pipeline must have.
        given: The folder, if the user names it.

    Raises:
        ConfigError: If `given` is no pipeline of this class, lacks a part, or has other text
            encoders than those of the run's embeddings.
    """
    found = [Path(given)] if given is not None else _named_folders(settings)
    if len(found) != 1:
        count = "none" if not found else " and ".join(map(str, found))
        return f"the pipeline of the run is not known (--source FOLDER), found {count}"
    try:
        return _read(found[0], class_name, _cache(settings))
    except ConfigError as error:
        if given is not None:
            raise
        return f"the run's is another: {error}"


def _named_folders(settings: Mapping[str, Any]) -> list[Path]:
    folders: dict[Path, Path] = {}
    for keys in _NAMED_BY:
        value: Any = settings
        for key in keys:
            value = (value or {}).get("init_args", value).get(key) if value else None
        if isinstance(value, str):
            for path in (Path(value), Path(value).parent):
                if (path / _INDEX).is_file():
                    folders.setdefault(path.resolve(), path)
    return list(folders.values())


def _cache(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The index of the run's cache of embeddings; empty if it is not there."""
    data: Any = settings.get("data") or {}
    folder = (data.get("init_args") or {}).get("embeddings")
    if not isinstance(folder, str):
        return {}
    try:
        return read_json(Path(folder) / "index.json", kind=dict)
    except FileError:
        return {}


def _read(folder: Path, class_name: str, cache: Mapping[str, Any]) -> PipelineSource:
    try:
        index = read_json(folder / _INDEX, kind=dict)
    except FileError as error:
        raise ConfigError(
            f"source: must be a pipeline folder of diffusers, found {error}"
        ) from error
    if index.get("_class_name") != class_name:
        raise ConfigError(
            f"source: must be the folder of a {class_name}, found {index.get('_class_name')} in "
            f"{folder}"
        )
    encoders = []
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry[:1] == [None]:
            continue  # a setting, or a part that the pipeline does not have
        if not (folder / name).is_dir():
            raise ConfigError(f"source: must hold {name}, as its {_INDEX} says, found no {name}")
        if name.startswith("text_encoder"):
            encoders.append(folder / name)
    numbers = sorted(
        int(key.split(".")[1]) for key in cache if key.endswith(".digest") and key.count(".") == 2
    )
    wanted = {cache[f"encoders.{i}.digest"] for i in numbers}
    digests = (encoder_identity(TextEncoder(str(each)))["digest"] for each in encoders)
    if wanted and set(digests) != wanted:
        raise ConfigError(
            "source: must have the text encoders of the run's embeddings (data.embeddings), found "
            f"others in {folder}"
        )
    length = cache.get(f"encoders.{numbers[-1]}.max_length") if numbers else None
    return PipelineSource(folder, index, length if type(length) is int else None)
