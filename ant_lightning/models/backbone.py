"""What a module requires of its network, and the errors that name what is missing."""

from __future__ import annotations

import warnings
from inspect import signature

from torch import Tensor, nn

from ant_lightning.balancing.shards import is_sharded
from ant_lightning.errors import ConfigError

__all__ = ["NO_NULL_CLASS", "backbone_name", "check_backbone", "check_output"]

# Attributes of a network, each with its smallest valid value; `null_class` may be missing.
_SIZES = {"input_size": 1, "in_channels": 1, "out_channels": 1, "num_classes": 0, "null_class": 0}


# The reason in messages of settings that need a null class, which the backbone lacks.
NO_NULL_CLASS = (
    "because the backbone has no null class (a DiT or UNet has one with num_classes above 1 and "
    "class_dropout_prob above 0, a network of your own with an attribute null_class)"
)


def backbone_name(backbone: nn.Module) -> str:
    """Name of the network's own class, without the one that `torch.compile` or FSDP2 adds."""
    bare = getattr(backbone, "_orig_mod", backbone)
    kind = type(bare)
    # `fully_shard` replaces the class by a new one with the bases (FSDPModule, own class).
    return (kind.__bases__[-1] if is_sharded(bare.parameters()) else kind).__name__


def check_backbone(backbone: nn.Module) -> None:
    """Check that a network has its sizes and can be called as `backbone(x_t, timesteps, labels)`.

    Raises:
        ConfigError: If an attribute is missing or invalid, or the call signature does not fit.
    """
    if not isinstance(backbone, nn.Module) or next(backbone.parameters(), None) is None:
        raise ConfigError(
            f"backbone: must be a torch.nn.Module with parameters, found {type(backbone).__name__}"
        )
    name = backbone_name(backbone)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # third-party classes may warn of deprecated attributes
        sizes = {each: getattr(backbone, each) for each in _SIZES if hasattr(backbone, each)}
    missing = [each for each in _SIZES if each not in sizes and each != "null_class"]
    if missing:
        raise ConfigError(
            f"backbone: {name} must have the attributes {', '.join(list(_SIZES)[:4])} (0 for no "
            f"classes), found no {', '.join(missing)}"
        )
    for each, value in sizes.items():
        least = _SIZES[each]
        # `None` counts as 0, which `num_classes` and `null_class` may be.
        if not isinstance(value or 0, int) or (value or 0) < least:
            raise ConfigError(
                f"backbone: {name}.{each} must be a whole number of at least {least}, "
                f"found {value!r}"
            )
    try:
        signature(backbone.forward).bind(None, None, None)
    except TypeError as error:
        raise ConfigError(
            f"backbone: {name}.forward must take (x_t, timesteps, labels), found "
            f"{signature(backbone.forward)}"
        ) from error


def check_output(backbone: nn.Module, output: object, x_t: Tensor) -> Tensor:
    """Return a network's output if it is one tensor of the right shape.

    Raises:
        ConfigError: If it is not.
    """
    wanted = (len(x_t), int(backbone.out_channels), *x_t.shape[2:])  # type: ignore[arg-type]
    if isinstance(output, Tensor) and output.shape == wanted:
        return output
    found = list(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
    raise ConfigError(
        f"backbone: {backbone_name(backbone)} must return one tensor of shape {list(wanted)} "
        f"for x_t of {list(x_t.shape)}, found {found}"
    )
