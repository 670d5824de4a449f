"""Each group of settings checks its own fields, and groups merge over several configs."""

import re

import pytest
import torch
import yaml
from grouped import grouped
from jsonargparse import ArgumentParser
from lightning import LightningModule
from tiny_digits import TinyDiT

from ant_lightning import (
    ConfigError,
    CosineSchedule,
    DiTModule,
    Optimization,
    PCGrad,
    SNRClustering,
    Tasks,
    TimestepSampling,
    UncertaintyWeighting,
)
from ant_lightning.models.settings_checks import warn_of_rare_tasks
from ant_lightning.models.task_means import TaskMeans

WRONG = {
    "placement without a balancer": (
        lambda: Tasks(SNRClustering(), placement="sorted"),
        "placement: must be 'spread' without a gradient balancer.* with NoneType$",
    ),
    "placement without task gradients": (
        lambda: Tasks(SNRClustering(), balancer=PCGrad(5), engine="low_memory", placement="sorted"),
        "placement: must be 'spread' with engine 'low_memory'.*'sorted'$",
    ),
    "empty interval": (
        lambda: TimestepSampling(interval=(5, 5)),
        r"interval: must satisfy 0 <= start < stop, found \[5, 5\]$",
    ),
    "stratified specialist": (
        lambda: TimestepSampling("stratified", interval=(0, 5)),
        "method: must be 'uniform' with an interval.* found 'stratified'$",
    ),
    "no parts": (
        lambda: Optimization(accumulate_grad_batches=0),
        "accumulate_grad_batches: must be at least 1, found 0$",
    ),
    "clipping to nothing": (
        lambda: Optimization(clip_grad_norm=0.0),
        "clip_grad_norm: must be above 0, or None for none, found 0.0$",
    ),
    "warm-up of a schedule": (
        lambda: Optimization(warmup_steps=3, lr_scheduler=lambda optimizer: None),
        "warmup_steps: must be 0 with an lr_scheduler, found 3$",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_group_names_its_own_argument(name):
    make, message = WRONG[name]
    with pytest.raises(ConfigError, match=f"^{message}"):
        make()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"balancer": PCGrad(4)}, "tasks.balancer.num_tasks: must equal .* 5, found 4$"),
        (
            {"balancer": PCGrad(5), "method": "uniform"},
            "timesteps.method: must be 'stratified'.* found 'uniform'$",
        ),
        ({"interval": (900, 1001)}, r"timesteps.interval: must end at 1000 .*\[900, 1001\]$"),
        ({"class_dropout": 1.0}, "class_dropout: must be at least 0 and below 1, found 1.0$"),
        ({"guided_channels": 2}, "sampling.guided_channels: must be from 1 to the 1 channels"),
    ],
)
def test_a_module_names_a_field_of_a_group_by_its_path(settings, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        DiTModule(
            TinyDiT(),
            **grouped(schedule=CosineSchedule(), clustering=SNRClustering(5), **settings),
        )


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({}, "uniform"),
        ({"balancer": UncertaintyWeighting(5)}, "stratified"),
        ({"balancer": UncertaintyWeighting(5), "method": "uniform"}, "uniform"),
        ({"interval": (0, 9)}, "uniform"),
    ],
)
def test_how_timesteps_are_drawn_follows_from_the_balancer(settings, method):
    flat = {"schedule": CosineSchedule(), "clustering": SNRClustering(5), **settings}
    assert DiTModule(TinyDiT(), **grouped(**flat)).timesteps.method == method


def test_groups_merge_key_by_key_over_several_configs(tmp_path):
    """A later file changes one key of a group and keeps the others, defaults of a preset too."""
    first = {
        "class_path": "ant_lightning.DiTModule",
        "init_args": {
            "backbone": {
                "class_path": "ant_lightning.DiT",
                "init_args": {"input_size": 8, "hidden_size": 8, "depth": 1, "num_heads": 1},
            },
            "process": {"init_args": {"schedule": "ant_lightning.CosineSchedule"}},
            "tasks": {"clustering": "ant_lightning.SNRClustering"},
            "optimization": {"warmup_steps": 7, "clip_grad_norm": 2.0},
        },
    }
    second = {
        "init_args": {
            "tasks": {
                "balancer": {
                    "class_path": "ant_lightning.UncertaintyWeighting",
                    "init_args": {"num_tasks": 5},
                }
            },
            "optimization": {"clip_grad_norm": None},
        }
    }
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(LightningModule, "model")
    args = []
    for i, model in enumerate((first, second)):
        (tmp_path / f"{i}.yaml").write_text(yaml.safe_dump({"model": model}))
        args += ["--config", str(tmp_path / f"{i}.yaml")]
    module = parser.instantiate_classes(parser.parse_args(args)).model
    assert isinstance(module.tasks.clustering, SNRClustering)
    assert isinstance(module.balancer, UncertaintyWeighting)
    assert module.optimization.warmup_steps == 7
    assert module.optimization.clip_grad_norm is None
    assert module.process.variance_type == "learned_range"
    assert module.process.log_snr[0] == pytest.approx(10.095, abs=0.01)  # the cosine schedule's


def test_means_of_tasks_do_not_depend_on_batches_or_ranks():
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(100, generator=generator)
    tasks = torch.randint(0, 4, (100,), generator=generator)  # task 4 has no sample
    whole, parts = TaskMeans(5), [TaskMeans(5), TaskMeans(5)]
    whole.update(losses, tasks)
    for i, rows in enumerate(torch.arange(100).split(13)):
        parts[i % 2].update(losses[rows], tasks[rows])
    merged = TaskMeans(5)
    merged.update(losses[:0], tasks[:0])
    merged.sums += parts[0].sums + parts[1].sums  # the reduction over ranks: a sum
    mean, by_task = whole.compute()
    assert mean.dtype == by_task.dtype == torch.float64
    torch.testing.assert_close(mean, losses.double().mean(), rtol=1e-14, atol=0)
    expected = torch.stack([losses[tasks == task].double().mean() for task in range(5)])
    torch.testing.assert_close(by_task, expected, rtol=1e-14, atol=0, equal_nan=True)
    for ours, theirs in zip(merged.compute(), (mean, by_task), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0, equal_nan=True)
    whole.reset()
    assert whole.sums.sum() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_means_of_tasks_stay_float64_in_a_module_that_is_cast(dtype):
    module = torch.nn.ModuleList([TaskMeans(2)]).to(dtype)
    module[0].update(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 1, 1]))
    mean, _ = module[0].compute()
    assert mean.dtype == torch.float64
    assert float(mean) == pytest.approx(0.2, rel=1e-7)


@pytest.mark.parametrize(
    ("allocation", "advice"),
    [
        ("equal", "use batches of at least 5 images on all ranks together"),
        (
            "proportional",
            "use batches of at least 10 images on all ranks together, timesteps.allocation equal, "
            "or weighted clusters",
        ),
    ],
)
def test_the_warning_of_rare_tasks_names_the_smallest_batch_and_not_what_is_set(allocation, advice):
    masses = torch.tensor([0.1, 0.2, 0.2, 0.2, 0.3], dtype=torch.float64)
    with pytest.warns(UserWarning, match="tasks: the expected number") as found:
        warn_of_rare_tasks(masses, 4, allocation)
    assert str(found[0].message).endswith(f"some steps; {advice}")


def test_the_warning_of_rare_tasks_lists_the_rarest_few():
    masses = torch.tensor([0.02] * 20 + [0.001, 0.599], dtype=torch.float64)
    with pytest.warns(UserWarning, match="tasks: the expected number") as found:
        warn_of_rare_tasks(masses, 4, "proportional")
    said = str(found[0].message)
    assert "less for task 20 (mass 0.001, 0.004 a step), task 0 (mass 0.02, 0.08 a step)" in said
    assert ", 0.08 a step) and 16 more in batches of 4:" in said
    assert len(re.findall(r"\btask \d", said)) == 5
