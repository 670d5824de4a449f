"""Samplers of flow matching and EDM on the exact field of a Gaussian mixture, and bad input."""

import itertools
import math
import sys

import diffusers
import pytest
import torch

from ant_lightning import (
    DDIM,
    DDPM,
    EDM,
    ConfigError,
    DiffusersSampler,
    DiscreteDiffusion,
    EDMSampler,
    FlowMatching,
    GaussianMixture,
    IDDPMPreconditioning,
    ODESampler,
    SDESampler,
    VEPreconditioning,
    flow_log_likelihood,
)
from ant_lightning.errors import NonFiniteError

MIXTURE = GaussianMixture(
    torch.tensor([0.3, 0.7]),
    torch.tensor([[-1.0, 0.5], [0.6, -0.2]]),
    torch.tensor([[[0.3, 0.1], [0.1, 0.2]], [[0.2, -0.05], [-0.05, 0.4]]]),
)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def exact(process, *, seen=None):
    """The best possible network of a process, in the type that it predicts."""

    def denoiser(x, times):
        if seen is not None:
            seen.append(times.tolist())
        at = process.levels(x, times)
        a, s = (each.flatten().expand(len(x)) for each in (at.a, at.s))
        # Where a state is an image (s = 0), E[eps | x] is taken just before.
        eps = MIXTURE.denoise(x, a=a, s=s.clamp(min=1e-9))
        mean = (MIXTURE.weights[:, None] * MIXTURE.means).sum(0)
        x_start = torch.where(at.a > 1e-12, (x - at.s * eps) / at.a.clamp(min=1e-12), mean)
        if isinstance(process, EDM):
            return process.convert("F", x_start, x, times, prediction_type="x0")
        output = {
            "v": at.a_rate * x_start + at.s_rate * eps,
            "eps": eps,
            "x0": x_start,
            "score": -eps / at.s,
        }[process.prediction_type]
        is_sit = process.prediction_type == "v" and process.convention == "sit"
        return -output if is_sit else output

    return denoiser


def end(sampler, process, x, **options):
    return sampler.sample(process, exact(process), x, clip_denoised=False, **options)


ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "ralston": 2, "heun3": 3, "rk4": 4}


@pytest.mark.parametrize("method", ORDERS)
@pytest.mark.parametrize("process", [FlowMatching(), FlowMatching("gvp")], ids=["linear", "gvp"])
def test_order_of_the_ode(method, process):
    x = normal(4, 2)
    # Inside the ends, where the field is smooth: the order is a statement about small steps.
    solution = end(ODESampler(times=even(0.9, 0.1, 100), method="rk4"), process, x)
    errors = [
        float(
            (end(ODESampler(times=even(0.9, 0.1, n), method=method), process, x) - solution).norm()
        )
        for n in (20, 40)
    ]
    # The next term of the error spoils the ratio by a share of about 1 / n.
    assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[method], abs=0.35)


def even(start, stop, n):
    return torch.linspace(start, stop, n + 1, dtype=torch.float64).tolist()


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun", "ralston"])
def test_order_of_edm(method):
    process, x = EDM(), normal(4, 2)
    solution = end(EDMSampler(400, sigma_min=0.1), process, x)
    errors = [
        float((end(EDMSampler(n, sigma_min=0.1, method=method), process, x) - solution).norm())
        for n in (40, 80)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[method], abs=0.4)


@pytest.mark.parametrize("kind", ["v", "eps", "x0", "score"])
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_all_paths_and_predictions_lead_to_the_same_image(path, kind):
    process, x = FlowMatching(path, prediction_type=kind), normal(4, 2)
    wanted = end(ODESampler(60, method="rk4", margin=1e-6), FlowMatching(path), x)
    # What a margin leaves out at an end changes the image by about as much.
    assert torch.allclose(end(ODESampler(50), process, x), wanted, atol=0.01)
    assert torch.allclose(end(ODESampler(30, path="linear"), process, x), wanted, atol=0.02)
    adaptive = ODESampler(method="dopri5", rtol=1e-4, atol=1e-4)
    assert torch.allclose(end(adaptive, process, x), wanted, atol=0.005)


def test_flow_and_edm_draw_the_mixture():
    """2,000 images of each stochastic sampler: mean and covariance within 4 standard errors."""
    n = 2000
    data, _ = MIXTURE.draw(200_000, generator=torch.Generator().manual_seed(3))
    bound = 4 * 1.3 / math.sqrt(n)
    for sampler, process in (
        (SDESampler(60, diffusion="sigma"), FlowMatching()),
        (SDESampler(60, method="heun", diffusion="increasing_decreasing"), FlowMatching("gvp")),
        (SDESampler(60, diffusion="sbdm", last_step="tweedie"), FlowMatching("vp")),
        (EDMSampler(30, S_churn=10.0), EDM()),
    ):
        generator = torch.Generator().manual_seed(1)

        def noise(generator=generator):
            return torch.randn(n, 2, dtype=torch.float64, generator=generator)

        found = end(sampler, process, noise(), noise=noise)
        assert float((found.mean(0) - data.mean(0)).abs().max()) < bound
        assert float((found.T.cov() - data.T.cov()).abs().max()) < 2 * bound


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_an_adaptive_image_does_not_depend_on_its_batch(method):
    process, x = FlowMatching(), 3 * normal(3, 2)
    sampler = ODESampler(method=method, rtol=1e-3, atol=1e-3)
    together = end(sampler, process, x)
    assert torch.equal(end(sampler, process, x[1:2]), together[1:2])
    assert torch.equal(end(sampler, process, x[[2, 1]]), together[[2, 1]])
    # Each image has its own times: a call of the network has one for each.
    seen = []
    sampler.sample(process, exact(process, seen=seen), x, clip_denoised=False)
    assert any(len(set(times)) == 3 for times in seen)


def test_an_adaptive_solver_passes_errors_on(monkeypatch):
    process, x = FlowMatching(), normal(3, 2)
    sampler = ODESampler(method="dopri5")

    def fails(x, times):
        raise RuntimeError("the network's own error")

    with pytest.raises(RuntimeError, match="the network's own error"):
        sampler.sample(process, fails, x)
    with pytest.raises(NonFiniteError, match=r"dopri5 found no step .* rtol 0.001 and atol 1e-06"):
        sampler.sample(process, lambda x, t: torch.full_like(x, math.nan), x)
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ConfigError, match=r"method: .*install torchdiffeq .*found dopri5"):
        sampler.sample(process, fails, x)


SAMPLERS = [
    (ODESampler(6, method="rk4"), FlowMatching()),
    (ODESampler(6, path="gvp"), FlowMatching()),
    (ODESampler(6), FlowMatching("vp")),
    (SDESampler(6), FlowMatching()),
    (SDESampler(6, method="heun", last_step=None), FlowMatching("gvp")),
    (EDMSampler(6), EDM()),
    (EDMSampler(6, S_churn=4.0, scaling="vp", schedule="vp", discretization="vp"), EDM()),
    (DiffusersSampler(diffusers.FlowMatchHeunDiscreteScheduler(), num_steps=3), FlowMatching()),
    (DiffusersSampler(diffusers.EDMEulerScheduler(), num_steps=6), EDM()),
]


@pytest.mark.parametrize(("sampler", "process"), SAMPLERS, ids=[str(i) for i in range(9)])
def test_steps_calls_and_the_middle_of_a_path(sampler, process):
    x, draws, seen = normal(2, 2), normal(20, 2, 2, seed=4), []
    denoiser = exact(process, seen=seen)
    used = []

    def noise():
        used.append(draws[len(used)])
        return used[-1]

    whole, drawn = [], []
    for step in sampler.trajectory(process, denoiser, x, noise=noise, clip_denoised=False):
        whole.append(step)
        drawn.append(len(used))
    assert len(whole) == sampler.path_length(process)
    assert len(seen) == sampler.num_calls(process)
    assert [step.index for step in whole] == list(range(len(whole)))
    assert bool(used) == sampler.is_random
    assert all(a.timestep >= b.timestep for a, b in itertools.pairwise(whole))
    first = 2 if isinstance(sampler, DiffusersSampler) else 3
    rest = iter(draws[drawn[first - 1] :])
    late = sampler.sample(
        process,
        exact(process),
        whole[first - 1].x,
        noise=rest.__next__,
        clip_denoised=False,
        first_step=first,
    )
    # diffusers' Heun keeps its derivative between two calls; its even steps start anew.
    assert torch.equal(late, whole[-1].x)


def test_an_image_of_a_fixed_method_does_not_depend_on_its_batch():
    for sampler, process in SAMPLERS:
        x, draws = normal(3, 2), normal(20, 3, 2, seed=5)
        together = end(sampler, process, x, noise=iter(draws).__next__)
        alone = end(sampler, process, x[1:2], noise=iter(draws[:, 1:2]).__next__)
        torch.testing.assert_close(alone, together[1:2], rtol=0, atol=1e-6)


def test_inversion_and_sampling_undo_each_other():
    x_start, _ = MIXTURE.draw(4, generator=torch.Generator().manual_seed(0))
    for process, path in ((FlowMatching(), None), (FlowMatching("vp"), "linear")):
        sampler = ODESampler(40, method="rk4", path=path, margin=1e-3)
        x = sampler.invert(process, exact(process), x_start)
        assert torch.allclose(end(sampler, process, x), x_start, atol=1e-4)


def test_likelihood_of_the_mixture():
    x, _ = MIXTURE.draw(5, generator=torch.Generator().manual_seed(0))
    process = FlowMatching()
    sampler = ODESampler(times=even(1, 1e-3, 60), method="rk4")
    found, noise = flow_log_likelihood(process, exact(process), x, sampler=sampler)
    components = torch.distributions.MultivariateNormal(MIXTURE.means, MIXTURE.covariances)
    wanted = torch.logsumexp(MIXTURE.weights.log() + components.log_prob(x[:, None]), 1)
    assert torch.allclose(found, wanted, atol=0.01)  # the margin of 0.001
    assert noise.shape == x.shape
    with pytest.raises(ConfigError, match=r"sampler: must be a fixed method .*found dopri5"):
        flow_log_likelihood(process, exact(process), x, sampler=ODESampler(method="dopri5"))


def test_clipping():
    for sampler, process in SAMPLERS[:7]:
        steps = sampler.trajectory(
            process, exact(process), 4 * normal(2, 2), noise=lambda: normal(2, 2)
        )
        assert all(float(step.x_start.abs().max()) <= 1 for step in steps)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ODESampler(0), "num_steps: must be at least 1, found 0"),
        (
            lambda: ODESampler(50, method="dopri5"),
            "num_steps: must be left out of the adaptive dopri5, .* found 50",
        ),
        (lambda: ODESampler(method="dopri5", shift=3), "shift: must be left out .*found 3"),
        (lambda: ODESampler(method="dopri5", rtol=0), "rtol: must be above 0, found 0"),
        (lambda: ODESampler(method="heun", rtol=1e-3), "rtol: must be left out of heun.*0.001"),
        (lambda: ODESampler(method="heun2"), "method: must be one of euler, .*found heun2"),
        (lambda: ODESampler(grid="x"), "grid: must be one of uniform, edm, found x"),
        (lambda: ODESampler(grid="edm", shift=2.0), "shift: must be 1 with grid 'edm', found 2"),
        (lambda: ODESampler(shift=-1), "shift: must be above 0, found -1"),
        (lambda: ODESampler(path="cosine"), "path: must be one of linear, gvp, vp, found cosine"),
        (lambda: ODESampler(times=[0.5, 0.7]), r"times: .* decrease, found \[0.5, 0.7\]"),
        (lambda: ODESampler(5, times=[1, 0]), "num_steps: must be left out beside times, found 5"),
        (
            lambda: ODESampler(margin=0.5).check(FlowMatching("vp")),
            "margin: must be above 0 and below 0.5, found 0.5",
        ),
        (lambda: SDESampler(1), "num_steps: must be at least 2, found 1"),
        (lambda: SDESampler(diffusion="x"), "diffusion: must be one of constant.*found x"),
        (lambda: SDESampler(last_step="x"), "last_step: must be one of mean.*found x"),
        (lambda: SDESampler(last_step_size=0), "last_step_size: must be above 0 .*found 0"),
        (lambda: SDESampler(diffusion_norm=-1), "diffusion_norm: must be at least 0, found -1"),
        (
            lambda: SDESampler(diffusion="sbdm").check(FlowMatching()),
            "diffusion: must be finite at t = 1, .*linear.*found sbdm",
        ),
        (
            lambda: SDESampler(diffusion="constant", method="heun", last_step=None).check(
                FlowMatching()
            ),
            "diffusion: must be finite at t = 0.*found constant",
        ),
        (lambda: EDMSampler(0), "num_steps: must be at least 1, found 0"),
        (lambda: EDMSampler(sigma_min=-1), "sigma_min: must be above 0 and finite, found -1"),
        (lambda: EDMSampler(S_churn=-1), "S_churn: must be at least 0, found -1"),
        (lambda: EDMSampler(S_min=2.0, S_max=1.0), "S_max: must be at least S_min 2.0, found 1.0"),
        (lambda: EDMSampler(method="rk4"), "method: must be one of euler, .*found rk4"),
        (lambda: EDMSampler(discretization="x"), "discretization: .*found x"),
        (lambda: EDMSampler(sigma_min=90).check(EDM()), "sigma_min: must be below sigma_max 80"),
        (
            lambda: EDMSampler(sigma_max=200.0).check(EDM(VEPreconditioning())),
            r"sigma_max: must be in \[0.02, 100\], .*VEPreconditioning, found 200.0",
        ),
        (
            lambda: EDMSampler(sigma_min=1e-3).check(EDM(IDDPMPreconditioning())),
            r"sigma_min: must be in \[0.00642.*IDDPMPreconditioning, found 0.001",
        ),
        (
            lambda: EDMSampler(1001, discretization="iddpm").check(EDM(IDDPMPreconditioning())),
            "num_steps: must be at most the .* levels of iddpm .*found 1001",
        ),
        (
            lambda: DDIM(10).check(FlowMatching()),
            "sampler: must be one for FlowMatching, found DDIM, which is for DiscreteDiffusion",
        ),
        (
            lambda: DDPM(10).check(EDM()),
            "sampler: must be one for EDM, found DDPM.*; take EDMSampler",
        ),
        (lambda: ODESampler().check(EDM()), "sampler: must be one for EDM, found ODESampler"),
        (
            lambda: EDMSampler().check(DiscreteDiffusion()),
            "sampler: must be one for DiscreteDiffusion, found EDMSampler, which is for EDM",
        ),
        (
            lambda: DiffusersSampler(diffusers.EDMEulerScheduler()).check(FlowMatching()),
            "sampler: must be one for FlowMatching, found EDMEulerScheduler, which is for EDM",
        ),
        (
            lambda: DiffusersSampler(diffusers.UniPCMultistepScheduler()).check(EDM()),
            "found UniPCMultistepScheduler, which is for DiscreteDiffusion and FlowMatching",
        ),
        (
            lambda: DiffusersSampler(diffusers.FlowMatchEulerDiscreteScheduler()).check(
                FlowMatching("gvp")
            ),
            "process.path: must be linear .*found gvp",
        ),
        (
            lambda: DiffusersSampler(diffusers.EDMEulerScheduler()).check(EDM(VEPreconditioning())),
            "process.preconditioning: must be EDMPreconditioning .*found VEPreconditioning",
        ),
        (
            lambda: DiffusersSampler(diffusers.EDMEulerScheduler(sigma_data=1.0)),
            "scheduler: its sigma_data comes from the diffusion process .*found 1.0",
        ),
        (
            lambda: DiffusersSampler(diffusers.EDMEulerScheduler(), mu=1.0),
            "mu: must be left out of EDMEulerScheduler, found 1.0",
        ),
        (
            lambda: DiffusersSampler(diffusers.FlowMatchEulerDiscreteScheduler(), mu=1.0),
            "mu: needed with use_dynamic_shifting .*found 1.0",
        ),
        (
            lambda: DiffusersSampler(
                diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
            ),
            "mu: needed with use_dynamic_shifting .*found None",
        ),
        (
            lambda: DiffusersSampler(
                diffusers.FlowMatchEulerDiscreteScheduler(), num_steps=3, sigmas=[1.0, 0.5]
            ),
            "num_steps: must be the 2 sigmas, or left out, found 3",
        ),
        (
            lambda: DiffusersSampler(
                diffusers.EDMDPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
            ),
            "scheduler: must not draw noise of its own, found .*sde-dpmsolver",
        ),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("scheduler", "process"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0), FlowMatching()),
        (diffusers.FlowMatchHeunDiscreteScheduler(), FlowMatching()),
        (diffusers.UniPCMultistepScheduler(), FlowMatching()),
        (diffusers.DPMSolverMultistepScheduler(), FlowMatching()),
        (diffusers.DPMSolverSinglestepScheduler(), FlowMatching()),
        (diffusers.DEISMultistepScheduler(), FlowMatching()),
        (diffusers.EDMEulerScheduler(), EDM()),
        (diffusers.EDMDPMSolverMultistepScheduler(), EDM()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_diffusers_find_the_same_images(scheduler, process):
    x = normal(4, 2)
    if isinstance(process, EDM):
        wanted = end(EDMSampler(100), process, x)
    else:
        wanted = end(ODESampler(50, method="rk4"), process, x)
    errors = []
    for num_steps in (20, 80):
        sampler = DiffusersSampler(scheduler, num_steps=num_steps)
        found = end(sampler, process, x.float())
        errors.append(float((found - wanted).abs().max()))
    assert errors[1] < max(errors[0] / 2, 0.002)  # at least first order, down to their starts
    assert errors[1] < 0.1
    # Clipped images are converted to what the scheduler takes.
    clipped = sampler.trajectory(process, exact(process), 4 * x.float())
    assert all(float(step.x_start.abs().max()) <= 1 for step in clipped)
