"""The published sizes of DiT: S, B, L, XL with patches of 2, 4 and 8."""

from __future__ import annotations

from typing import Protocol

from ant_lightning.backbones.dit import DiT

__all__ = [
    "dit_b_2",
    "dit_b_4",
    "dit_b_8",
    "dit_l_2",
    "dit_l_4",
    "dit_l_8",
    "dit_s_2",
    "dit_s_4",
    "dit_s_8",
    "dit_xl_2",
    "dit_xl_4",
    "dit_xl_8",
]

# hidden_size, depth, num_heads: table 1 of arXiv 2212.09748.
_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}


class _Preset(Protocol):
    """The signature that all presets share."""

    def __call__(
        self,
        *,
        input_size: int = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        class_dropout_prob: float = 0.1,
        gradient_checkpointing: bool = False,
        compiled: bool = False,
    ) -> DiT: ...


def _preset(size: str, patch_size: int) -> _Preset:
    """Make the constructor of one published size."""
    hidden_size, depth, num_heads = _SIZES[size]

    def build(
        *,
        input_size: int = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        class_dropout_prob: float = 0.1,
        gradient_checkpointing: bool = False,
        compiled: bool = False,
    ) -> DiT:
        return DiT(
            input_size=input_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            class_dropout_prob=class_dropout_prob,
            num_classes=num_classes,
            learn_sigma=learn_sigma,
            gradient_checkpointing=gradient_checkpointing,
            compiled=compiled,
        )

    # A configuration file names a preset by module and name, so these must be its own.
    build.__name__ = build.__qualname__ = f"dit_{size}_{patch_size}"
    build.__doc__ = f"""DiT-{size.upper()}/{patch_size}: width {hidden_size}, depth {depth}.

    Args:
        input_size: height and width of the input (latents: 32 for 256 px images).
        in_channels: channels of the input.
        num_classes: number of classes; see DiT for 0 and 1.
        learn_sigma: twice the output channels, the second half for the variance.
        class_dropout_prob: above 0, the label table has a null class.
        gradient_checkpointing: recompute each block in the backward pass.
        compiled: run through ``torch.compile``, which compiles at the first call.
    """
    return build


dit_s_2 = _preset("s", 2)
dit_s_4 = _preset("s", 4)
dit_s_8 = _preset("s", 8)
dit_b_2 = _preset("b", 2)
dit_b_4 = _preset("b", 4)
dit_b_8 = _preset("b", 8)
dit_l_2 = _preset("l", 2)
dit_l_4 = _preset("l", 4)
dit_l_8 = _preset("l", 8)
dit_xl_2 = _preset("xl", 2)
dit_xl_4 = _preset("xl", 4)
dit_xl_8 = _preset("xl", 8)
