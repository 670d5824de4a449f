"""The samplers of EDM and EDM2, their noise levels and guidance, against the official ones."""

import numpy as np
import pytest
import torch
from stand_in_network import error, load, stand_in, state_errors

from ant_lightning import (
    EDM,
    EDMPreconditioning,
    EDMSampler,
    GuidedDenoiser,
    IDDPMPreconditioning,
    VEPreconditioning,
    VPPreconditioning,
)
from ant_lightning.diffusion.samplers.noise_levels import (
    sigma_range,
    sigma_schedule,
    sigma_steps,
)

SAMPLER, SAMPLER_ARRAYS = load("J_edm/edm_sampler")
ABLATION, ABLATION_ARRAYS = load("J_edm/ablation_sampler")
SIGMAS, SIGMA_ARRAYS = load("J_edm/sigmas")
EDM2, EDM2_ARRAYS = load("K_edm2/edm_sampler")
METHODS = {1.0: "heun", 0.5: "midpoint", 2 / 3: "ralston"}
NETWORKS = {
    None: EDMPreconditioning,
    "VPPrecond": VPPreconditioning,
    "VEPrecond": VEPreconditioning,
    "iDDPMPrecond": IDDPMPreconditioning,
}


def preconditioned(process, network, sigmas, *, dtype):
    """The network of `process` in this precision; the official one computes c_noise in it too."""
    kind = process.preconditioning

    def denoiser(x, sigma, labels=None):
        sigmas.append(float(sigma[0]))
        scale = kind.c_in(sigma).view(-1, 1, 1, 1)
        return network((scale * x).to(dtype), kind.c_noise(sigma).to(dtype), labels)

    return denoiser


def run(sampler, process, network, arrays, *, dtype=torch.float64):
    """States of a path and its noise levels; the official code draws noise at every step."""
    sigmas, states = [], []
    draws = torch.from_numpy(arrays["noise"])
    steps = sampler.trajectory(
        process,
        preconditioned(process, network, sigmas, dtype=dtype),
        torch.from_numpy(arrays["latents"]),
        noise=lambda: draws[len(states)],
        clip_denoised=False,
    )
    for step in steps:
        states.append(step.x)
    assert len(sigmas) == sampler.num_calls(process)
    assert len(states) == sampler.path_length(process)
    return states, sigmas


@pytest.mark.parametrize("name", SAMPLER["runs"])
def test_edm_sampler(name):
    facts = SAMPLER["runs"][name]
    sampler, process = EDMSampler(**facts["kwargs"]), EDM()
    network = stand_in(SAMPLER["stand_in"])
    states, sigmas = run(sampler, process, network, SAMPLER_ARRAYS)
    assert len(sigmas) == facts["network_calls"]
    assert state_errors(states, SAMPLER_ARRAYS[f"{name}/x"][1:]) < 1e-9
    np.testing.assert_allclose(sigmas, SAMPLER_ARRAYS[f"{name}/net_sigma"], rtol=1e-9)
    single, _ = run(sampler, process, network, SAMPLER_ARRAYS, dtype=torch.float32)
    bound = 3 * facts["max_rel_err_32_vs_64"]
    assert error(single[-1], SAMPLER_ARRAYS[f"{name}/x"][-1]) <= bound
    # The first state is that of `prior`, unless the sampler starts elsewhere.
    first = SAMPLER_ARRAYS[f"{name}/x"][0]
    start = sampler.sigmas(process)[0]
    np.testing.assert_allclose(start * SAMPLER_ARRAYS["latents"], first, rtol=1e-12)


def test_every_network_call_of_edm():
    for name, facts in SAMPLER["runs"].items():
        process, states, seen, images = EDM(), [], [], []
        model = preconditioned(process, stand_in(SAMPLER["stand_in"]), [], dtype=torch.float64)

        def denoiser(x, sigma, *, process=process, model=model, seen=seen, images=images):
            output = model(x, sigma)
            seen.append(x)
            images.append(process.to_x_start(output, x, sigma))
            return output

        draws = torch.from_numpy(SAMPLER_ARRAYS["noise"])
        latents = torch.from_numpy(SAMPLER_ARRAYS["latents"])
        for step in EDMSampler(**facts["kwargs"]).trajectory(
            process,
            denoiser,
            latents,
            noise=lambda states=states, draws=draws: draws[len(states)],
            clip_denoised=False,
        ):
            states.append(step.x)
        assert state_errors(seen, SAMPLER_ARRAYS[f"{name}/net_x"]) < 1e-9
        assert state_errors(images, SAMPLER_ARRAYS[f"{name}/denoised"]) < 1e-9


@pytest.mark.parametrize("name", ABLATION["runs"])
def test_ablation_sampler(name):
    facts = ABLATION["runs"][name]
    settings = dict(facts["kwargs"])
    alpha = settings.pop("alpha", 1.0)
    method = METHODS[alpha] if settings.pop("solver") == "heun" else "euler"
    sampler = EDMSampler(method=method, **settings)
    process = EDM(NETWORKS[facts.get("precond")]())
    network = stand_in(ABLATION["stand_in"])
    states, sigmas = run(sampler, process, network, ABLATION_ARRAYS)
    assert len(sigmas) == facts["network_calls"]
    assert state_errors(states, ABLATION_ARRAYS[f"{name}/x"][1:]) < 1e-8
    np.testing.assert_allclose(sigmas, ABLATION_ARRAYS[f"{name}/net_sigma"], rtol=1e-8)
    single, _ = run(sampler, process, network, ABLATION_ARRAYS, dtype=torch.float32)
    bound = max(3 * facts["max_rel_err_32_vs_64"], 4 * torch.finfo(torch.float32).eps)
    assert error(single[-1], ABLATION_ARRAYS[f"{name}/x"][-1]) <= bound


@pytest.mark.parametrize("key", SIGMA_ARRAYS)
def test_noise_levels(key):
    kind, which, count = key.split("/")
    settings = SIGMAS["ranges"].get(which, {})
    low, high = sigma_range(kind)
    low, high = settings.get("sigma_min", low), settings.get("sigma_max", high)
    found = sigma_steps(kind, int(count[1:]), sigma_min=low, sigma_max=high)
    if which.startswith("schedule"):
        schedule = sigma_schedule(kind, sigma_min=low, sigma_max=high)
        found = [schedule.sigma(schedule.time(sigma)) for sigma in found.tolist()]
    np.testing.assert_allclose(found, SIGMA_ARRAYS[key], rtol=1e-10)


@pytest.mark.parametrize("name", EDM2["runs"])
def test_edm2_sampler_with_guidance(name):
    facts, process = EDM2["runs"][name], EDM()
    settings = dict(facts["kwargs"])
    scale = settings.pop("guidance", 1.0)
    network, weaker = stand_in(EDM2["stand_in"]), stand_in(EDM2["stand_in_gnet"])
    labels = torch.from_numpy(EDM2_ARRAYS["labels"]).argmax(1)
    seen, images, sigmas, weak_sigmas, drawn = [], [], [], [], []
    main = preconditioned(process, network, sigmas, dtype=torch.float64)
    guide = preconditioned(process, weaker, weak_sigmas, dtype=torch.float64)

    def model(x, sigma, labels):
        output = main(x, sigma, labels)
        seen.append(x)
        images.append(process.to_x_start(output, x, sigma))
        return output

    classless = facts["gnet"].startswith("classifier-free")
    denoiser = GuidedDenoiser(
        model,
        labels,
        null_label=None,
        scale=scale,
        guide=lambda x, sigma, labels: guide(x, sigma, None if classless else labels),
    )

    def noise():
        drawn.append(torch.from_numpy(EDM2_ARRAYS["noise"])[len(drawn)])
        return drawn[-1]

    x = EDMSampler(**settings).sample(
        process,
        denoiser,
        torch.from_numpy(EDM2_ARRAYS["noise_init"]),
        noise=noise,
        clip_denoised=False,
    )
    assert error(x, EDM2_ARRAYS[f"{name}/result"]) < 1e-9
    assert state_errors(seen, EDM2_ARRAYS[f"{name}/net_x"]) < 1e-9
    assert state_errors(images, EDM2_ARRAYS[f"{name}/net_D"]) < 1e-9
    np.testing.assert_allclose(sigmas, EDM2_ARRAYS[f"{name}/net_sigma"], rtol=1e-9)
    assert len(sigmas) == facts["network_calls"]
    assert len(weak_sigmas) == facts["gnet_calls"]
    assert len(drawn) == facts["noise_draws"]
