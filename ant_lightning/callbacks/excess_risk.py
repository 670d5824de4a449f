"""How far a model is from the best possible one, where that is known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ant_lightning.callbacks.base import RunCallback, steps_of
from ant_lightning.callbacks.figures import append_row
from ant_lightning.data.digits_mixture import DigitsMixtureData
from ant_lightning.errors import ConfigError, check_at_least
from ant_lightning.models.draws import on_device
from ant_lightning.randomness import keyed_generator
from ant_lightning.tasks.clusterings import Clustering, SNRClustering

if TYPE_CHECKING:
    from collections.abc import Sequence

    import lightning as L
    from torch import Tensor

    from ant_lightning.models.module import MultiTaskDiffusion


class ExcessRisk(RunCallback):
    """Measures `E|eps_theta(x_t, t) - E[eps | x_t]|²` of each cluster, per pixel, in validation.

    The risk is the mean squared error of the predicted noise. It is the sum of the excess risk and
    the Bayes risk `E|E[eps | x_t] - eps|²`, the risk of the exact denoiser, which no model can go
    below. So training can change the excess risk only, which is 0 for the exact denoiser.
    Predictions of x_start or v are converted to eps. Images, timesteps and noise depend on `seed`
    alone: all models are measured on the same ones, which makes their differences less noisy.

    Logged as `val/excess_risk` (mean over timesteps) and `val/task_i/excess_risk`; appended to
    `excess_risk.jsonl` in the log folder with risk and Bayes risk, clusters, and the excess risk of
    25 equal intervals of timesteps.

    Args:
        images_per_timestep: Images of each timestep.
        clustering: Clusters to report, whatever the model was trained with; by default 5 clusters
            of log-SNR.
        batch_size: Images in one forward pass.
        seed: Seed of images and noise; does not depend on the seed of the run.

    Raises:
        ConfigError: If a number is below 1, or the data's exact denoiser is not known.

    Examples:
        >>> import lightning as L
        >>> from ant_lightning import ExcessRisk, SNRClustering
        >>> risk = ExcessRisk(images_per_timestep=4, clustering=SNRClustering(num_tasks=3))
        >>> trainer = L.Trainer(callbacks=[risk], logger=False)  # with DigitsMixtureData
        >>> trainer.callbacks[0].images_per_timestep
        4
    """

    def __init__(
        self,
        *,
        images_per_timestep: int = 8,
        clustering: Clustering | None = None,
        batch_size: int = 500,
        seed: int = 0,
    ) -> None:
        check_at_least(1, images_per_timestep=images_per_timestep, batch_size=batch_size)
        super().__init__()
        self.images_per_timestep = images_per_timestep
        self.clustering = clustering or SNRClustering()
        self.batch_size = batch_size
        self.seed = seed
        self._draws: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def setup(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, stage: str) -> None:
        """Forget the draws: the next call may have another data module or process."""
        super().setup(trainer, pl_module, stage)
        self._draws = None

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Measure the weights that are validated: the averages."""
        if not trainer.sanity_checking:
            self._measure(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """As in validation."""
        self._measure(trainer, pl_module, "test")

    @torch.no_grad()
    def _measure(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, prefix: str) -> None:
        if self._draws is None:
            self._draws = self._fixed_draws(trainer, pl_module)
        timesteps, x_t, noise, exact = self._draws
        parts = zip(timesteps.split(self.batch_size), x_t.split(self.batch_size), strict=True)
        eps = torch.cat([self._eps(pl_module, *part) for part in parts])
        # [3, n] by image: excess risk, risk, Bayes risk.
        errors = torch.stack([eps - exact, eps - noise, exact - noise])
        values = errors.square().flatten(2).mean(2)
        process = pl_module.process
        clusters = self.clustering.with_density(process.density)(process.log_snr)
        by_task = [each.mean(1) for each in _split(values, timesteps, clusters.boundaries)]
        edges = torch.linspace(0, clusters.num_timesteps, 26).round().int().tolist()
        step = steps_of(trainer, pl_module)
        names = ("excess", "risk", "bayes")
        row: dict[str, Any] = {
            "stage": prefix,
            "step": step,
            "images": step * trainer.datamodule.batch_size,  # type: ignore[attr-defined]
            "num_draws": len(timesteps),
            "seed": self.seed,
            "boundaries": list(clusters.boundaries),
            "mean": dict(zip(names, values.mean(1).tolist(), strict=True)),
            "tasks": dict(zip(names, torch.stack(by_task, dim=1).tolist(), strict=True)),
            "bins": [float(each[0].mean()) for each in _split(values, timesteps, edges)],
        }
        logs = {f"{prefix}/excess_risk": row["mean"]["excess"]}
        for task, excess in enumerate(row["tasks"]["excess"]):
            logs[f"{prefix}/task_{task}/excess_risk"] = excess
        pl_module.log_dict(logs, rank_zero_only=True)
        append_row(trainer, "excess_risk.jsonl", row)

    def _fixed_draws(
        self, trainer: L.Trainer, pl_module: MultiTaskDiffusion
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Timesteps `[n]`, and `x_t`, noise and `E[eps | x_t]` `[n, c, h, w]` in float64."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, DigitsMixtureData):
            raise ConfigError(
                "data: must be DigitsMixtureData for ExcessRisk, which needs the exact denoiser, "
                f"found {type(data).__name__}"
            )
        process = pl_module.process
        timesteps = torch.arange(process.num_timesteps).repeat_interleave(self.images_per_timestep)
        generator = keyed_generator(self.seed, "excess risk")
        x_start, _ = data.mixture.draw(len(timesteps), generator=generator)
        noise = torch.randn(x_start.shape, generator=generator, dtype=torch.float64)
        times = process.times(timesteps)
        x_t = process.noised(x_start, noise, times)
        at = process.levels(x_t, times)
        a, s = at.a[:, 0], at.s[:, 0]
        levels = zip(*(each.split(self.batch_size) for each in (x_t, a, s)), strict=True)
        exact = torch.cat([data.mixture.denoise(x, a=a_, s=s_) for x, a_, s_ in levels])
        shape = (-1, *pl_module.image_shape)
        return timesteps, x_t.view(shape), noise.view(shape), exact.view(shape)

    def _eps(self, pl_module: MultiTaskDiffusion, timesteps: Tensor, x_t: Tensor) -> Tensor:
        """The model's prediction of the noise, float64 on the CPU."""
        device, process = pl_module.device, pl_module.process
        times = process.times(timesteps)
        output = pl_module.denoise(x_t.float().to(device), on_device(times, device), None)
        prediction, _ = process.split_output(output, x_t.shape[1])
        # Converted in float64: a prediction of x_start is divided by a small noise level.
        return process.to_eps(prediction.cpu().double(), x_t, times)


def _split(values: Tensor, timesteps: Tensor, edges: Sequence[int]) -> list[Tensor]:
    """Columns of `values` by the interval of their (sorted) timesteps."""
    stops = torch.searchsorted(timesteps, torch.tensor(edges))
    return list(values.tensor_split(stops[1:-1].tolist(), dim=1))
