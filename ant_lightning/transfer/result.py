"""Negative-transfer gaps of one multi-task model, as measured and as a file."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ant_lightning.files.atomic import write_atomically
from ant_lightning.files.npz import open_npz
from ant_lightning.transfer.gap import GapEstimate

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["IntervalGap", "TransferGapResult"]

_VERSION = 1
# Kinds and further sides of the array that keeps an attribute of this type.
_COLUMNS = {
    "int": ("iu", ()),
    "str": ("U", ()),
    "float": ("iuf", ()),
    "GapEstimate": ("iuf", (len(GapEstimate._fields),)),
}
_UNKNOWN = GapEstimate(math.nan, math.nan, math.nan)


@dataclass(frozen=True, kw_only=True)
class IntervalGap:
    """Both gaps of one interval and one specialist.

    Attributes:
        start: First timestep of the interval.
        stop: One past the last.
        budget: What the specialist has in common with the multi-task model: `iterations` or
            `samples` (of its interval).
        specialist_steps: Its optimizer steps.
        multitask_loss: Mean held-out loss inside the interval.
        specialist_loss: The same of the specialist.
        loss_gap: Their difference, with its interval.
        multitask_fid: FID with the multi-task model at every step; NaN if not measured.
        specialist_fid: FID with the specialist inside the interval.
        fid_gap: Their difference, with its interval.
    """

    start: int
    stop: int
    budget: str
    specialist_steps: int
    multitask_loss: float
    specialist_loss: float
    loss_gap: GapEstimate
    multitask_fid: float = math.nan
    specialist_fid: float = math.nan
    fid_gap: GapEstimate = _UNKNOWN

    @property
    def relative_loss_gap(self) -> GapEstimate:
        """The loss gap over the multi-task model's loss: intervals compare."""
        return GapEstimate(*(value / self.multitask_loss for value in self.loss_gap))


@dataclass(frozen=True, kw_only=True)
class TransferGapResult:
    """The gaps of a multi-task model, and what measuring them cost.

    Attributes:
        gaps: One for each interval and budget.
        multitask_steps: Optimizer steps of the multi-task model.
        num_images: Generated images of each FID; 0 if none was measured.
        num_held_out: Images of each loss.
        sampler_steps: Denoising steps that were computed for one image of each kind.
        sampler_steps_unshared: The same if every trajectory had started from noise.
    """

    gaps: tuple[IntervalGap, ...]
    multitask_steps: int
    num_images: int
    num_held_out: int
    sampler_steps: int = 0
    sampler_steps_unshared: int = 0

    def of_budget(self, budget: str) -> list[IntervalGap]:
        """The gaps of one budget, by interval."""
        return sorted((g for g in self.gaps if g.budget == budget), key=lambda g: g.start)

    @property
    def budgets(self) -> list[str]:
        """Which budgets there are, in the order they were given."""
        return list(dict.fromkeys(gap.budget for gap in self.gaps))

    def row(self) -> dict[str, Any]:
        """Everything as plain numbers and lists, for JSON; NaN as None."""
        row = asdict(self)
        row["gaps"] = [dict(_plain(gap)) for gap in self.gaps]
        return row

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> TransferGapResult:
        """The inverse of `row`."""
        gaps = tuple(_from_plain(gap) for gap in row["gaps"])
        return cls(**{**row, "gaps": gaps})

    def save(self, path: str | Path) -> None:
        """Write an `.npz` file, whole or not at all: one array for each attribute of the gaps."""
        arrays: dict[str, Any] = {"format_version": _VERSION}
        for field in fields(IntervalGap):
            arrays[field.name] = np.asarray([getattr(gap, field.name) for gap in self.gaps])
        for field in fields(self):
            if field.name != "gaps":
                arrays[field.name] = getattr(self, field.name)
        write_atomically(Path(path), lambda file: np.savez(file, **arrays))

    @classmethod
    def load(cls, path: str | Path) -> TransferGapResult:
        """Read what `save` wrote; nothing in the file is executed.

        Raises:
            FileError: If there is no such file, or it is damaged or of another format.
        """
        with open_npz(path, setting="negative transfer") as file:
            version = file.number("format_version")
            if version != _VERSION:
                raise file.error(f"must have format_version {_VERSION}, found {version}")
            (n,) = file.check("start", shape=(None,)).shape
            columns: dict[str, list[Any]] = {}
            for field in fields(IntervalGap) if n else ():
                kinds, sides = _COLUMNS[str(field.type)]
                columns[field.name] = file.read(field.name, shape=(n, *sides), kinds=kinds).tolist()
            own = {f.name: file.number(f.name) for f in fields(cls) if f.name != "gaps"}
        rows = zip(*columns.values(), strict=True)
        gaps = tuple(_from_plain(dict(zip(columns, row, strict=True))) for row in rows)
        return cls(gaps=gaps, **own)


def _plain(gap: IntervalGap) -> Iterator[tuple[str, Any]]:
    for field in fields(gap):
        value = getattr(gap, field.name)
        if isinstance(value, tuple):
            yield field.name, [_known(each) for each in value]
        else:
            yield field.name, _known(value)


def _known(value: Any) -> Any:  # noqa: ANN401 - a number or a text
    return None if isinstance(value, float) and math.isnan(value) else value


def _from_plain(values: dict[str, Any]) -> IntervalGap:
    made: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list | tuple):
            made[name] = GapEstimate(*(math.nan if each is None else each for each in value))
        else:
            made[name] = math.nan if value is None else value
    return IntervalGap(**made)
