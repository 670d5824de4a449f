"""Training losses and loss weights against the official ones."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from spacings import spaced

from ant_lightning import (
    P2,
    CosineSchedule,
    DiscreteDiffusion,
    LinearSchedule,
    MinSNR,
    denoising_loss,
    variational_bound,
)

GOLDEN = Path(__file__).parents[1] / "golden"
SCHEDULES = {"linear": LinearSchedule, "cosine": CosineSchedule}
FILES = ["losses_cosine_T1000", "losses_linear_T1000", "losses_linear_T1000_respaced250"]
MODES = [
    (name, mode, settings)
    for name in FILES
    for mode, settings in json.loads((GOLDEN / "C_diffusion" / f"{name}.json").read_text())[
        "modes"
    ].items()
]


def official(name, mean, var):
    facts = json.loads((GOLDEN / "C_diffusion" / f"{name}.json").read_text())
    process = DiscreteDiffusion(
        SCHEDULES[facts["schedule"]](),
        prediction_type="eps" if mean == "prev" else mean,
        variance_type=var,
    )
    if facts["respacing"]:
        process = process.respace(spaced(1000, facts["respacing"]))
    return process, np.load(GOLDEN / "C_diffusion" / f"{name}.npz")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "mode", "settings"), MODES, ids=[f"{n}-{m}" for n, m, _ in MODES])
def test_training_losses(name, mode, settings, dtype):
    process, golden = official(name, settings["mean"], settings["var"])
    x_start, noise, output = (
        torch.from_numpy(golden[key]).to(dtype) for key in ("x_start", "noise", "model_output")
    )
    t = torch.from_numpy(golden["t"])
    output = output[:, : process.output_channels(x_start.shape[1])].clone().requires_grad_()
    x_t = process.q_sample(x_start, t, noise)
    np.testing.assert_allclose(x_t, golden["x_t"], rtol=1e-5, atol=2e-6)
    assert process.timestep_map[t].tolist() == golden["t_seen_by_model"].tolist()

    rescale = process.num_timesteps / 1000 if settings["loss"] == "rescaled_mse" else 1.0
    found = {"vb": None}
    if settings["mean"] == "prev":
        # No prediction type of ours; its target is the posterior mean.
        mean, _, _ = process.q_posterior(x_start, x_t, t)
        found["mse"] = found["loss"] = (mean - output).square().mean(dim=(1, 2, 3))
    elif settings["loss"].endswith("kl"):
        bound = variational_bound(process, output, x_start, x_t, t)
        found["loss"] = bound * (process.num_timesteps if "rescaled" in settings["loss"] else 1)
    else:
        terms = denoising_loss(process, output, x_start, x_t, t, noise, vb_scale=rescale)
        found.update(loss=terms.loss, mse=terms.mse, vb=terms.vb)
        assert (terms.vb is None) == (settings["var"] != "learned_range")

    exact = dtype == torch.float64
    assert found["loss"].dtype == dtype
    for term in ("loss", "mse", "vb"):
        if f"{mode}/{term}_64" in golden:
            rtol = 1e-8 if exact else 5e-5
            value = found[term].detach()
            np.testing.assert_allclose(value, golden[f"{mode}/{term}_64"], rtol=rtol, err_msg=term)
            # The official float32 bound cancels near 0 (7% off at 4e-7 bits), hence atol.
            wanted = golden[f"{mode}/{term}"]
            np.testing.assert_allclose(value, wanted, rtol=5e-5, atol=1e-7, err_msg=term)
    if exact:
        (grad,) = torch.autograd.grad(found["loss"].sum(), output)
        np.testing.assert_allclose(grad, golden[f"{mode}/grad_64"], rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_min_snr_weights(name, kind):
    golden = np.load(GOLDEN / "E_weights" / "min_snr.npz")
    facts = json.loads((GOLDEN / "E_weights" / "min_snr.json").read_text())
    process = DiscreteDiffusion(SCHEDULES[name]())
    key = f"{name}_T1000/{kind}_gamma5"
    np.testing.assert_allclose(process.snr, golden[f"{name}_T1000/snr"], rtol=1e-9)
    weights = MinSNR(gamma=facts["weights"][key]["gamma"])(process.snr, kind)
    assert weights.dtype == torch.float64
    np.testing.assert_allclose(weights, golden[f"{key}_exact"], rtol=1e-9)
    np.testing.assert_allclose(weights, golden[key], rtol=1e-6)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("gamma", ["1", "0.5"])
def test_p2_weights(name, gamma):
    golden = np.load(GOLDEN / "E_weights" / "p2.npz")
    key = f"{name}_T1000/k1_gamma{gamma}"
    facts = json.loads((GOLDEN / "E_weights" / "p2.json").read_text())["weights"][key]
    snr = DiscreteDiffusion(SCHEDULES[name]()).snr
    weights = P2(gamma=facts["gamma"], k=facts["k"])(snr, "eps")
    np.testing.assert_allclose(weights, golden[key], rtol=1e-9)
    np.testing.assert_allclose(weights, golden[f"{key}_official"], rtol=1e-6)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_v_prediction_loss(name):
    golden = np.load(GOLDEN / "E_weights" / "v_prediction_loss.npz")
    facts = json.loads((GOLDEN / "E_weights" / "v_prediction_loss.json").read_text())
    process = DiscreteDiffusion(SCHEDULES[name](facts["T"]), prediction_type="v")
    weights = MinSNR(gamma=5.0)(process.snr, "v")
    for dtype in (torch.float32, torch.float64):
        x_start, noise, output = (
            torch.from_numpy(golden[key]).to(dtype) for key in ("x_start", "noise", "model_output")
        )
        t = torch.from_numpy(golden["t"])
        target = process.target(x_start, noise, t)
        rtol = 1e-10 if dtype == torch.float64 else 1e-5
        wanted = golden[f"{name}/v_target_exact"]
        np.testing.assert_allclose(target, wanted, rtol=rtol, atol=rtol)
        x_t = process.q_sample(x_start, t, noise)
        terms = denoising_loss(process, output, x_start, x_t, t, noise, weights=weights)
        np.testing.assert_allclose(terms.mse, golden[f"{name}/mse_raw_exact"], rtol=rtol)
        np.testing.assert_allclose(terms.mse, golden[f"{name}/mse_raw"], rtol=1e-5)
        np.testing.assert_allclose(terms.loss, golden[f"{name}/loss"], rtol=1e-5)
