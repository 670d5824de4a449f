"""Which timesteps a sampler visits: the spacings of guided diffusion and of latent diffusion."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ant_lightning.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["latent_ddim_timesteps", "space_timesteps"]


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> list[int]:
    """Choose timesteps: [0, T) is cut in equal sections, each visited at evenly spaced points.

    Args:
        num_timesteps: T.
        section_counts: how many points in each section, as integers or as "10,15,20"; the first
            and the last timestep of a section are among them. Or "ddimN": every c-th timestep
            from 0 on, with the whole c that gives exactly N.

    Returns:
        The timesteps, increasing.

    Raises:
        ConfigError: a count is not a whole number, is negative or exceeds its section, all are
            0, or no whole stride gives N.

    Reference: guided-diffusion, `space_timesteps`; Song et al., DDIM, arXiv 2010.02502.
    """
    if isinstance(section_counts, str) and section_counts.startswith("ddim"):
        return _strided(num_timesteps, _whole_numbers(section_counts.removeprefix("ddim"))[0])
    counts = (
        _whole_numbers(section_counts) if isinstance(section_counts, str) else list(section_counts)
    )
    if not counts or min(counts) < 0 or sum(counts) == 0:
        raise ConfigError(
            f"section_counts must hold non-negative counts, one of them positive, found {counts}"
        )
    size, extra = divmod(num_timesteps, len(counts))
    timesteps: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if count > length:
            raise ConfigError(
                f"section_counts: section {section} of {num_timesteps} timesteps has {length}, "
                f"so its count must not exceed that, found {count}"
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        # The official code adds the stride up instead of multiplying; the rounding of halves
        # depends on it.
        position = 0.0
        for _ in range(count):
            timesteps.append(start + round(position))
            position += stride
        start += length
    return timesteps


def latent_ddim_timesteps(
    num_timesteps: int, num_steps: int, *, quadratic: bool = False
) -> list[int]:
    """Choose timesteps as latent diffusion's DDIM does: 1, 1 + c, ..., with c = T // num_steps.

    There are more than `num_steps` of them where that does not divide T. The official code runs
    past its tables for `num_steps` near T; here that is an error.

    If `quadratic`, they are `1 + floor(x^2)` at `num_steps` evenly spaced x from 0 to
    `sqrt(0.8 T)`: dense near 0, where some fall together. Each is given once, so there may be
    fewer than `num_steps`; the official code has the others again, as steps that leave x as it is.

    Raises:
        ConfigError: the last timestep would not be below T.

    Reference: Rombach et al., arXiv 2112.10752, `make_ddim_timesteps` of its code.
    """
    if quadratic and num_steps > 0:
        squares = np.linspace(0, np.sqrt(num_timesteps * 0.8), num_steps) ** 2
        timesteps = sorted({int(square) + 1 for square in squares})
        rule = "1 + 0.8 T below"
    else:
        stride = num_timesteps // num_steps if num_steps > 0 else 0
        timesteps = [t + 1 for t in range(0, num_timesteps, stride)] if stride else []
        rule = "1 + k (T // num_steps) below"
    if not timesteps or timesteps[-1] >= num_timesteps:
        raise ConfigError(
            f"num_steps must be at least 1 and leave {rule} T = {num_timesteps} for spacing = "
            f"{'ldm_quadratic' if quadratic else 'ldm'}, found {num_steps}"
        )
    return timesteps


def _whole_numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"section_counts must be whole numbers like '10,15,20' or 'ddim50', found {text!r}"
        ) from error


def _strided(num_timesteps: int, count: int) -> list[int]:
    for stride in range(1, num_timesteps):
        if len(range(0, num_timesteps, stride)) == count:
            return list(range(0, num_timesteps, stride))
    raise ConfigError(
        f"no whole stride visits exactly {count} of {num_timesteps} timesteps ('ddim{count}'); "
        f"choose a divisor, or even spacing"
    )
