"""Guidance of a module: what it needs, and the weaker network of autoguidance."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from ant_lightning.backbones.diffusers import as_backbone
from ant_lightning.errors import ConfigError
from ant_lightning.models.backbone import (
    backbone_name,
    check_backbone,
    output_channels,
    size_of,
)
from ant_lightning.models.checkpoint_origin import load_weights_for

if TYPE_CHECKING:
    from torch import nn

    from ant_lightning.diffusion.process import NoiseProcess
    from ant_lightning.models.conditions import Conditions
    from ant_lightning.models.settings import Sampling


def check_guidance(
    sampling: Sampling, conditions: Conditions, guide: nn.Module | None, *, channels: int
) -> None:
    """Check that the backbone has what the guidance needs.

    Args:
        sampling: Its guidance is checked.
        conditions: What the backbone is conditioned on.
        guide: The weaker network, which needs no null class.
        channels: Those of an image.

    Raises:
        ConfigError: If there are fewer channels, or no null class.
    """
    guided = sampling.guided_channels
    if guided is not None and not 1 <= guided <= channels:
        raise ConfigError(
            f"sampling.guided_channels: must be from 1 to the {channels} channels of an image, "
            f"or None for all, found {guided}"
        )
    if guide is None:
        conditions.check_null("sampling.guidance_scale", sampling.guidance_scale, neutral=1)


def _size(network: nn.Module, name: str) -> int | tuple[int, int]:
    if name == "input_size":
        return size_of(network)
    if name == "out_channels":
        return output_channels(network)
    return int(getattr(network, name, 0) or 0)


def load_guide(sampling: Sampling, backbone: nn.Module, process: NoiseProcess) -> nn.Module | None:
    """The network of `guide_checkpoint`, in evaluation mode; `None` without one.

    Args:
        sampling: Its `guide_backbone` is filled, or else a copy of `backbone`.
        backbone: The network that is guided.
        process: What both were trained for.

    Raises:
        ConfigError: If the checkpoint does not fit the network or the process, or the network does
            not fit the one it guides.
    """
    if sampling.guide_checkpoint is None:
        return None
    guide = sampling.guide_backbone
    if guide is None:
        guide = copy.deepcopy(backbone)
    else:
        guide = as_backbone(guide)
        check_backbone(guide)
        for name in ("input_size", "in_channels", "out_channels", "num_classes"):
            own, found = _size(backbone, name), _size(guide, name)
            if found != own and not (name == "num_classes" and not found):
                raise ConfigError(
                    f"sampling.guide_backbone: {name} must be the backbone's {own}, found {found} "
                    f"of {backbone_name(guide)}"
                )
    try:
        load_weights_for(process, guide, sampling.guide_checkpoint, weights=sampling.guide_weights)
    except ConfigError as error:
        raise ConfigError(f"sampling.guide_checkpoint: {error}") from error
    return guide.requires_grad_(False).eval()
