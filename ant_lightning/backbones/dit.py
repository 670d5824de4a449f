"""DiT: the diffusion transformer with adaLN-Zero, with the official parameter names and shapes."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import astuple
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ant_lightning.backbones.layers import (
    arrange,
    check_classes,
    check_images,
    embed_timesteps,
    run_block,
    timestep_mlp,
)
from ant_lightning.backbones.routing import ChannelRouting
from ant_lightning.errors import ConfigError, check_above, check_at_least
from ant_lightning.sizes import Size, height_and_width

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_MAX_DEPTH = 1000  # a typo must not fill the memory
_TIMESTEP_FEATURES = 256


def _axis_features(positions: Tensor, dim: int) -> Tensor:
    """Sines, then cosines, of `positions` `[n]` at `dim / 2` frequencies: `[n, dim]` float64."""
    exponents = torch.arange(dim // 2, dtype=torch.float64) / (dim / 2)
    angles = positions[:, None] * (10000.0**-exponents)[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def position_embedding(dim: int, grid: tuple[int, int]) -> Tensor:
    """Sinusoidal features of the position of each of `h w` patches, `[1, h w, dim]` float32.

    The first half encodes the column and the second half the row, as in the official code.
    """
    height, width = grid
    axis = _axis_features(torch.arange(max(grid), dtype=torch.float64), dim // 2)
    columns = axis[None, :width].expand(height, -1, -1)
    rows = axis[:height, None].expand(-1, width, -1)
    return rearrange(torch.cat([columns, rows], dim=-1), "h w d -> 1 (h w) d").float()


class PatchEmbed(nn.Module):
    """Map patches to tokens: `[b, c, h, w]` -> `[b, n, d]`."""

    def __init__(self, *, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Project the patches."""
        # `proj` is a convolution only to have the official parameter shapes. It runs as a matrix
        # product, whose tokens are contiguous, so that the layer norms need not copy them.
        p = self.patch_size
        patches = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection, `[b, n, d]` -> `[b, n, d]`."""

    def __init__(self, *, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Let every token attend to all."""
        qkv = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        attended = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        output: Tensor = self.proj(rearrange(attended, "b h n d -> b n (h d)"))
        return output


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`x (1 + scale) + shift` for tokens `[b, n, d]` and vectors `[b, 1, d]` of each image."""
    # Not addcmul, whose backward pass also multiplies all tokens by its factor, 1. Adding in place
    # is safe: the product is new, and no backward pass needs it.
    return (x * (1 + scale)).add_(shift)


class DiTBlock(nn.Module):
    """A transformer block with adaLN-Zero: the conditioning vector scales norms and branches.

    `x += gate * f(norm(x) * (1 + scale) + shift)` for attention, then for the MLP. The six vectors
    are a linear map of `silu(conditioning)`. The map starts at zero, so that each block starts as
    the identity.
    """

    def __init__(self, *, hidden_size: int, num_heads: int, mlp_size: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size=hidden_size, num_heads=num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        layers = {
            "fc1": nn.Linear(hidden_size, mlp_size),
            "act": nn.GELU("tanh"),
            "fc2": nn.Linear(mlp_size, hidden_size),
        }
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(
        self, x: Float[Tensor, "b n d"], conditioning: Float[Tensor, "b d"]
    ) -> Float[Tensor, "b n d"]:
        """Attention, then the MLP, each modulated by the conditioning vector."""
        # adaLN-Zero: section 3.2 and figure 3 of the paper. Checkpoints fix the order of the six.
        vectors = self.adaLN_modulation(conditioning)[:, None].chunk(6, dim=-1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = vectors
        x = (gate * self.attn(_modulate(self.norm1(x), shift, scale))).add_(x)
        x = (gate_mlp * self.mlp(_modulate(self.norm2(x), shift_mlp, scale_mlp))).add_(x)
        return x


class FinalLayer(nn.Module):
    """Modulated norm and a linear map from tokens to the pixels of a patch."""

    def __init__(self, *, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(
        self, x: Float[Tensor, "b n d"], conditioning: Float[Tensor, "b d"]
    ) -> Float[Tensor, "b n ppc"]:
        """Modulate, norm and project the tokens."""
        shift, scale = self.adaLN_modulation(conditioning)[:, None].chunk(2, dim=-1)
        output: Tensor = self.linear(_modulate(self.norm_final(x), shift, scale))
        return output


class DiT(nn.Module):
    """Diffusion transformer with the layers and parameter names of the official one.

    Called as `dit(x, timesteps, labels)` with `x` `[b, c, h, w]`, `timesteps` `[b]` (integer or
    fractional, in steps) and `labels` `[b]`; returns `[b, out_channels, h, w]`. The network is
    deterministic: it never drops labels itself. For classifier-free guidance, the training step
    replaces labels by `null_class`.

    Args:
        input_size: Height and width of `x` (latents: 32 for 256 px images); one number for a
            square.
        patch_size: Side of a patch; divides height and width.
        in_channels: Channels of `x`.
        hidden_size: Width of the tokens; a multiple of 4 and of `num_heads`.
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: Width of a block's MLP, divided by `hidden_size`.
        class_dropout_prob: Above 0, the label table has one more row, the null class at index
            `num_classes`. Labels are dropped by the module's `class_dropout`.
        num_classes: Number of classes; 0 builds no label table. 1 is the unconditional variant
            of the ANT repository: its table has one row, `class_dropout_prob` adds no null class,
            and `labels` may be left out.
        learn_sigma: Whether the output has twice the channels, the second half for the variance.
        routing: Masks of channels for each noise level; `None` for none.
        gradient_checkpointing: Whether to recompute each block in the backward pass.
        compiled: Whether to run through `torch.compile`, which compiles at the first call.

    Attributes:
        out_channels: Channels of the output.
        null_class: Index of the null class, or `None` if there is none.

    Raises:
        ConfigError: If a size breaks one of the rules above.

    Reference:
        Peebles and Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748.

    Examples:
        >>> import torch
        >>> from ant_lightning import DiT
        >>> dit = DiT(input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=10)
        >>> x, timesteps, labels = torch.zeros(3, 4, 8, 8), torch.arange(3), torch.arange(3)
        >>> dit(x, timesteps, labels).shape
        torch.Size([3, 8, 8, 8])
        >>> dit.null_class
        10
    """

    def __init__(
        self,
        *,
        input_size: Size = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        routing: ChannelRouting | None = None,
        gradient_checkpointing: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        check_at_least(1, patch_size=patch_size, in_channels=in_channels)
        check_at_least(1, hidden_size=hidden_size, depth=depth, num_heads=num_heads)
        check_classes(num_classes, class_dropout_prob)
        height, width = height_and_width(input_size)
        if height % patch_size or width % patch_size:
            raise ConfigError(
                f"patch_size: must divide input_size {input_size}, found {patch_size}"
            )
        if hidden_size % num_heads or hidden_size % 4:
            raise ConfigError(
                f"hidden_size: must be a multiple of 4 and of num_heads {num_heads}, "
                f"found {hidden_size}"
            )
        if depth > _MAX_DEPTH:
            raise ConfigError(f"depth: must be at most {_MAX_DEPTH}, found {depth}")
        check_above(0, mlp_ratio=mlp_ratio)
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.num_classes = num_classes
        self.class_dropout_prob = class_dropout_prob if num_classes > 1 else 0.0
        self.null_class = num_classes if self.class_dropout_prob > 0 else None
        self.learn_sigma = learn_sigma
        self._routing = routing
        # In plain numbers, which identify what images were drawn with.
        self.routing = None if routing is None else astuple(routing)
        self.gradient_checkpointing = gradient_checkpointing

        # A frozen parameter, not a buffer: the official optimizer states count it as a parameter.
        self._grid = (height // patch_size, width // patch_size)
        num_patches = self._grid[0] * self._grid[1]
        self.pos_embed = nn.Parameter(torch.empty(1, num_patches, hidden_size), requires_grad=False)
        self.x_embedder = PatchEmbed(
            patch_size=patch_size, in_channels=in_channels, hidden_size=hidden_size
        )
        # Module dicts, because official files have the names "t_embedder.mlp.0.weight" and
        # "y_embedder.embedding_table.weight".
        self.t_embedder = nn.ModuleDict({"mlp": timestep_mlp(_TIMESTEP_FEATURES, hidden_size)})
        self.y_embedder = None
        if num_classes > 0:
            table = nn.Embedding(num_classes + (self.null_class is not None), hidden_size)
            self.y_embedder = nn.ModuleDict({"embedding_table": table})
        mlp_size = int(hidden_size * mlp_ratio)
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size=hidden_size, num_heads=num_heads, mlp_size=mlp_size)
            for _ in range(depth)
        )
        self.final_layer = FinalLayer(
            hidden_size=hidden_size, patch_size=patch_size, out_channels=self.out_channels
        )
        self.reset_parameters()
        arrange(self, compiled=compiled)

    def reset_parameters(self) -> None:
        """Xavier-uniform linear maps, normal embeddings, zero modulation and output (adaLN-Zero).

        With these zeros each block starts as the identity, and the network outputs 0.
        """
        for name, parameter in self.named_parameters():
            value = parameter.detach()
            if name == "pos_embed":
                value.copy_(position_embedding(value.shape[-1], self._grid))
            elif name.endswith("bias") or "adaLN_modulation" in name or "final_layer" in name:
                nn.init.zeros_(value)
            elif name.startswith(("t_embedder", "y_embedder")):
                nn.init.normal_(value, std=0.02)
            else:
                # Flat, so that the patch convolution has the fan-in and fan-out of a linear map.
                nn.init.xavier_uniform_(value.flatten(1))

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        timesteps: Float[Tensor, " b"] | Int[Tensor, " b"],
        labels: Int[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b out_channels h w"]:
        """Predict the noise (or x0, v) and, if learned, the variance values.

        Raises:
            ConfigError: If `x`, `timesteps` or `labels` do not fit the network.
        """
        check_images(x, timesteps, in_channels=self.in_channels)
        (rows, columns), p = self._grid, self.patch_size
        if x.shape[2:] != (rows * p, columns * p):
            raise ConfigError(
                f"x: must be {rows * p} x {columns * p}, found {x.shape[2]} x {x.shape[3]}"
            )
        tokens = self.x_embedder(x) + self.pos_embed  # [b, n, d]
        conditioning = embed_timesteps(self.t_embedder["mlp"], timesteps)
        if self.y_embedder is not None:
            table = self.y_embedder["embedding_table"]
            conditioning = conditioning + table(self._check_labels(labels, timesteps))
        mask = None
        if self._routing is not None:
            mask = self._routing.masks(timesteps, tokens.shape[2])[:, None].to(tokens)
        for block in self.blocks:
            routed = tokens if mask is None else tokens * mask
            output = run_block(
                block, routed, conditioning, checkpointing=self.gradient_checkpointing
            )
            # Channels outside of the mask pass by the block.
            tokens = output if mask is None else output + tokens * (1 - mask)
        patches = self.final_layer(tokens, conditioning)
        # The official layer orders the pixels of a patch (p, q, c), but `x_embedder` (c, p, q).
        image: Tensor = rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=p, q=p)
        return image

    def _check_labels(self, labels: Tensor | None, timesteps: Tensor) -> Tensor:
        """Check the labels; a network with a single class may go without, and gets zeros."""
        if labels is None and self.num_classes == 1:
            return torch.zeros_like(timesteps, dtype=torch.long)
        if labels is None or labels.shape != timesteps.shape:
            found = None if labels is None else list(labels.shape)
            raise ConfigError(
                f"labels: must have the shape {list(timesteps.shape)}, one for each image (the "
                f"null class is {self.null_class}), found {found}"
            )
        return labels
