"""Hides lines and warnings of Lightning and PyTorch that appear in every run and need no action."""

from __future__ import annotations

import logging
import warnings

__all__ = ["keep_quiet"]

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
# An evaluation may have fewer callbacks than the training had.
_FEWER_CALLBACKS = r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"


def keep_quiet(command: str) -> None:
    """Hide known lines and warnings, and third-party deprecation warnings."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_wanted)
    for pattern in _WARNINGS if command == "fit" else (*_WARNINGS, _FEWER_CALLBACKS):
        warnings.filterwarnings("ignore", pattern)
    # All of these come from third parties: this package raises none.
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)


def _wanted(record: logging.LogRecord) -> bool:
    return not any(line in record.getMessage() for line in _LINES)
