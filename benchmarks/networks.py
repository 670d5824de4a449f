"""The networks of `benchmarks.backbones`: ours, and the same ones of diffusers and in ViT style.

The UNet of diffusers is given our weights and must give our output: it is the same function, with
as many parameters and multiplications. It takes `ResnetDownsampleBlock2D` and its counterpart (its
plain blocks ignore `downsample_type`, and have 14% fewer multiplications for that) and a norm in
the middle attention. The DiT of diffusers is the same but for an embedding of the timestep and
class in each block, where the official one has a single one for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ant_lightning import UNet, adm_p2_light, dit_s_2
from ant_lightning.backbones.unet_blocks import AttentionBlock

__all__ = ["PAIRS", "Network", "build", "check_same_unet"]

DIT: dict[str, Any] = {
    "input_size": 32,
    "in_channels": 4,
    "num_classes": 1000,
    "learn_sigma": False,
}
PAIRS = [
    ("lightweight ADM, ours", "lightweight ADM, diffusers"),
    ("DiT-S/2, ours", "DiT-S/2, diffusers"),
    ("DiT-S/2 blocks, ours", "DiT-S/2 blocks, ViT style"),
]


class ViTBlock(nn.Module):
    """A DiT block as it is written on top of a ViT library: attention, MLP, six modulations."""

    def __init__(self, hidden: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.fc1, self.fc2 = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.modulation = nn.Linear(hidden, 6 * hidden)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c))[:, None].chunk(
            6, dim=-1
        )
        h = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = rearrange(self.qkv(h), "b n (t h d) -> t b h n d", t=3, h=self.num_heads)
        h = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        x = x + gate1 * self.proj(h)
        h = self.norm2(x) * (1 + scale2) + shift2
        output: Tensor = x + gate2 * self.fc2(F.gelu(self.fc1(h), approximate="tanh"))
        return output


class Blocks(nn.Module):
    """Blocks on tokens: the part of DiT-S/2 that costs the time."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, c)
        return x


class Network:
    """A network and one batch for it."""

    def __init__(self, model: nn.Module, call: Callable[[nn.Module], Tensor]) -> None:
        self.model = model
        self._call = call

    def step(self) -> Tensor:
        """Forward and backward; the scalar that was differentiated."""
        value = self._call(self.model).square().mean()
        value.backward()
        return value


def build(name: str, *, batch_size: int, pixels: int, device: str = "cpu") -> Network:
    """The network of that name, on `device` ("meta" only counts)."""
    with torch.device(device):
        return _build(name, batch_size, pixels)


def _build(name: str, batch_size: int, pixels: int) -> Network:
    ours = name.endswith("ours")
    if name.startswith("lightweight ADM"):
        image, t = torch.randn(1, 3, pixels, pixels), torch.full((1,), 300)
        if ours:
            return Network(adm_p2_light(input_size=pixels), lambda m: m(image, t))
        return Network(diffusers_unet(pixels), lambda m: m(image, t).sample)
    if "blocks" in name:
        x, c = torch.randn(batch_size, 256, 384), torch.randn(batch_size, 384)
        vit = (ViTBlock(384, 6) for _ in range(12))
        blocks = dit_s_2(**DIT).blocks if ours else nn.ModuleList(vit)
        return Network(Blocks(blocks), lambda m: m(x, c))
    latents = torch.randn(batch_size, 4, 32, 32)
    t, y = torch.arange(batch_size) * 100, torch.arange(batch_size)
    if ours:
        return Network(dit_s_2(**DIT), lambda m: m(latents, t, y))
    return Network(diffusers_dit(), lambda m: m(latents, timestep=t, class_labels=y).sample)


def diffusers_dit() -> nn.Module:
    """DiT-S/2 of diffusers; in training it would drop labels, which ours leaves to the step."""
    from diffusers import DiTTransformer2DModel  # noqa: PLC0415 - slow to import

    model: nn.Module = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        num_layers=12,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    return model


def diffusers_unet(pixels: int) -> nn.Module:
    """The UNet of diffusers that is the lightweight ADM."""
    from diffusers import UNet2DModel  # noqa: PLC0415 - slow to import

    down, up = ["ResnetDownsampleBlock2D"] * 6, ["ResnetUpsampleBlock2D"] * 6
    down[4], up[1] = "AttnDownBlock2D", "AttnUpBlock2D"
    model: nn.Module = UNet2DModel(
        sample_size=pixels,
        in_channels=3,
        out_channels=6,
        layers_per_block=1,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        attention_head_dim=64,
        attn_norm_num_groups=32,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
    )
    return model


@torch.no_grad()
def check_same_unet(pixels: int = 64) -> float:
    """Give diffusers' UNet our weights; the largest difference of the outputs over the largest.

    Raises:
        RuntimeError: If it is more than rounding: the two would not be the same network.
    """
    torch.manual_seed(0)
    ours = adm_p2_light(input_size=pixels)
    for parameter in ours.parameters():
        fan_in = max(1, parameter[0].numel())
        parameter.copy_(torch.randn_like(parameter) / fan_in**0.5)
    theirs = diffusers_unet(pixels)
    for mine, other in _pairs(ours, theirs):
        other.load_state_dict(mine.state_dict())
    x, t = torch.randn(1, 3, pixels, pixels), torch.full((1,), 300)
    wanted: Tensor = ours(x, t)
    difference = float((theirs(x, t).sample - wanted).abs().max() / wanted.abs().max())
    if not difference < 1e-4:
        raise RuntimeError(f"not the same network: outputs differ by {difference}")
    return difference


def _pairs(ours: UNet, theirs: Any) -> Iterator[tuple[nn.Module, nn.Module]]:  # noqa: ANN401
    """Layers with the same weights; attentions, whose rows differ in order, are copied here."""
    names = ("time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2")
    yield from zip(
        map(ours.get_submodule, names),
        [
            theirs.time_embedding.linear_1,
            theirs.time_embedding.linear_2,
            theirs.conv_in,
            theirs.conv_norm_out,
            theirs.conv_out,
        ],
        strict=True,
    )
    stages = [*ours.input_blocks[1:], ours.middle_block, *ours.output_blocks]
    layers = [layer for stage in stages for layer in stage]
    for mine, other in zip(layers, _their_layers(theirs), strict=True):
        if isinstance(mine, AttentionBlock):
            yield mine.norm, other.group_norm
            for part in ("weight", "bias"):
                value = mine.qkv.get_parameter(part)
                flat = value.view(value.shape[:2])  # a convolution of size 1
                rows = rearrange(flat, "(h t d) ... -> t (h d) ...", t=3, h=mine.num_heads)
                for row, linear in zip(rows, (other.to_q, other.to_k, other.to_v), strict=True):
                    linear.get_parameter(part).copy_(row)
            other.to_out[0].weight.copy_(mine.proj_out.weight.squeeze(2))
            other.to_out[0].bias.copy_(mine.proj_out.bias)
        else:
            yield mine.in_layers[0], other.norm1
            yield mine.in_layers[2], other.conv1
            yield mine.emb_layers[1], other.time_emb_proj
            yield mine.out_layers[0], other.norm2
            yield mine.out_layers[3], other.conv2
            if other.conv_shortcut is not None:
                yield mine.skip_connection, other.conv_shortcut


def _their_layers(model: Any) -> Iterator[Any]:  # noqa: ANN401
    """Residual and attention layers of diffusers' UNet in the order in which they run."""

    def layers(block: Any, change: str) -> Iterator[Any]:  # noqa: ANN401
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        for resnet, attention in zip(block.resnets, attentions, strict=True):
            yield from (layer for layer in (resnet, attention) if layer is not None)
        yield from getattr(block, change) or ()

    for block in model.down_blocks:
        yield from layers(block, "downsamplers")
    middle = model.mid_block
    yield from (middle.resnets[0], middle.attentions[0], middle.resnets[1])
    for block in model.up_blocks:
        yield from layers(block, "upsamplers")
