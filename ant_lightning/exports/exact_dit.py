"""The network of DiT for diffusers; `ant-lightning export` copies this file into the folder.

`DiTTransformer2DModel` embeds the time at frequencies 10000^(-i/127). The official DiT, and with it
its published weights, has 10000^(-i/128). No configuration changes it, so this class does. It also
takes rectangles, and the masks of channels of denoising task routing.
"""

from __future__ import annotations

import inspect
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

Output: TypeAlias = Any  # an object with the field `sample`, or a tuple


class ExactDiT(DiTTransformer2DModel):  # type: ignore[misc]
    """`DiTTransformer2DModel` with the time frequencies of the official DiT.

    Args:
        routing: `alpha`, `beta` and `last_time` of denoising task routing (arXiv 2310.07138).
        settings: Those of `DiTTransformer2DModel`; `sample_size` may be a height and a width.
    """

    def __init__(self, *, routing: list[float] | None = None, **settings: Any) -> None:
        size = settings["sample_size"]
        sides = [size, size] if isinstance(size, int) else list(size)
        super().__init__(**settings | {"sample_size": max(sides)})
        self.register_to_config(sample_size=size, routing=routing)
        for block in self.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        # Rows and columns have the positions that they have in a square.
        embed, side = self.pos_embed, max(sides) // self.patch_size
        embed.height, embed.width = (each // self.patch_size for each in sides)
        table = embed.pos_embed.unflatten(1, (side, side))[:, : embed.height, : embed.width]
        embed.pos_embed = table.flatten(1, 2)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Output:
        """As in the base class."""
        given: dict[str, Any] = {
            "timestep": timestep,
            "class_labels": class_labels,
            "cross_attention_kwargs": cross_attention_kwargs,
        }
        if isinstance(self.config.sample_size, int) and self.config.routing is None:
            return super().forward(hidden_states, **given, return_dict=return_dict)
        x = self.pos_embed(hidden_states)
        mask = self._mask(timestep, x)
        for block in self.transformer_blocks:
            x = block(x * mask, **given) + x * (1 - mask)
        told = self.transformer_blocks[0].norm1.emb(timestep, class_labels, hidden_dtype=x.dtype)
        shift, scale = self.proj_out_1(F.silu(told))[:, None].chunk(2, dim=2)
        x = self.proj_out_2(self.norm_out(x) * (1 + scale) + shift)
        p, grid = self.patch_size, (self.pos_embed.height, self.pos_embed.width)
        x = x.unflatten(1, grid).unflatten(3, (p, p, self.out_channels))
        output = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _mask(self, timestep: Tensor | None, x: Tensor) -> Tensor:
        """Channels that the blocks see at these times, `[b, 1, channels]`, or ones."""
        if self.config.routing is None or timestep is None:
            return x.new_ones(())
        alpha, beta, last_time = self.config.routing
        channels = x.shape[2]
        active = int(channels * beta)
        place = (timestep.double() / last_time).clamp(0, 1) ** alpha
        start = (place * (channels - active)).round()[:, None, None]
        channel = torch.arange(channels, device=x.device)
        mask: Tensor = (channel >= start) & (channel < start + active)
        return mask.to(x)


# diffusers reads the names of the settings from the signature.
_base = inspect.signature(DiTTransformer2DModel.__init__)
_own = inspect.Parameter("routing", inspect.Parameter.KEYWORD_ONLY, default=None)
ExactDiT.__init__.__signature__ = _base.replace(  # type: ignore[attr-defined]
    parameters=[*_base.parameters.values(), _own]
)
