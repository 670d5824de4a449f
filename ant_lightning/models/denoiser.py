"""What a diffusion model is outside its training: losses of held-out images, and sampling."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import lightning as L
import torch

from ant_lightning.balancing.reduction import default_reduction
from ant_lightning.balancing.vmap import note
from ant_lightning.data.batch import check_batch
from ant_lightning.diffusion.guidance import GuidedDenoiser
from ant_lightning.diffusion.losses import denoising_loss
from ant_lightning.errors import ConfigError
from ant_lightning.models.image_requests import as_indices, as_labels
from ant_lightning.models.latents import holds_moments, sample_latents
from ant_lightning.models.loadable import LoadableModule
from ant_lightning.models.protocol import check_output
from ant_lightning.randomness import ImageNoise
from ant_lightning.runtime.csv_rows import keep_csv_rows
from ant_lightning.runtime.peers import PeerWatch
from ant_lightning.runtime.sharding import gather_for_evaluation, reshard, shard_backbone

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor, nn

    from ant_lightning.data.batch import Batch
    from ant_lightning.data.latents.space import LatentSpace
    from ant_lightning.diffusion.process import DiscreteDiffusion
    from ant_lightning.diffusion.samplers.base import Sampler
    from ant_lightning.models.first_stage.first_stage import FirstStage
    from ant_lightning.models.settings import Sampling, Tasks
    from ant_lightning.tasks.clusters import TimestepClusters

__all__ = ["DiffusionModule", "Draws"]


@dataclass(frozen=True)
class Draws:
    """What is random in the loss of a batch: `timesteps`, `tasks` and `labels` `[b]`, `noise`."""

    timesteps: Tensor
    tasks: Tensor
    noise: Tensor
    labels: Tensor | None


class DiffusionModule(LoadableModule):
    """A diffusion model that can be evaluated and sampled; `MultiTaskDiffusion` trains it.

    Attributes:
        backbone: The network, called as `backbone(x_t, timesteps, labels)`.
        process: Noise schedule and meaning of the network's output.
        clusters: The tasks that losses are reported for.
        sampler: How images are drawn from noise.
        guidance_scale: Classifier-free guidance; 1 is none.
        sampling: How images are drawn from noise.
        first_stage: Autoencoder whose latents are denoised; None for pixels or cached latents.
        latent_space: Meaning of the latents; None for pixels.
        seed: Seed of everything that is drawn.
    """

    backbone: nn.Module
    process: DiscreteDiffusion
    clusters: TimestepClusters
    sampler: Sampler
    guidance_scale: float
    sampling: Sampling
    tasks: Tasks
    first_stage: FirstStage | None
    latent_space: LatentSpace | None
    seed: int
    trained_steps: int
    _validation_sums: Tensor

    @property
    def num_tasks(self) -> int:
        """Number of timestep clusters."""
        return self.clusters.num_tasks

    @property
    def num_classes(self) -> int:
        """Classes the backbone is conditioned on; 0 for none."""
        return int(self.backbone.num_classes or 0)  # type: ignore[arg-type]

    @property
    def null_class(self) -> int | None:
        """The label that stands for no class; None if the backbone has none."""
        return getattr(self.backbone, "null_class", None)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(c, h, w)` of what is denoised."""
        size = int(self.backbone.input_size)  # type: ignore[arg-type]
        return int(self.backbone.in_channels), size, size  # type: ignore[arg-type]

    @property
    def clip_denoised(self) -> bool:
        """Whether predicted images are clipped while sampling."""
        chosen = self.sampling.clip_denoised
        return self.latent_space is None if chosen is None else chosen

    def configure_callbacks(self) -> list[L.Callback]:
        """What every run has, also without the command line."""
        keep_csv_rows(self.trainer)  # the last hook before Lightning makes the writer
        return [PeerWatch()]

    def configure_model(self) -> None:
        """Shard the backbone if the strategy is `ShardedStrategy`."""
        if self._trainer is not None:
            shard_backbone(self)

    def on_validation_start(self) -> None:
        """Ranks may have unequally many batches: have the whole backbone on each."""
        gather_for_evaluation(self)

    def on_validation_end(self) -> None:
        """Go back to shards."""
        reshard(self)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def losses(
        self, x_start: Tensor, draws: Draws, *, unweighted: Tensor | None = None
    ) -> Callable[[Tensor], Tensor]:
        """The function of rows of the batch that `multitask_backward` asks for.

        Args:
            x_start: `[b, c, h, w]`.
            draws: What is random.
            unweighted: `[b]`, filled with the mean squared errors without any weight.

        Raises:
            ConfigError: If `x_start` has another shape than the backbone takes.
        """
        if tuple(x_start.shape[1:]) != self.image_shape:
            raise ConfigError(
                f"batch.images: must be {list(self.image_shape)} each, as backbone says, "
                f"found {list(x_start.shape[1:])}"
            )
        # bf16-true casts batches: noise levels and targets need float32.
        x_start = x_start.to(torch.promote_types(x_start.dtype, torch.float32))
        x_t = self.process.q_sample(x_start, draws.timesteps, draws.noise)

        def losses_of(rows: Tensor) -> Tensor:
            rows = rows.to(x_t.device, non_blocking=True)
            timesteps = draws.timesteps[rows]
            labels = None if draws.labels is None else draws.labels[rows]
            output = self.denoise(x_t[rows], timesteps, labels)
            terms = denoising_loss(
                self.process,
                output,
                x_start[rows],
                x_t[rows],
                timesteps,
                draws.noise[rows],
                weights=self.process.loss_weights,
            )
            if unweighted is not None:
                note(unweighted, rows, terms.mse)
            return terms.loss

        return losses_of

    def denoise(self, x_t: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        """The backbone's output for states of any precision, computed in the backbone's own.

        Raises:
            ConfigError: If it is not one tensor of the right shape.
        """
        dtype = next(self.backbone.parameters()).dtype
        return check_output(self.backbone, self.backbone(x_t.to(dtype), timesteps, labels), x_t)

    def encode(self, batch: Batch, *, step: int | None = None) -> Tensor:
        """What is denoised: images, or latents with the noise of `step`, or of their indices."""
        return sample_latents(self, batch, step=step)

    def decode(self, x_start: Tensor) -> Tensor:
        """Images in [-1, 1] of what was denoised; latents stay such without a first stage."""
        if self.first_stage is not None:
            return self.first_stage.decode(x_start)
        return x_start.clamp(-1, 1) if self.latent_space is None else x_start

    def images_of(self, batch: Batch) -> Tensor:
        """The images of a batch in [-1, 1], decoded where it holds cached moments."""
        return self.decode(self.encode(batch)) if holds_moments(self, batch) else batch.images

    def on_validation_epoch_start(self) -> None:
        """Forget the sums of the last epoch."""
        self._validation_sums = torch.zeros(2, self.num_tasks, dtype=torch.float64)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Sum the unweighted losses of held-out images, each with noise of its own.

        The timesteps of images 0, 1, 2, ... are a golden-ratio sequence over 0 .. T-1, which covers
        the timesteps evenly however many images there are.

        Raises:
            ConfigError: If the loader does not give a `Batch` that fits the backbone.
        """
        check_batch(batch)
        steps = (batch.indices.cpu().double() * 0.6180339887498949) % 1
        timesteps = (steps * self.clusters.num_timesteps).long().to(self.device)
        tasks = self.clusters.task_of(timesteps).cpu()
        noise = ImageNoise(
            batch.indices.tolist(),
            shape=tuple(self.image_shape),
            seed=self.seed,
            stream="validation",
            device=self.device,
        )()
        labels = batch.labels if self.num_classes else None
        draws = Draws(timesteps, tasks, noise, labels)
        unweighted = torch.zeros(len(batch.images), device=self.device, dtype=torch.float32)
        rows = torch.arange(len(batch.images), device=self.device)
        self.losses(self.encode(batch), draws, unweighted=unweighted)(rows)
        values = torch.stack([unweighted.cpu().double(), torch.ones(len(rows)).double()])
        self._validation_sums.index_add_(1, tasks, values)

    def on_validation_epoch_end(self) -> None:
        """Log the mean loss over all timesteps and over those of each task."""
        sums = default_reduction().all_reduce_(self._validation_sums.to(self.device)).cpu()
        # Ranks agree already; Lightning wants to be told to average all the same.
        loss = (sums[0].sum() / sums[1].sum()).float()
        self.log("val/loss", loss, prog_bar=True, sync_dist=True)
        # Lightning uses this as the step of everything logged here. In an evaluation the trainer's
        # own count is 0 or belongs to another module.
        fitting = self.trainer.state.fn == "fit"
        step = self.global_step if fitting else self.trained_steps
        self.log("step", float(step), sync_dist=True)
        for task, value in enumerate((sums[0] / sums[1]).tolist()):
            self.log(f"val/task_{task}/loss", value, sync_dist=True)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step

    def on_test_epoch_end(self) -> None:
        """The same losses, for a test."""
        self.on_validation_epoch_end()

    @torch.no_grad()
    def sample(
        self,
        indices: int | Iterable[int] | Tensor,
        *,
        labels: int | Iterable[int] | Tensor | None = None,
        guidance_scale: float | None = None,
        sampler: Sampler | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Draw one image for each index, `[n, c, h, w]` in [-1, 1], with the weights as they are.

        The same index gives the same image whatever the batch it is drawn in, and whether the
        module is in training mode or not. Averaged weights are used if `EMA` is a callback of the
        trainer (`predict`), inside its `averaged`, or after `load_run`.

        Args:
            indices: Which images; a number `n` stands for the first `n`.
            labels: One for each image, or one for all; by default index modulo the number of
                classes.
            guidance_scale: In place of the module's.
            sampler: In place of the module's.
            seed: In place of the module's.

        Raises:
            ConfigError: If the indices, labels or guidance are none that the backbone can have.
        """
        indices = as_indices(indices)
        noise = self.image_noise(indices, seed=seed)
        denoiser = self.guided(indices, labels=labels, guidance_scale=guidance_scale)
        with _evaluating(self):
            x_start = (sampler or self.sampler).sample(
                self.process, denoiser, noise(), noise=noise, clip_denoised=self.clip_denoised
            )
        return self.decode(x_start)

    def image_noise(self, indices: Iterable[int], *, seed: int | None = None) -> ImageNoise:
        """The noise that the images of these indices are drawn from."""
        return ImageNoise(
            indices,
            shape=self.image_shape,
            seed=self.seed if seed is None else seed,
            device=self.device,
        )

    def guided(
        self,
        indices: Iterable[int],
        *,
        labels: int | Iterable[int] | Tensor | None = None,
        guidance_scale: float | None = None,
        denoise: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None,
    ) -> GuidedDenoiser:
        """The network as a sampler calls it for the images of these indices.

        Args:
            indices: Which images.
            labels: One for each image, or one for all; by default index modulo the number of
                classes.
            guidance_scale: In place of the module's.
            denoise: In place of the module's own.

        Raises:
            ConfigError: If the labels or the guidance are none that the backbone can have.
        """
        indices, classes, null = list(indices), self.num_classes, self.null_class
        if labels is None and classes:
            labels = [index % classes for index in indices]
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        if scale != 1.0 and null is None:
            raise ConfigError(
                f"guidance_scale: must be 1 because the backbone has no null class, found {scale}"
            )
        chosen = as_labels(labels, len(indices), num_classes=classes, null_class=null)
        return GuidedDenoiser(
            denoise or self.denoise,
            None if chosen is None else chosen.to(self.device),
            null_label=null,
            scale=scale,
            guided_channels=self.sampling.guided_channels,
        )

    def predict_step(self, batch: list[int] | Tensor, batch_idx: int) -> Tensor:
        """Draw the images with these indices; a rank may have none.

        Raises:
            ConfigError: If the batch is not a list of indices.
        """
        if isinstance(batch, int):  # which `sample` would take for a number of images
            raise ConfigError(f"predict: each batch must be a list of indices, found {batch}")
        if not len(batch):
            return torch.empty(0, *self.image_shape)
        return self.sample(batch)


@contextmanager
def _evaluating(module: L.LightningModule) -> Iterator[None]:
    """Context in which the module is in evaluation mode; restores the modes afterwards."""
    training = [each for each in module.modules() if each.training]
    module.eval()
    try:
        yield
    finally:
        for each in training:
            each.training = True
