"""Keeps the rows of `metrics.csv` over a resume, an evaluation and a kill."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from ant_lightning.files.atomic import write_text

if TYPE_CHECKING:
    import lightning as L


def keep_csv_rows(trainer: L.Trainer) -> None:
    """Make each `CSVLogger` append to an existing `metrics.csv`, which Lightning would delete."""
    # Other ranks write nothing, and must not touch the file.
    if getattr(rank_zero_only, "rank", None):
        return
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger) and logger._experiment is None:
            logger._experiment = _AddingWriter(logger.log_dir)


class _AddingWriter(ExperimentWriter):
    """Lightning's writer, but it appends to an existing file."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir=log_dir)
        path = Path(self.metrics_file_path)
        if path.is_file():
            text = path.read_text(encoding="utf8")
            self.metrics_keys = next(csv.reader(io.StringIO(text)), [])
            if text and not text.endswith("\n"):  # a kill cut off the last row
                with path.open("a", encoding="utf8") as file:
                    file.write("\n")

    def _check_log_dir_exists(self) -> None:
        """Do nothing, where Lightning's method deletes an existing `metrics.csv`."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        with path.open(encoding="utf8", newline="") as file:
            rows = list(csv.DictReader(file))
        text = io.StringIO(newline="")
        # "ignore": a row damaged by a kill may have more cells than the header.
        writer = csv.DictWriter(text, fieldnames=fieldnames, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        # Atomic: a kill in the middle must not lose the rows written so far.
        write_text(path, text.getvalue())
