"""Whether the weights in a checkpoint are those of the module that is to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ant_lightning.backbones.checkpoint_layouts import bare_names
from ant_lightning.errors import ConfigError
from ant_lightning.models.protocol import backbone_name

if TYPE_CHECKING:
    import lightning as L

__all__ = ["check_weights", "use_names_of"]


def use_names_of(module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Rename the weights of a checkpoint, and their averages, to the names in `module`.

    The names differ if only one of them was wrapped by torch (`torch.compile`, DDP).
    """
    saved = checkpoint.get("ant_lightning", {})
    if saved.get("backbone") == "OptimizedModule":  # what 0.1 called every compiled network
        saved["backbone"] = backbone_name(module.backbone)  # type: ignore[arg-type]
    weights = checkpoint.get("state_dict")
    if weights is not None:
        checkpoint["state_dict"] = _renamed(weights, module.state_dict())
    own = dict(module.backbone.named_parameters())  # type: ignore[operator,union-attr]
    for state in checkpoint.get("callbacks", {}).values():
        if isinstance(state, dict) and isinstance(state.get("averages"), Mapping):
            state["averages"] = _renamed(state["averages"], own)


def _renamed(tensors: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
    if tensors.keys() == own.keys():
        return tensors
    names = bare_names(own)
    return {names.get(bare, name): tensors[name] for bare, name in bare_names(tensors).items()}


def check_weights(module: L.LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Compare names and shapes of a checkpoint's weights with those of the module.

    Raises:
        ConfigError: Naming the part that differs, and the first weight that does, both ways.
    """
    theirs = checkpoint.get("state_dict")
    if theirs is None:  # a strategy that shards the model has loaded it
        return
    ours = {name: _shape(value) for name, value in module.state_dict().items()}
    saved = {str(name): _shape(value) for name, value in theirs.items()}
    different = [name for name in {**ours, **saved} if ours.get(name) != saved.get(name)]
    if not different:
        return
    name = different[0]
    part, _, rest = name.partition(".")
    raise ConfigError(
        f"{part}: must be that of the checkpoint in ckpt_path, which has "
        f"{saved.get(name, 'no')} {rest}, found {ours.get(name, 'no')} {rest}; "
        f"{len(different)} of its weights differ"
    )


def _shape(value: object) -> str:
    return f"{list(value.shape)} as" if isinstance(value, Tensor) else "values as"
