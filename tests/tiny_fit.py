"""Training runs of a tiny model on the digits that are stopped, resumed and compared."""

import lightning as L
import torch
from grouped import grouped
from torch import nn
from torchjd.aggregation import UPGradWeighting

from ant_lightning import (
    EMA,
    Checkpoints,
    ContinuousUncertainty,
    CosineSchedule,
    DigitsData,
    DiT,
    DiTModule,
    LinearScalarization,
    NashMTL,
    PCGrad,
    SNRClustering,
    TorchJDBalancer,
    UncertaintyWeighting,
)

BALANCERS = {
    "vanilla": lambda: None,
    "linear": lambda: LinearScalarization(3, weights=[0.2, 0.3, 0.5]),
    "uw": lambda: UncertaintyWeighting(3),
    "continuous_uw": lambda: ContinuousUncertainty(3),
    "pcgrad": lambda: PCGrad(3),
    "nash": lambda: NashMTL(3, update_every=4),
    "upgrad": lambda: TorchJDBalancer(3, weighting=UPGradWeighting(), update_every=3),
}
BATCHES = 4  # of 300 digits in an epoch
SIZE = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 8}


class Forgetful(DiT):
    """Draws masks of its own."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.forget = nn.Dropout(0.2)

    def forward(self, x, timesteps, labels=None):
        return super().forward(self.forget(x), timesteps, labels)


def adamw(groups):
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0)


def module(method="pcgrad", kind=DiT, num_classes=10, **settings):
    torch.manual_seed(0)
    return DiTModule(
        kind(**SIZE, depth=1, num_heads=1, num_classes=num_classes, class_dropout_prob=0.1),
        **grouped(
            schedule=CosineSchedule(100),
            balancer=BALANCERS[method](),
            class_dropout=0.1 if num_classes > 1 else 0.0,
            seed=0,
            **{
                "clustering": SNRClustering(3),
                "optimizer": adamw,
                "warmup_steps": 7,
                **settings,
            },
        ),
    )


def fit(
    folder,
    *,
    method="pcgrad",
    steps=11,
    workers=0,
    val_interval=None,
    callbacks=(),
    every=1,
    resume=None,
    checkpoint=(),
    model=(),
    **settings,
):
    """Train to `steps`; the checkpoints are in `folder`."""
    saves = {"save_top_k": -1, "save_last": True, "filename": "{step}", **dict(checkpoint)}
    when = {} if "train_time_interval" in saves else {"every_n_train_steps": every}
    validation = {"limit_val_batches": 0}
    if val_interval:
        validation = {"val_check_interval": val_interval, "check_val_every_n_epoch": None}
    trainer = L.Trainer(
        max_steps=steps,
        callbacks=[EMA(decay=0.9), *callbacks, Checkpoints(dirpath=folder, **when, **saves)],
        **{
            "max_epochs": -1,
            "logger": False,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "accelerator": "cpu",
            **validation,
            **settings,
        },
    )
    data = DigitsData(batch_size=300)
    data.num_workers = workers  # not a setting: they are in memory
    trainer.fit(module(method, **dict(model)), data, ckpt_path=resume)
    return trainer


def everything(path):
    """All that a checkpoint holds, by name, but where the files of the run are.

    And but Lightning's counts of the batches of an evaluation, which nothing depends on.
    """
    state = torch.load(path, weights_only=True)
    averages = {name: each for name, each in state["callbacks"].items() if "Check" not in name}
    values = _flat({**state, "callbacks": averages})
    return {name: value for name, value in values if ".val_loop." not in name}


def assert_same(path, other):
    """Two checkpoints are equal bit for bit."""
    one, two = everything(path), everything(other)
    assert one.keys() == two.keys()
    different = [
        name
        for name, value in one.items()
        if not (
            torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name]
        )
    ]
    assert not different, [(name, one[name], two[name]) for name in different[:10]]


def _flat(value, path=""):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _flat(item, f"{path}[{i}]")
    else:
        yield path, value
