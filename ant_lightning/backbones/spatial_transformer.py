"""LDM's transformer on a feature map of the UNet, with cross-attention to a context."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ant_lightning.backbones.layers import zeroed

if TYPE_CHECKING:
    from jaxtyping import Float


class CrossAttention(nn.Module):
    """Attention of tokens `[b, n, d]` to a context `[b, m, c]`; the context may be the tokens."""

    def __init__(self, *, dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        # A sequence of one layer, because official files name it "to_out.0".
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(
        self, x: Float[Tensor, "b n d"], context: Float[Tensor, "b m c"]
    ) -> Float[Tensor, "b n d"]:
        """Attend to the context."""
        pattern = "b n (h d) -> b h n d"
        query = rearrange(self.to_q(x), pattern, h=self.num_heads)
        key = rearrange(self.to_k(context), pattern, h=self.num_heads)
        value = rearrange(self.to_v(context), pattern, h=self.num_heads)
        attended = F.scaled_dot_product_attention(query, key, value)
        output: Tensor = self.to_out(rearrange(attended, "b h n d -> b n (h d)"))
        return output


class GatedGELU(nn.Module):
    """`a * gelu(b)`, where `a` and `b` are the halves of the output of one linear map."""

    def __init__(self, *, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner_dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n inner"]:
        """Gate one half by the other."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        output: Tensor = value * F.gelu(gate)
        return output


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, feed-forward: each normed first, and residual."""

    def __init__(self, *, dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim=dim, context_dim=dim, num_heads=num_heads)
        # Official files name these layers "ff.net.0.proj" and "ff.net.2". Between them is a dropout
        # that is never used; an identity keeps the numbers.
        layers = (GatedGELU(dim=dim, inner_dim=4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))
        self.ff = nn.Sequential(OrderedDict(net=nn.Sequential(*layers)))
        self.attn2 = CrossAttention(dim=dim, context_dim=context_dim, num_heads=num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(
        self, x: Float[Tensor, "b n d"], context: Float[Tensor, "b m c"]
    ) -> Float[Tensor, "b n d"]:
        """Add attention to the tokens, to the context, and the feed-forward layers."""
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), context)
        output: Tensor = x + self.ff(self.norm3(x))
        return output


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map; the result is added to the map.

    Args:
        channels: Channels of the feature map.
        num_heads: Attention heads; divides `channels`.
        depth: Number of transformer blocks.
        context_dim: Features of a context token.

    Reference:
        Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models",
        section 3.3, arXiv 2112.10752.
    """

    def __init__(self, channels: int, *, num_heads: int, depth: int, context_dim: int) -> None:
        super().__init__()
        # LDM's own norm has eps 1e-6; the other norms of the UNet have PyTorch's default, 1e-5.
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(dim=channels, context_dim=context_dim, num_heads=num_heads)
            for _ in range(depth)
        )
        self.proj_out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(
        self, x: Float[Tensor, "b c h w"], context: Float[Tensor, "b m k"]
    ) -> Float[Tensor, "b c h w"]:
        """Add the output of the transformer to `x`."""
        # The 1x1 convolutions run as linear maps on tokens, which saves two copies. They are
        # convolutions only to have the official parameter shapes.
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        tokens = F.linear(tokens, self.proj_in.weight.flatten(1), self.proj_in.bias)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        tokens = F.linear(tokens, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return x + rearrange(tokens, "b (h w) c -> b c h w", h=x.shape[2])
