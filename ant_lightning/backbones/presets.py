"""The published sizes of DiT, ADM, P2 and LDM as tables.

A preset is a function that builds a network of a published size. It keeps the few arguments that
users still choose, `_ARGUMENTS`; width, depth and the like are fixed.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, get_type_hints

from torch import nn

from ant_lightning.backbones.dit import DiT
from ant_lightning.backbones.unet import UNet

P = ParamSpec("P")
N = TypeVar("N", bound=nn.Module)

# Arguments of a network that its presets keep; a preset fixes all others.
_ARGUMENTS = {
    "input_size",
    "in_channels",
    "out_channels",
    "model_channels",
    "num_classes",
    "class_dropout_prob",
    "context_dim",
    "learn_sigma",
    "dropout",
    "routing",
    "gradient_checkpointing",
    "channels_last",
    "compiled",
}


def _preset(
    network: Callable[P, N], name: str, summary: str, *, millions: int, **settings: Any
) -> Callable[P, N]:
    """Make a function that builds `network` with `settings` in place of its defaults.

    Args:
        network: The class.
        name: Name of the function.
        summary: First line of the function's docstring.
        millions: Number of parameters in millions, checked by the docstring's example.
        **settings: Fixed arguments, and other defaults for arguments that the function keeps.
    """
    # Annotations are strings at run time; the command line needs the types.
    types = get_type_hints(network.__init__)  # type: ignore[misc]
    signature = inspect.Signature(
        [
            each.replace(default=settings.get(each.name, each.default), annotation=types[each.name])
            for each in inspect.signature(network).parameters.values()
            if each.name in _ARGUMENTS
        ],
        return_annotation=network,
    )

    def build(*args: P.args, **kwargs: P.kwargs) -> N:
        signature.bind(*args, **kwargs)  # raises TypeError for a fixed argument
        return network(*args, **{**settings, **kwargs})  # type: ignore[arg-type]

    # The command line reads the signature, and finds the function by its name.
    build.__signature__ = signature  # type: ignore[attr-defined]
    build.__name__ = build.__qualname__ = name
    # The class documents its arguments; the function repeats the entries of those that it keeps.
    described = re.findall(r"^    ((\w+): .+(?:\n     .+)*)", inspect.getdoc(network) or "", re.M)
    arguments = "\n    ".join(text for text, name in described if name in signature.parameters)
    build.__doc__ = f"""{summary}

Args:
    {arguments}

Examples:
    >>> import torch
    >>> from ant_lightning import {name}
    >>> with torch.device("meta"):  # allocates no memory
    ...     network = {name}()
    >>> round(sum(p.numel() for p in network.parameters()) / 1e6)
    {millions}
"""
    return build


# Width, depth, heads (table 1 of arXiv 2212.09748); parameters in millions by patch size.
_DIT = {
    "s": (384, 12, 6, {2: 33, 4: 33, 8: 33}),
    "b": (768, 12, 12, {2: 131, 4: 130, 8: 131}),
    "l": (1024, 24, 16, {2: 458, 4: 458, 8: 459}),
    "xl": (1152, 28, 16, {2: 675, 4: 675, 8: 676}),
}


def _dit(size: str, patch_size: int) -> Callable[..., DiT]:
    width, depth, num_heads, millions = _DIT[size]
    return _preset(
        DiT,
        f"dit_{size}_{patch_size}",
        f"DiT-{size.upper()}/{patch_size}: width {width}, depth {depth} (arXiv 2212.09748).",
        millions=millions[patch_size],
        patch_size=patch_size,
        hidden_size=width,
        depth=depth,
        num_heads=num_heads,
    )


dit_s_2, dit_s_4, dit_s_8 = (_dit("s", patch_size) for patch_size in (2, 4, 8))
dit_b_2, dit_b_4, dit_b_8 = (_dit("b", patch_size) for patch_size in (2, 4, 8))
dit_l_2, dit_l_4, dit_l_8 = (_dit("l", patch_size) for patch_size in (2, 4, 8))
dit_xl_2, dit_xl_4, dit_xl_8 = (_dit("xl", patch_size) for patch_size in (2, 4, 8))

# 6 output channels: the prediction and the learned variance of 3 channels.
_ADM = {
    "out_channels": 6,
    "num_head_channels": 64,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}
_ADM_64 = {**_ADM, "use_new_attention_order": True, "num_classes": 1000, "dropout": 0.1}
_CONTEXT = {
    "use_spatial_transformer": True,
    "context_dim": 512,
    "num_classes": 1000,
    "class_dropout_prob": 0.1,
}

_COLUMNS = [
    "input_size",
    "model_channels",
    "channel_mult",
    "num_res_blocks",
    "attention_resolutions",
]
# Parameters in millions, the columns, and what else differs from the defaults of `UNet`. Levels of
# attention are down-sampling factors: at 256 px, 8, 16, 32 are ADM's resolutions 32, 16, 8.
_UNET: dict[str, tuple[Any, ...]] = {
    "adm_imagenet256": (553, 256, 256, (1, 1, 2, 2, 4, 4), 2, (8, 16, 32), _ADM),
    "adm_imagenet64": (296, 64, 192, (1, 2, 3, 4), 3, (2, 4, 8), _ADM_64),
    "adm_p2_light": (94, 256, 128, (1, 1, 2, 2, 4, 4), 1, (16,), _ADM),
    "ldm_ffhq256": (274, 64, 224, (1, 2, 3, 4), 2, (2, 4, 8), {"num_head_channels": 32}),
    "ldm_cin256": (401, 64, 192, (1, 2, 3, 5), 2, (2, 4, 8), _CONTEXT),
}


def _unet(name: str, summary: str) -> Callable[..., UNet]:
    millions, *values, others = _UNET[name]
    columns = dict(zip(_COLUMNS, values, strict=True))
    return _preset(UNet, name, summary, millions=millions, **columns, **others)


adm_imagenet256 = _unet(
    "adm_imagenet256", "ADM for ImageNet at 256 px, without classes by default (arXiv 2105.05233)."
)
adm_imagenet64 = _unet(
    "adm_imagenet64", "Class-conditional ADM for ImageNet at 64 px (arXiv 2105.05233)."
)
adm_p2_light = _unet(
    "adm_p2_light", "The light ADM of P2 for FFHQ and CelebA-HQ at 256 px (arXiv 2204.00227)."
)
ldm_ffhq256 = _unet(
    "ldm_ffhq256", "LDM for FFHQ and CelebA-HQ at 256 px: f=4 VQ latents (arXiv 2112.10752)."
)
ldm_cin256 = _unet(
    "ldm_cin256", "Class-conditional LDM for ImageNet at 256 px: f=4 VQ latents (arXiv 2112.10752)."
)
