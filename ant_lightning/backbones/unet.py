"""The UNet of ADM (pixels) and LDM (latents), with the official parameter names and shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ant_lightning.backbones.layers import (
    arrange,
    check_classes,
    check_images,
    embed_timesteps,
    run_block,
    timestep_mlp,
    zeroed,
)
from ant_lightning.backbones.spatial_transformer import SpatialTransformer
from ant_lightning.backbones.unet_blocks import (
    AttentionBlock,
    Downsample,
    ResBlock,
    Stage,
    Upsample,
)
from ant_lightning.errors import ConfigError, check_range
from ant_lightning.sizes import Size, height_and_width

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_MAX_BLOCKS = 100  # a typo must not fill the memory


class UNet(nn.Module):
    """One UNet for ADM, P2 and LDM, with the layers and parameter names of the official ones.

    Called as `unet(x, timesteps, labels)` with `x` `[b, c, h, w]`, `timesteps` `[b]` (integer or
    fractional, in steps) and `labels` `[b]`; returns `[b, out_channels, h, w]`. Height and width
    may differ from `input_size` as long as every down-sampling divides them.

    Classes enter in one of two ways. Without the spatial transformer, a label embedding is added
    to the time embedding (ADM). With the spatial transformer, the label's embedding is the only
    context token (LDM's class-conditional model). Its table is `class_embedder`, which official
    LDM files hold outside the UNet as `cond_stage_model`. A network with the spatial transformer
    and `num_classes=0` is called with a `context` `[b, m, context_dim]` instead of labels.

    Args:
        input_size: Height and width of `x` at training time; one number for a square.
        in_channels: Channels of `x`.
        out_channels: Channels of the output: `in_channels`, or twice as many if the variance is
            learned.
        model_channels: Channels at the highest resolution, a multiple of 32.
        channel_mult: Channels of each level divided by `model_channels`, highest resolution first;
            each further level halves the resolution.
        num_res_blocks: Residual blocks of a level on the way down (one more on the way up).
        attention_resolutions: Levels with attention as *down-sampling factors* (1, 2, 4, ...),
            as in LDM's configurations and in the official class. The flag of the same name in
            guided-diffusion's scripts lists resolutions instead: `factor = input_size /
            resolution`. The bottom of the UNet always has attention.
        num_heads: Number of attention heads if `num_head_channels` is -1.
        num_head_channels: Channels of one head; the number of heads then follows from the width.
        use_new_attention_order: Order of the rows of `qkv`: as in ADM's 64 px model (true) or
            as in all others (false).
        use_scale_shift_norm: Whether the time embedding scales and shifts the normed features
            (ADM) or is added to the features (LDM).
        resblock_updown: Whether residual blocks change the resolution (ADM).
        conv_resample: Without `resblock_updown`: whether convolutions change the resolution.
        num_classes: Number of classes; 0 is unconditional.
        class_dropout_prob: Above 0, the label table has one more row, the null class at index
            `num_classes`. Labels are dropped by the module's `class_dropout`.
        use_spatial_transformer: Whether attention is a transformer with cross-attention to a
            context.
        transformer_depth: Blocks of each transformer.
        context_dim: Features of a context token; needed with the spatial transformer.
        dropout: Probability of dropping a unit inside residual blocks.
        gradient_checkpointing: Whether to recompute each block in the backward pass.
        channels_last: Whether feature maps have the `channels_last` memory format, in which GPUs
            convolve fastest.
        compiled: Whether to run through `torch.compile`, which compiles at the first call.

    Attributes:
        null_class: Index of the null class, or `None` if there is none.

    Raises:
        ConfigError: If a setting breaks one of the rules above.

    Reference:
        Dhariwal and Nichol, arXiv 2105.05233; Choi et al. (P2), arXiv 2204.00227; Rombach et
        al. (LDM), arXiv 2112.10752.

    Examples:
        >>> import torch
        >>> from ant_lightning import UNet
        >>> unet = UNet(input_size=8, model_channels=32, channel_mult=(1, 2), num_res_blocks=1)
        >>> unet(torch.zeros(2, 3, 8, 8), torch.tensor([0, 999])).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self,
        *,
        input_size: Size,
        in_channels: int = 3,
        out_channels: int = 3,
        model_channels: int = 128,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (),
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_new_attention_order: bool = False,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        conv_resample: bool = True,
        num_classes: int = 0,
        class_dropout_prob: float = 0.0,
        use_spatial_transformer: bool = False,
        transformer_depth: int = 1,
        context_dim: int | None = None,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
        channels_last: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        widths = _level_widths(model_channels, channel_mult)
        _check_levels(
            input_size,
            len(widths),
            attention_resolutions,
            num_res_blocks=num_res_blocks,
            transformer_depth=transformer_depth,
        )
        check_classes(num_classes, class_dropout_prob)
        if use_spatial_transformer != (context_dim is not None):
            raise ConfigError(
                "context_dim: must be given with use_spatial_transformer and only then, found "
                f"{context_dim} with use_spatial_transformer={use_spatial_transformer}"
            )
        self.input_size = input_size
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.num_classes = num_classes
        self.class_dropout_prob = class_dropout_prob if num_classes > 0 else 0.0
        self.null_class = num_classes if self.class_dropout_prob > 0 else None
        self.context_dim = context_dim
        self.gradient_checkpointing = gradient_checkpointing
        self.num_levels = len(widths)

        emb_channels = 4 * model_channels
        num_embeddings = num_classes + (self.null_class is not None)
        res_block = partial(
            ResBlock,
            emb_channels=emb_channels,
            dropout=dropout,
            use_scale_shift_norm=use_scale_shift_norm,
        )
        attention = partial(
            _attention,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            new_order=use_new_attention_order,
            depth=transformer_depth,
            context_dim=context_dim,
        )
        resample = partial(
            _resample, res_block=res_block if resblock_updown else None, conv=conv_resample
        )
        self.time_embed = timestep_mlp(model_channels, emb_channels)
        self.label_emb = None
        if num_classes > 0 and context_dim is None:
            self.label_emb = nn.Embedding(num_embeddings, emb_channels)

        channels = widths[0]
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(in_channels, channels, 3, padding=1))])
        skips = [channels]
        for level, width in enumerate(widths):
            attends = 2**level in attention_resolutions
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [
                    res_block(channels, width),
                    *([attention(width)] if attends else []),
                ]
                self.input_blocks.append(Stage(*layers))
                channels = width
                skips.append(width)
            if level < self.num_levels - 1:
                self.input_blocks.append(Stage(resample(channels, Downsample)))
                skips.append(channels)

        # The bottom has attention whatever `attention_resolutions` says, as in the official code.
        self.middle_block = Stage(
            res_block(channels, channels),
            attention(channels),
            res_block(channels, channels),
        )

        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            attends = 2**level in attention_resolutions
            # One block more than on the way down: it takes the skip of the down-sampling, or, at
            # level 0, that of the first convolution.
            for index in range(num_res_blocks + 1):
                layers = [
                    res_block(channels + skips.pop(), width),
                    *([attention(width)] if attends else []),
                ]
                if level > 0 and index == num_res_blocks:
                    layers.append(resample(width, Upsample))
                self.output_blocks.append(Stage(*layers))
                channels = width

        self.out = nn.Sequential(
            nn.GroupNorm(32, channels),
            nn.SiLU(),
            zeroed(nn.Conv2d(channels, out_channels, 3, padding=1)),
        )
        # Registered last, so that all other entries have the order of the official state dict.
        self.class_embedder = None
        if num_classes > 0 and context_dim is not None:
            table = nn.Embedding(num_embeddings, context_dim)
            self.class_embedder = nn.ModuleDict({"embedding": table})
        arrange(self, channels_last=channels_last, compiled=compiled)

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        timesteps: Float[Tensor, " b"] | Int[Tensor, " b"],
        labels: Int[Tensor, " b"] | None = None,
        context: Float[Tensor, "b m k"] | None = None,
    ) -> Float[Tensor, "b out_channels h w"]:
        """Predict the noise (or x0, v) and, if learned, the variance values.

        Raises:
            ConfigError: If `x`, `timesteps`, `labels` or `context` do not fit the network.
        """
        check_images(x, timesteps, in_channels=self.in_channels)
        multiple = 2 ** (self.num_levels - 1)
        if x.shape[2] % multiple or x.shape[3] % multiple:
            raise ConfigError(
                f"x: its height and width must be divisible by {multiple}, found "
                f"{x.shape[2]} x {x.shape[3]}"
            )
        context = self._context(labels, context)
        embedding = embed_timesteps(self.time_embed, timesteps)
        if self.label_emb is not None:
            embedding = embedding + self.label_emb(labels)

        checkpointing = self.gradient_checkpointing
        skips = []  # feature maps for the way up
        for stage in self.input_blocks:
            x = stage(x, embedding, context, checkpointing=checkpointing)
            skips.append(x)
        x = self.middle_block(x, embedding, context, checkpointing=checkpointing)
        for stage in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            x = stage(x, embedding, context, checkpointing=checkpointing)
        return run_block(self.out, x, checkpointing=checkpointing)

    def _context(self, labels: Tensor | None, context: Tensor | None) -> Tensor | None:
        """Check labels and context; returns the given context, or the embedding of the labels."""
        if context is not None and labels is not None:
            raise ConfigError("labels: must be None beside a context, found both")
        if context is None and labels is None and self.num_classes > 0:
            raise ConfigError(
                f"labels: must be given for {self.num_classes} classes (the null class is "
                f"{self.null_class}), found None"
            )
        if context is None and self.class_embedder is not None:
            token: Tensor = self.class_embedder["embedding"](labels)[:, None]
            return token
        # A network without `context_dim` refuses any context: nothing in it would read the context.
        shape, dim = [] if context is None else list(context.shape), self.context_dim
        if (len(shape) != 3 or shape[2] != dim) if dim is not None else shape:
            raise ConfigError(f"context: must have the shape [b, m, {dim}], found {shape or None}")
        return context


def _level_widths(model_channels: int, channel_mult: Sequence[float]) -> list[int]:
    """Channels of each level; raises unless each width is a multiple of the norms' 32 groups."""
    widths = [int(mult * model_channels) for mult in channel_mult]
    if not widths or any(width < 1 or width % 32 for width in widths):
        raise ConfigError(
            "model_channels: times each of channel_mult must be a positive multiple of 32 "
            f"(the groups of the norms), found {model_channels} times {list(channel_mult)}"
        )
    return widths


def _check_levels(
    input_size: Size, num_levels: int, attention_resolutions: Sequence[int], **blocks: int
) -> None:
    """Check the sizes of a UNet.

    Raises:
        ConfigError: If a count in `blocks` is out of range, if `input_size` cannot be halved for
            every level, or if a factor of `attention_resolutions` belongs to no level.
    """
    check_range(1, _MAX_BLOCKS, **blocks)
    multiple = 2 ** (num_levels - 1)
    if any(side % multiple for side in height_and_width(input_size)):
        raise ConfigError(
            f"input_size: must be divisible by {multiple} ({num_levels} entries in "
            f"channel_mult), found {input_size}"
        )
    factors = [2**level for level in range(num_levels)]
    if not set(attention_resolutions) <= set(factors):
        raise ConfigError(
            f"attention_resolutions: must be down-sampling factors out of {factors}, "
            f"found {list(attention_resolutions)}"
        )


def _attention(
    channels: int,
    *,
    num_heads: int,
    num_head_channels: int,
    new_order: bool,
    depth: int,
    context_dim: int | None,
) -> AttentionBlock | SpatialTransformer:
    """The attention layer for a width: a transformer with `context_dim`, else self-attention."""
    by_width = num_head_channels != -1
    name = "num_head_channels" if by_width else "num_heads"
    value = num_head_channels if by_width else num_heads
    if value < 1 or channels % value:
        raise ConfigError(f"{name}: must divide the {channels} channels, found {value}")
    heads = channels // value if by_width else value
    if context_dim is None:
        return AttentionBlock(channels, num_heads=heads, new_order=new_order)
    return SpatialTransformer(channels, num_heads=heads, depth=depth, context_dim=context_dim)


def _resample(
    channels: int,
    kind: type[Upsample | Downsample],
    *,
    res_block: Callable[..., ResBlock] | None,
    conv: bool,
) -> nn.Module:
    """The layer between two levels: `kind` alone, or (`resblock_updown`) in a residual block."""
    if res_block is None:
        return kind(channels, conv=conv)
    # The block has convolutions of its own, so the resampling inside it has none.
    return res_block(channels, channels, resample=kind(channels, conv=False))
