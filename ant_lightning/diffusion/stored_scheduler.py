"""The noise process that a stored checkpoint of diffusers was trained with, by its scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ant_lightning.diffusion.density import Density, Uniform
from ant_lightning.diffusion.density_normal import LogNormal
from ant_lightning.diffusion.density_shifted import Shifted
from ant_lightning.diffusion.discrete import DiscreteDiffusion
from ant_lightning.diffusion.edm import EDM
from ant_lightning.diffusion.flow import FlowMatching
from ant_lightning.diffusion.preconditioning import EDMPreconditioning
from ant_lightning.diffusion.process import NoiseProcess
from ant_lightning.diffusion.schedules import (
    CosineSchedule,
    NoiseSchedule,
    TableSchedule,
    ZeroTerminalSNR,
)
from ant_lightning.errors import ConfigError, FileError
from ant_lightning.files.json_file import read_json

_PREDICTIONS: dict[str, Any] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


def stored_process(
    folder: str, *, density: Density | None = None, learned_variance: bool | None = None
) -> NoiseProcess:
    """The process of a pipeline's scheduler, as diffusers stores it.

    | scheduler | process |
    |---|---|
    | `FlowMatch...`, or with `flow_prediction` | `FlowMatching`, convention `diffusers` |
    | `EDM...` | `EDM` |
    | DDPM, DDIM, PNDM, ... with betas | `DiscreteDiffusion`, the betas in float64 |

    Args:
        folder: The pipeline's folder, or that of its scheduler.
        density: How often training draws each time. By default uniform over the scheduler's own
            times, which its `shift` moves towards the noise, as diffusers' scripts draw them;
            EDM's log-normal.
        learned_variance: Whether the network predicts the variance too. By default what the
            scheduler says, or the channels of the pipeline's network.

    Raises:
        ConfigError: If there is no scheduler in the folder, or it has a setting of no process.

    Examples:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from ant_lightning import stored_process
        >>> config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "scheduler_config.json").write_text(json.dumps(config))
        ...     process = stored_process(folder)
        >>> type(process).__name__, process.convention, process.sampling_density.shift
        ('FlowMatching', 'diffusers', 3.0)
    """
    found, config = _config(Path(folder))
    name = str(config.get("_class_name"))
    total = int(config.get("num_train_timesteps", 1000))
    prediction = config.get("prediction_type", "epsilon")
    if name.startswith("FlowMatch") or prediction == "flow_prediction":
        shift = float(config.get("shift", config.get("flow_shift", 1.0)) or 1.0)
        if config.get("use_dynamic_shifting"):
            shift = 1.0  # by the size of each image, in sampling alone
        default = Uniform() if shift == 1.0 else Shifted(Uniform(), shift=shift)
        return FlowMatching(convention="diffusers", density=density or default, num_timesteps=total)
    if name.startswith("EDM"):
        if prediction != "epsilon":
            raise ConfigError(
                f"folder: prediction_type of {name} must be epsilon for EDM, found {prediction}"
            )
        return EDM(
            EDMPreconditioning(float(config.get("sigma_data", 0.5))),
            density=density or LogNormal(-1.2, 1.2),
            sigma_min=float(config.get("sigma_min", 0.002)),
            sigma_max=float(config.get("sigma_max", 80.0)),
            num_timesteps=total,
        )
    if prediction not in _PREDICTIONS:
        raise ConfigError(
            f"folder: prediction_type of {name} must be one of {', '.join(_PREDICTIONS)}, found "
            f"{prediction}"
        )
    if learned_variance is None:
        learned_variance = str(config.get("variance_type")).startswith("learned") or _doubled(found)
    large = str(config.get("variance_type")).startswith("fixed_large")
    return DiscreteDiffusion(
        _schedule(config, total),
        prediction_type=_PREDICTIONS[prediction],
        variance_type="learned_range"
        if learned_variance
        else ("fixed_large" if large else "fixed_small"),
        density=density or Uniform(),
    )


def _config(folder: Path) -> tuple[Path, Mapping[str, Any]]:
    inside = folder / "scheduler"
    found = inside if inside.is_dir() else folder
    try:
        return found, read_json(found / "scheduler_config.json", kind=dict)
    except FileError as error:
        raise ConfigError(f"folder: must hold a scheduler of diffusers, found {error}") from error


def _doubled(scheduler: Path) -> bool:
    """Whether the network beside a scheduler has twice as many output as input channels."""
    for name in ("transformer", "unet"):
        path = scheduler.parent / name / "config.json"
        if path.is_file():
            config = read_json(path, kind=dict)
            return bool(config.get("out_channels") == 2 * config.get("in_channels", 0))
    return False


def _schedule(config: Mapping[str, Any], total: int) -> NoiseSchedule:
    """The betas, in float64 where diffusers has float32."""
    kind = config.get("beta_schedule", "linear")
    start, end = (float(config.get(f"beta_{n}", v)) for n, v in (("start", 1e-4), ("end", 0.02)))
    schedule: NoiseSchedule
    if config.get("trained_betas") is not None:
        schedule = TableSchedule(config["trained_betas"])
    elif kind == "squaredcos_cap_v2":
        schedule = CosineSchedule(total)
    elif kind == "linear":
        schedule = TableSchedule(_line(start, end, total).tolist())
    elif kind == "scaled_linear":
        schedule = TableSchedule(_line(start**0.5, end**0.5, total).square().tolist())
    elif kind == "sigmoid":
        betas = torch.sigmoid(_line(-6, 6, total)) * (end - start) + start
        schedule = TableSchedule(betas.tolist())
    else:
        raise ConfigError(
            "folder: beta_schedule must be linear, scaled_linear, squaredcos_cap_v2 or sigmoid, "
            f"found {kind}"
        )
    return ZeroTerminalSNR(schedule) if config.get("rescale_betas_zero_snr") else schedule


def _line(start: float, end: float, total: int) -> Tensor:
    return torch.linspace(start, end, total, dtype=torch.float64)
