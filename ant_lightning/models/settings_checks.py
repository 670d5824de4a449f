"""Checks of a module's settings against each other and against the layers of its network."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ant_lightning.errors import ConfigError
from ant_lightning.models.adapters import adapted
from ant_lightning.models.backbone import backbone_name

if TYPE_CHECKING:
    from torch import Tensor

    from ant_lightning.balancing.base import Balancer
    from ant_lightning.diffusion.process import NoiseProcess
    from ant_lightning.models.settings import Optimization, Tasks, TimestepSampling
    from ant_lightning.tasks.clusterings import Clustering
    from ant_lightning.tasks.clusters import TimestepClusters


class LearnedVarianceWarning(UserWarning):
    """The first losses of a task are mostly the term of a learned variance."""


def check_settings(
    tasks: Tasks,
    timesteps: TimestepSampling,
    optimization: Optimization,
    *,
    clusters: TimestepClusters,
    backbone: nn.Module,
) -> None:
    """Check the groups of settings against each other.

    Raises:
        ConfigError: If two of them contradict each other, or the network.
    """
    balancer, interval = tasks.balancer, timesteps.interval
    parts, engine = optimization.accumulate_grad_batches, tasks.engine
    if balancer is not None and balancer.num_tasks != clusters.num_tasks:
        raise ConfigError(
            f"tasks.balancer.num_tasks: must equal the number of clusters {clusters.num_tasks}, "
            f"found {balancer.num_tasks}"
        )
    if interval is not None and balancer is not None:
        raise ConfigError(
            f"timesteps.interval: must be None with {type(balancer).__name__}, because a "
            f"specialist has one task, found {list(interval)}"
        )
    if interval is not None and interval[1] > clusters.num_timesteps:
        raise ConfigError(
            f"timesteps.interval: must end at {clusters.num_timesteps} or before, found "
            f"{list(interval)}"
        )
    if balancer is not None and balancer.needs_gramian and timesteps.method == "uniform":
        raise ConfigError(
            "timesteps.method: must be 'stratified', because a gradient balancer needs samples "
            "of every task in each batch, found 'uniform'"
        )
    if parts > 1 and engine not in {"auto", "loop"}:
        raise ConfigError(
            f"tasks.engine: must be 'auto' or 'loop' with accumulate_grad_batches {parts}, "
            f"because it needs the images of a step in one pass, found {engine!r}"
        )
    _check_batch_norm(backbone, balancer, engine=engine, parts=parts)


def _check_batch_norm(
    backbone: nn.Module, balancer: Balancer | None, *, engine: str, parts: int
) -> None:
    """Refuse batch norm where it would mix tasks; warn where it sees only a part of the batch.

    Raises:
        ConfigError: If the engine computes all task gradients in one pass.
    """
    named = backbone.named_modules()
    found = [(n, m) for n, m in named if isinstance(m, _BatchNorm) and m.training]
    by_task = balancer is not None and balancer.needs_gramian
    if not found or not (by_task or parts > 1):
        return
    layer = f"{type(found[0][1]).__name__} {found[0][0]!r} ({len(found)} such layers in all)"
    if by_task and engine not in {"auto", "loop"}:
        raise ConfigError(
            "tasks.engine: must be 'auto' or 'loop' with a gradient balancer and batch norm, which "
            f"mixes the samples of tasks in a pass, found {engine!r} and {layer}"
        )
    warnings.warn(
        "backbone: batch norm normalises each task (of a gradient balancer) and each part of "
        "accumulate_grad_batches alone in training, but all samples by one average of their "
        f"statistics in evaluation; group or layer norm has no such gap; found {layer}",
        stacklevel=4,
    )


def warn_of_other_model(clustering: Clustering, backbone: nn.Module) -> None:
    """Warn of clusters that come from the gradients of another kind of network.

    Only a warning, because it may be intended. The affinity of a small network for a large one of
    the same class does not warn.
    """
    measured, ours = clustering.measured_model(), backbone_name(backbone)
    if measured and measured.partition(",")[0] != ours:
        warnings.warn(
            f"tasks.clustering: its affinity was measured on {measured!r}, and the backbone is a "
            f"{ours}: the clusters are those of another network",
            stacklevel=3,
        )


def warn_of_random_base(backbone: nn.Module) -> None:
    """Warn of an adapter in a network that no file has filled, as its own weights stay random.

    For a network that settings have made: one made in Python may have been filled by hand, which
    cannot be seen. A class of the user's own may read its weights itself.
    """
    network = adapted(backbone)
    known = type(network).__module__.partition(".")[0] in {"ant_lightning", "diffusers"}
    config = getattr(network, "config", None) or {}
    if known and not config.get("_name_or_path"):  # the folder that diffusers has read
        rank_zero_warn(
            f"adapter: adapts the weights that {backbone_name(backbone)} was made with, which are "
            "random: set model.init_from to a checkpoint or a folder of diffusers, or give the "
            "folder of a DiffusersBackbone"
        )


def warn_of_learned_variance(
    process: NoiseProcess, clusters: TimestepClusters, balancer: Balancer | None
) -> None:
    """Warn of a balancer that would see little but the variance term in the first losses of a task.

    A network begins with the output 0. If images and noise have the mean square 1, its squared
    error is then 1 at each timestep, and the process gives the variance term that goes with it.
    Where the mean of that term over a task is above the mean of the rest of the loss, a balancer
    that goes by losses takes the task for a hard one until the variance is learned, and longer.
    """
    if balancer is None or not (balancer.uses_losses or balancer.needs_losses):
        return
    cells = torch.arange(process.num_timesteps)
    times = process.times(cells)
    # Orthogonal, so that a target of both has the mean square 1 too.
    x_start = torch.tensor([1.0, -1.0]).expand(len(cells), 1, 1, 2)
    noise = torch.ones_like(x_start)
    first = process.losses(
        torch.zeros(len(cells), process.output_channels(1), 1, 2),
        x_start=x_start,
        x_t=process.noised(x_start, noise, times),
        times=times,
        noise=noise,
    )
    if first.vb is None:
        return
    density = process.density
    terms = torch.stack([first.vb, first.loss - first.vb]).double() * density
    of_tasks = torch.stack([terms[:, a:b].sum(1) for a, b in pairwise(clusters.boundaries)])
    ratios = of_tasks[:, 0] / of_tasks[:, 1]
    task, worst = int(ratios.argmax()), int(first.vb.argmax())
    ratio, largest = float(ratios[task]), float(first.vb[worst])
    if not ratio > 1:
        return
    rank_zero_warn(
        f"process.variance_type: should be fixed_small with {type(balancer).__name__} and this "
        f"schedule, found learned_range: at first the variance term is {largest:.0f} at timestep "
        f"{worst}, {ratio:.2g} times the rest of the mean loss of task {task}, and decides the "
        "weight of that task (--model.process.variance_type fixed_small; DDIM draws without it)",
        category=LearnedVarianceWarning,
    )


def warn_of_rare_tasks(masses: Tensor, num_images: int, allocation: str | None) -> None:
    """Warn of tasks that are missing from some batches.

    Args:
        masses: Share of the draws that each cluster has, `[k]`.
        num_images: Images of a step, on all ranks together.
        allocation: See `TimestepSampling`; `None` for draws that ignore the tasks.
    """
    k = len(masses)
    expected = [num_images / k] * k if allocation == "equal" else (num_images * masses).tolist()
    rare = [
        f"task {task} (mass {mass:.2g}, {count:.2g} a step)"
        for task, (mass, count) in enumerate(zip(masses.tolist(), expected, strict=True))
        if count < 1 - 1e-9
    ]
    if rare:
        rank_zero_warn(
            f"tasks: the expected number of images of a task should be at least 1 a step, found "
            f"less for {', '.join(rare)} in batches of {num_images}: such a task is missing from "
            "some steps; use larger batches, timesteps.allocation equal, or weighted clusters"
        )


def warn_of_other_ranks(
    then: int, now: int, *, placement: Literal["spread", "sorted"], backbone: nn.Module
) -> None:
    """Warn if a change of the number of ranks changes more than rounding.

    Args:
        then: Number of ranks of the checkpoint's run; 0 if unknown.
        now: Number of ranks of this run.
        placement: See `Tasks`.
        backbone: The network.
    """
    reasons = {
        "tasks.placement 'sorted' pairs images with other timesteps": placement == "sorted",
        "dropout inside the network draws other masks": any(
            isinstance(part, nn.Dropout) and part.p > 0 for part in backbone.modules()
        ),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if then and then != now and found:
        rank_zero_warn(
            f"number of ranks: the checkpoint has {then}, this run {now}: "
            f"{' and '.join(found)}, so results agree with those of the run that was stopped "
            "in distribution alone"
        )
