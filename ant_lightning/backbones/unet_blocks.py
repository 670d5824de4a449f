"""The UNet's residual block, self-attention and resampling, with the official parameter names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ant_lightning.backbones.layers import run_block, zeroed
from ant_lightning.backbones.spatial_transformer import SpatialTransformer

if TYPE_CHECKING:
    from jaxtyping import Float


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a 3x3 convolution if `conv`."""

    def __init__(self, channels: int, *, conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if conv else None

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 2*h 2*w"]:
        """Enlarge the feature map."""
        return _enlarged(x) if self.conv is None else convolved_after_upsampling(x, self.conv)


def _enlarged(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


# From this many positions of the small map on, one transposed convolution is faster on the CPU. On
# smaller maps, rearranging its weights (16/9 times as many) costs more than it saves.
_MIN_FUSED_POSITIONS = 1024


def convolved_after_upsampling(
    x: Float[Tensor, "b c h w"], conv: nn.Conv2d
) -> Float[Tensor, "b c_out 2*h 2*w"]:
    """Double the size of `x` by nearest neighbour, then apply `conv` (3x3, padding 1).

    The enlarged map repeats each value 2x2 times, so a 3x3 window sees at most 2x2 different
    values. The two steps therefore equal one transposed convolution of stride 2. Its 4x4 kernel is
    the sum of the 3x3 kernel at the four places of a repeated value. It needs 4/9 of the
    multiplications, and the enlarged map is neither written nor kept for the backward pass.

    Large maps on the CPU take the transposed convolution. It was not measured on GPUs, where the
    two steps are kept. See `docs/decisions/010-upsampling-convolution.md`.
    """
    if x.device.type != "cpu" or x.shape[2] * x.shape[3] < _MIN_FUSED_POSITIONS:
        enlarged: Tensor = conv(_enlarged(x))
        return enlarged
    # A transposed convolution applies its kernel mirrored, with input and output channels swapped.
    kernel = conv.weight.flip(2, 3).transpose(0, 1)
    # The four places of a 3x3 kernel in a 4x4 one, as `F.pad` wants them: left, right, top, bottom.
    places = [(0, 1, 0, 1), (1, 0, 0, 1), (0, 1, 1, 0), (1, 0, 1, 0)]
    kernel = sum((F.pad(kernel, place) for place in places[1:]), F.pad(kernel, places[0]))
    return F.conv_transpose2d(x, kernel, conv.bias, stride=2, padding=1)


class Downsample(nn.Module):
    """Halve height and width: a strided 3x3 convolution if `conv`, else means of 2x2 values."""

    def __init__(self, channels: int, *, conv: bool) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if conv else None

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h/2 w/2"]:
        """Shrink the feature map."""
        return F.avg_pool2d(x, 2) if self.op is None else self.op(x)


class ResBlock(nn.Module):
    """Two 3x3 convolutions with the time embedding in between; the result is added to the input.

    The embedding either shifts the features, `norm(h + shift)`, or scales and shifts the normed
    features, `norm(h) (1 + scale) + shift`. If the number of channels changes, a 1x1 convolution
    projects the input.

    Args:
        channels: Channels of the input.
        out_channels: Channels of the output.
        emb_channels: Length of the embedding.
        dropout: Probability of dropping a unit before the second convolution.
        use_scale_shift_norm: Whether the embedding scales and shifts, or only shifts.
        resample: Layer without parameters that changes the resolution inside the block.

    Reference:
        Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", section 3,
        arXiv 2105.05233.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        *,
        emb_channels: int,
        dropout: float,
        use_scale_shift_norm: bool,
        resample: Upsample | Downsample | None = None,
    ) -> None:
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        self.dropout = dropout
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, channels),
            nn.SiLU(),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        self.resample = resample
        num_vectors = 2 if use_scale_shift_norm else 1
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, num_vectors * out_channels)
        )
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection: nn.Module = nn.Identity()
        if out_channels != channels:
            self.skip_connection = nn.Conv2d(channels, out_channels, 1)

    def forward(
        self, x: Float[Tensor, "b c h w"], embedding: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b c_out h_out w_out"]:
        """Add the two convolutions' output to the input."""
        norm_in, activation, conv_in = self.in_layers
        h = activation(norm_in(x))
        # `conv_in` is always a Conv2d; the second check is for the type checker.
        if isinstance(self.resample, Upsample) and isinstance(conv_in, nn.Conv2d):
            h, x = convolved_after_upsampling(h, conv_in), self.resample(x)
        elif self.resample is not None:
            h, x = conv_in(self.resample(h)), self.resample(x)
        else:
            h = conv_in(h)
        vectors = self.emb_layers(embedding)[:, :, None, None]
        norm_out, activation, dropout, conv_out = self.out_layers
        if self.use_scale_shift_norm:
            # Adaptive group normalisation: section 3 of the paper.
            scale, shift = vectors.chunk(2, dim=1)
            # Not addcmul, whose backward pass also multiplies the whole map by its factor, 1.
            h = (norm_out(h) * (1 + scale)).add_(shift)
        else:
            h = norm_out(h + vectors)
        output: Tensor = conv_out(dropout(activation(h)))
        return output.add_(self.skip_connection(x))


class AttentionBlock(nn.Module):
    """Multi-head self-attention over the positions of a feature map; added to the map.

    Args:
        channels: Channels of the feature map.
        num_heads: Attention heads; divides `channels`.
        new_order: Order of the rows of `qkv`: (query|key|value, head, channel) if true, else
            (head, query|key|value, channel). Published checkpoints exist with both.
    """

    def __init__(self, channels: int, *, num_heads: int, new_order: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        heads = "(three h d)" if new_order else "(h three d)"
        self.pattern = f"b n {heads} -> three b h n d"
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Add the attention output to `x`."""
        # The 1x1 convolutions run as linear maps on tokens. The channels of a head are then
        # adjacent, as fused attention needs them, and channels_last maps need no copy.
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        qkv = F.linear(tokens, self.qkv.weight.flatten(1), self.qkv.bias)
        query, key, value = rearrange(qkv, self.pattern, three=3, h=self.num_heads)
        attended = F.scaled_dot_product_attention(query, key, value)
        tokens = rearrange(attended, "b h n d -> b n (h d)")
        tokens = F.linear(tokens, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return x + rearrange(tokens, "b (h w) c -> b c h w", h=x.shape[2])


class Stage(nn.Sequential):
    """Layers in sequence; a ResBlock also gets the embedding, a SpatialTransformer the context."""

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "b c h w"],
        embedding: Float[Tensor, "b e"],
        context: Float[Tensor, "b m k"] | None,
        *,
        checkpointing: bool,
    ) -> Float[Tensor, "b c_out h_out w_out"]:
        """Run the layers; `checkpointing` recomputes residual blocks and attention."""
        for layer in self:
            inputs: tuple[Tensor | None, ...] = ()
            if isinstance(layer, ResBlock):
                inputs = (embedding,)
            elif isinstance(layer, SpatialTransformer):
                inputs = (context,)
            x = run_block(
                layer,
                x,
                *inputs,
                checkpointing=checkpointing
                and isinstance(layer, ResBlock | SpatialTransformer | AttentionBlock),
                preserve_rng=self.training and getattr(layer, "dropout", 0) > 0,
            )
        return x
