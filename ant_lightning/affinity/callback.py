"""Task affinity of a model while it trains, or of a checkpoint: file, figures, numbers."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from tqdm import tqdm

from ant_lightning.affinity.curves import distance_correlation
from ant_lightning.affinity.estimate import task_affinity
from ant_lightning.affinity.figure import affinity_curves, affinity_heat_maps
from ant_lightning.affinity.grid import timestep_grid
from ant_lightning.affinity.halves import NonFiniteGradientError
from ant_lightning.affinity.probing import ValidationProbe
from ant_lightning.affinity.result import AffinityResult
from ant_lightning.callbacks.base import steps_of
from ant_lightning.callbacks.figures import log_folder, save_figure
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    import lightning as L
    from torch import Tensor

    from ant_lightning.models.module import MultiTaskDiffusion

__all__ = ["TaskAffinity"]

_log = logging.getLogger(__name__)


class TaskAffinity(ValidationProbe):
    """Measures how well the gradients at different timesteps agree, at the end of a validation.

    In `fit` the cosines are averaged over the validations so far (a resumed run goes on with
    them), in `validate` they are those of the checkpoint. Written to `task_affinity.npz` in the
    log folder, which `GradientClustering` reads; figures go to TensorBoard and to PNG files.

    Args:
        num_points: Timesteps of the grid, evenly spread.
        timesteps: The grid itself, increasing, in place of `num_points`.
        num_images: Images for each timestep, in two disjoint halves.
        batch_size: Most images in one forward pass.
        weights: Of which weights: `ema` or `live`.
        images: From which images: those that are trained on (`train`) or `held_out`.
        sketch_dim: Keep gradients as projections to so many numbers, a power of two; for models
            whose gradients fit neither memory nor disk.
        memory_budget_mb: For gradients in memory on each rank; more than that goes to disk.
        state_dir: Folder in which finished timesteps are kept until the end, so that a run that
            was killed goes on from there.
        average_with: Files of earlier measurements that are averaged in, one per checkpoint.
        every_n_epochs: Validations of `fit` between two measurements.
        seed: Of images, noise and sketch; by default that of the module.

    Raises:
        ConfigError: If a number is out of range.

    Reference:
        Go et al., "Addressing Negative Transfer in Diffusion Models", section 3, arXiv 2306.00354.
    """

    result: AffinityResult | None
    _half_dots: list[Tensor]
    of_run: ClassVar = {"result": NoneType, "_half_dots": list}

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
        state_dir: str | None = None,
        average_with: list[str] | None = None,
        every_n_epochs: int = 1,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            every_n_epochs=every_n_epochs,
            num_images=num_images,
            batch_size=batch_size,
            images=images,
            weights=weights,
            seed=seed,
        )
        if num_points < 1:
            raise ConfigError(f"TaskAffinity.num_points: must be at least 1, found {num_points}")
        self.num_points = num_points
        self.timesteps = timesteps
        self.sketch_dim = sketch_dim
        self.memory_budget_mb = memory_budget_mb
        self.state_dir = state_dir
        self._earlier = [AffinityResult.load(path) for path in average_with or []]

    def measure(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Measure and publish; what is not finite stops an evaluation, but not a training."""
        try:
            result = self._measured(trainer, pl_module)
        except NonFiniteGradientError as error:
            if error.partial is not None and trainer.is_global_zero:
                path = log_folder(trainer) / "task_affinity_partial.npz"
                error.partial.save(path)
                _log.warning("what was measured before is kept in %s", path)
            if trainer.state.fn != "fit":
                raise
            _log.warning("task affinity is left out at step %d: %s", trainer.global_step, error)
            return
        if trainer.state.fn == "fit":
            result = self._averaged(result)
        for earlier in self._earlier:
            if earlier.model and earlier.model != result.model:
                raise ConfigError(
                    "TaskAffinity.average_with: must be of the same model, "
                    f"{result.model!r}, found {earlier.model!r}"
                )
        self.result = AffinityResult.mean([*self._earlier, result])
        self._publish(trainer, pl_module, self.result)

    def state_dict(self) -> dict[str, Any]:
        """The dot products of the validations so far."""
        return {"half_dots": list(self._half_dots)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on averaging."""
        self._half_dots = list(state_dict["half_dots"])

    def _measured(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> AffinityResult:
        num_timesteps = pl_module.process.num_timesteps
        state = None
        if self.state_dir is not None:
            state = Path(self.state_dir) / f"step_{steps_of(trainer, pl_module)}"
        budget = None if self.memory_budget_mb is None else int(2**20 * self.memory_budget_mb)
        hidden = not trainer.is_global_zero or trainer.progress_bar_callback is None
        with (
            self.probing(trainer, pl_module) as probe,
            tqdm(
                desc="task affinity", unit=" timesteps", leave=False, disable=hidden or None
            ) as bar,
        ):

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            result = task_affinity(
                probe.at_timestep,
                parameters=pl_module.backbone.parameters(),
                num_timesteps=num_timesteps,
                timesteps=self.timesteps
                or timestep_grid(num_timesteps, num_points=self.num_points),
                log_snr=pl_module.process.log_snr,
                sketch_dim=self.sketch_dim,
                memory_budget_bytes=budget,
                state_path=state,
                seed=self.seed_of(pl_module),
                model=f"{type(pl_module.backbone).__name__}, {self.weights} weights",
                warn_below=-1,
                on_progress=show,
            )
        trainer.strategy.barrier()
        if state is not None and trainer.is_global_zero:
            shutil.rmtree(state)
        return result

    def _averaged(self, result: AffinityResult) -> AffinityResult:
        """The result over all validations of this run."""
        if self._half_dots and self._half_dots[0].shape != result.half_dots.shape:
            raise ConfigError(
                "TaskAffinity: the grid must be that of the checkpoint, which has "
                f"{self._half_dots[0].shape[-1]} timesteps, found {len(result.timesteps)}"
            )
        self._half_dots.append(result.half_dots)
        return replace(result, half_dots=torch.cat(self._half_dots))

    def _publish(
        self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, result: AffinityResult
    ) -> None:
        """File, figures and numbers."""
        numbers = {"affinity/lowest_reliability": float(result.reliability.min())}
        steps = torch.tensor(result.timesteps, dtype=torch.float64)
        for name, positions in (("timestep", steps), ("log_snr", result.grid_log_snr)):
            if positions is not None and len(result.timesteps) > 2:
                rank = distance_correlation(result.plain, positions)
                numbers[f"affinity/spearman_{name}"] = rank.estimate
        pl_module.log_dict(numbers, rank_zero_only=True)
        if not trainer.is_global_zero:
            return
        message = result.reliability_warning()
        if message is not None:
            _log.warning("task affinity: %s", message)
        result.save(log_folder(trainer) / "task_affinity.npz")
        for axis in ("timestep", "log_snr"):
            figure = affinity_heat_maps(result, axis=axis)  # type: ignore[arg-type]
            explain = "Red: the two timesteps want the same change of the weights. Blue: conflict."
            save_figure(trainer, figure, tag=f"5_affinity/by_{axis}", explain=explain)
        if len(result.timesteps) > 1:
            explain = "If it falls, tasks should be intervals of neighbouring timesteps."
            figure = affinity_curves(result)
            save_figure(trainer, figure, tag="5_affinity/by_distance", explain=explain)
