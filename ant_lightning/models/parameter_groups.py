"""The parameter groups of a network's optimizer: settings by name, and matrices for Muon."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import nn

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


class NamedGroups:
    """Parameter groups by patterns of names: other learning rates, no weight decay, ...

    A parameter belongs to the first pattern that fits its name, `*` standing for any characters.
    What fits none has the optimizer's settings. A scheduler scales each group's learning rate.

    Args:
        settings: For each pattern, settings of the optimizer's group.

    Raises:
        ConfigError: If there is no pattern, or when called, if one fits no parameter.

    Examples:
        >>> groups = NamedGroups({"*.bias": {"weight_decay": 0.0}, "0.*": {"lr": 1e-4}})
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        >>> for group in groups(list(network.named_parameters())):
        ...     print(len(group.pop("params")), group)
        1 {}
        2 {'weight_decay': 0.0}
        1 {'lr': 0.0001}
    """

    def __init__(self, settings: Mapping[str, Mapping[str, Any]]) -> None:
        if not settings:
            raise ConfigError("settings: must have at least one pattern, found none")
        self.settings = {pattern: dict(each) for pattern, each in settings.items()}

    def __call__(self, named: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
        """One group for the rest, and one for each pattern."""
        named, rest = list(named), list[nn.Parameter]()
        groups: dict[str, list[nn.Parameter]] = {pattern: [] for pattern in self.settings}
        for pattern in groups:
            if not any(fnmatchcase(name, pattern) for name, _ in named):
                raise ConfigError(
                    f"settings: each pattern must fit a name, found {pattern!r} among "
                    f"{named[0][0]} .. {named[-1][0]}"
                )
        for name, p in named:
            fits = [pattern for pattern in groups if fnmatchcase(name, pattern)]
            (groups[fits[0]] if fits else rest).append(p)
        return [
            {"params": rest},
            *({"params": groups[pattern], **each} for pattern, each in self.settings.items()),
        ]


class MuonGroups:
    """Two groups for `MuonAdamW`: matrices for Muon, and all other parameters for AdamW.

    Args:
        adamw: Patterns of names of matrices that AdamW takes too. By default embeddings and what
            makes the output, as Muon's authors do: these are no maps between hidden states.

    Examples:
        >>> layers = {"embed": torch.nn.Linear(2, 3), "mlp": torch.nn.Linear(3, 3)}
        >>> network = torch.nn.ModuleDict(layers)
        >>> for group in MuonGroups()(list(network.named_parameters())):
        ...     print(len(group["params"]), group["muon"])
        1 True
        3 False
    """

    def __init__(
        self, adamw: Sequence[str] = ("*embed*", "*table*", "final_layer.*", "out.*", "*proj_out*")
    ) -> None:
        self.adamw = tuple(adamw)

    def __call__(self, named: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
        """The group of Muon, and that of AdamW."""
        groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for name, p in named:
            others = p.ndim != 2 or any(fnmatchcase(name, each) for each in self.adamw)
            groups[others].append(p)
        return [{"params": groups[0], "muon": True}, {"params": groups[1], "muon": False}]


def checked_groups(groups: Any, named: Sequence[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:  # noqa: ANN401
    """The groups that a `param_groups` made, as new dicts.

    Raises:
        ConfigError: If they are not dicts with `params`, or not each parameter is in one of them.
    """
    try:
        found = [{**group, "params": list(group["params"])} for group in groups]
    except (TypeError, KeyError) as error:
        raise ConfigError(
            "param_groups: must give a list of dicts with the key 'params', "
            f"found {type(groups).__name__}: {error!r}"
        ) from error
    counts: dict[int, int] = {}
    for group in found:
        for p in group["params"]:
            counts[id(p)] = counts.get(id(p), 0) + 1
    for name, p in named:
        if (count := counts.pop(id(p), 0)) != 1:
            raise ConfigError(
                f"param_groups: each parameter must be in one group, found {name!r} in {count}"
            )
    if counts:
        raise ConfigError(
            f"param_groups: must give parameters of the network only, found {len(counts)} others"
        )
    return found
