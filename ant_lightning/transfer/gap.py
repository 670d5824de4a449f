"""The negative-transfer gap: does a model trained on one interval do better there than on all?"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from ant_lightning.errors import ConfigError
from ant_lightning.randomness import keyed_generator

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jaxtyping import Float
    from torch import Tensor

__all__ = ["GapEstimate", "negative_transfer_gap"]


class GapEstimate(NamedTuple):
    """A gap with its bootstrap interval; below 0 is negative transfer.

    Attributes:
        value: Specialist minus multi-task model.
        low: Lower end, NaN without resamples.
        high: Upper end, NaN without resamples.
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
    """How much lower a statistic is with each specialist than with the multi-task model.

        NTG = S(specialist) - S(multi-task),

    with S the mean of held-out losses inside an interval (loss gap), or the Fréchet distance of
    features of generated images to real ones, the specialist sampling inside its interval and the
    multi-task model outside (FID gap, the paper's). NTG < 0: the multi-task model suffers negative
    transfer in that interval.

    Row i of all tensors belongs to the same image and noise, so a bootstrap sample draws the same
    rows of both sides: what is common to them cancels. A resample has fewer distinct images, which
    raises a Fréchet distance; the draws are moved by the difference between their mean and the
    gap, so that the interval lies about the gap.

    Args:
        specialists: What was measured with each specialist, a row for each image.
        multitask: The same with the multi-task model.
        statistic: S, of any choice of rows.
        num_resamples: Bootstrap samples; 0 for no interval.
        confidence: Of the interval between percentiles.
        seed: Of the bootstrap.

    Raises:
        ConfigError: If there is no specialist, shapes differ, there are fewer than 2 rows, or a
            setting is out of its range.

    Reference:
        Go et al., "Addressing Negative Transfer in Diffusion Models", section 3, arXiv 2306.00354.
    """
    if num_resamples < 0 or not 0 < confidence < 1:
        found = f"{num_resamples} and {confidence}"
        raise ConfigError(f"num_resamples, confidence: must be >= 0 and in (0, 1), found {found}")
    shapes = [tuple(each.shape) for each in specialists]
    if not shapes or len(multitask) < 2 or any(s != tuple(multitask.shape) for s in shapes):
        raise ConfigError(
            "specialists: must be at least one, measured on the multi-task model's images, 2 or "
            f"more; found shapes {shapes} and {tuple(multitask.shape)}"
        )
    gaps = _gaps(specialists, multitask, statistic)
    if not num_resamples:
        return [GapEstimate(float(gap), torch.nan, torch.nan) for gap in gaps]
    generator = keyed_generator(seed, "negative transfer bootstrap")
    draws = []
    for _ in range(num_resamples):
        rows = torch.randint(len(multitask), (len(multitask),), generator=generator)
        draws.append(_gaps([each[rows] for each in specialists], multitask[rows], statistic))
    spread = torch.stack(draws)
    centred = spread - spread.mean(0) + gaps
    tail = (1 - confidence) / 2
    low, high = centred.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    ends = zip(gaps.tolist(), low.tolist(), high.tolist(), strict=True)
    return [GapEstimate(*each) for each in ends]


def _gaps(
    specialists: Sequence[Tensor], multitask: Tensor, statistic: Callable[[Tensor], float]
) -> Tensor:
    """The gap of each specialist, `[s]` float64."""
    values = torch.tensor([float(statistic(each)) for each in specialists], dtype=torch.float64)
    return values - float(statistic(multitask))
