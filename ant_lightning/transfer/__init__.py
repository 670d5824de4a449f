"""Negative transfer: what training on all tasks costs each of them."""

from ant_lightning.transfer.gap import GapEstimate, negative_transfer_gap
from ant_lightning.transfer.matrix import transfer_matrix
from ant_lightning.transfer.result import IntervalGap, TransferGapResult

__all__ = [
    "GapEstimate",
    "IntervalGap",
    "TransferGapResult",
    "negative_transfer_gap",
    "transfer_matrix",
]
