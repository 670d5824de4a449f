"""What learned log-variances are fitted to: losses without the values that would throw them off."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MAX_RATIO", "check_min_loss", "fitted_losses"]

MAX_RATIO = 100.0


def check_min_loss(min_loss: float) -> float:
    """`min_loss`, checked.

    Raises:
        ConfigError: If it is negative or not finite.
    """
    if not 0 <= min_loss < float("inf"):
        raise ConfigError(f"min_loss: must be at least 0 and finite, found {min_loss}")
    return min_loss


def fitted_losses(losses: Tensor, settled: Tensor, *, min_loss: float) -> Tensor:
    """The losses, detached, within `min_loss` and 100 times what the log-variances stand for.

    A log-variance is outside gradient clipping, and its gradient is linear in the loss. A single
    loss 1e8 times too large would stay in Adam's second moment for 30,000 steps, during which
    the log-variance hardly moves; with the limit it is back after some hundred.

    Args:
        losses: Any shape.
        settled: The losses at which the log-variances would stay as they are, same shape.
        min_loss: The least loss; 0 for none.
    """
    return losses.detach().clamp(min=min_loss).minimum(MAX_RATIO * settled.detach())
