"""The negative-transfer gap: loss of a specialist minus loss of the multi-task model."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from ant_lightning.errors import ConfigError, check_at_least, check_between
from ant_lightning.randomness import keyed_generator

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jaxtyping import Float
    from torch import Tensor


class GapEstimate(NamedTuple):
    """A gap with its bootstrap interval; below 0 is negative transfer.

    Attributes:
        value: Specialist minus multi-task model.
        low: Lower end of the interval; NaN without resamples.
        high: Upper end of the interval; NaN without resamples.
    """

    value: float
    low: float
    high: float


def negative_transfer_gap(
    specialists: Sequence[Float[Tensor, "n ..."]],
    multitask: Float[Tensor, "n ..."],
    *,
    statistic: Callable[[Tensor], float],
    num_resamples: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[GapEstimate]:
    """Difference of a statistic between each specialist and the multi-task model.

        NTG = S(specialist) - S(multi-task)

    S is the mean held-out loss inside an interval (loss gap), or the Fréchet distance between
    features of generated and of real images (FID gap, the paper's). For the latter, the specialist
    samples inside its interval and the multi-task model outside. If NTG < 0, the multi-task model
    suffers negative transfer in the interval.

    Row i of every tensor belongs to the same image and noise. A bootstrap sample takes the same
    rows of both models, so the noise that they share cancels. A resample has fewer distinct images,
    which raises a Fréchet distance. The draws are therefore shifted so that their mean is the gap.

    Args:
        specialists: Values of each specialist, one row for each image.
        multitask: Values of the multi-task model.
        statistic: S, a function of any selection of rows.
        num_resamples: Bootstrap samples; 0 for no interval.
        confidence: Confidence of the percentile interval.
        seed: Seed of the bootstrap.

    Raises:
        ConfigError: If there is no specialist, shapes differ, there are fewer than 2 rows, or a
            setting is out of its range.

    Reference:
        Go et al., "Addressing Negative Transfer in Diffusion Models", section 3, arXiv 2306.00354.

    Examples:
        >>> import torch
        >>> from ant_lightning import negative_transfer_gap
        >>> multitask = torch.tensor([0.5, 0.7, 0.9, 0.7])  # losses of four images
        >>> gaps = negative_transfer_gap(
        ...     [multitask - 0.1], multitask, statistic=lambda losses: float(losses.mean())
        ... )
        >>> [round(each, 3) for each in gaps[0]]
        [-0.1, -0.1, -0.1]
    """
    check_at_least(0, num_resamples=num_resamples)
    check_between(0, 1, confidence=confidence)
    shapes = [tuple(each.shape) for each in specialists]
    if not shapes or len(multitask) < 2 or any(s != tuple(multitask.shape) for s in shapes):
        raise ConfigError(
            "specialists: must be at least one, measured on the multi-task model's images, 2 or "
            f"more; found shapes {shapes} and {tuple(multitask.shape)}"
        )

    def gaps_of(rows: Tensor) -> Tensor:
        """The gap of every specialist on the same rows."""
        values = [float(statistic(each[rows])) for each in specialists]
        return torch.tensor(values, dtype=torch.float64) - float(statistic(multitask[rows]))

    n = len(multitask)
    gaps = gaps_of(torch.arange(n))
    if not num_resamples:
        return [GapEstimate(float(gap), torch.nan, torch.nan) for gap in gaps]
    generator = keyed_generator(seed, "negative transfer bootstrap")
    draws = torch.stack(
        [gaps_of(torch.randint(n, (n,), generator=generator)) for _ in range(num_resamples)]
    )
    draws += gaps - draws.mean(0)  # removes the bias of a statistic that depends on n
    tail = (1 - confidence) / 2
    low, high = draws.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    columns = zip(gaps.tolist(), low.tolist(), high.tolist(), strict=True)
    return [GapEstimate(*each) for each in columns]
