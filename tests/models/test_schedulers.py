"""Every scheduler of torch sets the backbone's learning rate, and that alone."""

import inspect

import lightning as L
import pytest
import torch
from tiny_fit import BATCHES, fit, module
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

from ant_lightning import ConfigError, DigitsData, InverseSqrtLR
from ant_lightning.models.old_checkpoints import upgrade

BALANCER_LR = 0.025
FACTORIES = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 0.5**step),
    "LambdaLR of a list": lambda o: schedulers.LambdaLR(o, [lambda step: 0.5**step]),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.5),
    "MultiplicativeLR of a list": lambda o: schedulers.MultiplicativeLR(o, [lambda step: 0.5]),
    "StepLR": lambda o: schedulers.StepLR(o, 1),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 2]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: schedulers.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.5),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, total_iters=9),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 9),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 9),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.001, 0.5, step_size_up=3),
    "CyclicLR of lists": lambda o: schedulers.CyclicLR(o, [0.001], [0.5], step_size_up=3),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.5, total_steps=9),
    "OneCycleLR of a list": lambda o: schedulers.OneCycleLR(o, [0.5], total_steps=9),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o), schedulers.CosineAnnealingLR(o, 9)], milestones=[2]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.LinearLR(o), schedulers.ExponentialLR(o, 0.5)]
    ),
    "InverseSqrtLR": lambda o: InverseSqrtLR(o, reference_steps=3, warmup_steps=2),
    "SWALR": lambda o: SWALR(o, swa_lr=0.5, anneal_epochs=3),
}


def made(factory):
    settings = module("uw", lr_scheduler=factory, warmup_steps=0)
    settings.balancer.lr = BALANCER_LR
    optimizers, made = settings.configure_optimizers()
    return optimizers[0], made[0], settings.optimizer_factory.step


def other_settings(group):
    return {name: value for name, value in group.items() if name != "params"}


def test_no_scheduler_of_torch_is_left_out():
    names = {name.split()[0] for name in FACTORIES}
    kinds = {
        name
        for name, kind in vars(schedulers).items()
        if inspect.isclass(kind) and issubclass(kind, schedulers.LRScheduler)
    }
    # It wants a metric, and is refused for that.
    assert kinds - {"LRScheduler", "_LRScheduler", "ReduceLROnPlateau"} <= names


@pytest.mark.parametrize("name", FACTORIES)
def test_the_balancers_learning_rate_stays_and_the_backbones_is_torchs(name):
    optimizer, scheduler, step_scheduler = made(FACTORIES[name])
    alone = torch.optim.AdamW([torch.zeros(1)], lr=0.01, weight_decay=0.0)
    reference = FACTORIES[name](alone)
    backbone, balancer = optimizer.param_groups
    before, rates = other_settings(balancer), set()
    for _ in range(6):
        rates.add(backbone["lr"])
        assert backbone["lr"] == alone.param_groups[0]["lr"]
        assert backbone["betas"] == alone.param_groups[0]["betas"]
        assert other_settings(balancer) == before
        assert balancer["lr"] == BALANCER_LR
        optimizer.step()
        alone.step()
        step_scheduler(scheduler)
        reference.step()
    assert len(rates) > 1


@pytest.mark.parametrize("name", [name for name in FACTORIES if "list" not in name])
def test_states_that_were_saved_with_the_balancers_rate_go_on(name):
    optimizer = torch.optim.AdamW(
        [{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "lr": BALANCER_LR}], lr=0.01
    )
    old = FACTORIES[name](optimizer)
    for _ in range(3):
        optimizer.step()
        old.step()
    checkpoint = {"lr_schedulers": [old.state_dict()]}
    upgrade(checkpoint)
    new_optimizer, scheduler, step_scheduler = made(FACTORIES[name])
    scheduler.load_state_dict(checkpoint["lr_schedulers"][0])
    for ours, then in zip(new_optimizer.param_groups, optimizer.param_groups, strict=True):
        ours.update(other_settings(then))
    for _ in range(2):
        optimizer.step()
        old.step()
        new_optimizer.step()
        step_scheduler(scheduler)
        assert new_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("total", "limits", "found"),
    [
        (3, {"steps": 4}, "found 3 in a run of 4 steps"),
        (7, {"steps": -1, "max_epochs": 2}, f"found 7 in a run of {2 * BATCHES} steps"),
        (
            7,
            {"steps": -1, "max_epochs": 4, "limit_train_batches": 2},
            "found 7 in a run of 8 steps",
        ),
        (
            7,
            {"steps": -1, "max_time": {"hours": 1}},
            r"found 7 in a run without trainer\.max_steps",
        ),
    ],
)
def test_a_cycle_that_ends_before_the_run_is_refused_before_it_starts(
    tmp_path, total, limits, found
):
    model = {
        "lr_scheduler": lambda o: schedulers.OneCycleLR(o, 0.5, total_steps=total),
        "warmup_steps": 0,
    }
    with pytest.raises(ConfigError, match=rf"optimization\.lr_scheduler\.total_steps: .* {found}"):
        fit(tmp_path, model=model, method="uw", **limits)
    assert not list(tmp_path.iterdir())


def test_with_loaders_the_epochs_are_not_counted_beforehand(tmp_path):
    one_cycle = {
        "lr_scheduler": lambda o: schedulers.OneCycleLR(o, 0.5, total_steps=BATCHES),
        "warmup_steps": 0,
    }
    data = DigitsData(batch_size=300)
    trainer = L.Trainer(
        max_epochs=1,
        max_steps=100,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        limit_val_batches=0,
    )
    loaders = data.train_dataloader(), data.val_dataloader()
    trainer.fit(module("vanilla", **one_cycle), *loaders)
    assert trainer.global_step == BATCHES


@pytest.mark.parametrize("total", [1, 2, 4])
def test_a_cycle_of_just_the_steps_of_the_run_trains(tmp_path, total):
    model = {
        "lr_scheduler": lambda o: schedulers.OneCycleLR(o, 0.5, total_steps=total),
        "warmup_steps": 0,
    }
    trainer = fit(tmp_path, model=model, method="uw", steps=total)
    assert trainer.global_step == total
    assert trainer.optimizers[0].param_groups[1]["lr"] == module("uw").balancer.lr


def test_a_cycle_inside_another_scheduler_that_ends_is_one_line_too(tmp_path):
    def sequence(o):
        parts = [schedulers.LinearLR(o), schedulers.OneCycleLR(o, 0.5, total_steps=3)]
        return schedulers.SequentialLR(o, parts, milestones=[1])

    with pytest.raises(
        ConfigError, match=r"optimization\.lr_scheduler: refused .* total steps is 3"
    ):
        fit(tmp_path, model={"lr_scheduler": sequence, "warmup_steps": 0}, steps=9)
