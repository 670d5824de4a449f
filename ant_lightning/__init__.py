"""Diffusion training as multi-task learning over clusters of timesteps."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The names that most scripts need. They are imported when they are first used, so that
# `import ant_lightning.balancing` costs no more than torch.
_HOMES = {
    "balancing": (
        "ContinuousUncertainty",
        "LinearScalarization",
        "NashMTL",
        "PCGrad",
        "UncertaintyWeighting",
        "multitask_backward",
    ),
    "clustering": (
        "FixedClustering",
        "GradientClustering",
        "SNRClustering",
        "TimestepClustering",
        "TimestepClusters",
    ),
    "callbacks": (
        "EMA",
        "ConflictMonitor",
        "ExcessRisk",
        "GenerationMetrics",
        "SampleGrid",
        "TaskAffinity",
        "TransferMatrix",
    ),
    "data": ("DigitsData", "DigitsMixtureData", "ImageFolderData", "LatentsData", "ShapesData"),
    "diffusion": ("CosineSchedule", "LinearSchedule", "ScaledLinearSchedule"),
    "errors": ("ConfigError",),
    "modules": (
        "ADMModule",
        "AutoencoderModule",
        "DiTModule",
        "FirstStage",
        "LDMModule",
        "MultiTaskDiffusion",
    ),
    "runs": ("load_run",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605 - the list is the keys of the table above

if TYPE_CHECKING:
    from ant_lightning.balancing import *
    from ant_lightning.callbacks import *
    from ant_lightning.clustering import *
    from ant_lightning.data import *
    from ant_lightning.diffusion import *
    from ant_lightning.errors import *
    from ant_lightning.modules import *
    from ant_lightning.runs import *


def __getattr__(name: str) -> Any:  # noqa: ANN401 - classes and functions of all kinds
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'ant_lightning' has no attribute {name!r}")
    return getattr(import_module(f"ant_lightning.{home}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
