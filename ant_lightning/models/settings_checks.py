"""Checks of a module's settings against each other and against the layers of its network."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Literal

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ant_lightning.errors import ConfigError
from ant_lightning.models.adapters import adapted
from ant_lightning.models.backbone import backbone_name

if TYPE_CHECKING:
    from torch import Tensor

    from ant_lightning.balancing.base import Balancer
    from ant_lightning.models.settings import Optimization, Tasks, TimestepSampling
    from ant_lightning.tasks.clusterings import Clustering
    from ant_lightning.tasks.clusters import TimestepClusters

_LISTED = 5  # tasks in a message


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


def warn_of_rare_tasks(masses: Tensor, num_images: int, allocation: str | None) -> None:
    """Warn of tasks that are missing from some batches.

    Args:
        masses: Share of the draws that each cluster has, `[k]`.
        num_images: Images of a step, on all ranks together.
        allocation: See `TimestepSampling`; `None` for draws that ignore the tasks.
    """
    k = len(masses)
    expected = [num_images / k] * k if allocation == "equal" else (num_images * masses).tolist()
    rarest = sorted(range(k), key=lambda task: expected[task])
    rare = [task for task in rarest if expected[task] < 1 - 1e-9]
    if rare:
        listed = [
            f"task {task} (mass {float(masses[task]):.2g}, {expected[task]:.2g} a step)"
            for task in rare[:_LISTED]
        ]
        more = f" and {len(rare) - _LISTED} more" if len(rare) > _LISTED else ""
        # The smallest batch of which every task has an image, on average.
        enough = k if allocation == "equal" else math.ceil(1 / float(masses.min()) - 1e-9)
        others = (
            "" if allocation == "equal" else ", timesteps.allocation equal, or weighted clusters"
        )
        rank_zero_warn(
            f"tasks: the expected number of images of a task should be at least 1 a step, found "
            f"less for {', '.join(listed)}{more} in batches of {num_images}: such a task is "
            f"missing from some steps; use batches of at least {enough} images on all ranks "
            f"together{others}"
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
