"""One model from specialists of intervals: switched by the noise level, or merged by weights."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ant_lightning.diffusion.condition import rows_of
from ant_lightning.errors import ConfigError
from ant_lightning.models.adapters import folded
from ant_lightning.transfer.specialists import check_specialist, specialist_network

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ant_lightning.diffusion.condition import Condition
    from ant_lightning.diffusion.process import NoiseProcess
    from ant_lightning.models.module import MultiTaskDiffusion


class IntervalExperts(nn.Module):
    """Networks that share a noise axis: each image goes to the one of its noise level.

    Called as the networks are. `x` may hold several noise levels.

    Args:
        networks: From the least noise to the most; the same may stand for several intervals.
        borders: The time input between two intervals, `len(networks) - 1` numbers; see
            `borders_between`.
        rising: Whether the time input rises with the noise.

    Raises:
        ConfigError: If the numbers do not fit.

    Examples:
        >>> from ant_lightning import DiT
        >>> from ant_lightning.transfer.experts import IntervalExperts
        >>> sizes = {"input_size": 4, "hidden_size": 8, "depth": 1, "num_heads": 1}
        >>> experts = IntervalExperts([DiT(**sizes), DiT(**sizes)], [499.5])
        >>> experts.expert_of(torch.tensor([0, 499, 500])).tolist()
        [0, 0, 1]
    """

    def __init__(
        self, networks: Sequence[nn.Module], borders: Sequence[float], *, rising: bool = True
    ) -> None:
        super().__init__()
        ordered = all((a < b) == rising and a != b for a, b in pairwise(borders))
        if len(borders) != len(networks) - 1 or not ordered:
            raise ConfigError(
                f"borders: must be {len(networks) - 1} {'rising' if rising else 'falling'} numbers,"
                f" one between two networks, found {list(borders)}"
            )
        # Which of the distinct networks serves each interval.
        distinct = list({id(network): network for network in networks}.values())
        self.networks = nn.ModuleList(distinct)
        self.served_by = [
            next(i for i, each in enumerate(distinct) if each is network) for network in networks
        ]
        self.borders = [float(each) for each in borders]
        self.rising = rising

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        # Sizes and conditions are those of the networks, which share them.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in _OF_NETWORKS and "networks" in self._modules:
                return getattr(self._modules["networks"][0], name)  # type: ignore[index]
            raise

    def expert_of(self, told: Tensor) -> Tensor:
        """The interval of each time input, `[b]`."""
        borders = torch.tensor(self.borders, device=told.device, dtype=torch.float64)
        above = told.double()[:, None] >= borders
        if not self.rising:
            above = told.double()[:, None] <= borders
        return above.sum(1)

    def forward(self, x: Tensor, told: Tensor, condition: Condition = None) -> Tensor:
        """Each image through the network of its interval."""
        chosen = [self.served_by[each] for each in self.expert_of(told).tolist()]
        if len(set(chosen)) == 1:
            whole: Tensor = self.networks[chosen[0]](x, told, condition)
            return whole
        output: Tensor | None = None
        for index in sorted(set(chosen)):
            rows = torch.tensor([i for i, each in enumerate(chosen) if each == index])
            rows = rows.to(x.device)
            part = self.networks[index](x[rows], told[rows], rows_of(condition, rows))
            if output is None:
                output = part.new_empty(len(x), *part.shape[1:])
            output = output.index_copy(0, rows, part)
        assert output is not None
        return output


_OF_NETWORKS = frozenset(
    {"input_size", "in_channels", "out_channels", "num_classes", "null_class", "null_condition"}
)


def borders_between(process: NoiseProcess, cells: Sequence[int]) -> tuple[list[float], bool]:
    """The time input between the cells `b - 1` and `b`, for each `b`, and whether it rises.

    Examples:
        >>> from ant_lightning import DiscreteDiffusion, FlowMatching
        >>> from ant_lightning.transfer.experts import borders_between
        >>> borders_between(DiscreteDiffusion(), [400])
        ([399.5], True)
        >>> borders_between(FlowMatching(), [400])  # SiT's time, 1 - t
        ([0.6], False)
    """
    ends = [0, process.num_timesteps - 1]
    around = torch.tensor([each for cell in cells for each in (cell - 1, cell)] + ends)
    x = torch.zeros(len(around), 1, 1, 1)
    _, told = process.network_inputs(x, process.times(around))
    *pairs, (first, last) = told.double().view(-1, 2).tolist()
    return [round((low + high) / 2, 7) for low, high in pairs], first < last


def switched_network(
    module: MultiTaskDiffusion, specialists: Sequence[str | Path], *, averaged: bool = True
) -> IntervalExperts:
    """Specialists inside their intervals, and the module's network elsewhere.

    Args:
        module: The base.
        specialists: Checkpoints that were trained with `timesteps.interval`.
        averaged: Whether to load their EMA weights, or the live ones.

    Raises:
        ConfigError: If a checkpoint is none of a specialist, differs in the process or the
            backbone, or two intervals overlap.
    """
    base, ends, networks = _own_network(module), [0], list[nn.Module]()
    for expert in _specialists(module, specialists, averaged=averaged):
        start, stop = expert.interval
        if start > ends[-1]:
            networks.append(base)
            ends.append(start)
        networks.append(expert.network)
        ends.append(stop)
    if ends[-1] < module.process.num_timesteps:
        networks.append(base)
        ends.append(module.process.num_timesteps)
    borders, rising = borders_between(module.process, ends[1:-1])
    return IntervalExperts(networks, borders, rising=rising)


def merged_weights(
    base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]], weights: Sequence[float]
) -> dict[str, Tensor]:
    """`base + sum_i w_i (expert_i - base)`, for each weight of a network.

    With weights of 0 it is the base, bit for bit. Numbers that are not floating point stay the
    base's.

    Raises:
        ConfigError: If there is not one weight for each expert.

    Reference:
        Ma et al., "Decouple-Then-Merge: Towards Better Training for Diffusion Models",
        arXiv 2410.06664.

    Examples:
        >>> base, expert = {"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}
        >>> merged_weights(base, [expert], [0.5])
        {'w': tensor([2.])}
    """
    if len(weights) != len(experts):
        raise ConfigError(
            f"weights: must be {len(experts)}, one for each specialist, found {list(weights)}"
        )
    merged = {name: value.clone() for name, value in base.items()}
    for weight, expert in zip(weights, experts, strict=True):
        for name, value in base.items():
            if weight and value.is_floating_point():
                merged[name] += weight * (expert[name].to(value) - value)
    return merged


def merged_network(
    module: MultiTaskDiffusion,
    specialists: Sequence[str | Path],
    weights: Sequence[float] | None = None,
    *,
    averaged: bool = True,
) -> nn.Module:
    """The module's network, with weights merged with those of specialists.

    Args:
        module: The base.
        specialists: Checkpoints that were trained with `timesteps.interval`.
        weights: Of each specialist; by default its share of the noise axis.
        averaged: Whether to load their EMA weights, or the live ones.

    Raises:
        ConfigError: As `switched_network`, or if there is not one weight for each.
    """
    found = _specialists(module, specialists, averaged=averaged, weights=weights)
    network = _own_network(module)
    experts = [expert.network.state_dict() for expert in found]
    weights = [expert.weight for expert in found]
    network.load_state_dict(merged_weights(network.state_dict(), experts, weights))
    return network


def with_experts(
    module: MultiTaskDiffusion,
    specialists: Sequence[str | Path],
    *,
    merge_weights: Sequence[float] | None = None,
    averaged: bool = True,
) -> MultiTaskDiffusion:
    """A copy of a module that is switched between specialists, or merged with them.

    Switched, it uses each specialist inside its interval, and itself elsewhere, in sampling and in
    evaluation. Merged, it has one network, `base + sum_i w_i (specialist_i - base)`. Adapters are
    folded into the weights first.

    Args:
        module: The base.
        specialists: Checkpoints that were trained with `timesteps.interval`.
        merge_weights: A weight for each specialist, to merge; `None` to switch.
        averaged: Whether to load their EMA weights, or the live ones.

    Raises:
        ConfigError: If a checkpoint is none of a specialist, differs in the process or the
            backbone, or two intervals overlap; if there is not one weight for each.

    Examples:
        `with_experts(load_run("runs/base"), ["low.ckpt", "high.ckpt"]).sample(16)` draws images
        with the specialist of low noise, that of high noise, and the base between them.

        >>> from ant_lightning import DiT, DiTModule, SNRClustering, Tasks, with_experts
        >>> sizes = {"input_size": 4, "hidden_size": 8, "depth": 1, "num_heads": 1}
        >>> with_experts(DiTModule(DiT(**sizes), tasks=Tasks(SNRClustering(2))), [])
        Traceback (most recent call last):
            ...
        ant_lightning.errors.ConfigError: specialists: must be at least one checkpoint, found []
    """
    if merge_weights is None:
        network: nn.Module = switched_network(module, specialists, averaged=averaged)
    else:
        network = merged_network(module, specialists, merge_weights, averaged=averaged)
    copied = copy.deepcopy(module)
    copied.backbone, copied.adapter, copied.not_stored = network, None, frozenset()
    return copied.eval()


def interval_shares(
    module: MultiTaskDiffusion, specialists: Sequence[str | Path]
) -> dict[tuple[int, int], float]:
    """The interval of each specialist, and its share of the noise axis."""
    found = [
        check_specialist(module, Path(path), None, "samples", f"specialists[{i}]").interval
        for i, path in enumerate(specialists)
    ]
    return {(a, b): (b - a) / module.process.num_timesteps for a, b in found}


def _own_network(module: MultiTaskDiffusion) -> nn.Module:
    """A copy of the module's network; an adapter is folded in, as its factors do not add up."""
    if module.adapter is not None:
        return folded(module.backbone).eval()
    network: nn.Module = copy.deepcopy(module.backbone)
    return network.eval()


class _Expert(NamedTuple):
    """A specialist: its interval, its network, and its weight in a merge."""

    interval: tuple[int, int]
    network: nn.Module
    weight: float


def _specialists(
    module: MultiTaskDiffusion,
    paths: Sequence[str | Path],
    *,
    averaged: bool,
    weights: Sequence[float] | None = None,
) -> list[_Expert]:
    """The specialists of these files, from the least noise to the most."""
    if not paths or (weights is not None and len(weights) != len(paths)):
        rule = "at least one checkpoint" if not paths else f"{len(paths)}, one for each specialist"
        name, value = ("specialists", []) if not paths else ("weights", list(weights or ()))
        raise ConfigError(f"{name}: must be {rule}, found {value}")
    found = []
    checked = [
        check_specialist(module, Path(path), None, "samples", f"specialists[{i}]")
        for i, path in enumerate(paths)
    ]
    intervals = sorted(each.interval for each in checked)
    for one, other in pairwise(intervals):
        if one[1] > other[0]:
            raise ConfigError(
                "specialists: must have intervals that do not overlap, found "
                f"{list(one)} and {list(other)}"
            )
    for i, specialist in enumerate(checked):
        start, stop = specialist.interval
        share = (stop - start) / module.process.num_timesteps
        network = specialist_network(module, specialist, averaged=averaged)
        if module.adapter is not None:
            network = folded(network)
        weight = share if weights is None else float(weights[i])
        found.append(_Expert(specialist.interval, network, weight))
    return sorted(found, key=lambda each: each.interval)
