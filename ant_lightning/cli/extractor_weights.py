"""Looks for the weights of the default extractor before anything is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ant_lightning.cli.merged_settings import merge
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

# Commands that fail without an extractor, and the option that sets it.
_OPTIONS = {"score": "--metrics.extractor", "sweep": "--extractor", "test": ""}


def check_extractor(command: str, settings: Mapping[str, Any], chosen: str | None = None) -> None:
    """Check that the weights of a default extractor are here or can be downloaded, and say so.

    Args:
        command: The command; those that can do without an extractor are not checked.
        settings: The merged settings.
        chosen: The class of the extractor, if an option names it.

    Raises:
        ConfigError: If their host cannot be reached; says how to do without.
    """
    metrics = scores_of(settings.get("trainer"))
    if command not in _OPTIONS or settings.get("scores") is False:
        return
    if metrics is None and command != "score":  # which always has one
        return
    given = settings.get("metrics")  # of `score`
    metrics = (metrics or {}) | (given if isinstance(given, dict) else {})
    extractor: dict[str, Any] = {"class_path": ""}
    merge(extractor, _as_dict(metrics.get("extractor")))
    merge(extractor, _as_dict(chosen))
    name = str(extractor["class_path"]).rpartition(".")[2]
    if name not in {"", "InceptionFeatures"} or extractor.get("weights"):
        return
    # Imported here: it imports `urllib`, which most commands can do without.
    from ant_lightning.generation.inception_file import (  # noqa: PLC0415
        check_download,
        without_weights,
    )

    try:
        said = check_download()
    except ConfigError as error:
        option = _OPTIONS[command]
        raise (without_weights(error, option) if option else error) from error
    if said:
        print(f"{command}: {said}", flush=True)


def scores_of(trainer: object) -> dict[str, Any] | None:
    """The settings of `GenerationMetrics` among the callbacks; `None` if it is not there."""
    callbacks = trainer.get("callbacks") if isinstance(trainer, dict) else None
    for each in callbacks if isinstance(callbacks, list) else [callbacks]:
        found: dict[str, Any] = {}
        merge(found, _as_dict(each))
        if str(found.get("class_path")).rpartition(".")[2] == "GenerationMetrics":
            return found
    return None


def _as_dict(given: object) -> object:
    return {"class_path": given} if isinstance(given, str) else given
