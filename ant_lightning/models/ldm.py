"""LDM as a LightningModule: a UNet on the latents of a first stage."""

from __future__ import annotations

from typing import Any

from ant_lightning.backbones.unet import UNet
from ant_lightning.errors import ConfigError
from ant_lightning.models.module import MultiTaskDiffusion

__all__ = ["LDMModule"]


class LDMModule(MultiTaskDiffusion):
    """A UNet on latents with fixed variance and without clipping, as in latent diffusion.

    Args:
        backbone: The network.
        settings: Everything else that `MultiTaskDiffusion` takes. Without `first_stage` the data
            must be cached latents, and what is drawn stays latent.

    Raises:
        ConfigError: When training starts, without a first stage on data that are not latents.

    Reference:
        Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models",
        arXiv 2112.10752.
    """

    def __init__(self, backbone: UNet, **settings: Any) -> None:
        super().__init__(backbone, **settings)

    def setup(self, stage: str) -> None:
        """Refuse pixels."""
        super().setup(stage)
        if stage != "predict" and self.latent_space is None:
            raise ConfigError(
                "model.first_stage: an LDM needs a first stage or LatentsData, found null and "
                f"{type(getattr(self.trainer, 'datamodule', None)).__name__}"
            )
