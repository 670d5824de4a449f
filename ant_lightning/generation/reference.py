"""Statistics of the real images, read from and written to npz files."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ant_lightning.errors import ConfigError, FileError
from ant_lightning.files.npz import open_npz
from ant_lightning.files.torch_file import not_finite
from ant_lightning.generation.moments import GaussianStatistics

__all__ = ["ReferenceStatistics", "load_reference", "save_reference"]


@dataclass(frozen=True)
class ReferenceStatistics:
    """What the metrics need of the real images.

    Args:
        gaussian: Mean and covariance of the features; all that FID needs.
        features: The features ``[n, d]`` where they were kept: precision, recall, KID and the
            companions of FID need them.
        extractor: Name of the extractor; empty for a file of the ADM evaluator.
        fingerprint: Of data and preprocessing; empty where unknown.
        image_shape: Shape (c, h, w) of one image; null where unknown.
    """

    gaussian: GaussianStatistics
    features: Tensor | None = None
    extractor: str = ""
    fingerprint: str = ""
    image_shape: tuple[int, int, int] | None = None

    @classmethod
    def from_features(
        cls,
        features: Tensor,
        *,
        extractor: str = "",
        fingerprint: str = "",
        image_shape: tuple[int, int, int] | None = None,
    ) -> ReferenceStatistics:
        """The statistics of features ``[n, d]``, which are kept."""
        gaussian = GaussianStatistics.from_features(features)
        return cls(gaussian, features, extractor, fingerprint, image_shape)

    def check(
        self,
        *,
        num_features: int,
        extractor: str = "",
        image_shape: tuple[int, int, int] | None = None,
    ) -> None:
        """Refuse to be compared with features of another dimension, network or resolution.

        What this reference or the caller leaves empty is not compared.

        Raises:
            ConfigError: Something differs; the message names both values.
        """
        dimension = len(self.gaussian.mean)
        if dimension != num_features:
            raise ConfigError(
                f"the reference must have {num_features} features as the extractor, got {dimension}"
            )
        if self.extractor and extractor and self.extractor != extractor:
            raise ConfigError(
                f"the reference must come from extractor {extractor!r}, got {self.extractor!r}"
            )
        if self.image_shape and image_shape and self.image_shape != tuple(image_shape):
            raise ConfigError(
                f"the reference must come from images of shape {tuple(image_shape)}, "
                f"got {self.image_shape}"
            )


def save_reference(path: str | Path, reference: ReferenceStatistics) -> None:
    """Write an npz with the ADM evaluator's ``mu`` and ``sigma``, and fields of our own.

    The file is complete or absent: it is written beside its place and then renamed.

    Raises:
        ConfigError: The statistics have a NaN or an infinity; a file that is there stays.
    """
    numbers = {"mu": reference.gaussian.mean, "sigma": reference.gaussian.covariance}
    if reference.features is not None:
        numbers["features"] = reference.features
    if bad := not_finite(numbers):
        raise ConfigError(f"{bad[0]} of the reference for {path} must be finite, got a NaN or inf")
    arrays = {
        "mu": reference.gaussian.mean.double().cpu().numpy(),
        "sigma": reference.gaussian.covariance.double().cpu().numpy(),
        "extractor": np.array(reference.extractor),
        "fingerprint": np.array(reference.fingerprint),
    }
    if reference.gaussian.num_samples is not None:
        arrays["num_samples"] = np.array(reference.gaussian.num_samples, dtype=np.int64)
    if reference.features is not None:
        arrays["features"] = reference.features.float().cpu().numpy()
    if reference.image_shape is not None:
        arrays["image_shape"] = np.array(reference.image_shape, dtype=np.int64)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        Path(temporary).chmod(0o644)  # mkstemp's 0600 would hide a shared cache from others
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_reference(path: str | Path, *, num_features: int | None = None) -> ReferenceStatistics:
    """Read statistics that we or the ADM evaluator wrote; other arrays of the file are left alone.

    Args:
        path: An npz file with ``mu [d]`` and ``sigma [d, d]``.
        num_features: The dimension d that is expected; null accepts any.

    Raises:
        FileError: No such file, arrays missing, shapes that do not fit each other, or values that
            are no mean and covariance.
        ConfigError: Another dimension than ``num_features``.
    """
    with open_npz(path) as file:
        (dimension,) = file.check("mu", shape=(None,), kinds="f").shape
        file.check("sigma", shape=(dimension, dimension), kinds="f")
        if dimension < 1 or (num_features is not None and dimension != num_features):
            raise ConfigError(
                f"the reference {path} must have {num_features or 1} features as the extractor, "
                f"got {dimension}"
            )
        mean, covariance = (
            torch.from_numpy(file.read(name, shape=shape, kinds="f").astype(np.float64))
            for name, shape in (("mu", (dimension,)), ("sigma", (dimension, dimension)))
        )
        num_samples = file.number("num_samples") if "num_samples" in file else None
        features = None
        if "features" in file:
            (count, _) = file.check("features", shape=(None, dimension), kinds="f").shape
            found = file.read("features", shape=(count, dimension), kinds="f", finite=True)
            features = torch.from_numpy(found)
        extractor = file.text("extractor") if "extractor" in file else ""
        fingerprint = file.text("fingerprint") if "fingerprint" in file else ""
        sides = [0, 0, 0]
        if "image_shape" in file:
            sides = file.read("image_shape", shape=(3,), kinds="iu").tolist()
    scale = covariance.diagonal().abs().amax()
    # written so that a NaN fails too
    if not bool(((covariance - covariance.T).abs() <= 1e-6 * scale).all() & mean.isfinite().all()):
        raise FileError(f"mu and sigma of {path} must be finite, and sigma symmetric")
    return ReferenceStatistics(
        GaussianStatistics(mean, covariance, num_samples),
        features,
        extractor,
        fingerprint,
        (sides[0], sides[1], sides[2]) if all(sides) else None,
    )
