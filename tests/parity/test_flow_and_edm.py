"""Paths, conversions and losses of SiT; preconditioning and losses of EDM."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ant_lightning import (
    EDM,
    EDMPreconditioning,
    FlowMatching,
    IDDPMPreconditioning,
    LogNormal,
    VEPreconditioning,
    VPPreconditioning,
)

GOLDEN = Path(__file__).parents[1] / "golden"
PATHS = {"Linear": "linear", "GVP": "gvp", "VP": "vp"}
TYPES = {"velocity": "v", "noise": "eps", "score": "score", "x1": "x0"}
# SiT's time and velocity run the other way.
SIGNS = {"velocity": -1, "noise": 1, "score": 1, "x1": 1}


def facts(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def arrays(name):
    stored = np.load(GOLDEN / f"{name}.npz")
    return {key: torch.from_numpy(stored[key]) for key in stored.files}


def close(found, wanted, tolerance):
    """Within a tolerance relative to the largest entry, as the golden files define it."""
    error, scale = float((found - wanted).abs().max()), float(wanted.abs().max())
    assert error <= tolerance * scale, f"{error / scale:.2e} > {tolerance}"


@pytest.mark.parametrize("name", PATHS)
def test_paths_of_sit(name):
    golden = arrays("I_flow/sit_paths")
    process = FlowMatching(PATHS[name])
    t = 1 - golden["t"]
    at = process.levels(torch.zeros(len(t), 1, dtype=torch.float64), t)
    a_rate, s_rate, det = (
        torch.as_tensor(each, dtype=torch.float64).expand(len(t), 1)
        for each in (at.a_rate, at.s_rate, at.det)
    )
    close(at.a[:, 0], golden[f"{name}/alpha"], 1e-11)
    close(at.s[:, 0], golden[f"{name}/sigma"], 1e-11)
    close(-a_rate[:, 0], golden[f"{name}/d_alpha"], 1e-11)
    close(-s_rate[:, 0], golden[f"{name}/d_sigma"], 1e-11)
    close((det * at.s / at.a)[:, 0], golden[f"{name}/drift_var"], 1e-11)
    x_t = process.noised(golden["x1"], golden["x0"], 1 - golden["t_batch"])
    close(x_t, golden[f"{name}/x_t"], 1e-11)
    target = process.target(golden["x1"], golden["x0"], 1 - golden["t_batch"])
    close(-target, golden[f"{name}/u_t"], 1e-11)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("first", TYPES)
@pytest.mark.parametrize("second", TYPES)
def test_all_twelve_conversions(name, first, second):
    if first == second:
        return
    golden = arrays("I_flow/sit_paths")
    process, t = FlowMatching(PATHS[name]), 1 - golden["t_batch"]
    x_t = golden[f"{name}/x_t"]
    given = SIGNS[first] * golden[f"{name}/f"]
    found = process.convert(TYPES[second], given, x_t, t, prediction_type=TYPES[first])
    close(SIGNS[second] * found, golden[f"{name}/exact/{first}_to_{second}"], 1e-10)
    back = process.convert(TYPES[first], found, x_t, t, prediction_type=TYPES[second])
    close(back, given, 1e-10)


@pytest.mark.parametrize("case", facts("I_flow/sit_losses")["cases"])
def test_losses_of_sit(case):
    golden, settings = arrays("I_flow/sit_losses"), facts("I_flow/sit_losses")["cases"][case]
    *custom, name, kind, weight = case.split("/")
    # SiT ignores weights and, but for VP, the given eps when the velocity is predicted; we refuse.
    ignored = kind == "velocity"
    process = FlowMatching(
        PATHS[name],
        prediction_type=TYPES[kind],
        loss_weighting=None if ignored or weight == "none" else weight,
        train_eps=0.02 if custom and not (ignored and name != "VP") else None,
    )
    low, high = settings["interval"]
    assert process.edges[[0, -1]].tolist() == pytest.approx([1 - high, 1 - low], rel=1e-12)
    prefix = "/".join([*custom, name, kind])
    t = golden[f"{prefix}/t"]
    # Uniform times: SiT's are u (t1 - t0) + t0.
    u = (1 - t - (1 - high)) / (high - low) * process.num_timesteps
    cells = u.long().clamp(max=process.num_timesteps - 1)
    times = process.times(cells, u - cells)
    torch.testing.assert_close(times, 1 - t, rtol=1e-12, atol=1e-14)
    times = 1 - t
    x_t = process.noised(golden["x1"], golden["x0"], times)
    close(x_t, golden[f"{prefix}/x_t"], 1e-11)
    x_in, told = process.network_inputs(x_t, times)
    assert x_in is x_t
    torch.testing.assert_close(told.double(), t, rtol=1e-7, atol=0)
    output = golden[f"{prefix}/model_output"].requires_grad_()
    terms = process.losses(output, x_start=golden["x1"], x_t=x_t, times=times, noise=golden["x0"])
    close(terms.loss.detach(), golden[f"{case}/loss"], 1e-11)
    terms.loss.sum().backward()
    close(output.grad, golden[f"{case}/grad"], 1e-11)


@pytest.mark.parametrize("row", facts("I_flow/sit_intervals")["rows"])
def test_training_intervals_of_sit(row):
    given = row["given_train_eps"]
    if row["prediction"] == "velocity" and row["path"] != "VP":
        given = None  # ignored by SiT, refused here
    process = FlowMatching(
        PATHS[row["path"]], prediction_type=TYPES[row["prediction"]], train_eps=given
    )
    low, high = row["train"]
    assert process.edges[[0, -1]].tolist() == pytest.approx([1 - high, 1 - low], rel=1e-12)


PRECONDITIONINGS = {
    "edm": EDMPreconditioning(),
    "edm_sigma_data2": EDMPreconditioning(sigma_data=1.0),
    "vp": VPPreconditioning(),
    "vp2": VPPreconditioning(beta_d=15.0, beta_min=0.2, num_levels=500),
    "ve": VEPreconditioning(),
    "ve2": VEPreconditioning(sigma_min=0.05, sigma_max=60.0),
    "iddpm": IDDPMPreconditioning(),
    "iddpm2": IDDPMPreconditioning(c_1=0.002, c_2=0.01, num_levels=200),
}


def stand_in(x, t, y=0.0):
    t, y = (torch.as_tensor(each, dtype=x.dtype).view(-1, 1, 1, 1) for each in (t, y))
    return 0.8 * torch.tanh(0.7 * x + 0.35 * t + 0.09 * y) - 0.3 * x


@pytest.mark.parametrize("case", PRECONDITIONINGS)
def test_preconditioning(case):
    golden, settings = arrays("J_edm/precond"), facts("J_edm/precond")["cases"][case]
    preconditioning = PRECONDITIONINGS[case]
    sigma, x = golden["sigma"], golden["x"]
    for name in ("c_skip", "c_out", "c_in", "c_noise"):
        found = getattr(preconditioning, name)(sigma)
        np.testing.assert_allclose(found, golden[f"{case}/{name}"], rtol=1e-9, atol=1e-14)
    process = EDM(preconditioning)
    x_in, _ = process.network_inputs(x, sigma)
    output = stand_in(x_in, preconditioning.c_noise(sigma))
    close(process.to_x_start(output, x, sigma), golden[f"{case}/D"], 1e-9)
    if not case.startswith("edm"):
        found = preconditioning.sigma_range
        np.testing.assert_allclose(found, (settings["sigma_min"], settings["sigma_max"]), rtol=1e-9)
    if case.startswith("iddpm"):
        np.testing.assert_allclose(preconditioning.table, golden[f"{case}/u"], rtol=1e-9)
        rounded = preconditioning.table[preconditioning.index(sigma)]
        np.testing.assert_allclose(rounded, golden[f"{case}/round_sigma"], rtol=1e-9)
    if case.startswith("vp"):
        np.testing.assert_allclose(preconditioning.t(sigma), golden[f"{case}/sigma_inv"], rtol=1e-9)


def test_labels_reach_the_preconditioned_network():
    golden = arrays("J_edm/precond")
    process, sigma, x = EDM(), golden["sigma"], golden["x"]
    x_in, _ = process.network_inputs(x, sigma)
    labels = golden["labels"].argmax(1)
    output = stand_in(x_in, process.preconditioning.c_noise(sigma), labels)
    close(process.to_x_start(output, x, sigma), golden["edm_labels/D"], 1e-9)


@pytest.mark.parametrize("case", facts("J_edm/losses")["cases"])
def test_losses_of_edm(case):
    golden, settings = arrays("J_edm/losses"), facts("J_edm/losses")["cases"][case]
    numbers = settings["loss_kwargs"]
    preconditioning = PRECONDITIONINGS["edm_sigma_data2" if case == "edm2" else case]
    density = LogNormal(numbers.get("P_mean", -1.2), numbers.get("P_std", 1.2))
    process = EDM(preconditioning, density=density)
    sigma = golden[f"{case}/sigma"]
    if case.startswith("edm"):  # the draws are ours: the quantile at u = Phi(z)
        u = torch.special.ndtr(golden["rnd_normal"].flatten())
        ends = torch.tensor([-math.inf]).double(), torch.tensor([math.inf]).double()
        z = density.inside(ends[0].expand_as(u), ends[1].expand_as(u), u)
        np.testing.assert_allclose(z.exp(), sigma, rtol=1e-9)
    x_t = process.noised(golden["images"], golden["n"], sigma)
    x_in, _ = process.network_inputs(x_t, sigma)
    output = stand_in(x_in, preconditioning.c_noise(sigma)).requires_grad_()
    d = process.to_x_start(output, x_t, sigma)
    close(d.detach(), golden[f"{case}/D"], 1e-9)
    terms = process.losses(
        output, x_start=golden["images"], x_t=x_t, times=sigma, noise=golden["n"]
    )
    # Theirs is a sum over channels and pixels.
    wanted = golden[f"{case}/loss"].flatten(1)
    close(terms.loss.detach() * wanted.shape[1], wanted.sum(1), 1e-9)
    terms.loss.sum().backward()
    # By the chain rule through D = c_skip x + c_out F.
    c_out = preconditioning.c_out(sigma).view(-1, 1, 1, 1)
    close(output.grad * wanted.shape[1], golden[f"{case}/grad_D"] * c_out, 1e-9)
