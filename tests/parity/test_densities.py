"""Densities of training times and loss weights of SD3 as diffusers has them, at their draws."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ant_lightning import FlowMatching, LogitNormal, Mode, Shifted, Uniform

FOLDER = Path(__file__).parents[1] / "golden" / "L_density"
FACTS = json.loads((FOLDER / "density.json").read_text())


def arrays(name):
    stored = np.load(FOLDER / f"{name}.npz")
    return {key: torch.from_numpy(stored[key]) for key in stored.files}


def density_of(case):
    numbers = FACTS["cases"][case]
    if case.startswith("logit_normal"):
        return LogitNormal(numbers["logit_mean"], numbers["logit_std"])
    return Mode(numbers["mode_scale"]) if case.startswith("mode") else Uniform()


@pytest.mark.parametrize("case", FACTS["cases"])
def test_draws(case):
    golden, density = arrays("density"), density_of(case)
    u, official = golden["u"], golden[f"{case}/official"]
    # diffusers maps u to the mode density in decreasing order.
    q = 1 - u if case.startswith("mode") else u
    torch.testing.assert_close(density.quantile(q), official, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(density.cdf(official), q, rtol=1e-9, atol=1e-12)
    # The same draw through the cells of a process.
    process = FlowMatching(density=density)
    cells = (official * 1000).long().clamp(max=999)
    below = density.cdf(cells.double() / 1000)
    mass = density.cdf((cells.double() + 1) / 1000) - below
    times = process.times(cells, (q - below) / mass)
    torch.testing.assert_close(times, official, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(process.density[cells], mass, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", [c for c in FACTS["cases"] if c.startswith("logit")])
def test_the_logit_normal_cdf_and_its_density(case):
    golden, density = arrays("density"), density_of(case)
    u = golden["u"]
    np.testing.assert_allclose(density.cdf(u), golden[f"{case}/cdf"], rtol=1e-12, atol=1e-15)
    t = u.clone().requires_grad_()
    (slope,) = torch.autograd.grad(density.cdf(t).sum(), t)
    np.testing.assert_allclose(slope, golden[f"{case}/density"], rtol=1e-9)


@pytest.mark.parametrize("case", [c for c in FACTS["cases"] if c.startswith("mode")])
def test_the_mode_density(case):
    golden, density = arrays("density"), density_of(case)
    q = (1 - golden["u"]).requires_grad_()
    (slope,) = torch.autograd.grad(density.quantile(q).sum(), q)
    np.testing.assert_allclose(1 / slope, golden[f"{case}/density_at_official"], rtol=1e-9)


def test_the_training_scripts_index_a_descending_table():
    """What they make of u is our static shift at 1 - u, to the resolution of their table."""
    golden = arrays("density")
    u = golden["training/indices"].double() / 1000
    sigma = Shifted(Uniform(), shift=FACTS["training_shift"]).quantile(1 - u)
    # Their float32 table has the entries shift(1), .., shift(1 / 1000).
    np.testing.assert_allclose(golden["training/sigmas"], sigma, rtol=1e-6)
    np.testing.assert_allclose(golden["training/timesteps"], 1000 * sigma, rtol=1e-6)


@pytest.mark.parametrize("name", ["sigma_sqrt", "cosmap"])
def test_loss_weights(name):
    golden = arrays("loss_weighting")
    weights = FlowMatching(loss_weighting=name).loss_weights_at(golden["sigma"])
    np.testing.assert_allclose(weights, golden[f"{name}/exact"], rtol=1e-12)
    tolerance = 1e-7 if name == "sigma_sqrt" else 1e-12
    np.testing.assert_allclose(weights, golden[f"{name}/official"], rtol=tolerance)
