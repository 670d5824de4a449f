"""What a module requires of its network, and the errors that name what is missing."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ant_lightning.backbones.diffusers import DiffusersBackbone
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from ant_lightning.diffusion.condition import Condition
    from ant_lightning.diffusion.process import NoiseProcess

# Attributes of every network, and of one that takes labels alone, with the smallest valid value.
_SIZES = {"input_size": 1, "in_channels": 1}
_OF_LABELS = {"out_channels": 1, "num_classes": 0}
_OPTIONAL = {"out_channels": 1, "num_classes": 0, "null_class": 0}


def backbone_name(backbone: nn.Module) -> str:
    """Name of the network's own class, without the one that `torch.compile` or FSDP2 adds."""
    bare = getattr(backbone, "_orig_mod", backbone)
    if isinstance(bare, DiffusersBackbone):
        bare = getattr(bare.network, "_orig_mod", bare.network)
    kind = type(bare)
    # `fully_shard` replaces the class by a new one with the bases (FSDPModule, own class). A
    # network inside a `DiffusersBackbone` is not a unit itself, and keeps its class.
    return (kind.__bases__[-1] if hasattr(bare, "unshard") else kind).__name__


def size_of(backbone: nn.Module) -> tuple[int, int]:
    """Height and width of what the network denoises."""
    size: Any = backbone.input_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return int(height), int(width)


def output_channels(backbone: nn.Module) -> int:
    """Channels of the network's output; those of its input unless it says otherwise."""
    return int(getattr(backbone, "out_channels", backbone.in_channels))  # type: ignore[arg-type]


def check_backbone(backbone: nn.Module) -> None:
    """Check that a network declares what the protocol asks for, and can be called that way.

    With `null_condition` it is called as `backbone(x_t, t, condition)`, with a mapping of the
    tensors that it names; else, with `num_classes`, as `backbone(x_t, t, labels)`.

    Raises:
        ConfigError: If an attribute is missing or invalid, or the call signature does not fit.
    """
    if not isinstance(backbone, nn.Module) or next(backbone.parameters(), None) is None:
        raise ConfigError(
            f"backbone: must be a torch.nn.Module with parameters, found {type(backbone).__name__}"
        )
    name = backbone_name(backbone)
    every = (*_SIZES, *_OPTIONAL, "null_condition")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # third-party classes may warn of deprecated attributes
        found = {each: getattr(backbone, each) for each in every if hasattr(backbone, each)}
    of_labels = "null_condition" not in found and "num_classes" in found
    needed = [*_SIZES, *(_OF_LABELS if of_labels else ["null_condition"])]
    missing = [each for each in needed if each not in found]
    if missing:
        rule = "0 for no classes" if of_labels else "{} for no condition"
        raise ConfigError(
            f"backbone: {name} must have the attributes {', '.join(needed)} ({rule}), found no "
            f"{', '.join(missing)}"
        )
    if not of_labels:
        _check_null(name, found)
    for each, least in {**_SIZES, **_OPTIONAL}.items():
        _check_size(f"{name}.{each}", found.get(each, least), least, pair=each == "input_size")
    third = "labels" if of_labels else "condition"
    try:
        signature(backbone.forward).bind(None, None, None)
    except TypeError as error:
        raise ConfigError(
            f"backbone: {name}.forward must take (x_t, t, {third}), found "
            f"{signature(backbone.forward)}"
        ) from error


def check_output_channels(backbone: nn.Module, process: NoiseProcess) -> None:
    """Check that a network has the outputs that a process reads.

    Raises:
        ConfigError: If it has another number of channels.
    """
    allowed = process.accepted_channels(int(backbone.in_channels))  # type: ignore[arg-type]
    found = output_channels(backbone)
    doubles = getattr(backbone, "learn_sigma", None)
    if found not in allowed and doubles is not None:
        raise ConfigError(
            f"backbone.learn_sigma: must be {str(not doubles).lower()} with "
            f"{process.output_setting}, found {str(doubles).lower()}"
        )
    if found not in allowed:
        raise ConfigError(
            f"backbone.out_channels: must be {' or '.join(map(str, allowed))} with "
            f"{process.output_setting}, found {found}"
        )


def _check_size(name: str, value: object, least: int, *, pair: bool) -> None:
    parts = list(value) if pair and isinstance(value, tuple | list) else [value, value]
    # `None` counts as 0, which `num_classes` and `null_class` may be.
    numbers: list[Any] = [part or 0 for part in parts]
    if len(numbers) == 2 and all(isinstance(each, int) and each >= least for each in numbers):
        return
    rule = f"a whole number of at least {least}{', or a height and a width' if pair else ''}"
    raise ConfigError(f"backbone: {name} must be {rule}, found {value!r}")


def _check_null(name: str, found: Mapping[str, Any]) -> None:
    null = found["null_condition"]
    kinds = (Tensor, int, float, type(None))
    if not isinstance(null, Mapping) or not all(isinstance(v, kinds) for v in null.values()):
        raise ConfigError(
            f"backbone: {name}.null_condition must map the name of each condition to its null "
            f"value (a tensor for one image, a number, or None for no null), found {null!r:.80}"
        )
    if ("labels" in null) != bool(found.get("num_classes")):
        raise ConfigError(
            f"backbone: {name}.num_classes must be the number of classes with labels in "
            f"null_condition, and 0 or left out without, found {found.get('num_classes')} with "
            f"{', '.join(null) or 'none'}"
        )


def call_backbone(network: nn.Module, x_in: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The network's output; one that takes named conditions is given those that it names.

    Args:
        network: The network.
        x_in: Images, scaled for the network.
        t: The network's time input, `[b]`.
        condition: Labels or named tensors.

    Raises:
        ConfigError: If a condition is missing, or the output is not one tensor of the right shape.
    """
    names: Any = getattr(network, "null_condition", None)
    if names is not None:
        given = {"labels": condition} if isinstance(condition, Tensor) else dict(condition or {})
        missing = [name for name in names if name not in given]
        if missing:
            raise ConfigError(
                f"condition: must have {', '.join(missing)} for {backbone_name(network)}, found "
                f"{', '.join(given) or 'none'}"
            )
        condition = {
            name: given[name].to(x_in.dtype) if given[name].is_floating_point() else given[name]
            for name in names
        }
    elif isinstance(condition, Mapping):
        condition = condition.get("labels")
    return check_output(network, network(x_in, t, condition), x_in)


def check_output(backbone: nn.Module, output: object, x_t: Tensor) -> Tensor:
    """Return a network's output, or its field `sample`, if it is a tensor of the right shape.

    Raises:
        ConfigError: If it is not.
    """
    output = getattr(output, "sample", output)  # output objects of diffusers
    wanted = (len(x_t), output_channels(backbone), *x_t.shape[2:])
    if isinstance(output, Tensor) and output.shape == wanted:
        return output
    found = list(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
    raise ConfigError(
        f"backbone: {backbone_name(backbone)} must return one tensor of shape {list(wanted)} "
        f"for x_t of {list(x_t.shape)}, found {found}"
    )
