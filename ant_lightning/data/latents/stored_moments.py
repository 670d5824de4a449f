"""Data modules for latents of EDM2 and REPA: one npy file for each image."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ant_lightning.data.archives.edm_images import EDMImages
from ant_lightning.data.archives.store import open_store
from ant_lightning.data.latents.others import OthersLatents
from ant_lightning.data.latents.space import LatentSpace
from ant_lightning.errors import ConfigError, FileError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.utils.data import Dataset

    from ant_lightning.data.archives.store import FileStore

# EDM2's `StabilityVAEEncoder`: statistics of ImageNet's latents, for a final deviation of 0.5.
_EDM2_MEAN = (5.81, 3.25, 0.12, -2.15)
_EDM2_STD = (4.17, 4.62, 3.71, 3.28)
_EDM2_FINAL_STD = 0.5


class _StoredMoments(OthersLatents):
    """Files `img-mean-std-NNNNNNNN.npy` with mean and standard deviation, `[2c, h, w]`."""

    _store: FileStore

    def _open(self) -> None:
        self._store = open_store(self.cache, suffixes={".npy"})
        self.count = len(self._store)
        self.labels = self._store.labels
        self.moments_shape = tuple(self._array(0).shape)  # type: ignore[assignment]

    def content_digest(self) -> str:
        return self._store.fingerprint

    def moments(self, index: int, *, mirrored: bool) -> Tensor:
        del mirrored
        found = self._array(index)
        if tuple(found.shape) != self.moments_shape:
            raise FileError(
                f"{self.cache}: file {index} must have shape {list(self.moments_shape)}, found "
                f"{list(found.shape)}"
            )
        mean, std = found.chunk(2)
        # Our moments have the log-variance. log 0 is -inf, which `LatentSpace` clamps.
        return torch.cat([mean, 2 * std.log()])

    def _array(self, index: int) -> Tensor:
        try:
            array = np.load(BytesIO(self._store.read(index)), allow_pickle=False)
            if array.ndim != 3 or array.shape[0] % 2 or array.dtype.kind != "f":
                raise ValueError(f"{array.dtype} of shape {list(array.shape)}")
        except (ValueError, EOFError, OSError) as error:
            raise FileError(
                f"{self.cache}: file {index} must be floats [2c, h, w], found {error}"
            ) from error
        return torch.from_numpy(array).float()


class EDM2LatentsData(_StoredMoments):
    """Latents as EDM2's `dataset_tool.py encode` writes them: a folder, or a stored zip archive.

    Files are `NNNNN/img-mean-std-NNNNNNNN.npy` and `dataset.json`. Latents are
    `x = (mean + std n - raw_mean) 0.5 / raw_std` with the official statistics of each channel.

    Args:
        path: The archive or the folder.
        batch_size: Images of one optimizer step, over all ranks.
        num_held_out: Images that are never trained on; by default a tenth, at most 1,000.
        num_classes: Number of classes; by default the largest label plus one. 0 ignores labels.
        images: The images that were encoded, in the same order, for metrics (`EDMImages`).
        raw_mean: Mean of each channel; by default EDM2's.
        raw_std: Standard deviation of each channel; by default EDM2's.
        final_std: Standard deviation of the latents.
        split_seed: Seed of the split.
        num_workers: Loading processes of each rank; by default four, or the cores of this machine.
        seed: Order of the images; by default the seed of the run.

    Raises:
        ConfigError: If there are no such files, or a setting does not fit them.

    Reference:
        Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models",
        arXiv 2312.02696; `StabilityVAEEncoder` of its code.

    Examples:
        >>> import tempfile
        >>> import numpy as np
        >>> from ant_lightning import EDM2LatentsData
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for i in range(4):
        ...         moments = np.full((8, 2, 2), 5.81, np.float32)
        ...         np.save(f"{folder}/img-mean-std-{i:08}.npy", moments)
        ...     data = EDM2LatentsData(folder, batch_size=2, num_workers=0)
        ...     batch = data.train_images.load([0], epoch=None)
        >>> data.shape_and_classes()
        ((4, 2, 2), 0)
        >>> data.latent_space.sample(batch.images, 0 * batch.images[:, :4])[0, :, 0, 0].tolist()
        [0.0, 0.277..., 0.766..., 1.213...]
    """

    def __init__(
        self,
        path: str,
        *,
        batch_size: int,
        num_held_out: int | None = None,
        num_classes: int | None = None,
        images: Dataset | None = None,
        raw_mean: Sequence[float] = _EDM2_MEAN,
        raw_std: Sequence[float] = _EDM2_STD,
        final_std: float = _EDM2_FINAL_STD,
        split_seed: int = 0,
        num_workers: int | None = None,
        seed: int | None = None,
    ) -> None:
        if len(raw_mean) != len(raw_std) or not all(each > 0 for each in (*raw_std, final_std)):
            raise ConfigError(
                f"raw_std: must be above 0, one for each of raw_mean {list(raw_mean)}, found "
                f"{list(raw_std)} with final_std {final_std}"
            )
        self.latent_space = LatentSpace(
            kind="kl",
            scale=tuple(final_std / each for each in raw_std),
            shift=tuple(raw_mean),
            fingerprint="",
            source=path,
        )
        super().__init__(
            path,
            batch_size=batch_size,
            num_held_out=num_held_out,
            num_classes=num_classes,
            images=images,
            split_seed=split_seed,
            num_workers=num_workers,
            seed=seed,
        )
        if self.moments_shape[0] != 2 * len(raw_mean):
            raise ConfigError(
                f"raw_mean: must have one for each of the {self.moments_shape[0] // 2} channels, "
                f"found {len(raw_mean)}"
            )


class REPALatentsData(_StoredMoments):
    """Latents as REPA's preprocessing writes them: `vae-sd/` with the moments, beside `images/`.

    Latents are `x = (mean + std n) scale`. The images serve metrics, if they are there.

    Args:
        root: The folder that holds `vae-sd` and `images`.
        batch_size: Images of one optimizer step, over all ranks.
        num_held_out: Images that are never trained on; by default a tenth, at most 1,000.
        num_classes: Number of classes; by default the largest label plus one. 0 ignores labels.
        scale: Scale of the latents.
        split_seed: Seed of the split.
        num_workers: Loading processes of each rank; by default four, or the cores of this machine.
        seed: Order of the images; by default the seed of the run.

    Raises:
        ConfigError: If there are no such files, or a setting does not fit them.

    Reference:
        Yu et al., "Representation Alignment for Generation", arXiv 2410.06940; its code.

    Examples:
        >>> import tempfile
        >>> import numpy as np
        >>> from pathlib import Path
        >>> from ant_lightning import REPALatentsData
        >>> with tempfile.TemporaryDirectory() as root:
        ...     Path(root, "vae-sd").mkdir()
        ...     for i in range(4):
        ...         moments = np.ones((8, 2, 2), np.float32)
        ...         np.save(f"{root}/vae-sd/img-mean-std-{i:08}.npy", moments)
        ...     data = REPALatentsData(root, batch_size=2, num_workers=0)
        >>> data.shape_and_classes(), len(data.train_images), data.latent_space.scale
        (((4, 2, 2), 0), 3, 0.18215)
    """

    def __init__(
        self,
        root: str,
        *,
        batch_size: int,
        num_held_out: int | None = None,
        num_classes: int | None = None,
        scale: float = 0.18215,
        split_seed: int = 0,
        num_workers: int | None = None,
        seed: int | None = None,
    ) -> None:
        self.latent_space = LatentSpace(
            kind="kl", scale=scale, shift=0.0, fingerprint="", source=root
        )
        images = Path(root) / "images"
        super().__init__(
            str(Path(root) / "vae-sd"),
            batch_size=batch_size,
            num_held_out=num_held_out,
            num_classes=num_classes,
            images=EDMImages(str(images)) if images.is_dir() else None,
            split_seed=split_seed,
            num_workers=num_workers,
            seed=seed,
        )
