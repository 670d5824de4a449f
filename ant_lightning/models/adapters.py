"""Adapters of PEFT: a few trained weights inside a network whose own weights stay as they are."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any

from ant_lightning.backbones.diffusers import DiffusersBackbone
from ant_lightning.errors import ConfigError, check_at_least, extra_for

if TYPE_CHECKING:
    import torch
    from torch import nn

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # of diffusers' networks
NAME = "default"  # PEFT's


class Adapter(ABC):
    """Which adapter is put into a backbone; the base for `LoRA` and `PeftAdapter`.

    Examples:
        >>> from ant_lightning import Adapter
        >>> class LoHa(Adapter):
        ...     def config(self):
        ...         from peft import LoHaConfig
        ...
        ...         return LoHaConfig(r=2, target_modules=["to_q"])
        >>> LoHa().config().r
        2
    """

    @abstractmethod
    def config(self) -> Any:  # noqa: ANN401 - a `peft.PeftConfig`; peft is an extra
        """The configuration of PEFT."""


@dataclass(frozen=True)
class LoRA(Adapter):
    """LoRA: `W x + (alpha / r) B A x`, with `A [r, in]` random and `B [out, r]` zero at the start.

    Args:
        r: Rank.
        alpha: Numerator of the scale; by default `r`, a scale of 1.
        target_modules: Ends of the names of the layers that get an adapter; by default the
            attention of diffusers' networks.
        dropout: Of the adapter's input.
        use_dora: Learn the norm of each row of the weight too (DoRA).

    Raises:
        ConfigError: If `r` is below 1, or there is no target.

    Reference:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.

    Examples:
        >>> from ant_lightning import LoRA
        >>> LoRA(r=4, alpha=8).config().lora_alpha
        8.0
    """

    r: int = 16
    _: KW_ONLY
    alpha: float | None = None
    target_modules: tuple[str, ...] = ATTENTION
    dropout: float = 0.0
    use_dora: bool = False

    def __post_init__(self) -> None:
        check_at_least(1, r=self.r)
        if not self.target_modules:
            raise ConfigError("target_modules: must name a layer, found none")
        # As a config gives them: a checkpoint compares the text of the settings.
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if self.alpha is not None:
            object.__setattr__(self, "alpha", float(self.alpha))

    def config(self) -> Any:  # noqa: ANN401
        """The `LoraConfig`."""
        return _peft().LoraConfig(
            r=self.r,
            lora_alpha=self.r if self.alpha is None else self.alpha,
            target_modules=list(self.target_modules),
            lora_dropout=self.dropout,
            use_dora=self.use_dora,
        )


@dataclass(frozen=True)
class PeftAdapter(Adapter):
    """Any adapter of PEFT that can be put into a network: LoKr, LoHa, OFT, IA3, VeRA, ...

    Args:
        peft_type: Its name in PEFT, such as `LOKR`.
        settings: Arguments of its config, with `target_modules`.

    Raises:
        ConfigError: When it is used, if PEFT has none of that name or refuses the settings.

    Examples:
        >>> from ant_lightning import PeftAdapter
        >>> PeftAdapter("LOKR", settings={"r": 4, "target_modules": ["to_q"]}).config().r
        4
    """

    peft_type: str
    _: KW_ONLY
    settings: dict[str, Any] = field(default_factory=dict)

    def config(self) -> Any:  # noqa: ANN401
        """The config of PEFT."""
        known = _peft().mapping.PEFT_TYPE_TO_CONFIG_MAPPING
        kinds = {str(getattr(kind, "value", kind)): config for kind, config in known.items()}
        if self.peft_type not in kinds:
            raise ConfigError(
                f"adapter.peft_type: must be one of {', '.join(sorted(kinds))}, found "
                f"{self.peft_type}"
            )
        try:
            return kinds[self.peft_type](**self.settings)
        except (TypeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"adapter.settings: {self.peft_type} refuses: {reason}") from error


def insert(adapter: Adapter, backbone: nn.Module) -> frozenset[str]:
    """Put an adapter into a network, in place, and freeze everything else.

    Returns:
        The names in the backbone's state that are not the adapter's.

    Raises:
        ConfigError: If the network lacks a target, or PEFT refuses.
    """
    config, network = adapter.config(), adapted(backbone)
    before = set(backbone.state_dict())
    _check_targets(config, network)
    backbone.requires_grad_(False)
    try:
        _peft().inject_adapter_in_model(config, network, adapter_name=NAME)
    except (TypeError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"adapter: PEFT refuses it for this backbone: {reason}") from error
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    if not trained:
        raise ConfigError(f"adapter: must have trained weights, found none in {config.peft_type}")
    # PEFT puts the weights of a layer one level below: `to_q.weight` is `to_q.base_layer.weight`.
    return frozenset(
        name
        for name in backbone.state_dict()
        if name not in trained and name.replace(".base_layer", "") in before
    )


def adapted(backbone: nn.Module) -> nn.Module:
    """The network inside a backbone that an adapter is put into: that of diffusers, uncompiled."""
    inner = getattr(backbone, "_orig_mod", backbone)
    inner = inner.network if isinstance(inner, DiffusersBackbone) else inner
    return getattr(inner, "_orig_mod", inner)  # type: ignore[no-any-return]


def folded(backbone: nn.Module) -> nn.Module:
    """A copy whose adapter is added to the weights that it adapts; its layers are plain again."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: PLC0415 - an extra

    copied = copy.deepcopy(backbone)
    for name, part in list(copied.named_modules()):
        if isinstance(part, BaseTunerLayer):
            part.merge()
            parent, _, child = name.rpartition(".")
            setattr(copied.get_submodule(parent), child, part.get_base_layer())
    return copied


def base_fingerprint(state: Mapping[str, torch.Tensor], base: frozenset[str]) -> str:
    """A short text that differs between networks: of some values of each base weight.

    Not of all values: a checkpoint of a network of 12 billion weights must not wait for a hash.
    """
    from ant_lightning.files.identity import tensors_digest  # noqa: PLC0415

    parts = (state[name].detach().reshape(-1) for name in sorted(base))
    return tensors_digest(part[:: max(1, len(part) // 64)].float() for part in parts)


def _check_targets(config: Any, network: nn.Module) -> None:  # noqa: ANN401
    """PEFT is content if one target is found; a misspelt one beside it would train nothing."""
    wanted = getattr(config, "target_modules", None)
    if not isinstance(wanted, set | list | tuple):
        return
    names = [name for name, _ in network.named_modules()]
    missing = [w for w in wanted if not any(n == w or n.endswith(f".{w}") for n in names)]
    if missing:
        sizes: Counter[str] = Counter()
        for name, layer in network.named_modules():
            end = name.rpartition(".")[2]
            if _is_layer(layer) and not end.isdigit():
                sizes[end] += sum(p.numel() for p in layer.parameters())
        ends = [end for end, _ in sizes.most_common(8)]  # those with the most weights
        raise ConfigError(
            f"adapter.target_modules: must be layers of {type(network).__name__}, such as "
            f"{', '.join(ends)}, found {', '.join(sorted(missing))}"
        )


def _is_layer(part: nn.Module) -> bool:
    return hasattr(part, "weight") and not list(part.children())


def _peft() -> Any:  # noqa: ANN401
    with extra_for("adapter", "peft"):
        import peft  # noqa: PLC0415 - an extra
    return peft
