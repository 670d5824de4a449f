"""Which samples of a data set are held out."""

from __future__ import annotations

import torch
from torch import Tensor

from ant_lightning.errors import ConfigError
from ant_lightning.randomness import keyed_generator


def split_positions(
    count: int,
    num_held_out: int | None,
    *,
    seed: int,
    stream: str = "map split",
    setting: str = "dataset",
    place: object = "the data set",
) -> tuple[Tensor, Tensor]:
    """Positions that are trained on, and those that are not, each in increasing order.

    Args:
        count: Samples of the data set.
        num_held_out: How many are held out; `None`: a tenth, at most 1,000.
        seed: Decides which ones.
        stream: Name of the random numbers.
        setting: The argument that says which images.
        place: What holds the images, for a message.

    Raises:
        ConfigError: If none would be left to train on, or there are too few to hold one out.

    Examples:
        >>> from ant_lightning.data.split import split_positions
        >>> train, held_out = split_positions(20, None, seed=0)
        >>> len(train), len(held_out), sorted([*train.tolist(), *held_out.tolist()]) == [*range(20)]
        (18, 2, True)
    """
    chosen = min(1000, max(1, count // 10)) if num_held_out is None else num_held_out
    if num_held_out is None and count < 2:
        raise ConfigError(
            f"{setting}: must hold at least 2 images, one to train on and one held out, found "
            f"{count} in {place}"
        )
    if not 1 <= chosen < count:
        raise ConfigError(
            f"num_held_out: must be at least 1 and below the {count} images in {place}, "
            f"found {chosen}"
        )
    order = torch.randperm(count, generator=keyed_generator(seed, stream))
    held_out, train = (part.sort().values for part in order.tensor_split([chosen]))
    return train, held_out
