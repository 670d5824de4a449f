"""ADM as a LightningModule: a UNet on pixels."""

from __future__ import annotations

from typing import Any, Literal

from ant_lightning.backbones.unet import UNet
from ant_lightning.models.module import MultiTaskDiffusion

__all__ = ["ADMModule"]


class ADMModule(MultiTaskDiffusion):
    """A UNet on pixels with learned variance, as in ADM and in P2 weighting.

    Args:
        backbone: The network.
        variance_type: As in `MultiTaskDiffusion`; the official models learn it.
        settings: Everything else that `MultiTaskDiffusion` takes.

    Reference:
        Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", arXiv 2105.05233.
    """

    def __init__(
        self,
        backbone: UNet,
        *,
        variance_type: Literal["fixed_small", "fixed_large", "learned_range"] = "learned_range",
        **settings: Any,
    ) -> None:
        super().__init__(backbone, variance_type=variance_type, **settings)
