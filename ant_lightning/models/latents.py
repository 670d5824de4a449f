"""How a module meets its data: through a first stage, from cached moments, or as pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_only

from ant_lightning.backbones.checkpoints import load_official_checkpoint
from ant_lightning.data.latents.cache import check_first_stage
from ant_lightning.data.latents.space import LatentSpace
from ant_lightning.data.module import image_data
from ant_lightning.errors import ConfigError
from ant_lightning.models.draws import step_noise
from ant_lightning.randomness import ImageNoise

if TYPE_CHECKING:
    from torch import Tensor

    from ant_lightning.data.batch import Batch
    from ant_lightning.models.denoiser import DiffusionModule
    from ant_lightning.models.module import MultiTaskDiffusion

__all__ = [
    "bind_data",
    "holds_moments",
    "load_initial_weights",
    "restore_latent_space",
    "sample_latents",
]


def bind_data(module: MultiTaskDiffusion) -> None:
    """Take the meaning of cached moments from the data, and compare shapes and classes.

    Raises:
        ConfigError: Naming the setting, the rule and the value found.
    """
    data: Any = image_data(module.trainer)
    if data is None:
        return
    first_stage, cached = module.first_stage, getattr(data, "latent_space", None)
    if cached is not None:
        if first_stage is not None:
            check_first_stage(cached, first_stage.space, data.cache)
        module.latent_space = cached
        shape = cached.latent_shape(data.moments_shape)
    elif first_stage is not None:
        shape = first_stage.latent_shape(data.image_shape)
    else:
        shape = data.image_shape
    if tuple(shape) != tuple(module.image_shape):
        what = "images" if module.latent_space is None else "latents"
        raise ConfigError(
            f"backbone: in_channels and input_size must fit the {what} "
            f"{tuple(shape)}, found {tuple(module.image_shape)}"
        )
    # Without labels every image is of class 0, which is what a network of one class expects.
    if module.num_classes > 1 and not data.num_classes:
        raise ConfigError(
            "data: labels are missing, which a model with backbone.num_classes = "
            f"{module.num_classes} needs, found 0 classes"
        )
    if module.num_classes and max(1, data.num_classes) != module.num_classes:
        raise ConfigError(
            f"backbone.num_classes: must be the {data.num_classes} classes of the data "
            f"(or 0 to ignore labels), found {module.num_classes}"
        )


def load_initial_weights(module: MultiTaskDiffusion) -> None:
    """Fill the backbone from `init_from`, once, unless a checkpoint was loaded.

    This happens when the module is constructed or, if the file is missing then, when the weights
    are needed.

    Raises:
        ConfigError: If the file does not fit.
    """
    if module.init_from is None or not module.init_due:
        return
    try:
        report = load_official_checkpoint(
            module.backbone, module.init_from, weights=module.init_weights
        )
    except ConfigError as error:
        raise ConfigError(f"init_from: {error}") from error
    module.init_due = False
    rank_zero_only(print)(f"init_from {report}")


def restore_latent_space(module: MultiTaskDiffusion, saved: dict[str, Any] | None) -> None:
    """Restore the meaning of latents from a checkpoint, if neither first stage nor data give it.

    Without it, latents would be treated as pixels and clipped during sampling.

    Raises:
        ConfigError: If the stored `latent_space` is incomplete.
    """
    if saved is None or module.latent_space is not None:  # of pixels, or of an older version
        return
    try:
        module.latent_space = LatentSpace(**saved)
    except TypeError as error:
        raise ConfigError(f"ckpt_path: its latent_space must be complete, found {saved}") from error


def holds_moments(module: DiffusionModule, batch: Batch) -> bool:
    """Whether the images of a batch are cached moments; a first stage changes an image's size."""
    space = module.latent_space
    shape = tuple(batch.images.shape[1:])
    return space is not None and shape == space.moments_shape(module.image_shape)


def sample_latents(module: DiffusionModule, batch: Batch, *, step: int | None) -> Tensor:
    """Latents of a batch of images or of moments, `[b, c, h, w]`.

    The posterior's noise is that of the training step, as for the diffusion noise, or for
    `step=None` that of each image's index.
    """
    space, moments = module.latent_space, batch.images
    if space is None:
        return moments
    if not holds_moments(module, batch):
        if module.first_stage is None:
            raise ConfigError(
                "first_stage: needed to encode images, found None with a batch of shape "
                f"{list(moments.shape)}"
            )
        moments = module.first_stage.encode_moments(moments)
    device, b = moments.device, len(moments)
    if step is None:
        noise = ImageNoise(
            batch.indices.tolist(),
            shape=module.image_shape,
            seed=module.seed,
            stream="posterior",
            device=device,
        )()
    else:
        rank = module.trainer.global_rank
        mine = slice(rank * b, (rank + 1) * b)
        noise = step_noise(mine, module.image_shape, module.seed, step, device, stream="posterior")
    return space.sample(moments.float(), noise)
