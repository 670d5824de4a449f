"""A diffusion run of seconds with everything in it that can go wrong on several ranks."""

import copy
import logging

import lightning as L
import torch
from grouped import grouped
from torch import nn
from torchjd.aggregation import UPGradWeighting

from ant_lightning import (
    EMA,
    ContinuousUncertainty,
    CosineSchedule,
    DiT,
    DiTModule,
    FixedClustering,
    ImageDataModule,
    LinearScalarization,
    NashMTL,
    PCGrad,
    TorchJDBalancer,
    UncertaintyWeighting,
)
from ant_lightning.data.dataset import TensorImages

K = 3
METHODS = {
    "vanilla": lambda: None,
    "linear": lambda: LinearScalarization(K, weights=[0.2, 0.3, 0.5]),
    "uw": lambda: UncertaintyWeighting(K),
    "continuous_uw": lambda: ContinuousUncertainty(K),
    "pcgrad": lambda: PCGrad(K, seed=1),
    "nash": lambda: NashMTL(K, update_every=2),
    "upgrad": lambda: TorchJDBalancer(K, weighting=UPGradWeighting()),
}


class PartlyUsed(DiT):
    """One parameter that only high timesteps use, one that nobody uses."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            input_size=4,
            patch_size=2,
            in_channels=1,
            hidden_size=16,
            depth=1,
            num_heads=2,
            num_classes=3,
        )
        self.late = nn.Parameter(torch.full((2,), 0.1))
        self.never = nn.Parameter(torch.ones(5))
        with torch.no_grad():  # adaLN-Zero starts with most gradients at 0
            for p in self.parameters():
                p.add_(torch.randn_like(p), alpha=0.2)

    def forward(self, x, timesteps, labels=None):
        output = super().forward(x, timesteps, labels)
        late = timesteps >= 500
        if late.any():
            output = output + late.view(-1, 1, 1, 1) * self.late.view(1, 2, 1, 1)
        return output


class TinyData(ImageDataModule):
    """Images of noise with labels 0 .. 2."""

    image_shape = (1, 4, 4)
    num_classes = 3

    def __init__(self, *, batch_size=20, poisoned=None):
        super().__init__(batch_size=batch_size, num_workers=0, seed=3)
        self.poisoned = poisoned

    def prepare(self):
        generator = torch.Generator().manual_seed(1)
        images = torch.rand(120, 1, 4, 4, generator=generator) * 2 - 1
        labels = torch.arange(120) % 3
        train = TensorImages(images[:100].clone(), labels[:100])
        if self.poisoned is not None:
            train.images[self.poisoned] = float("nan")
        return train, TensorImages(images[100:], labels[100:])


# Sums in another order change a gradient of norm 0.5 (it is clipped) by some 8 * 2^-24 of that.
# AdamW, below, makes lr / eps = 10 times as much of it, in each of some 5 steps, in which weights
# move by 5e-3.
ROUNDING = 2e-5


def largest_difference(a, b):
    """Between the tensors of two mappings, over the names of the first."""
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def adamw(groups):
    # A larger eps than usual: the gradient of a key's bias is 0 up to rounding, and Adam divides
    # by its size.
    return torch.optim.AdamW(groups, lr=1e-3, eps=1e-4, weight_decay=0.01)


def sgd(groups):
    return torch.optim.SGD(groups, lr=1e-2, momentum=0.9)


def module(method, *, kind=DiTModule, backbone=None, **settings):
    settings = {
        "optimizer": adamw,
        "clip_grad_norm": 0.5,
        "accumulate_grad_batches": 2,
        "class_dropout": 0.2,
        "seed": 7,
    } | settings
    return kind(
        backbone or PartlyUsed(),
        **grouped(
            schedule=CosineSchedule(),
            # k = 3 does not divide the batch: the counts of the tasks differ.
            clustering=FixedClustering([0, 300, 500, 1000]),
            balancer=METHODS[method](),
            **settings,
        ),
    )


def trainer(*, ranks=1, steps=5, callbacks=(), strategy=None, **settings):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    settings = {"logger": False, "enable_checkpointing": False, "limit_val_batches": 0} | settings
    return L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy or ("ddp" if ranks > 1 else "auto"),
        max_steps=steps,
        max_epochs=-1,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        **settings,
    )


def fit(
    method,
    *,
    ranks=1,
    steps=5,
    data=None,
    batch_size=20,
    precision="32-true",
    plugins=None,
    **settings,
):
    """Train; what the run ends with."""
    model = module(method, **settings)
    ema = EMA(decay=0.9)
    kind = {"plugins": plugins} if plugins else {"precision": precision}
    run = trainer(ranks=ranks, steps=steps, callbacks=[ema], **kind)
    run.fit(model, datamodule=data or TinyData(batch_size=batch_size))
    return {
        "weights": {n: p.detach().clone() for n, p in model.backbone.named_parameters()},
        "averages": dict(ema._averages),
        "num_updates": ema.num_updates,
        "balancer": copy.deepcopy(model.balancer.state_dict()) if model.balancer else {},
        "task_weights": model.last_report.task_weights,
        "num_samples": model.last_report.num_samples,
        "global_step": run.global_step,
        "skipped": model.num_skipped_steps,
    }
