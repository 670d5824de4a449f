"""Between the images of the data and what a module denoises: pixels, latents or cached moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ant_lightning.data.latents.cache import check_first_stage
from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from ant_lightning.data.latents.space import LatentSpace
    from ant_lightning.models.first_stage.first_stage import FirstStage


@dataclass(frozen=True)
class ImageCodec:
    """How images become what is denoised, and back.

    Args:
        shape: `(c, h, w)` of what is denoised.
        space: Meaning of the latents; `None` for pixels.
        first_stage: Autoencoder between images and latents; `None` for pixels and cached latents.
    """

    shape: tuple[int, int, int]
    space: LatentSpace | None
    first_stage: FirstStage | None

    def holds_moments(self, images: Tensor) -> bool:
        """Whether these are cached moments and not images.

        The shape tells them apart: a first stage reduces the size of images at least by half.
        """
        space = self.space
        return space is not None and tuple(images.shape[1:]) == space.moments_shape(self.shape)

    def moments(self, images: Tensor) -> Tensor:
        """The moments of the latents: cached ones as they are, those of images encoded here.

        Raises:
            ConfigError: If images must be encoded and there is no first stage.
        """
        if self.holds_moments(images):
            return images
        if self.first_stage is None:
            raise ConfigError(
                "first_stage: needed to encode images, found None with a batch of shape "
                f"{list(images.shape)}"
            )
        return self.first_stage.encode_moments(images)

    def decode(self, x_start: Tensor) -> Tensor:
        """Images in [-1, 1] from `x_start`; latents stay latents without a first stage."""
        if self.first_stage is not None:
            return self.first_stage.decode(x_start, space=self.space)
        return x_start.clamp(-1, 1) if self.space is None else x_start

    def space_of(self, data: Any) -> LatentSpace | None:  # noqa: ANN401 - any image data module
        """The latent space for these data: that of a cache, or else the own one.

        Raises:
            ConfigError: If the cache is of another first stage, or the shapes do not fit.
        """
        cached, space, shape = getattr(data, "latent_space", None), self.space, data.image_shape
        if cached is not None:
            if self.first_stage is not None:
                check_first_stage(cached, self.first_stage.space, data.cache)
            space, shape = cached, cached.latent_shape(data.moments_shape)
        elif self.first_stage is not None:
            shape = self.first_stage.latent_shape(shape)
        if tuple(shape) != self.shape:
            what = "images" if space is None else "latents"
            raise ConfigError(
                f"backbone: in_channels and input_size must fit the {what} "
                f"{tuple(shape)}, found {self.shape} (many data sets have an image_size)"
            )
        return space
