"""What is not a time, an image or a schedule is refused in one line, whatever the process."""

import pytest
import torch
from process_cases import PROCESSES

from ant_lightning import (
    ConfigError,
    DiscreteDiffusion,
    LinearSchedule,
    NoiseSchedule,
    TableSchedule,
    ZeroTerminalSNR,
)

B, SHAPE = 3, (3, 1, 4, 4)


def calls(process, times, x, noise):
    """All public methods that take times."""
    return {
        "levels": lambda: process.levels(x, times),
        "log_snr_at": lambda: process.log_snr_at(times),
        "network_inputs": lambda: process.network_inputs(x, times),
        "noised": lambda: process.noised(x, noise, times),
        "to_x_start": lambda: process.to_x_start(noise, x, times, prediction_type="eps"),
        "to_v": lambda: process.to_v(noise, x, times, prediction_type="eps"),
        "losses": lambda: process.losses(noise, x_start=x, x_t=x, times=times, noise=noise),
        "target": lambda: process.target(x, noise, times),
    }


@pytest.mark.parametrize("name", PROCESSES)
def test_cells_are_no_times_and_pixels_no_images(name):
    process = PROCESSES[name]()
    cells = torch.tensor([0, 500, 999])
    good = process.times(cells, torch.full((B,), 0.5, dtype=torch.float64))
    discrete = isinstance(process, DiscreteDiffusion)
    x, noise = torch.zeros(SHAPE), torch.ones(SHAPE)
    for wrong in (good.double() if discrete else cells, good.to(torch.uint8), 0.5):
        for method, call in calls(process, wrong, x, noise).items():
            if discrete and method in ("losses", "target"):  # of eps and x0, at weight 1
                continue
            with pytest.raises(ConfigError, match=r"^times: must be (floating|int64).*found") as e:
                call()
            assert "\n" not in str(e.value), method
    pixels = torch.zeros(SHAPE, dtype=torch.uint8)
    for method, call in calls(process, good, pixels, noise).items():
        if method != "log_snr_at":
            with pytest.raises(ConfigError, match=r"^x\w*: must be floating .*found torch.uint8"):
                call()
    with pytest.raises(ConfigError, match=r"^noise: must be floating point .*torch.int64$"):
        process.noised(x, noise.long(), good)
    with pytest.raises(ConfigError, match=r"^\w+: must be .*noised\(x_start, noise, times|^times"):
        process.noised(x, good, noise)
    for call in calls(process, good, x, noise).values():
        call()


def test_q_sample_is_noised_in_another_order():
    process, x, noise = DiscreteDiffusion(), torch.zeros(SHAPE), torch.randn(SHAPE)
    t = torch.tensor([0, 10, 999], dtype=torch.int32)
    assert torch.equal(process.q_sample(x, t, noise), process.noised(x, noise, t))
    with pytest.raises(ConfigError, match=r"^x_start: must be floating point in \[-1, 1\]"):
        process.q_sample(x.byte(), t, noise)
    with pytest.raises(ConfigError, match=r"^times: must be int64 timesteps of DiscreteDiffusion"):
        process.q_sample(x, noise, t)


def schedule_of(values, num_timesteps=None):
    class Mine(NoiseSchedule):
        def _betas(self):
            return values

    return Mine(num_timesteps or len(values))


def test_schedules_that_are_none():
    betas = LinearSchedule()()
    for wrong, found in (
        (LinearSchedule, "the class LinearSchedule"),
        (betas, "a Tensor"),
        (None, "None"),
    ):
        with pytest.raises(ConfigError, match=f"^schedule: must be a NoiseSchedule.* {found}$"):
            DiscreteDiffusion(wrong)
    with pytest.raises(ConfigError, match=r"^Mine: must return betas as a tensor \[9\].*\[1000\]$"):
        DiscreteDiffusion(schedule_of(betas, 9))
    with pytest.raises(ConfigError, match=r"^Mine: must return betas as a tensor .* a list$"):
        DiscreteDiffusion(schedule_of(betas.tolist()))
    abar = torch.cumprod(1 - betas, 0)
    for wrong in (schedule_of(abar), TableSchedule(abar.tolist())):
        with pytest.raises(ConfigError, match=r"not alphas_cumprod .* from 0.9999 to 4.036e-05$"):
            DiscreteDiffusion(wrong)
    DiscreteDiffusion(schedule_of(betas.flip(0)))  # falling betas are a process
    process = DiscreteDiffusion(ZeroTerminalSNR(LinearSchedule()), prediction_type="v")
    process.respace(range(900, 1000))  # begins with a beta near 1
