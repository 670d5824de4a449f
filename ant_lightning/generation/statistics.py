"""Statistics of a set of images, and the files that hold them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ant_lightning.errors import ConfigError, FileError
from ant_lightning.files.atomic import write_atomically
from ant_lightning.files.npz import open_npz
from ant_lightning.files.safetensors_file import read_tensors, write_tensors
from ant_lightning.files.torch_file import not_finite
from ant_lightning.generation.frechet import GaussianStatistics

if TYPE_CHECKING:
    from torch import Tensor

    from ant_lightning.generation.extractor import FeatureExtractor

_KIND = "image statistics 1"
_TENSORS: dict[str, tuple[torch.dtype, tuple[str, ...]]] = {
    "mean": (torch.float64, ("d",)),
    "covariance": (torch.float64, ("d", "d")),
    "features": (torch.float32, ("n", "d")),  # n = 0 if they were not kept
}
_ENTRIES = {"kind": _KIND, "extractor": str, "num_images": int, "image_shape": list}


class ImageStatistics:
    """Statistics of a set of images: all that `GenerationScores` needs of them.

    Args:
        gaussian: Mean and covariance of the features; FID needs no more.
        features: The features `[n, d]`, if they were kept; all other scores need them.
        logits: Class scores `[n, c]`, if the extractor classifies; not stored in files.
        extractor: Name of the extractor; empty if unknown, as in a file of the ADM evaluator.
        image_shape: Shape `(c, h, w)` of one image; `None` if unknown.

    Examples:
        >>> import torch
        >>> from ant_lightning import GaussianStatistics, ImageStatistics
        >>> features = torch.tensor([[0.0], [2.0], [4.0]])
        >>> real = ImageStatistics(GaussianStatistics.from_features(features), features)
        >>> real.gaussian.mean
        tensor([2.], dtype=torch.float64)
    """

    def __init__(
        self,
        gaussian: GaussianStatistics,
        features: Tensor | None = None,
        *,
        logits: Tensor | None = None,
        extractor: str = "",
        image_shape: tuple[int, int, int] | None = None,
    ) -> None:
        self.gaussian = gaussian
        self.features = features
        self.logits = logits
        self.extractor = extractor
        self.image_shape = image_shape

    def check(
        self, extractor: FeatureExtractor, image_shape: tuple[int, ...] | None = None
    ) -> None:
        """Check that extractor and size of the images are those of the statistics.

        A property that the file did not state is not compared.

        Raises:
            ConfigError: If one differs.
        """
        for what, ours, theirs in (
            ("number of features", len(self.gaussian.mean), extractor.num_features),
            ("extractor", self.extractor, extractor.name),
            ("image shape", self.image_shape, image_shape),
        ):
            if ours and theirs and ours != theirs:
                raise ConfigError(f"reference: its {what} must be {theirs}, found {ours}")

    def save(self, path: str | Path, *, fingerprint: str = "") -> None:
        """Write a safetensors file, or for `.npz` the ADM evaluator's `mu` and `sigma` alone.

        Args:
            path: The file, which is written whole or not at all.
            fingerprint: Hash of the images and the extractor, stored with the statistics.

        Raises:
            ConfigError: If the statistics have a NaN or an infinity; an existing file stays.
        """
        mean, covariance = self.gaussian.mean.double(), self.gaussian.covariance.double()
        features = mean.new_zeros(0, len(mean)) if self.features is None else self.features
        tensors = {"mean": mean, "covariance": covariance, "features": features.float()}
        if bad := not_finite(tensors):
            raise ConfigError(f"{bad[0]}: must be finite to be stored, found a NaN or an infinity")
        if Path(path).suffix == ".npz":
            arrays = {"mu": mean.cpu().numpy(), "sigma": covariance.cpu().numpy()}
            write_atomically(Path(path), lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
            return
        metadata = {
            "kind": _KIND,
            "extractor": self.extractor,
            "fingerprint": fingerprint,
            "num_images": self.gaussian.num_samples or 0,
            "image_shape": list(self.image_shape or ()),
        }
        write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path, *, fingerprint: str | None = None) -> ImageStatistics:
        """Read statistics that `save` or the ADM evaluator wrote.

        Args:
            path: A safetensors file, or an npz file with `mu [d]` and `sigma [d, d]`.
            fingerprint: The fingerprint that the file must have; `None` accepts any.

        Raises:
            FileError: If the file is missing, lacks content, or its values are no mean and
                covariance.
        """
        found = cls._load_npz(path) if Path(path).suffix == ".npz" else cls._load(path, fingerprint)
        mean, covariance = found.gaussian.mean, found.gaussian.covariance
        # A comparison with NaN is false, so NaN is refused too.
        asymmetry = (covariance - covariance.T).abs()
        symmetric = len(mean) and bool((asymmetry <= 1e-6 * covariance.abs().amax()).all())
        if not symmetric or not bool(mean.isfinite().all()):
            raise FileError(f"{path}: must hold a finite mean and a symmetric covariance")
        return found

    @classmethod
    def _load(cls, path: str | Path, fingerprint: str | None) -> ImageStatistics:
        # `read_tensors` takes any fingerprint if it is given a type in place of a value.
        entries = _ENTRIES | {"fingerprint": fingerprint or str}
        tensors, metadata = read_tensors(path, _TENSORS, entries)
        count, features = metadata["num_images"], tensors["features"]
        return cls(
            GaussianStatistics(tensors["mean"], tensors["covariance"], count or None),
            features if len(features) else None,
            extractor=metadata["extractor"],
            image_shape=tuple(metadata["image_shape"]) or None,  # type: ignore[arg-type]
        )

    @classmethod
    def _load_npz(cls, path: str | Path) -> ImageStatistics:
        with open_npz(path) as file:
            mu = file.read("mu", shape=(None,), kinds="f")
            dimension = len(mu)
            sigma = file.read("sigma", shape=(dimension, dimension), kinds="f")
            mean, covariance = (torch.from_numpy(each.astype(np.float64)) for each in (mu, sigma))
            features, extractor = None, ""
            if "extractor" in file:  # written by ant_lightning 0.1, which kept these there
                extractor = file.text("extractor")
            if "features" in file:
                found = file.read("features", shape=(None, dimension), kinds="f", finite=True)
                features = torch.from_numpy(found).float()
        count = None if features is None else len(features)
        return cls(GaussianStatistics(mean, covariance, count), features, extractor=extractor)
