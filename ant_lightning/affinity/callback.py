"""`TaskAffinity`: measures task affinity in validation, saves it, draws it and logs numbers."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from ant_lightning.affinity.distance import distance_correlation
from ant_lightning.affinity.figure import affinity_curves, affinity_heat_maps
from ant_lightning.affinity.gradient import NonFiniteGradientError
from ant_lightning.affinity.measure import task_affinity, timestep_grid
from ant_lightning.affinity.result import AffinityResult
from ant_lightning.callbacks.base import steps_of
from ant_lightning.callbacks.figures import log_folder, save_figure
from ant_lightning.callbacks.measuring import MeasuringCallback
from ant_lightning.callbacks.progress import progress_of
from ant_lightning.errors import ConfigError, check_at_least
from ant_lightning.tasks.figure import NOISE_AXES
from ant_lightning.tasks.time_axis import TimeAxis

if TYPE_CHECKING:
    import lightning as L
    from torch import Tensor

    from ant_lightning.models.module import MultiTaskDiffusion

_log = logging.getLogger(__name__)


class TaskAffinity(MeasuringCallback):
    """Measures how well the gradients at different timesteps agree, at the end of a validation.

    In `validate`, the result describes the checkpoint. In `fit`, cosines are averaged over all
    validations so far, those before a resume included. The result is written to
    `task_affinity.safetensors` in the run's folder; `GradientClustering` reads this file. Figures
    go to the loggers and to PNG files.

    Args:
        num_points: Timesteps of the grid, evenly spread.
        timesteps: The grid itself, increasing, in place of `num_points`.
        num_images: Images for each timestep, in two disjoint halves.
        batch_size: Most images in one forward pass.
        weights: Weights to measure: `ema` or `live`.
        images: Images to measure on: those that are trained on (`train`), or `held_out`.
        sketch_dim: Keep gradients as random projections of this length, a power of two. For models
            whose gradients fit neither in memory nor on disk.
        memory_budget_mb: MiB of each rank for gradients; what does not fit goes to disk.
        resume_dir: Folder for finished gradients, from which a killed measurement resumes. It is
            emptied at the end.
        average_with: Files of earlier measurements to average with, one for each checkpoint.
        every_n_epochs: Validations of `fit` between two measurements.
        seed: Seed of images, noise and sketch; by default that of the module.

    Raises:
        ConfigError: If a number is out of its range.

    Reference:
        Go et al., "Addressing Negative Transfer in Diffusion Models", section 3, arXiv 2306.00354.

    Examples:
        >>> from ant_lightning import TaskAffinity
        >>> TaskAffinity(num_points=50, num_images=256).num_points
        50
    """

    result: AffinityResult | None
    _half_dots: list[Tensor]  # [1, 2, 2, n, n] of each validation of this run
    run_state: ClassVar = {"result": NoneType, "_half_dots": list}

    def __init__(
        self,
        *,
        num_points: int = 100,
        timesteps: list[int] | None = None,
        num_images: int = 512,
        batch_size: int = 256,
        weights: Literal["ema", "live"] = "ema",
        images: Literal["train", "held_out"] = "train",
        sketch_dim: int | None = None,
        memory_budget_mb: float | None = None,
        resume_dir: str | None = None,
        average_with: list[str] | None = None,
        every_n_epochs: int = 1,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            num_images=num_images,
            batch_size=batch_size,
            images=images,
            weights=weights,
            seed=seed,
            every_n_epochs=every_n_epochs,
        )
        check_at_least(1, num_points=num_points)
        self.num_points = num_points
        self.timesteps = timesteps
        self.sketch_dim = sketch_dim
        self.memory_budget_mb = memory_budget_mb
        self.resume_dir = resume_dir
        self._earlier = [AffinityResult.load(path) for path in average_with or []]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Measure and publish; a gradient that is not finite stops `validate`, but not `fit`."""
        if not self.is_due(trainer):
            return
        try:
            result = self._measure(trainer, pl_module)
        except NonFiniteGradientError as error:
            if error.partial is not None and trainer.is_global_zero:
                path = log_folder(trainer) / "task_affinity_partial.safetensors"
                error.partial.save(path)
                _log.warning("the timesteps measured before are in %s", path)
            if trainer.state.fn != "fit":
                raise
            _log.warning("task affinity is left out at step %d: %s", trainer.global_step, error)
            return
        if trainer.state.fn == "fit":
            result = self._averaged(result)
        for earlier in self._earlier:  # a file from another program may not name its model
            if earlier.model and earlier.model != result.model:
                raise ConfigError(
                    f"average_with: must be measurements of the same model, {result.model!r}, "
                    f"found {earlier.model!r}"
                )
        self.result = AffinityResult.mean([*self._earlier, result])
        self._publish(trainer, pl_module, self.result)

    def state_dict(self) -> dict[str, Any]:
        """The dot products of the validations so far."""
        return {"half_dots": list(self._half_dots)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the average."""
        self._half_dots = list(state_dict["half_dots"])

    def _measure(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> AffinityResult:
        process = pl_module.process
        folder = None
        if self.resume_dir is not None:
            # Finished gradients are valid for one set of weights: one folder for each step.
            folder = Path(self.resume_dir) / f"step_{steps_of(trainer, pl_module)}"
        with (
            self.fixed_loss(trainer, pl_module) as loss,
            progress_of(trainer, "timesteps for the task affinity") as shown,
        ):
            result = task_affinity(
                loss.at_timestep,
                parameters=pl_module.backbone.parameters(),
                num_timesteps=process.num_timesteps,
                timesteps=self.timesteps
                or timestep_grid(process.num_timesteps, num_points=self.num_points),
                log_snr=process.log_snr,
                sketch_dim=self.sketch_dim,
                memory_budget_mb=self.memory_budget_mb,
                resume_dir=folder,
                seed=self.seed_of(pl_module),
                model=f"{type(pl_module.backbone).__name__}, {self.weights} weights",
                warn_below=-1,  # `_publish` warns about the average instead
                on_progress=shown.show,
            )
        trainer.strategy.barrier()  # other ranks may still read the folder that rank 0 deletes
        if folder is not None and trainer.is_global_zero:
            shutil.rmtree(folder)
        return result

    def _averaged(self, result: AffinityResult) -> AffinityResult:
        """The average over all validations of this run."""
        if self._half_dots and self._half_dots[0].shape != result.half_dots.shape:
            raise ConfigError(
                "timesteps: must be the grid of the checkpoint, which has "
                f"{self._half_dots[0].shape[-1]} timesteps, found {len(result.timesteps)}"
            )
        # Dot products are kept, not cosines: reliability and correction need them.
        self._half_dots.append(result.half_dots)
        return replace(result, half_dots=torch.cat(self._half_dots))

    def _publish(
        self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, result: AffinityResult
    ) -> None:
        """Write the file, draw the figures and log the numbers."""
        numbers = {"affinity/lowest_reliability": float(result.reliability.min())}
        timesteps = torch.tensor(result.timesteps, dtype=torch.float64)
        for axis, positions in (("timestep", timesteps), ("log_snr", result.grid_log_snr)):
            # Two timesteps are one pair, which has no rank correlation.
            if positions is not None and len(timesteps) > 2:
                correlation = distance_correlation(result.plain, positions)
                numbers[f"affinity/spearman_{axis}"] = correlation.estimate
        pl_module.log_dict(numbers, rank_zero_only=True)
        if not trainer.is_global_zero:
            return
        message = result.reliability_warning()
        if message is not None:
            _log.warning("task affinity: %s", message)
        result.save(log_folder(trainer) / "task_affinity.safetensors")
        time = TimeAxis.of(pl_module.process)
        for axis in NOISE_AXES:
            explain = "Red: the two timesteps want the same change of the weights. Blue: conflict."
            figure = affinity_heat_maps(result, axis=axis, time=time)
            save_figure(trainer, figure, tag=f"5_affinity/by_{axis}", explain=explain)
        if len(timesteps) > 1:
            explain = "If it falls, tasks should be intervals of neighbouring timesteps."
            figure = affinity_curves(result, time=time)
            save_figure(trainer, figure, tag="5_affinity/by_distance", explain=explain)
