"""DiT as a LightningModule: defaults over the common base."""

from __future__ import annotations

from typing import Any, Literal

from ant_lightning.backbones.dit import DiT
from ant_lightning.models.module import MultiTaskDiffusion

__all__ = ["DiTModule"]


class DiTModule(MultiTaskDiffusion):
    """A diffusion transformer on latents or pixels, with learned variance and class dropout.

    Args:
        backbone: The transformer.
        variance_type: As in `MultiTaskDiffusion`; the official models learn it.
        class_dropout: Share of labels replaced by the null class; by
            default 0.1, or 0 for a backbone without one.
        settings: Everything else that `MultiTaskDiffusion` takes.

    Reference:
        Peebles and Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748.
    """

    def __init__(
        self,
        backbone: DiT,
        *,
        variance_type: Literal["fixed_small", "fixed_large", "learned_range"] = "learned_range",
        class_dropout: float | None = None,
        **settings: Any,
    ) -> None:
        if class_dropout is None:
            class_dropout = 0.0 if backbone.null_class is None else 0.1
        super().__init__(
            backbone, variance_type=variance_type, class_dropout=class_dropout, **settings
        )
