"""The frozen autoencoder between images and the latents that are denoised."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ant_lightning.data.latents.space import LatentSpace
from ant_lightning.errors import ConfigError, check_at_least
from ant_lightning.models.first_stage.files import load_autoencoder

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

# Scales for files that hold none, as published: KL of Stable Diffusion and DiT; VQ of LDM has 1.
_SCALES = {"kl": 0.18215, "vq": 1.0, "dc": 1.0}
_KINDS: dict[str, Literal["kl", "vq", "dc"]] = {
    "AutoencoderKL": "kl",
    "VQModel": "vq",
    "AutoencoderDC": "dc",
}


class FirstStage(nn.Module):
    """A trained autoencoder of diffusers, frozen and not stored in checkpoints.

    An `AutoencoderKL`, a `VQModel`, or the `AutoencoderDC` of Sana, whose encoder draws nothing.

    Its weights follow the module to its device but are neither parameters nor part of a state
    dict: a checkpoint names the first stage by its fingerprint only.

    Args:
        source: A local folder of diffusers, a single file (also of latent-diffusion), or
            `owner/name` on the hub: see `load_autoencoder`.
        kind: `kl`, `vq` or `dc`, checked against the source; by default that of the source.
        scale: Scale of the latents, one number or one for each channel; by default the source's
            `scaling_factor`, divided by its `latents_std` if it has those, or the published 0.18215
            (KL) or 1.
        shift: Shift of the latents; by default the source's `latents_mean` or `shift_factor`, or 0.
        batch_size: Images that are encoded or decoded at once.
        local_files_only: Use only files that were downloaded before, without asking the hub.

    Raises:
        ConfigError: If the source cannot be used.

    Reference:
        Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models",
        arXiv 2112.10752.

    Examples:
        >>> import tempfile, torch
        >>> from ant_lightning import AutoencoderModule, FirstStage
        >>> network = AutoencoderModule(in_channels=1, widths=(16, 16)).backbone
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     network.save_pretrained(folder)
        ...     first_stage = FirstStage(folder)
        >>> first_stage.latent_shape((1, 8, 8)), first_stage.space.scale
        ((4, 4, 4), 0.18215)
        >>> first_stage.decode(torch.zeros(2, 4, 4, 4)).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        source: str,
        *,
        kind: Literal["kl", "vq", "dc"] | None = None,
        scale: float | list[float] | None = None,
        shift: float | list[float] | None = None,
        batch_size: int = 32,
        local_files_only: bool = False,
    ) -> None:
        super().__init__()
        check_at_least(1, batch_size=batch_size)
        autoencoder, config = load_autoencoder(source, local_files_only=local_files_only)
        found = _KINDS[config["_class_name"]]
        if kind not in {None, found}:
            raise ConfigError(
                f"kind: must be {found!r}, as {source} is {config['_class_name']}, found {kind!r}"
            )
        autoencoder.eval().requires_grad_(False)
        # In a list, so that torch does not register a submodule: its weights are then in no state
        # dict and no optimizer, and `train()` does not reach it. `_apply` below moves it.
        self._held = [autoencoder]
        settings: Any = autoencoder.config
        self.in_channels = int(settings.in_channels)
        self.latent_channels = int(settings.latent_channels)
        # A `VQModel` projects to `vq_embed_dim` channels before it quantises.
        if found == "vq":
            self.latent_channels = int(settings.vq_embed_dim or settings.latent_channels)
        levels = settings.get("encoder_block_out_channels") or settings.block_out_channels
        self.factor = 2 ** (len(levels) - 1)
        if self.factor < 2:
            raise ConfigError(f"source: must reduce the size of images, found {source}")
        self.batch_size = batch_size
        own_scale, own_shift = _normalisation(config, _SCALES[found])
        space = LatentSpace(
            kind=found,
            scale=own_scale if scale is None else scale,  # type: ignore[arg-type]
            shift=own_shift if shift is None else shift,  # type: ignore[arg-type]
            fingerprint="",
            source=source,
        )
        for name in ("scale", "shift"):
            value = getattr(space, name)
            if isinstance(value, tuple) and len(value) != self.latent_channels:
                raise ConfigError(
                    f"{name}: must be one number, or one for each of the {self.latent_channels} "
                    f"channels, found {len(value)}"
                )
        self.space = replace(space, fingerprint=_fingerprint(autoencoder, space))

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """`(c, h, w)` of the latents of an image of `image_shape`.

        Raises:
            ConfigError: If the encoder does not take such images.
        """
        channels, height, width = image_shape
        if channels != self.in_channels or height % self.factor or width % self.factor:
            raise ConfigError(
                f"source: {self.space.source} takes images of {self.in_channels} channels and "
                f"sides that are multiples of {self.factor}, found {image_shape}"
            )
        return self.latent_channels, height // self.factor, width // self.factor

    def moments_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """`(c, h, w)` of the moments of an image of `image_shape`."""
        return self.space.moments_shape(self.latent_shape(image_shape))

    def encode_moments(self, images: Tensor) -> Tensor:
        """Moments of images: `[b, 2c, h, w]` (KL: mean and log-variance), else `[b, c, h, w]`."""
        self.latent_shape(tuple(images.shape[1:]))  # type: ignore[arg-type]
        if self.space.kind == "vq":
            return self._in_parts(lambda part: self._autoencoder.encode(part).latents, images)
        if self.space.kind == "dc":
            return self._in_parts(lambda part: self._autoencoder.encode(part).latent, images)
        return self._in_parts(
            lambda part: self._autoencoder.encode(part).latent_dist.parameters, images
        )

    def decode(self, x_start: Tensor, *, space: LatentSpace | None = None) -> Tensor:
        """Images in [-1, 1] of latents `[b, c, h, w]`; VQ latents are quantised first.

        Args:
            x_start: The latents.
            space: Scale and shift of latents that another program stored; by default our own.
        """
        z = (space or self.space).raw(x_start)
        return self._in_parts(lambda part: self._autoencoder.decode(part).sample, z).clamp(-1, 1)

    @property
    def fingerprint(self) -> str:
        """Hash of the weights, the scale and the shift."""
        return self.space.fingerprint

    @property
    def _autoencoder(self) -> Any:  # noqa: ANN401 - either class of diffusers
        return self._held[0]

    @torch.no_grad()
    def _in_parts(self, function: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        weight = next(self._autoencoder.parameters())
        parts = batch.to(weight.device, weight.dtype).split(self.batch_size)
        return torch.cat([function(part) for part in parts]).float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FirstStage:
        super()._apply(fn, recurse)
        self._autoencoder._apply(fn)
        return self


def _normalisation(config: dict[str, Any], default: float) -> tuple[Any, Any]:
    """Scale and shift that the config of a diffusers autoencoder asks for.

    With `latents_mean` and `latents_std` of each channel, pipelines of diffusers take
    `x = (z - latents_mean) scaling_factor / latents_std`; without, `(z - shift_factor)
    scaling_factor`.
    """
    scale = config.get("scaling_factor")
    scale = default if scale is None else scale
    mean, std = (config.get(name) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return scale, config.get("shift_factor") or 0.0
    try:
        return [scale / each for each in std], [float(each) for each in mean]
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(
            f"source: latents_std must be numbers above 0, one for each channel, found {std!r:.80}"
        ) from error


def _fingerprint(autoencoder: nn.Module, space: LatentSpace) -> str:
    """Hash of 64 bits in hexadecimal, over names, shapes and float32 values."""
    digest = hashlib.blake2b(f"{space.scale!r}/{space.shift!r}".encode(), digest_size=8)
    for name, value in sorted(autoencoder.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
