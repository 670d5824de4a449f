"""EDM2's learning rate, learned log-variance and power-function averages (golden/K_edm2)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ant_lightning import ContinuousUncertainty, InverseSqrtLR

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
