"""DiT: the diffusion transformer with adaLN-Zero, in the official layout and parameter names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ant_lightning.backbones.layers import arrange, check_images, run_block, timestep_embedding
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["DiT"]

_MAX_DEPTH = 1000  # more would be made until no memory is left
_TIMESTEP_FEATURES = 256


def _axis_features(positions: Tensor, dim: int) -> Tensor:
    """Sines, then cosines, of ``positions`` [n] at ``dim / 2`` frequencies: [n dim] float64."""
    exponents = torch.arange(dim // 2, dtype=torch.float64) / (dim / 2)
    angles = positions[:, None] * (10000.0**-exponents)[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _position_embedding(dim: int, grid_size: int) -> Tensor:
    """Fixed features of every patch, [1 grid_size**2 dim] float32: column half, then row half."""
    axis = _axis_features(torch.arange(grid_size, dtype=torch.float64), dim // 2)
    columns = axis[None].expand(grid_size, -1, -1)
    rows = axis[:, None].expand(-1, grid_size, -1)
    return rearrange(torch.cat([columns, rows], dim=-1), "h w d -> 1 (h w) d").float()


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: [b c h w] -> [b n d]."""

    def __init__(self, *, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        # The convolution is held for its parameter shapes; as a matrix product on patches it
        # leaves tokens contiguous, which every following layer norm would otherwise copy for.
        p = self.patch_size
        patches = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class TimestepEmbedder(nn.Module):
    """Timesteps [b], integer or fractional, to vectors [b d]."""

    def __init__(self, *, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(_TIMESTEP_FEATURES, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, timesteps: Tensor) -> Float[Tensor, "b d"]:
        features = timestep_embedding(timesteps, _TIMESTEP_FEATURES)
        embedding: Tensor = self.mlp(features.to(next(self.mlp.parameters()).dtype))
        return embedding


class LabelEmbedder(nn.Module):
    """Class labels [b] to vectors [b d]; dropping labels is the training step's business."""

    def __init__(self, *, num_embeddings: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_embeddings, hidden_size)

    def forward(self, labels: Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
        embedding: Tensor = self.embedding_table(labels)
        return embedding


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection, [b n d] -> [b n d]."""

    def __init__(self, *, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        qkv = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        attended = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        output: Tensor = self.proj(rearrange(attended, "b h n d -> b n (h d)"))
        return output


class Mlp(nn.Module):
    """Two linear layers around a tanh-approximated GELU."""

    def __init__(self, *, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        output: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return output


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x (1 + scale) + shift`` for tokens [b n d] and per-image vectors [b 1 d]."""
    # Not addcmul: its backward pass multiplies all tokens by 1 once more.
    return (x * (1 + scale)).add_(shift)


class DiTBlock(nn.Module):
    """A transformer block whose norms and residual gates are set by the conditioning vector.

    ``x += gate * f(norm(x) * (1 + scale) + shift)`` for attention, then for the MLP; the six
    vectors are a linear map of ``silu(conditioning)`` that starts at zero, so that every block
    starts as the identity.
    """

    def __init__(self, *, hidden_size: int, num_heads: int, mlp_size: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size=hidden_size, num_heads=num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size=hidden_size, mlp_size=mlp_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(
        self, x: Float[Tensor, "b n d"], conditioning: Float[Tensor, "b d"]
    ) -> Float[Tensor, "b n d"]:
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
        shift, scale = self.adaLN_modulation(conditioning)[:, None].chunk(2, dim=-1)
        output: Tensor = self.linear(_modulate(self.norm_final(x), shift, scale))
        return output


class DiT(nn.Module):
    """Diffusion transformer, parameter for parameter the official one.

    Called as ``dit(x, timesteps, labels)`` with x [b c s s], timesteps [b] (integer or
    fractional, in steps) and labels [b]; returns [b out_channels s s]. The network is
    deterministic: classifier-free dropout of labels happens outside, by passing ``null_class``.

    Args:
        input_size: height and width of x (latents: 32 for 256 px images).
        patch_size: side of a patch; divides ``input_size``.
        in_channels: channels of x.
        hidden_size: width of the tokens; a multiple of 4 and of ``num_heads``.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width of a block's MLP over ``hidden_size``.
        class_dropout_prob: above 0, the label table has one row more, the null class at index
            ``num_classes``. The probability itself is for the training step to use.
        num_classes: number of classes; 0 builds no label table. 1 is the unconditional variant
            of the ANT repository: one row, no null class whatever ``class_dropout_prob`` is,
            and ``labels`` may be left out.
        learn_sigma: the output has twice the channels, the second half for the variance.
        gradient_checkpointing: recompute each block in the backward pass.
        compiled: run through ``torch.compile``, which compiles at the first call.

    Attributes:
        out_channels: channels of the output.
        null_class: index of the null class, or None if there is none.

    Raises:
        ConfigError: a size breaks one of the rules above.

    Reference:
        Peebles and Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748.
    """

    def __init__(
        self,
        *,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        gradient_checkpointing: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        if patch_size < 1 or input_size < 1 or input_size % patch_size:
            raise ConfigError(
                f"patch_size: must be positive and divide input_size {input_size}, "
                f"found {patch_size}"
            )
        if hidden_size < 1 or depth < 1 or in_channels < 1 or not mlp_ratio > 0:
            raise ConfigError(
                "hidden_size, depth, in_channels, mlp_ratio: must each be above 0, found "
                f"{hidden_size}, {depth}, {in_channels}, {mlp_ratio}"
            )
        if depth > _MAX_DEPTH:
            raise ConfigError(f"depth: must be at most {_MAX_DEPTH}, found {depth}")
        if num_heads < 1 or hidden_size % num_heads or hidden_size % 4:
            raise ConfigError(
                f"hidden_size: must be a multiple of 4 and of num_heads {num_heads}, "
                f"found {hidden_size}"
            )
        if num_classes < 0 or not 0 <= class_dropout_prob <= 1:
            raise ConfigError(
                "num_classes: at least 0, with class_dropout_prob in [0, 1], "
                f"found {num_classes} and {class_dropout_prob}"
            )
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.num_classes = num_classes
        self.class_dropout_prob = class_dropout_prob if num_classes > 1 else 0.0
        self.null_class = num_classes if self.class_dropout_prob > 0 else None
        self.learn_sigma = learn_sigma
        self.gradient_checkpointing = gradient_checkpointing

        # A frozen parameter and not a buffer: official state dicts and optimizers count it.
        num_patches = (input_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.empty(1, num_patches, hidden_size), requires_grad=False)
        self.x_embedder = PatchEmbed(
            patch_size=patch_size, in_channels=in_channels, hidden_size=hidden_size
        )
        self.t_embedder = TimestepEmbedder(hidden_size=hidden_size)
        self.y_embedder = None
        if num_classes > 0:
            num_embeddings = num_classes + (self.null_class is not None)
            self.y_embedder = LabelEmbedder(num_embeddings=num_embeddings, hidden_size=hidden_size)
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

        With the zeros, the network starts at output 0 and each block at the identity.
        """
        for name, parameter in self.named_parameters():
            value = parameter.detach()
            if name == "pos_embed":
                grid_size = self.input_size // self.patch_size
                value.copy_(_position_embedding(value.shape[-1], grid_size))
            elif name.endswith("bias") or "adaLN_modulation" in name or "final_layer" in name:
                nn.init.zeros_(value)
            elif name.startswith(("t_embedder", "y_embedder")):
                nn.init.normal_(value, std=0.02)
            else:
                # Flat, so that the patch convolution counts as the linear map that it is.
                nn.init.xavier_uniform_(value.flatten(1))

    def forward(
        self,
        x: Float[Tensor, "b c s s"],
        timesteps: Float[Tensor, " b"] | Int[Tensor, " b"],
        labels: Int[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b out_channels s s"]:
        """Predict the noise (or x_0, v) and, if learned, the variance's interpolation.

        Raises:
            ConfigError: x, timesteps or labels do not fit the network.
        """
        check_images(x, timesteps, in_channels=self.in_channels)
        if x.shape[2] != self.input_size or x.shape[3] != self.input_size:
            raise ConfigError(
                f"input_size: the network takes {self.input_size} x {self.input_size}, "
                f"found {x.shape[2]} x {x.shape[3]}"
            )
        tokens = self.x_embedder(x) + self.pos_embed
        conditioning = self.t_embedder(timesteps)
        if self.y_embedder is not None:
            conditioning = conditioning + self.y_embedder(self._complete(labels, timesteps))
        for block in self.blocks:
            tokens = run_block(
                block, tokens, conditioning, checkpointing=self.gradient_checkpointing
            )
        patches = self.final_layer(tokens, conditioning)
        grid, p = self.input_size // self.patch_size, self.patch_size
        output: Tensor = rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=grid, p=p, q=p)
        return output

    def _complete(self, labels: Tensor | None, timesteps: Tensor) -> Tensor:
        """The labels, or zeros for the network with a single class."""
        if labels is not None:
            if labels.shape != timesteps.shape:
                raise ConfigError(
                    f"labels: one per image, shape {list(timesteps.shape)}, "
                    f"found {list(labels.shape)}"
                )
            return labels
        if self.num_classes > 1:
            raise ConfigError(
                f"labels: a network of {self.num_classes} classes needs one per image "
                f"(null_class is {self.null_class}), found None"
            )
        return torch.zeros_like(timesteps, dtype=torch.long)
