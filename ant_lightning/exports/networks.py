"""Networks of diffusers that compute what ours do, several of intervals as one."""

from __future__ import annotations

import copy
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ant_lightning.backbones.checkpoint_layouts import bare_names
from ant_lightning.backbones.diffusers import DiffusersBackbone
from ant_lightning.backbones.diffusers_layouts import diffusers_layout
from ant_lightning.errors import ConfigError
from ant_lightning.models.adapters import adapted
from ant_lightning.transfer.experts import IntervalExperts

if TYPE_CHECKING:
    from torch import nn

# Classes of ours, whose code is copied into the folder.
_CODE = {"ExactDiT": "exact_dit", "IntervalNetwork": "interval_network"}


def diffusers_network(network: nn.Module) -> Any:  # noqa: ANN401 - a model of diffusers
    """A network of diffusers that computes what this network does, with its weights.

    Raises:
        ConfigError: If there is none; says why.

    Examples:
        >>> import torch
        >>> from ant_lightning import DiT
        >>> from ant_lightning.exports.networks import diffusers_network
        >>> dit = DiT(input_size=4, hidden_size=8, depth=1, num_heads=1, num_classes=3)
        >>> x, t, labels = torch.randn(2, 4, 4, 4), torch.tensor([5, 900]), torch.tensor([0, 2])
        >>> theirs = diffusers_network(dit)
        >>> output = theirs(x, t, class_labels=labels).sample
        >>> torch.allclose(output, dit(x, t, labels), atol=1e-5)
        True
    """
    import diffusers  # noqa: PLC0415 - 5 s of imports

    if isinstance(network, IntervalExperts):
        return _interval_network(network)
    if isinstance(network, DiffusersBackbone):
        return copy.deepcopy(adapted(network)).cpu().eval()
    layout = diffusers_layout(network)
    own = network.state_dict()
    weights = layout.to_diffusers({bare: own[name] for bare, name in bare_names(own).items()})
    if layout.class_name == "DiTTransformer2DModel":
        kind = import_module("ant_lightning.exports.exact_dit").ExactDiT
    else:
        kind = getattr(diffusers, layout.class_name)
    made = kind(**layout.config)
    made.load_state_dict(weights)
    return made.eval()


def _interval_network(experts: IntervalExperts) -> Any:  # noqa: ANN401 - a model of diffusers
    """The networks of intervals as one model of diffusers."""
    check_experts(experts)
    plain = [diffusers_network(each) for each in experts.networks]
    scale = _time_scale(plain[0])
    exact = type(plain[0]).__name__ == "ExactDiT"
    config = {n: v for n, v in plain[0].config.items() if not n.startswith("_")}
    routing = config.pop("routing", None)
    if exact and (routing or not isinstance(config["sample_size"], int)):
        raise ConfigError(
            "experts: must be of square images and without routing to be switched in a pipeline, "
            f"found sample_size {config['sample_size']} and routing {routing}"
        )
    kind = import_module("ant_lightning.exports.interval_network").IntervalNetwork
    made = kind(
        class_name="DiTTransformer2DModel" if exact else type(plain[0]).__name__,
        network=config,
        borders=[scale * each for each in experts.borders],
        rising=experts.rising,
        served_by=experts.served_by,
        official_frequencies=exact,
    )
    for theirs, network in zip(made.networks, plain, strict=True):
        theirs.load_state_dict(network.state_dict())
    return made.eval()


def _time_scale(network: Any) -> float:  # noqa: ANN401
    """What the time that a network is told in a pipeline is, over that of a backbone."""
    if type(network).__name__ == "FluxTransformer2DModel":
        return 1e-3  # it multiplies by 1000 itself
    return float(network.config.get("timestep_scale", 1.0))


def check_experts(experts: IntervalExperts) -> None:
    """Check that a pipeline can switch between these networks."""
    if any("class_embedder.embedding.weight" in each.state_dict() for each in experts.networks):
        raise ConfigError(
            "experts: must not have class tables outside of the UNet, as there is one for all in "
            "a pipeline, found use_spatial_transformer with classes"
        )


def first_network(backbone: nn.Module) -> nn.Module:
    """The backbone, or the first of the networks of intervals, which are alike."""
    return backbone.networks[0] if isinstance(backbone, IntervalExperts) else backbone


def code_of(part: object) -> str | None:
    """The file of ours that holds a part's class; `None` for a class of diffusers."""
    return _CODE.get(type(part).__name__)


def copy_code(name: str, folder: Path) -> None:
    """Copy a file of this folder."""
    source = Path(__file__).with_name(f"{name}.py")
    (folder / f"{name}.py").write_text(source.read_text(encoding="utf8"), encoding="utf8")
