"""Checks of images and times by dtype and shape alone: no accelerator has to be waited for."""

from __future__ import annotations

import torch
from torch import Tensor

from ant_lightning.errors import ConfigError

_ORDER = "noised(x_start, noise, times), but q_sample(x_start, times, noise)"


def check_images(**images: Tensor) -> None:
    """Check that images are floating point: whole numbers are not in [-1, 1].

    Raises:
        ConfigError: If they are not.

    Examples:
        >>> import torch
        >>> from ant_lightning import EDM, ConfigError
        >>> pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
        >>> try:
        ...     EDM().noised(pixels, torch.zeros(1, 3, 8, 8), torch.tensor([1.0]))
        ... except ConfigError as error:
        ...     print(error)
        x_start: must be floating point in [-1, 1] (x_start / 127.5 - 1), found torch.uint8
    """
    for name, each in images.items():
        if not each.is_floating_point():
            hint = f" in [-1, 1] ({name} / 127.5 - 1)"
            if name == "noise":
                hint = f" ({_ORDER})"
            raise ConfigError(f"{name}: must be floating point{hint}, found {each.dtype}")


def check_real_times(process: object, times: object) -> None:
    """Check that times of a continuous process are not cells.

    Raises:
        ConfigError: If they are whole numbers, or not one for each image.

    Examples:
        >>> import torch
        >>> from ant_lightning import ConfigError, FlowMatching
        >>> try:
        ...     FlowMatching().log_snr_at(torch.tensor([500]))
        ... except ConfigError as error:
        ...     print(error)
        times: must be floating-point times of FlowMatching; process.times(cells, torch.rand(b)) makes them of the cells that clusters.sample draws, found torch.int64
    """  # noqa: E501 - one line of output
    if not (isinstance(times, Tensor) and times.is_floating_point()):
        found = times.dtype if isinstance(times, Tensor) else f"the {type(times).__name__} {times}"
        raise ConfigError(
            f"times: must be floating-point times of {type(process).__name__}; "
            "process.times(cells, torch.rand(b)) makes them of the cells that clusters.sample "
            f"draws, found {found}"
        )
    _check_one_each(times)


def check_timesteps(process: object, times: object) -> None:
    """Check that times of a discrete process are timesteps.

    Raises:
        ConfigError: If they are not int64 (or int32), or not one for each image.
    """
    # uint8 and bool would be masks where a table is indexed.
    if not (isinstance(times, Tensor) and times.dtype in (torch.int64, torch.int32)):
        found = times.dtype if isinstance(times, Tensor) else f"the {type(times).__name__} {times}"
        raise ConfigError(
            f"times: must be int64 timesteps of {type(process).__name__}, found {found}"
        )
    _check_one_each(times)


def _check_one_each(times: Tensor) -> None:
    if times.ndim > 1:
        raise ConfigError(
            f"times: must be [b], one for each image ({_ORDER}), found {list(times.shape)}"
        )
