"""The layers of one UNet from its settings: what all its levels have in common."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ant_lightning.backbones.spatial_transformer import SpatialTransformer
from ant_lightning.backbones.unet_blocks import AttentionBlock, Downsample, ResBlock, Upsample
from ant_lightning.errors import ConfigError

__all__ = ["LayerFactory"]


@dataclass(frozen=True, kw_only=True)
class LayerFactory:
    """Makes a UNet's layers at any width; the settings are described in UNet."""

    emb_channels: int
    dropout: float
    use_scale_shift_norm: bool
    resblock_updown: bool
    conv_resample: bool
    num_heads: int
    num_head_channels: int
    use_new_attention_order: bool
    transformer_depth: int
    context_dim: int | None

    def res_block(
        self, channels: int, out_channels: int, resample: Upsample | Downsample | None = None
    ) -> ResBlock:
        """Make a residual block, with a change of resolution inside if one is given."""
        return ResBlock(
            channels=channels,
            out_channels=out_channels,
            emb_channels=self.emb_channels,
            dropout=self.dropout,
            use_scale_shift_norm=self.use_scale_shift_norm,
            resample=resample,
        )

    def attention(self, channels: int) -> AttentionBlock | SpatialTransformer:
        """Make the attention layer: with a context, a transformer; else self-attention."""
        num_heads = self._num_heads(channels)
        if self.context_dim is not None:
            return SpatialTransformer(
                channels=channels,
                num_heads=num_heads,
                depth=self.transformer_depth,
                context_dim=self.context_dim,
            )
        return AttentionBlock(
            channels=channels, num_heads=num_heads, new_order=self.use_new_attention_order
        )

    def resample(self, channels: int, kind: type[Upsample | Downsample]) -> nn.Module:
        """Make the step between two levels."""
        if self.resblock_updown:
            return self.res_block(channels, channels, kind(channels=channels, conv=False))
        return kind(channels=channels, conv=self.conv_resample)

    def _num_heads(self, channels: int) -> int:
        """Attention heads at a width: one of the two settings decides.

        Raises:
            ConfigError: that setting does not divide the channels.
        """
        by_width = self.num_head_channels != -1
        name = "num_head_channels" if by_width else "num_heads"
        value = self.num_head_channels if by_width else self.num_heads
        if value < 1 or channels % value:
            raise ConfigError(f"{name}: must divide the {channels} channels, found {value}")
        return channels // value if by_width else value
