"""Weights that a network starts from, of the process of the run where the file says so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_only

from ant_lightning.backbones.official_checkpoints import fill_backbone, read_checkpoint
from ant_lightning.diffusion.discrete import DiscreteDiffusion
from ant_lightning.errors import ConfigError
from ant_lightning.models.state import process_summary

if TYPE_CHECKING:
    from torch import nn

    from ant_lightning.backbones.checkpoint_layouts import CheckpointReport, Weights
    from ant_lightning.diffusion.process import NoiseProcess

# Names of SiT's training script, and ours.
_PREDICTIONS = {"velocity": "v", "noise": "eps", "score": "score"}


class InitialWeights:
    """The file that a network starts from: loaded once, unless a checkpoint comes first.

    Args:
        path: Official checkpoint, or folder of diffusers; `None` for none.
        weights: Which weights of the file, if it has both.

    Attributes:
        due: Whether the file is still to be loaded.
    """

    def __init__(self, path: str | None, weights: Weights) -> None:
        self.path = path
        self.weights: Weights = weights
        self.due = path is not None

    def load(self, process: NoiseProcess, backbone: nn.Module) -> None:
        """Fill `backbone` if that is due, and print what was loaded.

        Raises:
            ConfigError: If the file does not fit, or is of another process.
        """
        if self.path is None or not self.due:
            return
        try:
            report = load_weights_for(
                process, backbone, self.path, weights=self.weights, adapt=True
            )
        except ConfigError as error:
            raise ConfigError(f"init_from: {error}") from error
        self.due = False
        rank_zero_only(print)(f"init_from {report}")


def load_weights_for(
    process: NoiseProcess,
    backbone: nn.Module,
    path: str | Path,
    *,
    weights: Weights,
    adapt: bool = False,
) -> CheckpointReport:
    """Fill `backbone` as `load_official_checkpoint` does, if the file is of the same process.

    Our own checkpoints and the training files of SiT and DiT say what they were trained for. A
    bare state dict does not: its process and convention are those of the settings.

    Raises:
        ConfigError: If the file is of another process, path, prediction or convention, or does not
            fit the network.
    """
    path = Path(path)
    content = read_checkpoint(path)
    found, ours = _trained_for(content), f"{process_summary(process)}, {process.prediction_type}"
    # DiT and 0.1 had one process, whose prediction need not be stored.
    discrete = isinstance(process, DiscreteDiffusion) and found == "DiscreteDiffusion"
    if found is not None and found != ours and not discrete:
        raise ConfigError(
            f"{path}: must be trained for the process of the run ({ours}), found a network for "
            f"{found}"
        )
    return fill_backbone(backbone, content, path=path, weights=weights, adapt=adapt)


def _trained_for(content: Mapping[str, Any]) -> str | None:
    """The process and the prediction that a file names; `None` if it names none."""
    own = content.get("ant_lightning")
    if isinstance(own, Mapping):
        kind, prediction = own.get("process", "DiscreteDiffusion"), own.get("prediction_type")
        return kind if prediction is None else f"{kind}, {prediction}"
    stored = content.get("args")
    args = stored if isinstance(stored, Mapping) else vars(stored) if stored is not None else {}
    if "path_type" in args:  # SiT
        path = str(args["path_type"]).lower()
        kind = _PREDICTIONS.get(str(args.get("prediction", "velocity")), "another prediction")
        return f"FlowMatching(path={path}, convention=sit), {kind}"
    return "DiscreteDiffusion" if str(args.get("model", "")).startswith("DiT-") else None
