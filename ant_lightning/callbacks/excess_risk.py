"""How far a model is from the best possible one, where that is known."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from ant_lightning.callbacks.base import RunCallback, steps_of
from ant_lightning.callbacks.figures import log_folder
from ant_lightning.data.digits_mixture import DigitsMixtureData
from ant_lightning.errors import ConfigError
from ant_lightning.randomness import keyed_generator
from ant_lightning.tasks.clusterings import Clustering, SNRClustering

if TYPE_CHECKING:
    import lightning as L
    from torch import Tensor

    from ant_lightning.models.module import MultiTaskDiffusion

__all__ = ["ExcessRisk"]


class ExcessRisk(RunCallback):
    """Measures `E|eps_theta(x_t, t) - E[eps | x_t]|²` of each cluster, per pixel, in validation.

    The mean squared error of the noise, the risk, is the excess risk plus the Bayes risk
    `E|E[eps | x_t] - eps|²` of the exact denoiser, which no model can go below; so the excess risk
    is all that training can change, and is 0 for the exact denoiser. Predictions of x_start or v
    are converted to eps. Images, timesteps and noise depend on `seed` alone: they are the same for
    every model and method, and the differences between methods are that much sharper.

    Logged as `val/excess_risk` (mean over timesteps) and `val/task_i/excess_risk`; appended to
    `excess_risk.jsonl` in the log folder with risk and Bayes risk, clusters, and the excess risk of
    25 equal intervals of timesteps.

    Args:
        images_per_timestep: Images of each timestep.
        clustering: Clusters to report, whatever the model is trained on; 5 of log-SNR by default.
        batch_size: Images in one forward pass.
        seed: Of images and noise; of the measurement, so not that of the run.

    Raises:
        ConfigError: If a number is below 1, or the data's exact denoiser is not known.
    """

    def __init__(
        self,
        *,
        images_per_timestep: int = 8,
        clustering: Clustering | None = None,
        batch_size: int = 500,
        seed: int = 0,
    ) -> None:
        if images_per_timestep < 1 or batch_size < 1:
            raise ConfigError(
                "ExcessRisk: images_per_timestep and batch_size must be at least 1, found "
                f"{images_per_timestep} and {batch_size}"
            )
        super().__init__()
        self.images_per_timestep = images_per_timestep
        self.clustering = clustering or SNRClustering()
        self.batch_size = batch_size
        self.seed = seed
        self._draws: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Draw again: the data and the process may differ from the last call."""
        super().setup(trainer, pl_module, stage)
        self._draws = None

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """Measure the weights that are validated: the averages."""
        if not trainer.sanity_checking:
            self._measure(trainer, pl_module, "val")

    @torch.no_grad()
    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion) -> None:
        """As in validation."""
        self._measure(trainer, pl_module, "test")

    def _measure(self, trainer: L.Trainer, pl_module: MultiTaskDiffusion, prefix: str) -> None:
        if self._draws is None:
            self._draws = self._fixed_draws(trainer, pl_module)
        timesteps, x_t, noise, exact = self._draws
        parts = zip(timesteps.split(self.batch_size), x_t.split(self.batch_size), strict=True)
        eps = torch.cat([self._eps(pl_module, *part) for part in parts])
        values = torch.stack(
            [_per_image(eps - exact), _per_image(eps - noise), _per_image(exact - noise)]
        )
        clusters = self.clustering(pl_module.process.log_snr)
        by_task = torch.stack([v.mean(1) for v in _split(values, timesteps, clusters.boundaries)])
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
            "tasks": dict(zip(names, by_task.mT.tolist(), strict=True)),
            "bins": [float(v[0].mean()) for v in _split(values, timesteps, edges)],
        }
        logs = {f"{prefix}/excess_risk": row["mean"]["excess"]}
        for task, excess in enumerate(row["tasks"]["excess"]):
            logs[f"{prefix}/task_{task}/excess_risk"] = excess
        pl_module.log_dict(logs, rank_zero_only=True)
        if trainer.is_global_zero:
            with (log_folder(trainer) / "excess_risk.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")

    def _fixed_draws(
        self, trainer: L.Trainer, pl_module: MultiTaskDiffusion
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Timesteps, x_t, noise and `E[eps | x_t]`, the last three float64."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, DigitsMixtureData):
            raise ConfigError(
                "ExcessRisk: needs data whose exact denoiser is known, DigitsMixtureData, found "
                f"{type(data).__name__}"
            )
        process = pl_module.process
        timesteps = torch.arange(process.num_timesteps).repeat_interleave(self.images_per_timestep)
        generator = keyed_generator(self.seed, "excess risk")
        x_start, _ = data.mixture.draw(len(timesteps), generator=generator)
        noise = torch.randn(x_start.shape, generator=generator, dtype=torch.float64)
        a = process.alphas_cumprod.sqrt()[timesteps]
        s = (1 - process.alphas_cumprod).sqrt()[timesteps]
        x_t = a[:, None] * x_start + s[:, None] * noise
        size = self.batch_size
        levels = zip(x_t.split(size), a.split(size), s.split(size), strict=True)
        exact = torch.cat([data.mixture.denoise(x, a=a_, s=s_) for x, a_, s_ in levels])
        shape = (-1, *pl_module.image_shape)
        return timesteps, x_t.view(shape), noise.view(shape), exact.view(shape)

    def _eps(self, pl_module: MultiTaskDiffusion, timesteps: Tensor, x_t: Tensor) -> Tensor:
        """The model's prediction of the noise, float64 on the CPU."""
        timesteps, process = timesteps.to(pl_module.device), pl_module.process
        output = pl_module.denoise(x_t.float().to(pl_module.device), timesteps, None)
        prediction, _ = process.split_output(output, x_t.shape[1])
        # Converted in float64: a prediction of x_start is divided by a small noise level.
        return process.to_eps(prediction.cpu().double(), x_t, timesteps.cpu())


def _per_image(errors: Tensor) -> Tensor:
    """Mean square over an image's pixels."""
    return errors.square().flatten(1).mean(1)


def _split(values: Tensor, timesteps: Tensor, edges: tuple[int, ...] | list[int]) -> list[Tensor]:
    """Columns of `values` by the interval of their (sorted) timesteps."""
    stops = torch.searchsorted(timesteps, torch.tensor(edges))
    return list(values.tensor_split(stops[1:-1].tolist(), dim=1))
