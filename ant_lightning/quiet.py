"""What Lightning and PyTorch print on every run and nobody can act on is left out."""

from __future__ import annotations

import logging
import warnings

__all__ = ["keep_quiet"]

# Advertisements, facts that hold on every machine of a kind, and what our own lines say better.
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
)
_WARNINGS = (
    # The images of small data sets are in memory: processes that load would only cost.
    r"The '.*_dataloader' does not have many workers",
    # Logging goes by the steps of the run, not by those of an epoch.
    r"The number of training batches .* is smaller than the logging interval",
    # It was chosen.
    r"GPU available but not used",
    r"TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled",
    # Every image of the loaders of this package is on one rank.
    r"Using `DistributedSampler` with the dataloaders",
    # A run that is resumed goes on in its own folder, or was asked for another.
    r"Checkpoint directory .* exists and is not empty",
    r"The dirpath has changed from",
)
# An evaluation may have fewer callbacks than the training had.
_FEWER_CALLBACKS = r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"


def keep_quiet(command: str) -> None:
    """Leave out known lines and warnings, and the deprecations of third parties."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_wanted)
    for pattern in _WARNINGS if command == "fit" else (*_WARNINGS, _FEWER_CALLBACKS):
        warnings.filterwarnings("ignore", pattern)
    # Of their callers among each other, as this package raises none.
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)


def _wanted(record: logging.LogRecord) -> bool:
    return not any(line in record.getMessage() for line in _LINES)
