"""A small KL autoencoder on a user's own images, so that latent diffusion works from nothing."""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable

from ant_lightning.data.module import image_data
from ant_lightning.errors import ConfigError, NonFiniteError, check_at_least, check_range
from ant_lightning.files.torch_file import not_finite
from ant_lightning.models.base import BaseModule
from ant_lightning.models.draws import step_noise
from ant_lightning.models.old_checkpoints import upgrade
from ant_lightning.models.optimizers import OptimizerFactory
from ant_lightning.models.resumed_settings import OptimizerSettings
from ant_lightning.models.settings import Optimization
from ant_lightning.runtime.run_record import run_folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from torch import Tensor
    from torch.optim import Optimizer

    from ant_lightning.data.batch import Batch


@runtime_checkable
class _Averages(Protocol):
    """A callback that can lend the averaged weights: `EMA`, which this layer may not import."""

    def averaged(self, pl_module: L.LightningModule) -> AbstractContextManager[None]: ...


class AutoencoderModule(BaseModule):
    """Trains an `AutoencoderKL` of diffusers on `E|x - D(z)|^p + w KL(q(z|x) || N(0, 1))`.

    Both terms are means: over the values of an image, and over the values of a latent. When `fit`
    ends, the averaged weights are written to `export` as a folder that `FirstStage` and diffusers
    load, with the scale `1 / std(z)` and the shift `mean(z)` of the held-out images' latents. Only
    an export with finite weights replaces an earlier one; `fast_dev_run` exports nothing.

    Args:
        in_channels: Channels of the images.
        latent_channels: Channels of the latents.
        widths: Channels of each resolution, highest first; each further one halves the size.
        layers_per_block: Residual blocks of a resolution.
        norm_num_groups: Groups of the group norms; must divide every width.
        reconstruction: `l1` or `l2`.
        kl_weight: Weight `w` of the KL divergence.
        optimizer: Makes the optimizer from the parameters; default AdamW, learning rate 1e-3.
        clip_grad_norm: Largest norm of the gradient; `None` for no clipping.
        export: Folder that `fit` writes; by default `first_stage` in the log folder.
        seed: Seed of the posterior's noise.

    Raises:
        ConfigError: If a setting is out of range, or the images do not fit.
        NonFiniteError: If a logged loss is not finite, or what would be exported is not.

    Reference:
        Rombach et al., arXiv 2112.10752, section 3.1, without its perceptual and adversarial
        losses, which need a network trained elsewhere.

    Examples:
        >>> import torch
        >>> from ant_lightning import AutoencoderModule
        >>> module = AutoencoderModule(in_channels=1, latent_channels=2, widths=(16, 16))
        >>> module.backbone.encode(torch.zeros(3, 1, 8, 8)).latent_dist.mean.shape
        torch.Size([3, 2, 4, 4])
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        latent_channels: int = 4,
        widths: tuple[int, ...] = (32, 64),
        layers_per_block: int = 1,
        norm_num_groups: int = 16,
        reconstruction: Literal["l1", "l2"] = "l1",
        kl_weight: float = 1e-4,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(
            parameters, lr=1e-3, weight_decay=0.0
        ),
        clip_grad_norm: float | None = 1.0,
        export: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # With one resolution the latents have the size of the images, which `FirstStage` refuses.
        if len(widths) < 2:
            raise ConfigError(f"widths: must be at least two resolutions, found {list(widths)}")
        if any(width < 1 or width % norm_num_groups for width in widths):
            raise ConfigError(
                f"widths: each must be a multiple of norm_num_groups = {norm_num_groups}, "
                f"found {list(widths)}"
            )
        check_range(1, 64, layers_per_block=layers_per_block)
        check_at_least(0, kl_weight=kl_weight)
        from diffusers import AutoencoderKL  # noqa: PLC0415 - 5 s that only first stages need

        # `EMA` and our checkpoints look for the network under the name `backbone`.
        self.backbone = AutoencoderKL(
            in_channels=in_channels,
            out_channels=in_channels,
            latent_channels=latent_channels,
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
        )
        self.reconstruction = reconstruction
        self.kl_weight = kl_weight
        self.optimization = Optimization(optimizer, clip_grad_norm=clip_grad_norm)
        self.optimizer_factory = OptimizerFactory(self.optimization)
        self.export = export
        self.seed = seed
        self.factor = 2 ** (len(widths) - 1)  # of the size: each width after the first halves it
        self.last_step_skipped = False  # read by `EMA` after every step

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's own loose type
        """All parameters in one group."""
        return self.optimizer_factory.make(self.backbone.parameters())[0]

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clip as the module says; `setup` refuses the Trainer's flag."""
        self.clip_gradients(optimizer, self.optimization.clip_grad_norm, "norm")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the optimizer's settings, to compare them when the run is resumed."""
        state = {"optimization": OptimizerSettings(self.optimizer_factory).described()}
        checkpoint.setdefault("ant_lightning", {}).update(state)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the weights of another model; apply the settings of this run."""
        self.use_own_names(checkpoint)
        upgrade(checkpoint)
        self.check_weights(checkpoint)
        if self.is_training_run:
            stored = checkpoint.get("ant_lightning", {}).get("optimization")
            OptimizerSettings(self.optimizer_factory).resume(self.trainer, checkpoint, stored)

    def setup(self, stage: str) -> None:
        """Refuse images that do not fit, and Trainer settings that would be ignored or misapplied.

        Raises:
            ConfigError: Names the setting, the rule and the value found.
        """
        trainer: Any = self.trainer
        data = image_data(trainer)
        if stage == "predict":
            raise ConfigError(
                "predict: an AutoencoderModule draws no images; use its export as the "
                "model.first_stage of a model that does"
            )
        if stage == "fit" and trainer.accumulate_grad_batches != 1:
            raise ConfigError(
                "trainer.accumulate_grad_batches: must be 1, because the noise of a step is that "
                "of one batch; use a larger data.batch_size, found "
                f"{trainer.accumulate_grad_batches}"
            )
        if stage == "fit" and trainer.gradient_clip_val is not None:
            raise ConfigError(
                "trainer.gradient_clip_val: must be left out; use clip_grad_norm in its "
                f"place, found {trainer.gradient_clip_val}"
            )
        if stage == "fit" and data is None and self.export is not None:
            raise ConfigError(
                "export: must be None without an ant_lightning.ImageDataModule, whose held-out "
                f"images give the scale of the latents, found {self.export}"
            )
        if data is not None:
            channels, height, width = data.image_shape
            ours = self.backbone.config.in_channels
            if channels != ours or height % self.factor or width % self.factor:
                raise ConfigError(
                    f"in_channels: the autoencoder takes {ours} channels and sides that are "
                    f"multiples of {self.factor}, found images of {tuple(data.image_shape)}"
                )

    def losses(self, images: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean reconstruction error and mean KL divergence; `noise=None` decodes the means."""
        posterior = self.backbone.encode(images).latent_dist
        z = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        error = self.backbone.decode(z).sample - images
        size = error.abs() if self.reconstruction == "l1" else error.square()
        # KL(N(mu, s^2) || N(0, 1)) = (mu^2 + s^2 - 1 - log s^2) / 2 for each latent value.
        divergence = posterior.mean.square() + posterior.var - 1 - posterior.logvar
        return size.mean(), 0.5 * divergence.mean()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The weighted sum of the two terms; noise depends on seed, step and place in the batch."""
        self.check_images(batch)
        b, _, height, width = batch.images.shape
        channels, rank = self.backbone.config.latent_channels, self.trainer.global_rank
        shape = channels, height // self.factor, width // self.factor
        mine = slice(rank * b, (rank + 1) * b)  # this rank's part of the global batch
        noise = step_noise(
            mine, shape, self.seed, self.global_step, self.device, stream="posterior"
        )
        error, divergence = self.losses(batch.images, noise)
        loss = error + self.kl_weight * divergence
        self.log_dict({"train/reconstruction": error, "train/kl": divergence})
        self.log("train/loss", loss, prog_bar=True)
        # A loss that is not finite turns every weight into NaN for good. The check waits for the
        # device, so it is made only in steps in which logging waits anyway.
        if self.log_due and not bool(loss.isfinite()):
            raise NonFiniteError(
                f"the loss of step {self.global_step} is {loss.item()}, so the autoencoder has "
                "diverged; a lower learning rate or clip_grad_norm may help"
            )
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log both terms on held-out images, from the posterior's means."""
        self.check_images(batch)
        error, divergence = self.losses(batch.images, None)
        stage, size = self.stage, len(batch.images)
        self.log(f"{stage}/reconstruction", error, batch_size=size, sync_dist=True, prog_bar=True)
        self.log(f"{stage}/kl", divergence, batch_size=size, sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch: object, batch_idx: int) -> None:
        """Refused in `setup`; without this method Lightning would report a missing `forward`."""

    def on_fit_end(self) -> None:
        """Measure the latents and write the folder that `FirstStage` loads."""
        trainer: Any = self.trainer
        data = image_data(trainer)
        # On every rank, and so before the return below: `run_folder` may broadcast.
        folder = Path(self.export or run_folder(trainer) / "first_stage")
        if data is None or not trainer.is_global_zero or trainer.fast_dev_run:
            return
        ema = next((c for c in trainer.callbacks if isinstance(c, _Averages)), None)
        with nullcontext() if ema is None else ema.averaged(self):
            scale, shift = self.latent_scale(data.held_out_images.load, len(data.held_out_images))
            # The scale as well: it is infinite if all latents are equal.
            numbers = {**self.backbone.state_dict(), "its scale": torch.tensor([scale, shift])}
            if bad := not_finite(numbers):
                raise NonFiniteError(
                    f"export: {folder} stays as it was, as the autoencoder has diverged: "
                    f"{len(bad)} of its tensors are not finite, the first is {bad[0]}"
                )
            self.backbone.register_to_config(scaling_factor=scale, shift_factor=shift)
            _replace_folder(folder, self.backbone.save_pretrained)
        print(f"first stage {folder}: scale {scale:.4f}, shift {shift:.4f}")

    @torch.no_grad()
    def latent_scale(self, load: Any, count: int) -> tuple[float, float]:  # noqa: ANN401
        """`1 / std(z)` and `mean(z)` over all values in the latents of at most 1,024 images."""
        parts = []
        for rows in torch.arange(min(count, 1024)).split(64):
            images = load(rows.tolist(), epoch=None).images.to(self.device, self.dtype)
            parts.append(self.backbone.encode(images).latent_dist.mean.double().flatten())
        z = torch.cat(parts)
        return float(1 / z.std()), float(z.mean())

    def child_state(self, trainer: L.Trainer) -> dict[str, Any]:
        """In a child process: the measured scale of the latents."""
        config = self.backbone.config
        return {name: config[name] for name in ("scaling_factor", "shift_factor")}

    def load_child_state(self, state: dict[str, Any], pl_module: L.LightningModule) -> None:
        """In the parent: take over the scale that belongs to the weights."""
        self.backbone.register_to_config(**state)


def _replace_folder(folder: Path, save: Callable[[Path], object]) -> None:
    """Let `save` write files beside a folder, then move them in, `config.json` last.

    A folder without `config.json` is not a valid first stage. So a kill at any time leaves the old
    first stage, none, or the new one, and never the weights of one with the scale of another.
    """
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        save(unfinished)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)
        for file in sorted(unfinished.iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
