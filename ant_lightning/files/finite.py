"""Checks for NaN and infinities in what is read from or written to files."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["not_finite"]


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that contain a NaN or an infinity, in order."""
    return [name for name, value in tensors.items() if not bool(value.isfinite().all())]
