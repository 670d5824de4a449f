"""Converts autoencoders of latent-diffusion: names for diffusers, architecture from shapes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ant_lightning.errors import FileError

if TYPE_CHECKING:
    from torch import Tensor

_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.embedding.")
# Patterns of latent-diffusion and what diffusers calls them; a name may match several.
_RENAMED = (
    (r"\bencoder\.down\.(\d+)", r"encoder.down_blocks.\1"),
    (r"\bblock\.(\d+)", r"resnets.\1"),
    (r"\battn\.(\d+)", r"attentions.\1"),
    (r"\bdownsample\b", "downsamplers.0"),
    (r"\bupsample\b", "upsamplers.0"),
    (r"\bmid\.block_1\b", "mid_block.resnets.0"),
    (r"\bmid\.block_2\b", "mid_block.resnets.1"),
    (r"\bmid\.attn_1\b", "mid_block.attentions.0"),
    (r"\bnorm_out\b", "conv_norm_out"),
    (r"\bnin_shortcut\b", "conv_shortcut"),
)
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def is_latent_diffusion(names: list[str]) -> bool:
    """Whether these are the names of latent-diffusion, and not those of diffusers."""
    return any(name.startswith("encoder.down.") for name in names)


def diffusers_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The autoencoder's entries under diffusers' names; others (loss, EMA) are left out.

    latent-diffusion stores attention as convolutions of one pixel, diffusers as linear layers, and
    they count the decoder's levels from opposite ends.
    """
    last, renamed = _num_levels(tensors) - 1, {}
    for name, tensor in tensors.items():
        if not name.startswith(_PARTS):
            continue
        # The decoder's level 0 is the finest in latent-diffusion and the coarsest in diffusers.
        new = re.sub(r"decoder\.up\.(\d+)", lambda m: f"decoder.up_blocks.{last - int(m[1])}", name)
        for pattern, replacement in _RENAMED:
            new = re.sub(pattern, replacement, new)
        if ".attentions." in new:
            head, part, kind = new.rsplit(".", 2)
            new = f"{head}.{_ATTENTION.get(part, part)}.{kind}"
            # A 1x1 convolution [o, i, 1, 1] as the linear layer [o, i].
            tensor = tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor  # noqa: PLW2901
        renamed[new] = tensor
    return renamed


def diffusers_config(tensors: dict[str, Tensor], *, path: str) -> dict[str, Any]:
    """Constructor arguments of the diffusers class for these entries of latent-diffusion.

    Raises:
        FileError: If entries are missing, or diffusers has no such architecture.
    """
    try:
        levels = range(_num_levels(tensors))
        attention = [f"encoder.down.{i}.attn.0.norm.weight" in tensors for i in levels]
        down = [f"{'Attn' if each else ''}DownEncoderBlock2D" for each in attention]
        up = [f"{'Attn' if each else ''}UpDecoderBlock2D" for each in reversed(attention)]
        block = re.compile(r"encoder\.down\.0\.block\.\d+\.conv1\.weight")
        latent = tensors["decoder.conv_in.weight"].shape[1]
        embedded = tensors["post_quant_conv.weight"].shape[1]
        config: dict[str, Any] = {
            "in_channels": tensors["encoder.conv_in.weight"].shape[1],
            "out_channels": tensors["decoder.conv_out.weight"].shape[0],
            "block_out_channels": [
                tensors[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in levels
            ],
            "layers_per_block": sum(bool(block.fullmatch(name)) for name in tensors),
            "latent_channels": latent,
            "down_block_types": down,
            "up_block_types": up,
            "mid_block_add_attention": "encoder.mid.attn_1.norm.weight" in tensors,
        }
    except KeyError as error:
        raise FileError(f"{path}: must be an autoencoder, but has no entry {error}") from error
    if "quantize.embedding.weight" in tensors:
        codes, width = tensors["quantize.embedding.weight"].shape
        vq = {"_class_name": "VQModel", "num_vq_embeddings": codes, "vq_embed_dim": width}
        return {**config, **vq}
    # latent-diffusion may project to other channels in `quant_conv`; `AutoencoderKL` cannot.
    if embedded != latent:
        raise FileError(
            f"{path}: must have embed_dim = z_channels for diffusers, found {embedded} and {latent}"
        )
    return {**config, "_class_name": "AutoencoderKL"}


def _num_levels(tensors: dict[str, Tensor]) -> int:
    """Resolutions of the encoder."""
    found = (re.match(r"encoder\.down\.(\d+)\.", name) for name in tensors)
    return 1 + max((int(match[1]) for match in found if match), default=0)
