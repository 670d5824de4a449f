"""Data module for latents of LightningDiT: safetensors shards and their statistics."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ant_lightning.data.latents.others import OthersLatents
from ant_lightning.data.latents.space import LatentSpace
from ant_lightning.errors import ConfigError, FileError
from ant_lightning.files.safetensors_file import read_safetensors
from ant_lightning.files.torch_file import read_torch

if TYPE_CHECKING:
    from torch.utils.data import Dataset


class LightningDiTLatentsData(OthersLatents):
    """Latents as LightningDiT's `extract_features.py` writes them.

    Files are `latents_rankRR_shardSSS.safetensors` with `latents` and `latents_flip` `[n, c, h, w]`
    and `labels` `[n]`, and `latents_stats.pt` with `mean` and `std` `[1, c, 1, 1]`. Latents were
    drawn once: `x = (z - mean) / std multiplier`.

    Args:
        path: The folder.
        batch_size: Images of one optimizer step, over all ranks.
        num_held_out: Images that are never trained on; by default a tenth, at most 1,000.
        num_classes: Number of classes; by default the largest label plus one. 0 ignores labels.
        images: The images that were encoded, in the same order, for metrics: a map-style data set.
        normalize: Whether mean and std are used; without, `x = z multiplier`.
        multiplier: What the latents are multiplied by; 1 for VA-VAE.
        flip: Whether mirrored images are used in half of the epochs.
        split_seed: Seed of the split.
        num_workers: Loading processes of each rank; by default four, or the cores of this machine.
        seed: Order of the images, and flips; by default the seed of the run.

    Raises:
        ConfigError: If there are no such files, or a setting does not fit them.

    Reference:
        Yao et al., "Reconstruction vs. Generation", arXiv 2501.01423; its code.

    Examples:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> from ant_lightning import LightningDiTLatentsData
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     latents = torch.full((4, 3, 2, 2), 5.0)
        ...     rows = {"latents": latents, "latents_flip": -latents, "labels": torch.arange(4)}
        ...     save_file(rows, f"{folder}/latents_rank00_shard000.safetensors")
        ...     stats = {"mean": torch.ones(1, 3, 1, 1), "std": torch.full((1, 3, 1, 1), 2.0)}
        ...     torch.save(stats, f"{folder}/latents_stats.pt")
        ...     data = LightningDiTLatentsData(folder, batch_size=2, num_workers=0)
        ...     batch = data.train_images.load([0], epoch=None)
        >>> data.shape_and_classes(), data.latent_space.sample(batch.images, batch.images).mean()
        (((3, 2, 2), 4), tensor(2.))
    """

    identity_settings = ("num_held_out", "split_seed", "flip")

    def __init__(
        self,
        path: str,
        *,
        batch_size: int,
        num_held_out: int | None = None,
        num_classes: int | None = None,
        images: Dataset | None = None,
        normalize: bool = True,
        multiplier: float = 1.0,
        flip: bool = True,
        split_seed: int = 0,
        num_workers: int | None = None,
        seed: int | None = None,
    ) -> None:
        self.flip = self.has_mirrored = flip
        self._normalize, self._multiplier = normalize, multiplier
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

    def _open(self) -> None:
        files = sorted(self.cache.glob("latents_rank*_shard*.safetensors"))
        if not files:
            raise ConfigError(
                "path: must be a folder with latents_rankRR_shardSSS.safetensors, found "
                f"{self.cache}"
            )
        self._shards = [self._shard(each) for each in files]
        self.moments_shape = tuple(self._shards[0]["latents"].shape[1:])  # type: ignore[assignment]
        counts = [len(each["latents"]) for each in self._shards]
        self._ends = torch.tensor(counts).cumsum(0)
        self.count = sum(counts)
        self.labels = torch.cat([each["labels"].long() for each in self._shards])
        digest = hashlib.sha256(repr([(each.name, each.stat().st_size) for each in files]).encode())
        digest.update(self.labels.numpy().tobytes())
        self._digest = digest.hexdigest()
        self.latent_space = self._space()

    def _shard(self, path: Path) -> dict[str, Tensor]:
        """The tensors of a file, mapped into memory."""
        tensors, _ = read_safetensors(path)
        shapes = {name: list(each.shape) for name, each in tensors.items()}
        latents = shapes.get("latents", [])
        needed = ["latents", "labels", *(["latents_flip"] if self.flip else [])]
        wanted = {"latents": latents, "labels": latents[:1], "latents_flip": latents}
        if len(latents) != 4 or any(shapes.get(name) != wanted[name] for name in needed):
            raise FileError(
                f"{path}: must hold {', '.join(needed)} of n samples, latents [n, c, h, w], found "
                f"{shapes}"
            )
        return tensors

    def _space(self) -> LatentSpace:
        scale: Any = self._multiplier
        shift: Any = 0.0
        if self._normalize:
            path = self.cache / "latents_stats.pt"
            stats: Any = read_torch(path)
            c = self.moments_shape[0]
            try:
                mean, std = (stats[name].double().reshape(c) for name in ("mean", "std"))
            except (KeyError, TypeError, AttributeError, RuntimeError, IndexError) as error:
                raise FileError(
                    f"{path}: must hold mean and std of {c} channels, found {error}"
                ) from error
            scale, shift = (self._multiplier / std).tolist(), mean.tolist()
        return LatentSpace(
            kind="vq", scale=scale, shift=shift, fingerprint="", source=str(self.cache)
        )

    def content_digest(self) -> str:
        """Identifies names and sizes of the files, and the labels."""
        return self._digest

    def moments(self, index: int, *, mirrored: bool) -> Tensor:
        """The latents of a sample before they are normalised."""
        number = int(torch.searchsorted(self._ends, index, right=True))
        latents = self._shards[number]["latents_flip" if mirrored else "latents"]
        return latents[index - int(self._ends[number])].float()
