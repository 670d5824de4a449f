"""Autoencoders of latent-diffusion in the names of diffusers, and the architecture they have."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["diffusers_config", "diffusers_names", "is_latent_diffusion"]

_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.embedding.")
_LEVEL = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.(block|attn|downsample|upsample)\.(.+)")
_RENAMED = (
    (re.compile(r"\bmid\.block_1\b"), "mid_block.resnets.0"),
    (re.compile(r"\bmid\.block_2\b"), "mid_block.resnets.1"),
    (re.compile(r"\bmid\.attn_1\b"), "mid_block.attentions.0"),
    (re.compile(r"\bnorm_out\b"), "conv_norm_out"),
    (re.compile(r"\bnin_shortcut\b"), "conv_shortcut"),
)
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_KINDS = {
    "block": "resnets",
    "attn": "attentions",
    "downsample": "downsamplers.0",
    "upsample": "upsamplers.0",
}


def is_latent_diffusion(names: list[str]) -> bool:
    """Whether these are the names of latent-diffusion, and not those of diffusers."""
    return any(name.startswith("encoder.down.") for name in names)


def diffusers_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The autoencoder's entries under diffusers' names; others (loss, EMA) are left out.

    Attention is stored as convolutions of one pixel there and as linear layers here, and the
    decoder's levels are counted from the other end.
    """
    num_levels = _num_levels(tensors)
    renamed = {}
    for name, tensor in tensors.items():
        if not name.startswith(_PARTS):
            continue
        new = _level_name(name, num_levels)
        for pattern, replacement in _RENAMED:
            new = pattern.sub(replacement, new)
        in_attention = re.fullmatch(r"(.*attentions\.\d+)\.(\w+)\.(weight|bias)", new)
        if in_attention:
            head, part, kind = in_attention.groups()
            new = f"{head}.{_ATTENTION.get(part, part)}.{kind}"
            if tensor.ndim == 4:
                tensor = tensor[:, :, 0, 0]  # noqa: PLW2901
        renamed[new] = tensor
    return renamed


def diffusers_config(tensors: dict[str, Tensor], *, path: str) -> dict[str, Any]:
    """Constructor arguments of the diffusers class that has these (latent-diffusion's) entries.

    Raises:
        ConfigError: If entries are missing, or diffusers has no such architecture.
    """
    try:
        levels = range(_num_levels(tensors))
        widths = [tensors[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in levels]
        has_attention = [f"encoder.down.{i}.attn.0.norm.weight" in tensors for i in levels]
        blocks = sum(
            bool(re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", n)) for n in tensors
        )
        latent = tensors["decoder.conv_in.weight"].shape[1]
        embedded = tensors["post_quant_conv.weight"].shape[1]
        config: dict[str, Any] = {
            "in_channels": tensors["encoder.conv_in.weight"].shape[1],
            "out_channels": tensors["decoder.conv_out.weight"].shape[0],
            "block_out_channels": widths,
            "layers_per_block": blocks,
            "latent_channels": latent,
            "down_block_types": [
                "AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in has_attention
            ],
            "up_block_types": [
                "AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(has_attention)
            ],
            "mid_block_add_attention": "encoder.mid.attn_1.norm.weight" in tensors,
        }
    except KeyError as error:
        raise ConfigError(f"first_stage.source: {path} has no entry {error}") from error
    if "quantize.embedding.weight" in tensors:
        codes, width = tensors["quantize.embedding.weight"].shape
        return {
            **config,
            "_class_name": "VQModel",
            "num_vq_embeddings": codes,
            "vq_embed_dim": width,
        }
    if embedded != latent:
        raise ConfigError(
            f"first_stage.source: diffusers needs embed_dim = z_channels, found {embedded} and "
            f"{latent} in {path}"
        )
    return {**config, "_class_name": "AutoencoderKL"}


def _num_levels(tensors: dict[str, Tensor]) -> int:
    """Resolutions of the encoder."""
    found = (re.match(r"encoder\.down\.(\d+)\.", name) for name in tensors)
    return 1 + max((int(match.group(1)) for match in found if match), default=0)


def _level_name(name: str, num_levels: int) -> str:
    """The name of an entry of one resolution."""
    match = _LEVEL.fullmatch(name)
    if match is None:
        return name
    side, level, kind, rest = match.groups()
    number = int(level) if side == "encoder.down" else num_levels - 1 - int(level)
    return f"{side}_blocks.{number}.{_KINDS[kind]}.{rest}"
