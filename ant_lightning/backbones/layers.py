"""What DiT and the UNet share: timestep features, checks, gradient checkpointing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ant_lightning.errors import ConfigError, check_at_least, check_range

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Convolution = TypeVar("Convolution", nn.Conv1d, nn.Conv2d)


def timestep_embedding(
    timesteps: Float[Tensor, " b"] | Int[Tensor, " b"], dim: int, *, max_period: float = 10000.0
) -> Float[Tensor, "b dim"]:
    """Sinusoidal features of the timestep, cosines first.

    `[cos(t w_0), .., cos(t w_{h-1}), sin(t w_0), .., sin(t w_{h-1})]` with
    `w_i = max_period ** (-i / h)` and `h = dim // 2`; an odd `dim` ends in a zero.

    Args:
        timesteps: Timesteps `[b]`, integer or fractional, in units of training's steps (0 .. 999).
        dim: Number of features.
        max_period: Upper limit of `1 / w_i`, in steps.

    Returns:
        Features `[b, dim]` in float32, whatever the default dtype is, as in the official networks.
        The last bit of `exp`, `cos` and `sin` depends on the device: the outputs of a DiT differ by
        up to 1.1e-5 between two CPUs.

    Reference:
        Vaswani et al., "Attention Is All You Need", section 3.5, arXiv 1706.03762.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-math.log(max_period) * index / half)
    angles = timesteps.to(torch.float32)[:, None] * frequencies[None]
    features = [torch.cos(angles), torch.sin(angles)]
    if dim % 2:
        features.append(torch.zeros_like(angles[:, :1]))
    return torch.cat(features, dim=-1)


def timestep_mlp(num_features: int, hidden_size: int) -> nn.Sequential:
    """The MLP of `embed_timesteps`: timestep features to a vector of `hidden_size`."""
    return nn.Sequential(
        nn.Linear(num_features, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
    )


def embed_timesteps(mlp: nn.Module, timesteps: Tensor) -> Float[Tensor, "b d"]:
    """Embed timesteps `[b]`, integer or fractional, as vectors `[b, d]` in the dtype of `mlp`."""
    # The features are cast, not the timesteps: in bfloat16, timestep 999 would be 1000.
    weight = mlp.get_parameter("0.weight")
    embedding: Tensor = mlp(timestep_embedding(timesteps, weight.shape[1]).to(weight.dtype))
    return embedding


def check_classes(num_classes: int, class_dropout_prob: float) -> None:
    """Check the two settings of a network's class conditioning.

    Raises:
        ConfigError: If one of them is out of its range.
    """
    check_at_least(0, num_classes=num_classes)
    check_range(0, 1, class_dropout_prob=class_dropout_prob)


def check_images(x: Tensor, timesteps: Tensor, *, in_channels: int) -> None:
    """Check that a batch can enter a backbone: `x` `[b, c, h, w]` and `timesteps` `[b]`.

    Raises:
        ConfigError: If `x` has another rank or channel count, or `timesteps` another length.
    """
    if x.ndim != 4 or x.shape[1] != in_channels:
        raise ConfigError(f"x: must have the shape [b, {in_channels}, h, w], found {list(x.shape)}")
    if timesteps.shape != x.shape[:1]:
        raise ConfigError(
            f"timesteps: must have the shape [{x.shape[0]}], one for each image, "
            f"found {list(timesteps.shape)}"
        )


def run_block(
    block: nn.Module, *args: Tensor | None, checkpointing: bool, preserve_rng: bool = False
) -> Tensor:
    """Run `block(*args)`; with checkpointing, recompute its activations in the backward pass.

    Args:
        block: A module that returns one tensor.
        *args: Its inputs.
        checkpointing: Whether to recompute the activations instead of keeping them: less memory,
            about a third more compute.
        preserve_rng: Whether the recomputation replays the random state, so that dropout drops the
            same units; needed only if the block has dropout.
    """
    if not (checkpointing and torch.is_grad_enabled()):
        output: Tensor = block(*args)
        return output
    # Task gradients are taken with torch.autograd.grad, which the reentrant form does not support.
    output = checkpoint(block, *args, use_reentrant=False, preserve_rng_state=preserve_rng)
    return output


def arrange(network: nn.Module, *, channels_last: bool = False, compiled: bool) -> None:
    """Set in place how a network runs; the names in its state dict do not change.

    Args:
        network: The network.
        channels_last: Whether weights of convolutions, and so their outputs, have the
            `channels_last` memory format.
        compiled: Whether to run through `torch.compile`.
    """
    if channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compiled:
        # Not torch.compile(network): the wrapper would put `_orig_mod.` before every name.
        network.compile()


def zeroed(layer: Convolution) -> Convolution:
    """Set a convolution to zero: its residual branch, or the network's output, then starts at 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
