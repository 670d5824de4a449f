"""Whether the numbers of a file, or of one to be written, are numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["not_finite"]


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that have a NaN or an infinity, in their order."""
    return [name for name, value in tensors.items() if not bool(value.isfinite().all())]
