"""EDM2's learning rate, learned log-variance and power-function averages (golden/K_edm2)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ant_lightning import ContinuousUncertainty, InverseSqrtLR
from ant_lightning.callbacks.power_function import (
    exponent_of,
    length_of,
    power_decay,
    profile_coefficients,
)

FOLDER = Path(__file__).parents[1] / "golden" / "K_edm2"


def _settings(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def _arrays(name):
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


@pytest.mark.parametrize("batch", [256, 2048])
@pytest.mark.parametrize("case", _settings("learning_rate")["settings"])
def test_the_learning_rate_is_edm2s(case, batch):
    settings, golden = _settings("learning_rate")["settings"][case], _arrays("learning_rate")
    optimizer = torch.optim.Adam([torch.zeros(1)], lr=settings["ref_lr"])
    images = settings["rampup_Mimg"] * 1e6
    scheduler = InverseSqrtLR(
        optimizer,
        reference_steps=int(settings["ref_batches"]),
        warmup_steps=images / batch,  # not whole, in these settings
    )
    found = [settings["ref_lr"] * scheduler.factor(n / batch) for n in golden["cur_nimg"]]
    np.testing.assert_allclose(found, golden[f"{case}/batch{batch}"], rtol=1e-12, atol=0)
    assert optimizer.param_groups[0]["lr"] == (0 if images else settings["ref_lr"])


@pytest.mark.parametrize("case", _settings("loss")["cases"])
def test_continuous_uncertainty_is_edm2s_loss(case):
    golden = {n: torch.from_numpy(array) for n, array in _arrays("loss").items()}
    sigma, output = golden[f"{case}/sigma"], golden[f"{case}/D"].requires_grad_()
    data = _settings("loss")["cases"][case]["kwargs"]["sigma_data"]
    weight = (sigma**2 + data**2) / (sigma * data) ** 2
    losses = weight * (output - golden["images"]).square().mean((1, 2, 3))
    balancer, log_snr = ContinuousUncertainty(num_tasks=1), -2 * sigma.log()  # x = y + sigma n
    # Its features are fixed; these weights give the stored log-variances at the stored sigmas.
    features = torch.stack([_derivative(balancer, each)[0] for each in log_snr]).double()
    with torch.no_grad():
        balancer.weight.copy_(torch.linalg.lstsq(features, golden[f"{case}/logvar"]).solution)
    balancer.zero_grad()
    found = balancer(losses, log_snr)
    # The official loss adds the log-variance at every pixel, and is summed over them.
    expected = golden[f"{case}/loss"].mean((1, 2, 3))
    close = {"rtol": 0, "atol": 3e-6}  # log-variances are float32: 128 products of about 1e-7
    np.testing.assert_allclose(found.detach(), expected, **close)
    (found.sum() * output[0].numel()).backward()
    scale = golden[f"{case}/grad_D"].abs().max()
    np.testing.assert_allclose(output.grad / scale, golden[f"{case}/grad_D"] / scale, **close)
    grad = golden[f"{case}/grad_logvar"]
    scale = grad.abs().max()
    np.testing.assert_allclose(
        balancer.weight.grad / scale, (features.T @ grad).float() / scale, **close
    )
    np.testing.assert_allclose(balancer.bias.grad / scale, grad.sum() / scale, **close)


def _derivative(balancer, log_snr):
    """Derivatives of one log-variance by the weights and the bias."""
    return torch.autograd.grad(balancer.log_variance(log_snr[None]).sum(), [*balancer.parameters()])


def test_lengths_and_exponents_are_edm2s():
    golden = _arrays("power_ema")
    np.testing.assert_allclose(
        [exponent_of(s) for s in golden["std"]], golden["std_to_exp"], rtol=1e-9
    )
    np.testing.assert_allclose(
        [length_of(g) for g in golden["exp"]], golden["exp_to_std"], rtol=1e-10
    )
    for length, n, delta, expected in golden["beta_table"]:
        np.testing.assert_allclose(power_decay(length, n, delta), expected, rtol=1e-9)


def test_snapshots_give_other_lengths_as_edm2_does():
    golden, batch = _arrays("power_ema"), _settings("power_ema")["batch_size"]
    steps = _settings("power_ema")["steps"]
    snapshots = list(zip(golden["in_ofs"] // batch, golden["in_std"], strict=True))
    found = [profile_coefficients(snapshots, steps, s) for s in golden["out_std"]]
    coefficients = np.stack([each for each, _ in found], axis=1)
    np.testing.assert_allclose(coefficients, golden["coefficients"], rtol=0, atol=1e-8)
    # The official profiles have sum 1 over the whole steps.
    profiles = np.stack([_profile(np.arange(steps + 1), n, s) for n, s in snapshots])
    profiles /= profiles.sum(1, keepdims=True)
    np.testing.assert_allclose(
        coefficients.T @ profiles, golden["profile_reconstructed"], rtol=0, atol=1e-8
    )
    # The error is that of the profiles as functions of time.
    fine = np.linspace(0, steps, 100_001)
    profiles = np.stack([_profile(fine, n, s) for n, s in snapshots])
    for (own, error), length in zip(found, golden["out_std"], strict=True):
        wanted = _profile(fine, steps, length)
        numeric = np.linalg.norm(own @ profiles - wanted) / np.linalg.norm(wanted)
        np.testing.assert_allclose(error, numeric, rtol=1e-2)


def _profile(times, n, length):
    g = exponent_of(length)
    return np.where(times <= n, (g + 1) / n * (np.minimum(times, n) / n) ** g, 0.0)
