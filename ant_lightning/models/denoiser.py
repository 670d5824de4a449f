"""A diffusion model without its training step: validation losses and sampling."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from ant_lightning.backbones.diffusers import DiffusersBackbone, as_backbone
from ant_lightning.data.module import image_data
from ant_lightning.diffusion.condition import map_condition, rows_of
from ant_lightning.diffusion.flow import FlowMatching
from ant_lightning.diffusion.guidance import GuidedDenoiser
from ant_lightning.errors import ConfigError
from ant_lightning.models.backbone import (
    call_backbone,
    check_backbone,
    check_output_channels,
    size_of,
)
from ant_lightning.models.base import BaseModule
from ant_lightning.models.conditions import Conditions
from ant_lightning.models.draws import Draws, on_device, step_noise
from ant_lightning.models.guide import check_guidance, load_guide
from ant_lightning.models.image_codec import ImageCodec
from ant_lightning.models.requests import as_indices
from ant_lightning.models.task_means import TaskMeans
from ant_lightning.randomness import GOLDEN_RATIO, ImageNoise, run_seed
from ant_lightning.runtime.sharded_backbone import UnevenCalls, shard_backbone

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import Tensor

    from ant_lightning.data.batch import Batch
    from ant_lightning.data.latents.space import LatentSpace
    from ant_lightning.diffusion.condition import Condition
    from ant_lightning.diffusion.process import NoiseProcess
    from ant_lightning.diffusion.samplers.base import Sampler, SampleStep
    from ant_lightning.models.first_stage.first_stage import FirstStage
    from ant_lightning.models.settings import Sampling
    from ant_lightning.tasks.clusters import TimestepClusters


class DiffusionModule(BaseModule):
    """A diffusion model that can be evaluated and sampled; `MultiTaskDiffusion` trains it.

    Args:
        backbone: The network, called as `backbone(x_t, t, condition)`.
        process: How noise is added, what the network is given and what its output means.
        clusters: The tasks that losses are reported for.
        sampling: How images are drawn from noise.
        first_stage: Autoencoder whose latents are denoised; `None` for pixels or cached latents.
        seed: Seed of everything that is drawn; by default that of `seed_everything`.

    Attributes:
        latent_space: Meaning of the latents; `None` for pixels.
        trained_steps: Optimizer steps that trained the weights.
        uneven_calls: A context in which ranks may call a sharded backbone different numbers of
            times, under `ShardedStrategy`; every rank must enter it.

    Raises:
        ConfigError: If the backbone or the sampling do not fit the process.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        process: NoiseProcess,
        clusters: TimestepClusters,
        sampling: Sampling,
        first_stage: FirstStage | None,
        seed: int | None,
    ) -> None:
        super().__init__()
        backbone = as_backbone(backbone)
        check_backbone(backbone)
        self.backbone = backbone
        if isinstance(backbone, DiffusersBackbone) and isinstance(process, FlowMatching):
            process = process.with_convention("diffusers")
        # A shift of the density by resolution is fixed here, for the whole run.
        self.process = process.for_size(*self.image_shape[1:])
        self.conditions = Conditions(backbone)
        self.clusters = clusters
        self.sampling = sampling
        self.sampler = sampling.sampler_for(process)
        self.guidance_scale = sampling.guidance_scale
        self.first_stage = first_stage
        self.latent_space: LatentSpace | None = None if first_stage is None else first_stage.space
        self.seed = run_seed(seed)
        self.trained_steps = 0
        #: Classes of the images that `predict` draws, in turn; `None` for all.
        self.predict_classes: list[int] | None = None
        #: Called in `sample` after each step with images, step and number of steps.
        self.sampling_progress: Callable[[int, int, int], None] | None = None
        self.validation_losses = TaskMeans(clusters.num_tasks)
        self.uneven_calls = UnevenCalls(backbone, self._padding)
        check_output_channels(backbone, self.process)
        guide = load_guide(sampling, backbone, self.process)
        # In a tuple: the guide is no part of the model, and no checkpoint holds it.
        self._guides: tuple[nn.Module, ...] = () if guide is None else (guide,)
        check_guidance(sampling, self.conditions, guide, channels=self.image_shape[0])

    @property
    def guide(self) -> nn.Module | None:
        """The weaker network of autoguidance; `None` without one."""
        return self._guides[0] if self._guides else None

    @property
    def num_tasks(self) -> int:
        """Number of timestep clusters."""
        return self.clusters.num_tasks

    @property
    def num_classes(self) -> int:
        """Classes the backbone is conditioned on; 0 for none."""
        return self.conditions.num_classes

    @property
    def null_class(self) -> int | None:
        """The label that stands for no class; `None` if the backbone has none."""
        return self.conditions.null_class

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(c, h, w)` of what is denoised."""
        return int(self.backbone.in_channels), *size_of(self.backbone)

    @property
    def codec(self) -> ImageCodec:
        """Between the images of the data and what is denoised."""
        return ImageCodec(self.image_shape, self.latent_space, self.first_stage)

    @property
    def clip_denoised(self) -> bool:
        """Whether predicted images are clipped while sampling."""
        chosen = self.sampling.clip_denoised
        return self.latent_space is None if chosen is None else chosen

    def configure_model(self) -> None:
        """Shard the backbone if the strategy is `ShardedStrategy`."""
        if self._trainer is not None:
            shard_backbone(self.backbone, self.trainer)

    def setup(self, stage: str) -> None:
        """Compare the data with the backbone and the first stage."""
        self.uneven_calls.cancel()
        data: Any = image_data(self.trainer)
        if data is None:
            return
        if stage != "predict":
            self.latent_space = self.codec.space_of(data)
            self.conditions.check_classes(data)
        self.conditions.bind(data)

    def on_validation_start(self) -> None:
        """Let ranks have different numbers of batches; their last batch finishes it."""
        self.uneven_calls.begin()

    on_test_start = on_predict_start = on_validation_start

    def _padding(self) -> None:
        """A pass through the backbone for other ranks, see `uneven_calls`."""
        x_t = torch.zeros(1, *self.image_shape, device=self.device)
        cell = torch.zeros(1, dtype=torch.int64)
        labels = cell.to(self.device) if self.num_classes else None  # class 0
        condition = self.conditions.of_padding(labels, self.device)
        self.denoise(x_t, on_device(self.process.times(cell), self.device), condition)

    def losses(self, x_start: Tensor, draws: Draws) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Make the function `rows -> losses, mean squared errors` that `MultiTaskStep` calls.

        Both are `[len(rows)]`; the errors are float32, without any weight and without gradient.

        Args:
            x_start: Clean images or latents, `[b, c, h, w]`.
            draws: Timesteps, tasks, noise and condition of the batch.

        Raises:
            ConfigError: If the backbone takes another shape than that of `x_start`.
        """
        if tuple(x_start.shape[1:]) != self.image_shape:
            raise ConfigError(
                f"batch.images: must be {list(self.image_shape)} each, as backbone says, "
                f"found {list(x_start.shape[1:])}"
            )
        # bf16-true casts batches: noise levels and targets need float32.
        x_start = x_start.to(torch.promote_types(x_start.dtype, torch.float32))
        correction = draws.correction
        x_t = self.process.noised(x_start, draws.noise, draws.times)

        def losses_of(rows: Tensor) -> tuple[Tensor, Tensor]:
            rows = rows.to(x_t.device, non_blocking=True)  # no wait: the copy is queued
            times = draws.times[rows]
            condition = rows_of(draws.condition, rows)
            output = self.denoise(x_t[rows], times, condition)
            terms = self.process.losses(
                output, x_start=x_start[rows], x_t=x_t[rows], times=times, noise=draws.noise[rows]
            )
            loss = terms.loss if correction is None else terms.loss * correction[rows]
            return loss, terms.mse.detach().float()

        return losses_of

    def denoise(
        self,
        x_t: Tensor,
        times: Tensor,
        condition: Condition,
        *,
        network: nn.Module | None = None,
    ) -> Tensor:
        """The backbone's output for `x_t` of any precision, computed in the backbone's dtype.

        Args:
            x_t: The state of the process, before it is scaled for the network.
            times: The process' own times, `[b]`; the process makes the time input of them.
            condition: Classes `[b]`, named tensors `[b, ...]`, or `None`.
            network: Replaces the backbone.

        Raises:
            ConfigError: If a condition is missing, or the output is not one tensor of the right
                shape.
        """
        network = self.backbone if network is None else network
        dtype = next(network.parameters()).dtype
        x_in, told = self.process.network_inputs(x_t, times)
        return call_backbone(network, x_in.to(dtype), told, condition)

    def encode(self, batch: Batch, *, step: int | None = None) -> Tensor:
        """`x_start [b, c, h, w]`: the images, or latents sampled from the first stage's moments.

        The moments are encoded here, unless the batch holds cached ones. The noise of the latents
        depends on the training step `step`; without `step`, on the index of each image.

        Raises:
            ConfigError: If images must be encoded and there is no first stage.
        """
        if self.latent_space is None:
            return batch.images
        moments = self.codec.moments(batch.images)
        if step is None:
            noise = self.image_noise(batch.indices.tolist(), stream="posterior")()
        else:
            b, rank = len(moments), self.trainer.global_rank
            mine = slice(rank * b, (rank + 1) * b)  # this rank's part of the global batch
            noise = step_noise(
                mine, self.image_shape, self.seed, step, moments.device, stream="posterior"
            )
        return self.latent_space.sample(moments.float(), noise)

    def decode(self, x_start: Tensor) -> Tensor:
        """Images in [-1, 1] from `x_start`; latents stay latents without a first stage."""
        return self.codec.decode(x_start)

    def images_of(self, batch: Batch) -> Tensor:
        """The images of a batch in [-1, 1], decoded where it holds cached moments."""
        cached = self.codec.holds_moments(batch.images)
        return self.decode(self.encode(batch)) if cached else batch.images

    def takes_pixels(self, batch: Batch) -> bool:
        """Whether images are denoised or encoded; what sampling does not clip may be anything."""
        if self.latent_space is None:
            return self.clip_denoised
        return not self.codec.holds_moments(batch.images)

    def on_validation_epoch_start(self) -> None:
        """Forget the losses of the last epoch."""
        self.validation_losses.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Sum the unweighted losses of held-out images; each image has fixed noise.

        The cells of images 0, 1, 2, ... are a golden-ratio sequence over 0 .. T-1, which covers the
        noise axis evenly however many images there are. The times are the cells' centres: the loss
        does not depend on the density of training.

        Raises:
            ConfigError: If the loader does not give a `Batch` that fits the backbone.
        """
        self.check_images(batch)
        # Fixed draws: validation losses of two runs, or two steps, differ only through the weights.
        steps = (batch.indices.cpu().double() * GOLDEN_RATIO) % 1
        timesteps = (steps * self.clusters.num_timesteps).long()
        times = on_device(self.process.times(timesteps), self.device)
        timesteps = timesteps.to(self.device)
        tasks = self.clusters.task_of(timesteps)
        noise = self.image_noise(batch.indices.tolist(), stream="validation")()
        condition = self.conditions.of_batch(batch)
        draws = Draws(timesteps, times, tasks, noise, condition)
        rows = torch.arange(len(batch.images), device=self.device)
        _, mse = self.losses(self.encode(batch), draws)(rows)
        self.validation_losses.update(mse, tasks)
        self.uneven_calls.finish_after(self._trainer, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the mean loss over all cells of the noise axis, and over those of each task."""
        stage = self.stage
        loss, by_task = self.validation_losses.compute()
        # `compute` has summed over ranks; `sync_dist` only averages equal values, and keeps
        # Lightning from warning that it is missing.
        self.log(f"{stage}/loss", loss.float(), prog_bar=True, sync_dist=True)
        # Lightning uses this as the step of everything logged here. In an evaluation the trainer's
        # own count is 0 or belongs to another module.
        step = self.global_step if self.is_training_run else self.trained_steps
        self.log("step", float(step), sync_dist=True)
        for task, value in enumerate(by_task.tolist()):
            self.log(f"{stage}/task_{task}/loss", value, sync_dist=True)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step

    def on_test_epoch_end(self) -> None:
        """Log the losses of a test, `test/loss` and those of each task."""
        self.on_validation_epoch_end()

    @torch.no_grad()
    def sample(
        self,
        indices: int | Iterable[int] | Tensor,
        *,
        labels: int | Iterable[int] | Tensor | None = None,
        condition: Mapping[str, Tensor] | None = None,
        guidance_scale: float | None = None,
        sampler: Sampler | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Draw one image for each index, `[n, c, h, w]` in [-1, 1], with the weights as they are.

        An index gives the same image in any batch, and in training or evaluation mode. The weights
        are the averaged ones in `Trainer.predict` with an `EMA` callback, inside `EMA.averaged`,
        and after `load_run`. Under `ShardedStrategy` every rank must call this, with any number of
        images, or enter `uneven_calls`.

        Args:
            indices: Which images; a number `n` stands for the first `n`.
            labels: One for each image, or one for all; by default index modulo the number of
                classes.
            condition: Named tensors `[n, ...]` beside the labels; by default those of the held-out
                images of the data, index modulo their number.
            guidance_scale: Replaces the module's.
            sampler: Replaces the module's.
            seed: Replaces the module's.

        Raises:
            ConfigError: If the backbone does not support these indices, labels or guidance.
        """
        indices = as_indices(indices)
        noise = self.image_noise(indices, seed=seed)
        denoiser = self.guided(
            indices, labels=labels, condition=condition, guidance_scale=guidance_scale
        )
        with self.uneven_calls(), _evaluating(self):
            chosen = sampler or self.sampler
            shown = self.sampling_progress
            x_start = chosen.sample(
                self.process,
                denoiser,
                noise(),
                noise=noise,
                clip_denoised=self.clip_denoised,
                on_step=shown and partial(_show, shown, chosen.path_length(self.process)),
            )
        return self.decode(x_start)

    def image_noise(
        self, indices: Iterable[int], *, seed: int | None = None, stream: str = "sample"
    ) -> ImageNoise:
        """Noise of the images with these indices, keyed by seed, stream and index."""
        seed = self.seed if seed is None else seed
        shape, device = self.image_shape, self.device
        return ImageNoise(indices, shape=shape, seed=seed, stream=stream, device=device)

    def guided(
        self,
        indices: Iterable[int],
        *,
        labels: int | Iterable[int] | Tensor | None = None,
        condition: Mapping[str, Tensor] | None = None,
        guidance_scale: float | None = None,
        denoise: Callable[[Tensor, Tensor, Condition], Tensor] | None = None,
    ) -> GuidedDenoiser:
        """The denoiser that a sampler calls for the images with these indices.

        Args:
            indices: Which images.
            labels: One for each image, or one for all; by default index modulo the number of
                classes.
            condition: Named tensors `[n, ...]` beside the labels, as for `sample`.
            guidance_scale: Replaces the module's.
            denoise: Replaces the module's method `denoise`.

        Raises:
            ConfigError: If the backbone does not support these labels or this guidance.
        """
        indices = list(indices)
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        if scale != 1.0 and self.guide is None:
            self.conditions.check_null("guidance_scale", scale, neutral=1)
        told = self.conditions.of_images(indices, labels, condition)
        return GuidedDenoiser(
            denoise or self.denoise,
            map_condition(lambda each: each.to(self.device), told),
            null_label=self.conditions.null,
            scale=scale,
            guided_channels=self.sampling.guided_channels,
            guide=None if self.guide is None else self._guide_at,
            interval=self.sampling.guidance_interval,
            process=self.process,
        )

    def _guide_at(self, x_t: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The guide's output; a guide without classes is called without labels."""
        guide = self.guide
        assert guide is not None
        if not hasattr(guide, "null_condition") and not guide.num_classes:
            condition = None
        return self.denoise(x_t, times, condition, network=guide)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # The guide follows the module to its device and dtype.
        for guide in self._guides:
            guide._apply(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-any-return]

    def predict_step(self, batch: list[int] | Tensor, batch_idx: int) -> Tensor:
        """Draw the images with these indices; the list of a rank may be empty.

        Raises:
            ConfigError: If the batch is not a list of indices.
        """
        if isinstance(batch, int):  # which `sample` would take for a number of images
            raise ConfigError(f"predict: each batch must be a list of indices, found {batch}")
        classes = self.predict_classes
        labels = None if classes is None else [classes[int(i) % len(classes)] for i in batch]
        images = torch.empty(0, *self.image_shape)
        if len(batch):
            images = self.sample(batch, labels=labels)
        self.uneven_calls.finish_after(self._trainer, batch_idx)
        return images


def _show(shown: Callable[[int, int, int], None], num_steps: int, step: SampleStep) -> None:
    shown(len(step.x), step.index + 1, num_steps)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Put the module into evaluation mode; restore the modes afterwards."""
    training = [each for each in module.modules() if each.training]
    module.eval()
    try:
        yield
    finally:
        # `module.train()` would also wake parts that the user had put into evaluation mode.
        for each in training:
            each.training = True
