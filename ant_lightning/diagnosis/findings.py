"""What the measured gradients and losses say about the tasks of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, combinations
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from ant_lightning.affinity.clustering import GradientClustering, spread_affinity
from ant_lightning.affinity.distance import distance_correlation
from ant_lightning.affinity.estimate import (
    corrected_affinity,
    corrected_standard_error,
    split_half_reliability,
)
from ant_lightning.balancing.nash import nash_weights
from ant_lightning.balancing.pcgrad import PCGrad
from ant_lightning.errors import ConfigError
from ant_lightning.tasks.clusterings import SNRClustering, TimestepClustering

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float
    from torch import Tensor

    from ant_lightning.affinity.result import AffinityResult
    from ant_lightning.tasks.clusters import TimestepClusters


ENOUGH_IMAGES = 256  # of a timestep; fewer leave the conflicts too noisy for many tasks


@dataclass(frozen=True, eq=False)
class Findings:
    """Measurements of one checkpoint, by timestep and by task.

    The gradient of a task is the mean of the measured gradients in its cluster. A task's cluster
    must therefore hold a timestep of the grid.

    Attributes:
        affinity: Gradients on a grid of `n` timesteps, with the log-SNR of the process.
        losses: Training loss at these timesteps, `[n]`, for the picture.
        task_losses: Mean training loss of each task over its own draws, `[k]`, positive.
        clusters: The `k` tasks.
        transfer: Share of task j's loss that a step on task i removes, `[k, k]`; `None` if not
            measured.
        prediction_type: What the network predicts.
        is_latent: Whether it denoises the latents of a first stage.
        times: Seconds of each timed backward pass on this machine, by the name of the method; the
            i-th passes of all methods came after each other.
        num_images: Images of each timestep.
        steps: Steps that the weights were trained for; `None` if unknown.

    Raises:
        ConfigError: If a cluster has no timestep of the grid, or shapes do not fit.
    """

    affinity: AffinityResult
    losses: Float[Tensor, " n"]
    task_losses: Float[Tensor, " k"]
    clusters: TimestepClusters
    transfer: Float[Tensor, "k k"] | None = None
    prediction_type: str = "eps"
    is_latent: bool = False
    times: dict[str, list[float]] = field(default_factory=dict)
    num_images: int = ENOUGH_IMAGES
    steps: int | None = None

    def __post_init__(self) -> None:
        n = len(self.affinity.timesteps)
        if self.losses.shape != (n,):
            raise ConfigError(f"losses: must have shape ({n},), found {tuple(self.losses.shape)}")
        empty = (self._members.sum(1) == 0).nonzero().flatten().tolist()
        if empty:
            raise ConfigError(
                f"num_points: must be so many that each task has a timestep of the grid, found "
                f"{n}, and none in task {empty[0]}"
            )

    @property
    def num_tasks(self) -> int:
        """`k`."""
        return self.clusters.num_tasks

    @cached_property
    def _members(self) -> Float[Tensor, "k n"]:
        """1 where a timestep of the grid belongs to a task."""
        tasks = self.clusters.task_of(torch.tensor(self.affinity.timesteps))
        return (tasks == torch.arange(self.num_tasks)[:, None]).double()

    @cached_property
    def _half_dots(self) -> Float[Tensor, "c 2 2 k k"]:
        """Dot products of the tasks' gradients, half by half."""
        means = self._members / self._members.sum(1, keepdim=True)
        return means @ self.affinity.half_dots @ means.T

    @cached_property
    def cosines(self) -> Float[Tensor, "k k"]:
        """Cosines of the tasks' gradients, corrected for noise; NaN where noise drowns them."""
        return corrected_affinity(self._half_dots).nanmean(0)

    @cached_property
    def cosine_errors(self) -> Float[Tensor, "k k"]:
        """Approximate standard errors of `cosines`."""
        return corrected_standard_error(self._half_dots).nanmean(0)

    @cached_property
    def reliability(self) -> Float[Tensor, " k"]:
        """Split-half reliability of each task's gradient: 1 without noise."""
        return split_half_reliability(self._half_dots).mean(0)

    @cached_property
    def gradient_shares(self) -> Float[Tensor, " k"]:
        """Each task's share of the squared lengths of the gradients, without their noise."""
        squares = _squared_norms(self._half_dots)
        return squares / squares.sum()

    @cached_property
    def conflicts(self) -> list[tuple[int, int]]:
        """Pairs of tasks whose cosine is below 0 by more than two standard errors, worst first."""
        found = [
            (i, j)
            for i, j in combinations(range(self.num_tasks), 2)
            if float(self.cosines[i, j] + 2 * self.cosine_errors[i, j]) < 0
        ]
        return sorted(found, key=lambda pair: float(self.cosines[pair]))

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Weight of each task by balancer, `[k]` with mean 1.

        PCGrad and NashMTL are given these gradients; UW is at its equilibrium, `1 / (2 L_i)`.
        """
        # All four products of halves: the Gramian of the gradients over all images, noise included,
        # which is what a balancer is given in training.
        gramian = self._half_dots.mean((0, 1, 2))
        found = {
            "PCGrad": PCGrad(self.num_tasks)(gramian),
            "NashMTL": nash_weights(gramian),
            "UW": 0.5 / self.task_losses,
        }
        return {name: each.double() / each.double().mean() for name, each in found.items()}

    @cached_property
    def clusterings(self) -> dict[str, TimestepClusters]:
        """The clusters that each clustering would make of this process."""
        log_snr = self.affinity.log_snr
        if log_snr is None:
            return {}
        k = self.num_tasks
        found = {"timestep": TimestepClustering(k)(log_snr), "SNR": SNRClustering(k)(log_snr)}
        if len(self.affinity.timesteps) > k:
            full = spread_affinity(
                self.affinity.plain,
                timesteps=self.affinity.timesteps,
                num_timesteps=self.affinity.num_timesteps,
            )
            found["gradient"] = GradientClustering(full, num_tasks=k)(log_snr)
        return found

    @property
    def seconds(self) -> dict[str, float]:
        """The median of each method's `times`."""
        return {name: median(times) for name, times in self.times.items()}

    @property
    def relative_times(self) -> dict[str, tuple[float, float, float]]:
        """Time of each other method over vanilla's: the median over the turns, and its interval.

        None if there are too few turns for an interval (`median_interval`).
        """
        plain = self.times.get("vanilla", [])
        found = {}
        for name, times in self.times.items():
            ratios = [time / other for time, other in zip(times, plain, strict=True)]
            interval = median_interval(ratios)
            if name != "vanilla" and interval is not None:
                found[name] = (median(ratios), *interval)
        return found

    @cached_property
    def correlations(self) -> dict[str, float]:
        """Rank correlation of affinity with distance, in timesteps and in log-SNR."""
        if len(self.affinity.timesteps) < 3:
            return {}
        axes = {"timestep": torch.tensor(self.affinity.timesteps, dtype=torch.float64)}
        if self.affinity.grid_log_snr is not None:
            axes["log-SNR"] = self.affinity.grid_log_snr
        return {
            name: distance_correlation(self.affinity.plain, each).estimate
            for name, each in axes.items()
        }

    def numbers(self) -> dict[str, Any]:
        """Everything as plain numbers and lists, for a JSON file; what was not measured is None."""
        log_snr, transfer = self.affinity.grid_log_snr, self.transfer
        return {
            "boundaries": list(self.clusters.boundaries),
            "timesteps": list(self.affinity.timesteps),
            "log_snr": None if log_snr is None else log_snr.tolist(),
            "losses": self.losses.tolist(),
            "gradient_norms": _squared_norms(self.affinity.half_dots).sqrt().tolist(),
            "tasks": {
                "loss": self.task_losses.tolist(),
                "gradient_share": self.gradient_shares.tolist(),
                "reliability": self.reliability.tolist(),
                "cosines": _or_none(self.cosines),
                "cosine_errors": _or_none(self.cosine_errors),
                "conflicts": [list(pair) for pair in self.conflicts],
                "weights": {name: each.tolist() for name, each in self.weights.items()},
                "transfer": None if transfer is None else transfer.tolist(),
            },
            "distance_correlation": self.correlations,
            "seconds": self.seconds,
            "times": self.times,
            "relative_times": {name: list(each) for name, each in self.relative_times.items()},
        }


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """A 95% interval of the median, by the order of the values alone; `None` for fewer than 6.

    The j-th lowest of n values lies above the median, and the j-th highest below it, with the
    probability `sum_(i<j) C(n, i) / 2^n` each: the interval is between those of the largest j for
    which this is at most 2.5%.
    """
    n = len(values)
    tails = list(accumulate(math.comb(n, i) / 2**n for i in range(n)))
    j = sum(tail <= 0.025 for tail in tails)
    ordered = sorted(values)
    return (ordered[j - 1], ordered[n - j]) if j else None


def _squared_norms(half_dots: Float[Tensor, "c 2 2 n n"]) -> Float[Tensor, " n"]:
    """Squared lengths of gradients, without their noise."""
    dots = half_dots.mean(0)
    # Products of different halves: their noise is independent, so it does not add to the length.
    return ((dots[0, 1] + dots[1, 0]) / 2).diagonal().clamp(min=0)


def _or_none(matrix: Float[Tensor, "k k"]) -> list[list[float | None]]:
    """A matrix as lists; JSON has no NaN."""
    return [[None if math.isnan(x) else x for x in row] for row in matrix.tolist()]
