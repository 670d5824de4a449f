"""A digits model and a trainer small enough for a test of one callback."""

import lightning as L
import torch
from grouped import grouped

from ant_lightning import DDIM, CosineSchedule, DiT, DiTModule, SNRClustering

T = 100


class TinyDiT(DiT):
    """Random weights everywhere: adaLN-Zero would start with gradients of 0."""

    def __init__(self, seed=0, nan_from=None):
        torch.manual_seed(seed)
        super().__init__(
            input_size=8,
            patch_size=4,
            in_channels=1,
            hidden_size=8,
            depth=1,
            num_heads=1,
            num_classes=10,
        )
        self.nan_from = nan_from
        with torch.no_grad():
            for p in filter(lambda p: p.requires_grad, self.parameters()):
                p.add_(torch.randn_like(p), alpha=0.3)

    def forward(self, x, timesteps, labels=None):
        output = super().forward(x, timesteps, labels)
        if self.nan_from is not None and (timesteps >= self.nan_from).any():
            output = output * torch.nan
        return output


def module(backbone=None, *, kind=DiTModule, **settings):
    return kind(
        TinyDiT() if backbone is None else backbone,
        **grouped(
            **{
                "schedule": CosineSchedule(T),
                "clustering": SNRClustering(3),
                "sampler": DDIM(num_steps=2),
                "seed": 0,
                **settings,
            }
        ),
    )


def saved(model, path):
    """The checkpoint of a module that was not trained."""
    run = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    run.strategy.connect(model)
    run.save_checkpoint(path)
    return str(path)


def trainer(folder, *callbacks, steps=4, **settings):
    return L.Trainer(
        max_steps=steps,
        callbacks=list(callbacks),
        default_root_dir=folder,
        **{
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "accelerator": "cpu",
            "num_sanity_val_steps": 0,
            **settings,
        },
    )
