"""The result of an affinity measurement: dot products of gradients, estimates, and their file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ant_lightning.affinity.estimate import (
    corrected_affinity,
    corrected_standard_error,
    plain_affinity,
    split_half_reliability,
)
from ant_lightning.errors import ConfigError, FileError
from ant_lightning.files.npz import open_npz
from ant_lightning.files.safetensors_file import read_tensors, write_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float

_LISTED = 8  # timesteps that a message names
_FORMAT = "ant_lightning affinity"
_TENSORS: dict[str, tuple[torch.dtype, tuple[int | str, ...]]] = {
    "affinity": (torch.float64, ("n", "n")),
    "timesteps": (torch.int64, ("n",)),
    "half_dots": (torch.float64, ("c", 2, 2, "n", "n")),
    "log_snr": (torch.float64, ("T",)),  # empty if not known
}
_NUMBERS = ("num_timesteps", "seed", "num_parameters", "sketch_dim")


@dataclass(frozen=True, eq=False)
class AffinityResult:
    """Task affinity on a grid of `n` timesteps, averaged over `c` checkpoints.

    Attributes:
        timesteps: The grid, increasing, in `0 .. num_timesteps - 1`.
        num_timesteps: `T` of the schedule.
        half_dots: `[c, 2, 2, n, n]` float64: `half_dots[c, g, h, i, j]` is the dot product of the
            gradient of half g at timestep i with that of half h at timestep j.
        seed: Seed of the noise and of the sketch.
        model: Description of the measured model.
        num_parameters: Length of the gradients.
        sketch_dim: Length of the sketches; `None` if the gradients were kept whole.
        log_snr: Log-SNR of the schedule, `[T]` float64; `None` if not known.

    Raises:
        ConfigError: If shapes or values do not fit each other.

    Examples:
        >>> import torch
        >>> from ant_lightning import AffinityResult
        >>> gradients = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).double()  # two timesteps
        >>> half_dots = (gradients @ gradients.T).expand(1, 2, 2, 2, 2)  # equal halves: no noise
        >>> result = AffinityResult(timesteps=(0, 9), num_timesteps=10, half_dots=half_dots)
        >>> round(float(result.plain[0, 1]), 3), result.reliability.tolist()
        (0.707, [1.0, 1.0])
    """

    timesteps: tuple[int, ...]
    num_timesteps: int
    half_dots: Float[Tensor, "c 2 2 n n"]
    seed: int = 0
    model: str = ""
    num_parameters: int = 0
    sketch_dim: int | None = None
    log_snr: Float[Tensor, " T"] | None = None

    def __post_init__(self) -> None:
        check_grid(self.timesteps, self.num_timesteps, self.log_snr)
        n, shape = len(self.timesteps), tuple(self.half_dots.shape)
        if len(shape) != 5 or shape[0] < 1 or shape[1:] != (2, 2, n, n):
            raise ConfigError(f"half_dots: must have shape (c, 2, 2, {n}, {n}), found {shape}")
        if not bool(self.half_dots.isfinite().all()):
            raise ConfigError("half_dots: must be finite, found NaN or infinity")

    @property
    def num_checkpoints(self) -> int:
        """Number of checkpoints in the average."""
        return len(self.half_dots)

    @cached_property
    def plain(self) -> Float[Tensor, "n n"]:
        """Cosine of the mean gradients, averaged over checkpoints: see `plain_affinity`."""
        return plain_affinity(self.half_dots).mean(0)

    @cached_property
    def corrected(self) -> Float[Tensor, "n n"]:
        """Estimate of the cosine without noise: see `corrected_affinity`.

        Each entry is averaged over the checkpoints that have an estimate; NaN if none has.
        """
        return corrected_affinity(self.half_dots).nanmean(0)

    @cached_property
    def corrected_standard_error(self) -> Float[Tensor, "n n"]:
        """Approximate standard error of `corrected`; checkpoints count as independent."""
        errors = corrected_standard_error(self.half_dots)
        counts = (~errors.isnan()).sum(0)
        # Standard error of a mean of `counts` independent estimates: sqrt(sum e²) / counts.
        mean = errors.square().nansum(0).sqrt() / counts.clamp(min=1)
        return torch.where(counts > 0, mean, torch.nan)

    @cached_property
    def reliability(self) -> Float[Tensor, " n"]:
        """Split-half reliability of each gradient, averaged over checkpoints."""
        return split_half_reliability(self.half_dots).mean(0)

    @property
    def sketch_standard_error(self) -> Float[Tensor, "n n"]:
        """Standard error of `plain` due to the sketch, `(1 - c²) / sqrt(m)`; 0 without a sketch.

        Checkpoints may share their projection, so averaging does not reduce it. For `corrected`,
        divide it by the square root of the product of the two reliabilities.
        """
        scale = 0.0 if self.sketch_dim is None else self.sketch_dim**-0.5
        return (1 - self.plain.square()) * scale

    @property
    def grid_log_snr(self) -> Float[Tensor, " n"] | None:
        """Log-SNR at the timesteps of the grid; `None` if not known."""
        return None if self.log_snr is None else self.log_snr[list(self.timesteps)]

    def reliability_warning(self, *, below: float = 0.8) -> str | None:
        """A sentence naming the timesteps with a reliability under `below`; `None` without any."""
        low = [t for t, r in zip(self.timesteps, self.reliability, strict=True) if r < below]
        if not low:
            return None
        names = ", ".join(map(str, low[:_LISTED])) + (", ..." if len(low) > _LISTED else "")
        worst = int(self.reliability.argmin())
        return (
            f"split-half reliability is below {below:g} at {len(low)} of {len(self.timesteps)} "
            f"timesteps ({names}; lowest {float(self.reliability[worst]):.2f} at timestep "
            f"{self.timesteps[worst]}): plain affinity is too near 0 there; use more images, or "
            "read the corrected estimate"
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all.

        It has the tensors `affinity [n, n]` (the plain cosines), `timesteps [n]`, `half_dots`,
        `corrected`, `corrected_standard_error`, `reliability` and `log_snr [T]` (empty if not
        known). The other attributes are in its JSON metadata.
        """
        # The estimates are for other programs: `load` computes them from `half_dots`.
        tensors = {
            "affinity": self.plain,
            "timesteps": torch.tensor(self.timesteps),
            "half_dots": self.half_dots,
            "corrected": self.corrected,
            "corrected_standard_error": self.corrected_standard_error,
            "reliability": self.reliability,
            "log_snr": torch.zeros(0).double() if self.log_snr is None else self.log_snr,
        }
        numbers = {name: getattr(self, name) or 0 for name in _NUMBERS}  # 0 for no sketch
        write_tensors(path, tensors, {"format": _FORMAT, **numbers, "model": self.model})

    @classmethod
    def load(cls, path: str | Path) -> AffinityResult:
        """Read what `save` wrote, or the `.npz` file of version 0.1.

        Raises:
            FileError: If the file is missing or damaged, or its tensors do not fit each other.
        """
        tensors, entries = read_affinity_file(path, "timesteps", "half_dots", "log_snr")
        try:
            return cls(
                timesteps=tuple(tensors["timesteps"].tolist()),
                half_dots=tensors["half_dots"],
                log_snr=tensors["log_snr"] if len(tensors["log_snr"]) else None,
                **entries | {"sketch_dim": entries["sketch_dim"] or None},
            )
        except ConfigError as error:
            raise FileError(f"{path}: {error}") from None

    @classmethod
    def mean(cls, results: Sequence[AffinityResult]) -> AffinityResult:
        """Average over checkpoints.

        Cosines are averaged, not dot products, so each checkpoint has the same weight.

        Raises:
            ConfigError: If there is no result, or they differ in grid, schedule or sketch.
        """
        if not results:
            raise ConfigError("results: must be at least one, found 0")
        first = results[0]
        for other in results[1:]:
            for name in ("timesteps", "num_timesteps", "num_parameters", "sketch_dim"):
                one, two = getattr(first, name), getattr(other, name)
                if one != two:
                    raise ConfigError(f"results: must have equal {name}, found {one} and {two}")
            # Cosines of two schedules at one timestep belong to different noise levels.
            if not _equal_schedules(first.log_snr, other.log_snr):
                raise ConfigError("results: must have equal log_snr, found different schedules")
        return replace(
            first,
            half_dots=torch.cat([each.half_dots for each in results]),
            model=", ".join(dict.fromkeys(each.model for each in results)),
        )


def check_grid(timesteps: Sequence[int], num_timesteps: int, log_snr: Tensor | None) -> None:
    """Check that a grid increases within the schedule, and the length of the log-SNR.

    Raises:
        ConfigError: If one breaks its rule.
    """
    increasing = all(one < two for one, two in pairwise(timesteps))
    if not timesteps or not increasing or timesteps[0] < 0 or timesteps[-1] >= num_timesteps:
        more = " ..." if len(timesteps) > _LISTED else ""
        raise ConfigError(
            f"timesteps: must increase within 0 .. {num_timesteps - 1}, "
            f"found {list(timesteps[:_LISTED])}{more}"
        )
    if log_snr is not None and log_snr.shape != (num_timesteps,):
        raise ConfigError(
            f"log_snr: must have one value for each of {num_timesteps} timesteps, found shape "
            f"{tuple(log_snr.shape)}"
        )


def read_affinity_file(path: str | Path, *names: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the named tensors of an affinity file, its numbers and its description of the model.

    A `.npz` file, the format of version 0.1, needs only the arrays of `names` (`log_snr` may be
    missing) and `num_timesteps`.

    Raises:
        FileError: If the file is missing or damaged, or has a wrong dtype or shape.
    """
    path = Path(path)
    if path.suffix != ".npz":
        rules = {"format": _FORMAT, "model": str, **dict.fromkeys(_NUMBERS, int)}
        tensors, entries = read_tensors(path, {name: _TENSORS[name] for name in names}, rules)
        return tensors, {name: entries[name] for name in ("model", *_NUMBERS)}
    tensors = {"log_snr": torch.zeros(0, dtype=torch.float64)}
    with open_npz(path) as file:
        for name in names:
            dtype, shape = _TENSORS[name]
            if name == "log_snr" and name not in file:
                continue
            sides = [side if isinstance(side, int) else None for side in shape]
            kinds = "iuf" if dtype.is_floating_point else "iu"
            tensors[name] = torch.from_numpy(file.read(name, shape=sides, kinds=kinds)).to(dtype)
        # A file written by hand for clustering may lack all numbers but `num_timesteps`.
        entries = {name: file.number(name) for name in _NUMBERS if name in file}
        entries["model"] = file.text("model") if "model" in file else ""
        entries["num_timesteps"] = file.number("num_timesteps")
    return tensors, {"seed": 0, "num_parameters": 0, "sketch_dim": 0, **entries}


def _equal_schedules(one: Tensor | None, two: Tensor | None) -> bool:
    """Whether two tables of log-SNR are equal up to rounding; two unknown ones count as equal."""
    if one is None or two is None:
        return one is two
    return torch.allclose(one, two, rtol=1e-6, atol=1e-9)
