"""Settings that follow from others, so that nothing has to be said twice.

- `num_tasks` of a balancer, also of a class of one's own, is that of the clustering.
- `input_size`, `in_channels` and `num_classes` of a network are those of the data, or of their
  latents; `out_channels` and `learn_sigma` follow from the process.

- A class that is chosen in place of a default of another class keeps its own defaults. The parser
  would take those that both have from the other class.

They are added to a command line as options. What is set anywhere, to any value, stays.
"""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from ant_lightning.cli.merged_settings import merged_settings
from ant_lightning.cli.messages import first_config_error
from ant_lightning.cli.own_defaults import any_class, our_class, own_defaults
from ant_lightning.data.module import ImageDataModule
from ant_lightning.diffusion.edm import EDM
from ant_lightning.errors import ConfigError
from ant_lightning.models.first_stage.first_stage import FirstStage

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_SIZES = ("input_size", "sample_size", "in_channels", "num_classes", "out_channels")
# Networks of diffusers whose sizes mean the same; `sample_size` is their `input_size`.
_UNETS = ("diffusers.UNet2DModel", "diffusers.UNet2DConditionModel")


def derived_settings(args: Sequence[str]) -> list[str]:
    """Options for the settings that follow from those of a command line and were not given.

    Args:
        args: The arguments of a command, without its name.

    Returns:
        Options to append, `["--model.backbone.init_args.input_size=32", ..]`; none where the
        settings are incomplete or wrong, which the parser then says.
    """
    settings = merged_settings(args)
    model = settings.get("model") if settings else None
    if not settings or not isinstance(model, dict):
        return []
    found: dict[str, object] = {}
    tasks = model.get("tasks")
    if isinstance(tasks, dict):
        num_tasks = _num_tasks(tasks.get("clustering"))
        if num_tasks and "num_tasks" in _open(tasks.get("balancer"), kind=any_class):
            found["model.init_args.tasks.balancer.init_args.num_tasks"] = num_tasks
    found |= own_defaults(model, "model")
    process = model.get("process")
    name = str(process.get("class_path") if isinstance(process, dict) else process)
    has_one_half = our_class(name) is EDM or str(_variance_type(model)).startswith("fixed")
    if has_one_half and "learn_sigma" in _open(model.get("backbone")):
        found["model.init_args.backbone.init_args.learn_sigma"] = False
    own, backbone = (
        [name for name in _open(part) if name in _SIZES] for part in (model, model.get("backbone"))
    )
    if own or backbone:
        sizes = _sizes(settings)
        places = {"model.init_args": own, "model.init_args.backbone.init_args": backbone}
        for path, names in places.items():
            found |= {f"{path}.{name}": sizes[name] for name in names if name in sizes}
    return [f"--{name}={value}" for name, value in found.items()]


def about_sizes(error: ConfigError, args: Sequence[str], derived: Sequence[str]) -> ConfigError:
    """The error of a command, with what it leaves out about a size of the network.

    It is that of the data if it is one of the derived options. It is missing if the first stage
    cannot be made, and then that is the error.
    """
    names = {option.partition("=")[0].rpartition(".")[2] for option in derived}
    for name in _SIZES:
        if name in names and re.search(rf"\b{name}\b", str(error)):
            return ConfigError(f"{error}; {name} is that of the data")
        if f"{name}: needed" in str(error):
            model = (merged_settings(args) or {}).get("model")
            if not isinstance(model, dict) or "first_stage" not in model:
                return error
            try:
                _made(model["first_stage"], FirstStage)
            except Exception as cause:
                return ConfigError(f"model.first_stage.{first_config_error(cause)}")
    return error


def _open(part: object, kind: Callable[[object], Any] | None = None) -> list[str]:
    """The arguments that the class of a part, found by `kind`, takes and that are not given."""
    given = part if isinstance(part, dict) else {"class_path": part}
    name = given.get("class_path")
    if name in _UNETS:  # imported here: 1 s that no other network needs
        found = getattr(import_module("diffusers"), name.rpartition(".")[2])
    else:
        found = (kind or our_class)(name)
    if found is None:
        return []
    return [n for n in inspect.signature(found).parameters if n not in given]


def _num_tasks(clustering: object) -> int | None:
    """The number of tasks of a clustering, `None` if its settings do not tell."""
    given: dict[str, Any] = (
        clustering if isinstance(clustering, dict) else {"class_path": clustering}
    )
    if isinstance(given.get("boundaries"), list):
        return len(given["boundaries"]) - 1
    if "clustering" in given:  # `ShuffledClustering` has the tasks of another
        return _num_tasks(given["clustering"])
    kind = any_class(given.get("class_path"))
    default = inspect.signature(kind).parameters.get("num_tasks") if kind else None
    number = given.get("num_tasks", default and default.default)
    return number if type(number) is int else None


def _sizes(settings: Mapping[str, Any]) -> dict[str, int | list[int]]:
    """What a network must fit: sizes and classes of the data, or of their latents."""
    model, first_stage = settings["model"], settings["model"].get("first_stage")
    try:
        data = _made(settings.get("data"), ImageDataModule)
        shape, num_classes = data.shape_and_classes()
        if first_stage is not None and not hasattr(data, "latent_space"):
            shape = _made(first_stage, FirstStage).latent_shape(shape)
    except Exception:  # whatever is wrong, the command itself says it, with the path of the setting
        return {}
    channels, height, width = shape
    learned = _variance_type(model) == "learned_range"
    size = height if height == width else [height, width]
    return {
        "input_size": size,
        "sample_size": size,
        "in_channels": channels,
        "out_channels": 2 * channels if learned else channels,
        "num_classes": num_classes,
    }


def _variance_type(model: Mapping[str, Any]) -> str | None:
    """The variance of the process, which decides the channels of the output."""
    process = model.get("process")
    if process is None:  # the module has one of its own
        kind = our_class(model.get("class_path"))
        default = inspect.signature(kind).parameters.get("process") if kind else None
        return getattr(default and default.default, "variance_type", None)
    return process.get("variance_type") if isinstance(process, dict) else None


def _made(settings: Any, kind: type) -> Any:  # noqa: ANN401
    """The object that merged settings describe."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "part", required=True)
    chosen = settings if isinstance(settings, dict) else {"class_path": settings}
    named = {"class_path": f"ant_lightning.{kind.__name__}", **chosen}
    return parser.instantiate(parser.parse_object({"part": _unmerged(named)})).part


def _unmerged(settings: Any) -> Any:  # noqa: ANN401 - values of all kinds
    """Settings with the arguments of each class in `init_args` again, as the parser reads them."""
    if isinstance(settings, list):
        return [_unmerged(each) for each in settings]
    if not isinstance(settings, dict):
        return settings
    inner = {name: _unmerged(value) for name, value in settings.items()}
    if "class_path" not in inner:
        return inner
    return {"class_path": inner.pop("class_path"), "init_args": inner}
