"""The Inception score: how sure a classifier is of each image, and how varied its answers are."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ant_lightning.errors import ConfigError, check_at_least


class MeanAndStd(NamedTuple):
    """Mean and standard deviation (denominator n) over splits or subsets."""

    mean: float
    std: float


def inception_score(
    logits: Tensor,
    *,
    num_splits: int = 10,
    split_size: int | None = None,
    seed: int | None = 2020,
) -> MeanAndStd:
    """The Inception score of logits `[n, c]`: mean and spread over splits, in float64.

        exp(1/n sum_i KL(p(y | x_i) || 1/n sum_j p(y | x_j)))

    There are two ways to split. `num_splits` is torch-fidelity's: images are shuffled by `seed`,
    then split i ends at (i + 1) n // num_splits. `split_size` is the ADM evaluator's: splits of
    that many images, where the last may be shorter but has the same weight in the mean (it uses
    5000 and `seed=None`). Unlike torch-fidelity's function, this one is not NaN if a class has
    probability 0 for all images of a split.

    Args:
        logits: Class scores `[n, c]`.
        num_splits: Number of splits; ignored if `split_size` is given.
        split_size: Images per split.
        seed: Seed of the shuffle, drawn as torch-fidelity does; `None` keeps the order.

    Raises:
        ConfigError: If there are no logits, or more splits than images.

    Reference:
        Salimans et al., "Improved Techniques for Training GANs", section 4, arXiv 1606.03498.

    Examples:
        >>> import torch
        >>> from ant_lightning import inception_score
        >>> certain_and_varied = 100 * torch.eye(4)
        >>> inception_score(certain_and_varied, num_splits=1)
        MeanAndStd(mean=4.0, std=0.0)
    """
    if logits.ndim != 2 or len(logits) == 0:
        raise ConfigError(f"logits: must have shape [n, c] with n >= 1, found {list(logits.shape)}")
    num_images = len(logits)
    if split_size is not None:
        check_at_least(1, split_size=split_size)
        edges = [*range(0, num_images, split_size), num_images]
    else:
        if not 1 <= num_splits <= num_images:
            raise ConfigError(
                f"num_splits: must be 1 to the number of images ({num_images}), found {num_splits}"
            )
        edges = [i * num_images // num_splits for i in range(num_splits + 1)]
    if seed is not None:
        order = np.random.RandomState(seed).permutation(num_images)
        logits = logits[torch.from_numpy(order).to(logits.device)]
    log_p = logits.double().log_softmax(1)
    scores = []
    for start, stop in pairwise(edges):
        split = log_p[start:stop]
        # log of the split's mean probability of each class, 1/n sum_j p(y | x_j).
        log_marginal = split.logsumexp(0) - np.log(stop - start)
        divergence = (split.exp() * (split - log_marginal)).sum(1).mean()
        scores.append(divergence.exp().item())
    return MeanAndStd(float(np.mean(scores)), float(np.std(scores)))
