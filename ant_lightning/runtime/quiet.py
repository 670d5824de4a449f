"""What a command prints besides its own lines: warnings as one line each, and no lines of Lightning
and PyTorch that appear in every run and need no action.
"""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

# Advertisements, facts about the machine, and what our own lines already say.
_LINES = (
    "Tip: For seamless cloud",
    "Seed set to ",
    "GPU available: ",
    "TPU available: ",
    "LOCAL_RANK: ",
    "Initializing distributed: ",
    "distributed_backend=",
    "You are using a CUDA device",
    "`Trainer.fit` stopped: `max_",
    "Restoring states from the checkpoint path",
    "Restored all states from the checkpoint",
    "Loaded model weights from the checkpoint",
    "batch will be used.",
    "batch per epoch will be used.",
    "100% of the batches",
)
_WARNINGS = (
    # Small data sets are in memory: loading processes would only add overhead.
    r"The '.*_dataloader' does not have many workers",
    # Logging intervals count steps of the run, not of an epoch.
    r"The number of training batches .* is smaller than the logging interval",
    # The user chose so.
    r"GPU available but not used",
    r"TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled",
    # Our loaders give each image to exactly one rank.
    r"Using `DistributedSampler` with the dataloaders",
    # A resumed run continues in its own folder, or the user chose another one.
    r"Checkpoint directory .* exists and is not empty",
    r"The dirpath has changed from",
)
# An evaluation may have fewer callbacks than the training had, and `--scores false` leaves one out.
_FEWER_CALLBACKS = r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"
_FEWER_SCORES = rf"{_FEWER_CALLBACKS}.*following callbacks: \['GenerationMetrics[^,]*\]"
_PACKAGES = {"ant_lightning", "lightning", "lightning_utilities"}


def keep_quiet(command: str) -> None:
    """Hide known lines and warnings, and third-party deprecations; other warnings are one line."""
    warn_in_lines()  # again: the import of Lightning sets another form
    for name in ("lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_wanted)
    fewer = _FEWER_SCORES if command == "fit" else _FEWER_CALLBACKS
    for pattern in (*_WARNINGS, fewer):
        warnings.filterwarnings("ignore", pattern)
    # All of these come from third parties: this package raises none.
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)


def warn_in_lines() -> None:
    """Print each warning as one line, `ant-lightning: warning: ...`, and once.

    Python's own rule forgets what was said whenever a filter changes, which torch does often.
    """
    warnings.formatwarning = _new_form()


def _new_form() -> Callable[..., str]:
    said = set()

    def form(
        message: object, category: type, filename: str, lineno: int, line: object = None
    ) -> str:
        text = " ".join(str(message).split())
        if text in said:
            return ""
        said.add(text)
        fewer = re.match(rf"{_FEWER_CALLBACKS}.*following callbacks: (.*)\.$", text)
        if fewer:
            text = f"trainer.callbacks: lacks some of the checkpoint, whose state ends: {fewer[1]}"
        ours = _PACKAGES.intersection([*Path(filename).parts, *category.__module__.split(".")])
        where = "" if ours else f" ({filename}:{lineno})"
        return f"ant-lightning: warning: {text}{where}\n"

    return form


def _wanted(record: logging.LogRecord) -> bool:
    return not any(line in record.getMessage() for line in _LINES)
