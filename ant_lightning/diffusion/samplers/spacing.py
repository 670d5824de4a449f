"""Which timesteps a sampler visits: the spacings of guided diffusion and of latent diffusion."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence


def space_timesteps(num_timesteps: int, section_counts: Sequence[int]) -> list[int]:
    """Choose timesteps: [0, T) is cut into equal sections, each visited at evenly spaced points.

    Args:
        num_timesteps: T.
        section_counts: Number of points in each section. Two or more points include the first and
            the last timestep of the section.

    Returns:
        The timesteps, increasing.

    Raises:
        ConfigError: If a count is negative or exceeds its section, or if all are 0.

    Reference:
        `space_timesteps` of guided-diffusion.

    Examples:
        >>> from ant_lightning.diffusion.samplers.spacing import space_timesteps
        >>> space_timesteps(10, [2, 3])
        [0, 4, 5, 7, 9]
    """
    if not section_counts or min(section_counts) < 0 or sum(section_counts) == 0:
        raise ConfigError(
            f"section_counts: must be at least 0 and not all 0, found {list(section_counts)}"
        )
    size, extra = divmod(num_timesteps, len(section_counts))
    timesteps: list[int] = []
    start = 0
    for section, count in enumerate(section_counts):
        length = size + (section < extra)
        if count > length:
            raise ConfigError(
                f"section_counts: must be at most {length} for section {section} of "
                f"{num_timesteps} timesteps, found {count}"
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        # Added up and not multiplied, as in the official code. The two differ in the last bit, and
        # at halves `round` would then pick another timestep.
        position = 0.0
        for _ in range(count):
            timesteps.append(start + round(position))
            position += stride
        start += length
    return timesteps


def strided_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """Choose timesteps 0, c, 2c, ... with the whole c that gives exactly `num_steps` of them.

    Raises:
        ConfigError: If there is none.

    Reference:
        The spacing "ddimN" of guided-diffusion; Song et al., "DDIM", arXiv 2010.02502.

    Examples:
        >>> from ant_lightning.diffusion.samplers.spacing import strided_timesteps
        >>> strided_timesteps(10, 5)
        [0, 2, 4, 6, 8]
    """
    for stride in range(1, num_timesteps):
        if len(range(0, num_timesteps, stride)) == num_steps:
            return list(range(0, num_timesteps, stride))
    raise ConfigError(
        f"num_steps: must be reached exactly by a whole stride through {num_timesteps} timesteps, "
        f"found {num_steps}; take a divisor or the even spacing"
    )


def latent_ddim_timesteps(
    num_timesteps: int, num_steps: int, *, quadratic: bool = False
) -> list[int]:
    """Choose timesteps as latent diffusion's DDIM does: 1, 1 + c, ..., with c = T // num_steps.

    If `num_steps` does not divide T, there are more than `num_steps` of them. If the last one would
    be T, the official code reads past the end of its tables; here that is an error.

    With `quadratic`, they are `1 + floor(x^2)` at `num_steps` evenly spaced x from 0 to
    `sqrt(0.8 T)`: dense near 0, where several coincide. Each timestep is returned once, so there
    may be fewer than `num_steps`; the official code repeats them as steps that do not change x.

    Raises:
        ConfigError: If the last timestep would not be below T.

    Reference:
        `make_ddim_timesteps` of latent-diffusion; Rombach et al., arXiv 2112.10752.

    Examples:
        >>> from ant_lightning.diffusion.samplers.spacing import latent_ddim_timesteps
        >>> latent_ddim_timesteps(1000, 4)
        [1, 251, 501, 751]
    """
    timesteps: list[int] = []
    if quadratic and num_steps > 0:
        squares = np.linspace(0, np.sqrt(num_timesteps * 0.8), num_steps) ** 2
        timesteps = sorted({int(square) + 1 for square in squares})
    elif 0 < num_steps <= num_timesteps:
        timesteps = [t + 1 for t in range(0, num_timesteps, num_timesteps // num_steps)]
    if not timesteps or timesteps[-1] >= num_timesteps:
        last = "1 + 0.8 T" if quadratic else "1 + k (T // num_steps)"
        raise ConfigError(
            f"num_steps: must be at least 1 and leave {last} below T = {num_timesteps} for spacing "
            f"{'ldm_quadratic' if quadratic else 'ldm'}, found {num_steps}"
        )
    return timesteps
