"""Negative-transfer gaps of one multi-task model, as a record of plain numbers."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ant_lightning.errors import FileError
from ant_lightning.files.atomic import write_text
from ant_lightning.transfer.gap import GapEstimate

if TYPE_CHECKING:
    from collections.abc import Mapping

_MAX_BYTES = 2**24  # of a file that is parsed; a row has a few kilobytes
Row = TypeVar("Row", "IntervalGap", "TransferGapResult")
_WRONG = (LookupError, TypeError, ValueError, OverflowError)  # entries missing or of other types
_UNKNOWN = GapEstimate(math.nan, math.nan, math.nan)


@dataclass(frozen=True, kw_only=True)
class IntervalGap:
    """Both gaps of one interval and one specialist.

    To add a column, add a field with a default here and fill it in `NegativeTransferGap`
    (`transfer/callback.py`, `_loss_gaps`). Files written before then are still read.

    Attributes:
        start: First timestep of the interval.
        stop: Timestep after the last.
        budget: Quantity that is equal for specialist and multi-task model: `iterations` (optimizer
            steps) or `samples` (images of the interval).
        specialist_steps: Optimizer steps of the specialist.
        multitask_loss: Mean held-out loss of the multi-task model inside the interval.
        specialist_loss: Mean held-out loss of the specialist inside the interval.
        loss_gap: Specialist's loss minus multi-task loss.
        multitask_fid: FID with the multi-task model at all timesteps; NaN if not measured.
        specialist_fid: FID with the specialist inside the interval; NaN if not measured.
        fid_gap: Specialist's FID minus multi-task FID; NaN if not measured.
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
        """The loss gap divided by the multi-task loss; derived, so not in the file."""
        return GapEstimate(*(value / self.multitask_loss for value in self.loss_gap))


@dataclass(frozen=True, kw_only=True)
class TransferGapResult:
    """The gaps of a multi-task model, and the cost of measuring them.

    Attributes:
        gaps: One for each interval and budget.
        multitask_steps: Optimizer steps of the multi-task model.
        num_images: Generated images of each FID; 0 if none was measured.
        num_held_out: Images of each loss.
        sampler_steps: Denoising steps for one image of the model and one with each specialist.
        sampler_steps_unshared: The same count if every trajectory started from noise.

    Examples:
        >>> from ant_lightning.transfer import GapEstimate, IntervalGap, TransferGapResult
        >>> gap = IntervalGap(
        ...     start=0,
        ...     stop=200,
        ...     budget="samples",
        ...     specialist_steps=300,
        ...     multitask_loss=0.5,
        ...     specialist_loss=0.4,
        ...     loss_gap=GapEstimate(-0.1, -0.12, -0.08),
        ... )
        >>> result = TransferGapResult(
        ...     gaps=(gap,), multitask_steps=1500, num_images=0, num_held_out=360
        ... )
        >>> result.budgets, round(result.of_budget("samples")[0].relative_loss_gap.value, 2)
        (['samples'], -0.2)
    """

    gaps: tuple[IntervalGap, ...]
    multitask_steps: int
    num_images: int
    num_held_out: int
    sampler_steps: int = 0
    sampler_steps_unshared: int = 0

    def of_budget(self, budget: str) -> list[IntervalGap]:
        """The gaps of one budget, sorted by interval."""
        return sorted((g for g in self.gaps if g.budget == budget), key=lambda g: g.start)

    @property
    def budgets(self) -> list[str]:
        """The budgets, in the order they were given."""
        return list(dict.fromkeys(gap.budget for gap in self.gaps))

    def row(self) -> dict[str, Any]:
        """All attributes as numbers, texts and lists, for JSON; NaN as `None`."""
        row: dict[str, Any] = _without_nan(asdict(self))
        return row

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> TransferGapResult:
        """The inverse of `row`; other entries are ignored.

        Raises:
            FileError: If an entry is missing or has another type.
        """
        try:
            return _read(cls, row)
        except _WRONG as error:
            raise FileError(f"row: must be a negative-transfer gap, found {error!r}") from error

    def save(self, path: str | Path) -> None:
        """Write the row as one line of JSON, whole or not at all."""
        write_text(Path(path), json.dumps(self.row()) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> TransferGapResult:
        """Read what `save` wrote, or the last line of a run's `negative_transfer_gap.jsonl`.

        Raises:
            FileError: If the file is missing or damaged, or has other content.
        """
        path = Path(path)
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise ValueError(f"more than {_MAX_BYTES} bytes")
            return _read(cls, json.loads(path.read_text(encoding="utf8").splitlines()[-1]))
        except (OSError, RecursionError, *_WRONG) as error:  # recursion: deeply nested JSON
            raise FileError(f"{path}: must be a negative-transfer gap, found {error!r}") from error


def _read(kind: type[Row], row: Mapping[str, Any]) -> Row:
    """A dataclass from the entries of a row, by the types of its fields."""
    values = {}
    # `field.type` is a string: with `from __future__ import annotations` none is evaluated.
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name not in row and field.default is not MISSING:
            continue  # a column that is newer than the row
        value = row[field.name]
        if field.type in ("int", "str"):
            if type(value).__name__ != field.type:  # `isinstance` would take true for an int
                raise TypeError(f"{field.name} {value!r}")
        elif field.type == "float":
            value = _number(value)
        elif field.type == "GapEstimate":
            value = GapEstimate(*map(_number, value))
        else:
            value = tuple(_read(IntervalGap, gap) for gap in value)
        values[field.name] = value
    return kind(**values)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _without_nan(value: Any) -> Any:  # noqa: ANN401 - a part of a row
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
