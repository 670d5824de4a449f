"""Random generators keyed by their purpose: no draw depends on the history of a run."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractContextManager

    from torch import Tensor

# (sqrt(5) - 1) / 2: the fractional parts of its multiples fill [0, 1) evenly at any length.
GOLDEN_RATIO = 0.6180339887498949


def run_seed(seed: int | None) -> int:
    """`seed`, or if `None` the seed of `lightning.seed_everything`, which is 0 if never called.

    Lightning keeps its seed in the environment variable `PL_GLOBAL_SEED`.
    """
    return int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed


def undisturbed(device: torch.device) -> AbstractContextManager[None]:
    """Context that restores PyTorch's generators of the CPU and of `device` when it ends."""
    # `fork_rng` always restores the CPU's generator; by default also that of every GPU.
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)


def keyed_seed(seed: int, stream: str, *keys: int) -> int:
    """A 63-bit seed that depends on every argument and on nothing else.

    Args:
        seed: The seed of the run.
        stream: What the numbers are for, for instance `"noise"`.
        keys: Further coordinates: step, rank, image index.

    Examples:
        >>> from ant_lightning.randomness import keyed_seed
        >>> keyed_seed(0, "noise", 7) == keyed_seed(0, "noise", 7)
        True
        >>> keyed_seed(0, "noise", 7) == keyed_seed(0, "noise", 8)
        False
    """
    # Not `hash`: Python salts the hash of a string anew in each process.
    text = "/".join([str(seed), stream, *map(str, keys)]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def keyed_generator(
    seed: int, stream: str, *keys: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A new generator on `device`, seeded by `keyed_seed`.

    Examples:
        >>> from ant_lightning.randomness import keyed_generator
        >>> torch.randperm(3, generator=keyed_generator(0, "order", 1)).sort().values
        tensor([0, 1, 2])
    """
    return torch.Generator(device).manual_seed(keyed_seed(seed, stream, *keys))


class ImageNoise:
    """Standard normal noise for a batch, with one generator for each image.

    An image's noise depends on the seed, the stream and its index, and not on its batch or the
    number of ranks.

    Args:
        indices: Index of each image of the batch.
        shape: Shape of one image, `(c, h, w)`.
        seed: The seed of the run.
        stream: What the noise is for.
        device: Device of the result. The noise is drawn on the CPU, so that devices agree.

    Examples:
        >>> from ant_lightning.randomness import ImageNoise
        >>> alone, batch = (ImageNoise(i, shape=(1, 2, 2), seed=0)() for i in ([5], [4, 5]))
        >>> torch.equal(alone[0], batch[1])
        True
    """

    def __init__(
        self,
        indices: Iterable[int],
        *,
        shape: tuple[int, ...],
        seed: int,
        stream: str = "sample",
        device: torch.device | str = "cpu",
    ) -> None:
        self._generators = [keyed_generator(seed, stream, int(index)) for index in indices]
        self._shape = shape
        self._device = device

    def __call__(self) -> Tensor:
        """The next noise of every image, `[b, *shape]` float32."""
        draws = [
            torch.randn(self._shape, generator=each, dtype=torch.float32)
            for each in self._generators
        ]
        return torch.stack(draws).to(self._device)
