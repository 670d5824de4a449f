"""Paths and conversions of flow_matching, whose time is 1 - t and whose velocity is -v."""

from itertools import permutations

import pytest
import torch
from flow_matching_paths import PATHS
from stand_in_network import error, load

_, SCHEDULES = load("I_flow/fm_schedulers")
_, SAMPLES = load("I_flow/fm_path")
NAMES = sorted({key.partition("/")[0] for key in SAMPLES if "/" in key})
TYPES = {"velocity": "v", "epsilon": "eps", "target": "x0"}


@pytest.fixture(params=NAMES)
def path(request, monkeypatch):
    """A name, and the process; `vp2` is VP with other betas."""
    if request.param == "vp2":
        monkeypatch.setattr("ant_lightning.diffusion.flow._BETA_MIN", 0.3)
        monkeypatch.setattr("ant_lightning.diffusion.flow._BETA_RANGE", 11.7)
    return request.param, PATHS[request.param.replace("vp2", "vp")]()


def double(arrays, key):
    return torch.from_numpy(arrays[key]).double()


def test_the_files_have_every_path():
    assert set(NAMES) == set(PATHS) | {"vp2"}
    assert {key.partition("/")[0] for key in SCHEDULES if "/" in key} == set(NAMES)


def test_schedules(path):
    name, process = path
    times = 1 - double(SCHEDULES, "t")
    at = process.levels(torch.zeros(len(times), 1, dtype=torch.float64), times)
    for key, level, sign in (
        ("alpha_t", at.a, 1),
        ("sigma_t", at.s, 1),
        ("d_alpha_t", at.a_rate, -1),
        ("d_sigma_t", at.s_rate, -1),
    ):
        found = sign * torch.as_tensor(level, dtype=torch.float64).expand(len(times), 1)[:, 0]
        assert error(found, SCHEDULES[f"{name}/{key}"]) < 1e-10, key
    # Their signal-to-noise ratio is alpha / sigma, ours its square.
    found = process.times_at(2 * double(SCHEDULES, "snr").log())
    assert error(1 - found, SCHEDULES[f"{name}/snr_inverse"]) < 1e-10


def test_samples_targets_and_all_six_conversions(path):
    name, process = path
    t = 1 - double(SAMPLES, "t")
    noise, data = double(SAMPLES, "x_0"), double(SAMPLES, "x_1")
    x_t = process.noised(data, noise, t)
    assert error(x_t, SAMPLES[f"{name}/x_t"]) < 1e-10
    assert error(-process.target(data, noise, t), SAMPLES[f"{name}/dx_t"]) < 1e-10
    output = double(SAMPLES, f"{name}/f")
    for (first, kind), (second, wanted) in permutations(TYPES.items(), 2):
        given = -output if first == "velocity" else output
        found = process.convert(wanted, given, x_t, t, prediction_type=kind)
        found = -found if second == "velocity" else found
        assert error(found, SAMPLES[f"{name}/{first}_to_{second}"]) < 1e-10, (first, second)


def test_losses(path):
    name, process = path
    t, noise = 1 - double(SAMPLES, "t"), double(SAMPLES, "x_0")
    terms = process.losses(
        double(SAMPLES, f"{name}/f"),  # a network of SiT gives their velocity
        x_start=double(SAMPLES, "x_1"),
        x_t=double(SAMPLES, f"{name}/x_t"),
        times=t,
        noise=noise,
    )
    assert error(terms.loss, SAMPLES[f"{name}/loss"]) < 1e-10
