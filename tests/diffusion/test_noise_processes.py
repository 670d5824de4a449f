"""What all noise processes share: the axis of cells, times, conversions, losses, bad input."""

import math
import pickle

import pytest
import torch
from process_cases import PROCESSES

from ant_lightning import (
    EDM,
    ConfigError,
    CosineSchedule,
    DiscreteDiffusion,
    EDMPreconditioning,
    FlowMatching,
    GaussianMixture,
    LinearSchedule,
    LogitNormal,
    LogNormal,
    MinSNR,
    SNRClustering,
    Table,
    TableSchedule,
    TimestepClustering,
    VEPreconditioning,
    VPPreconditioning,
    ZeroTerminalSNR,
)

KINDS = ("x0", "eps", "v", "score")
every_process = pytest.mark.parametrize("name", PROCESSES)


def mixture():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    spread = torch.randn(3, 4, 4, generator=generator, dtype=torch.float64)
    covariances = spread @ spread.mT / 8 + 0.05 * torch.eye(4, dtype=torch.float64)
    return GaussianMixture(torch.tensor([0.2, 0.3, 0.5]), means, covariances)


def exact_field(process):
    """Cells all over the axis, and `x_t`, `x_start`, noise and `E[eps | x_t]` at their centres."""
    generator = torch.Generator().manual_seed(1)
    cells = torch.arange(0, process.num_timesteps, 7)
    times = process.times(cells)
    x_start, _ = mixture().draw(len(cells), generator=generator)
    noise = torch.randn(x_start.shape, generator=generator, dtype=torch.float64)
    x_t = process.noised(x_start, noise, times)
    at = process.levels(x_t, times)
    eps = mixture().denoise(x_t, a=at.a[:, 0], s=at.s[:, 0])
    return times, x_t, x_start, noise, eps


@every_process
def test_cells_lie_on_the_axis_from_little_noise_to_much(name):
    process = PROCESSES[name]()
    total = process.num_timesteps
    assert process.log_snr.shape == process.density.shape == (total,)
    assert bool((process.log_snr.diff() < 0).all())
    assert process.log_snr.dtype == process.density.dtype == torch.float64
    assert float(process.density.sum()) == pytest.approx(1, abs=1e-12)
    assert process.edges.shape == (total + 1,)
    cells = torch.arange(total)
    centres = process.times(cells)
    assert bool((process.edges[:-1] <= centres).all())
    assert bool((centres < process.edges[1:]).all())
    torch.testing.assert_close(process.log_snr_at(centres), process.log_snr, rtol=1e-9, atol=1e-9)
    at = process.levels(torch.zeros(total, 1, dtype=torch.float64), centres)
    snr = 2 * (at.a.log() - at.s.log())[:, 0]
    torch.testing.assert_close(snr, process.log_snr, rtol=1e-9, atol=1e-9)


@every_process
def test_times_fill_their_cell_by_the_density(name):
    process = PROCESSES[name]()
    cells = torch.tensor([0, 1, 400, process.num_timesteps - 2]).repeat_interleave(101)
    u = torch.linspace(0, 1 - 1e-12, 101, dtype=torch.float64).repeat(4)
    times = process.times(cells, u)
    inner = cells > 0  # EDM's end cells are open
    slack = 1e-12 * process.edges[cells + 1]  # rounding of the quantile at the edges
    assert bool((times >= process.edges[cells] - slack)[inner].all())
    assert bool((times <= process.edges[cells + 1] + slack).all())
    if times.is_floating_point():
        assert bool((times.view(4, 101).diff(dim=1) > 0).all())
        lowest = times.view(4, 101)[1:, 0]
        torch.testing.assert_close(lowest, process.edges[[1, 400, process.num_timesteps - 2]])


@every_process
def test_rates_are_the_derivatives_of_the_levels(name):
    process = PROCESSES[name]()
    if isinstance(process, DiscreteDiffusion):
        return  # its v is the derivative by an angle: test_diffusion_process.py
    t = process.times(torch.tensor([100, 500, 900])).requires_grad_()
    at = process.levels(torch.zeros(3, 1, dtype=torch.float64), t)
    for level, rate in ((at.a, at.a_rate), (at.s, at.s_rate)):
        found = (
            torch.autograd.grad(level.sum(), t, retain_graph=True)[0]
            if level.requires_grad
            else torch.zeros(3)
        )
        wanted = torch.as_tensor(rate, dtype=torch.float64).expand(3, 1)[:, 0].detach()
        torch.testing.assert_close(found.double(), wanted, rtol=1e-10, atol=1e-10)


@every_process
@pytest.mark.parametrize("first", KINDS)
def test_conversions_are_inverse_pairs_on_the_exact_field(name, first):
    process = PROCESSES[name]()
    times, x_t, _, _, eps = exact_field(process)
    value = process.convert(first, eps, x_t, times, prediction_type="eps")
    for second in KINDS:
        there = process.convert(second, value, x_t, times, prediction_type=first)
        back = process.convert(first, there, x_t, times, prediction_type=second)
        # A level of 1e-3 costs three of the sixteen digits, as in any order of the operations.
        error = (back - value).abs().amax(1) / value.abs().amax(1).clamp(min=1)
        at = process.levels(x_t, times)
        smallest = torch.minimum(at.a, at.s)[:, 0].clamp(max=1)
        assert float((error * smallest).max()) < 1e-12
        assert float(error[smallest > 1e-2].max()) < 1e-10


@every_process
def test_the_target_means_the_data_and_the_noise(name):
    process = PROCESSES[name]()
    times, x_t, x_start, noise, _ = exact_field(process)
    target = process.target(x_start, noise, times)
    at = process.levels(x_t, times)
    for found, wanted, level in (
        (process.to_x_start(target, x_t, times), x_start, at.a),
        (process.to_eps(target, x_t, times), noise, at.s),
    ):
        # What float64 keeps of a part of x_t shrinks with its level, here relative to x_t.
        error = ((found - wanted) * level).abs() / x_t.abs().amax(1, keepdim=True).clamp(min=1)
        assert float(error.max()) < 1e-12


@every_process
def test_a_perfect_output_has_no_loss_and_the_convention_is_the_networks(name):
    process = PROCESSES[name]()
    times, x_t, x_start, noise, _ = exact_field(process)
    output = process.target(x_start, noise, times)
    if isinstance(process, FlowMatching) and process.prediction_type == "v":
        output = -output  # SiT's velocity points to the data
    terms = process.losses(output, x_start=x_start, x_t=x_t, times=times, noise=noise)
    assert float(terms.loss.abs().max()) < 1e-20
    assert terms.loss.shape == terms.mse.shape == (len(times),)
    half = process.losses(
        output.bfloat16(),
        x_start=x_start.float(),
        x_t=x_t.float(),
        times=times,
        noise=noise.float(),
    )
    assert half.loss.dtype == torch.float32


@every_process
def test_a_pickle_is_the_same_process(name):
    process = PROCESSES[name]()
    twin = pickle.loads(pickle.dumps(process))
    assert torch.equal(twin.log_snr, process.log_snr)
    assert twin.identity() == process.identity()


def test_both_conventions_of_flow_matching_are_one_process():
    ours, theirs = FlowMatching(), FlowMatching(convention="diffusers")
    times, x_t, x_start, noise, _ = exact_field(ours)
    torch.testing.assert_close(theirs.target(x_start, noise, times), noise - x_start)
    assert torch.equal(ours.network_inputs(x_t, times)[1], (1 - times).float())
    assert torch.equal(theirs.network_inputs(x_t, times)[1], (1000 * times).float())
    output = torch.randn(x_t.shape, dtype=torch.float64)
    torch.testing.assert_close(ours.split_output(-output, 4)[0], theirs.split_output(output, 4)[0])


def test_the_second_half_of_a_learned_sigma_is_dropped():
    output = torch.randn(2, 6, 4, 4)
    prediction, rest = FlowMatching().split_output(output, 3)
    assert rest is None
    torch.testing.assert_close(prediction, -output[:, :3])
    assert torch.equal(EDM(IDDPM, sigma_max=80.0).split_output(output, 3)[0], output[:, :3])
    with pytest.raises(ConfigError, match=r"must have 3 channels .* with EDM, found 6"):
        EDM().split_output(output, 3)


def test_on_edm_clusters_of_timesteps_and_of_log_snr_coincide():
    log_snr = EDM().log_snr
    for k in (2, 4, 5, 6, 8, 10):
        by_time = TimestepClustering(num_tasks=k)(log_snr)
        by_snr = SNRClustering(num_tasks=k)(log_snr)
        # Where k does not divide T, the order of the two sizes is not determined by the costs.
        assert sorted(by_time.sizes.tolist()) == sorted(by_snr.sizes.tolist())
        assert by_time == by_snr or 1000 % k


def test_edm_draws_beyond_the_axis_in_its_end_cells():
    process = EDM(sigma_min=0.1, sigma_max=1.0, num_timesteps=10)
    ends = process.times(torch.tensor([0, 9]), torch.tensor([1e-6, 1 - 1e-6]).double())
    assert float(ends[0]) < 0.1 * 0.5
    assert float(ends[1]) > 1.0 * 2
    # P(ln sigma < ln 0.1 + width) and P(ln sigma > ln 1 - width).
    width = math.log(10) / 10
    normal = torch.distributions.Normal(-1.2, 1.2)
    low = float(normal.cdf(torch.tensor(math.log(0.1) + width)))
    high = 1 - float(normal.cdf(torch.tensor(-width)))
    assert float(process.density[0]) == pytest.approx(low, rel=1e-5)
    assert float(process.density[9]) == pytest.approx(high, rel=1e-5)


def test_the_prior_of_edm_has_the_largest_sigma():
    noise = torch.randn(2, 1, 4, 4)
    torch.testing.assert_close(EDM().prior(noise), 80 * noise)
    assert torch.equal(FlowMatching().prior(noise), noise)
    assert FlowMatching(prediction_type="eps").max_time == 1.0


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule()])
@pytest.mark.parametrize("kind", ["v", "x0"])
def test_a_terminal_snr_of_zero(schedule, kind):
    process = DiscreteDiffusion(
        ZeroTerminalSNR(schedule),
        prediction_type=kind,
        variance_type="learned_range",
        loss_weighting=MinSNR(),
    )
    roots = torch.cumprod(1 - schedule(), 0).sqrt()
    # Algorithm 1 of Lin et al., step by step.
    shifted = roots - roots[-1]
    wanted = shifted * roots[0] / (roots[0] - roots[-1])
    torch.testing.assert_close(process.alphas_cumprod.sqrt(), wanted, rtol=1e-9, atol=1e-12)
    assert float(process.alphas_cumprod[-1]) == 0
    assert bool(process.log_snr.isfinite().all())
    assert bool((process.log_snr.diff() < 0).all())
    tables = process.tables(torch.device("cpu"))
    assert all(bool(table.isfinite().all()) for table in tables)
    last = torch.tensor([999])
    x_start, noise = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    assert torch.equal(process.noised(x_start, noise, last), noise)
    # At the last timestep v is minus the image, and x_start comes back exactly.
    target = process.target(x_start, noise, last)
    torch.testing.assert_close(process.to_x_start(target, noise, last), x_start)
    output = torch.randn(1, 6, 4, 4, dtype=torch.float64).requires_grad_()
    terms = process.losses(output, x_start=x_start, x_t=noise, times=last, noise=noise)
    terms.loss.sum().backward()
    assert bool(output.grad.isfinite().all())
    assert process.p_mean_variance(output.detach(), noise, last).mean.isfinite().all()
    respaced = process.respace([0, 500, 999])
    assert float(respaced.alphas_cumprod[-1]) == 0


IDDPM = PROCESSES["edm iddpm"]().preconditioning


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlowMatching("cubic"), "path: must be one of linear, gvp, vp, found cubic"),
        (
            lambda: FlowMatching(prediction_type="velocity"),
            "prediction_type: must be one of x0, eps, v, score, found velocity",
        ),
        (lambda: FlowMatching(convention="sd3"), "convention: must be one of sit, diffusers"),
        (
            lambda: FlowMatching(loss_weighting="velocity"),
            "loss_weighting: velocity needs prediction_type eps, x0 or score .*found v",
        ),
        (
            lambda: FlowMatching(prediction_type="eps", loss_weighting="cosmap"),
            "loss_weighting: cosmap needs prediction_type v, found eps",
        ),
        (lambda: FlowMatching(loss_weighting="snr"), "loss_weighting: must be one of .*found snr"),
        (lambda: FlowMatching(train_eps=0.01), "train_eps: must be 0 for the velocity"),
        (lambda: FlowMatching("vp", train_eps=0.5), "train_eps: must be at least 0 and below 0.5"),
        (lambda: FlowMatching(num_timesteps=0), "num_timesteps: must be at least 1, found 0"),
        (lambda: FlowMatching(density=LogNormal()), r"density: must be a density of t in \[0, 1\]"),
        (lambda: EDM(density=LogitNormal()), "density: must be a density of ln sigma .*LogitN"),
        (
            lambda: DiscreteDiffusion(density=LogNormal()),
            r"density: must be a density of t in \[0, 1\].*LogNormal",
        ),
        (lambda: EDM(density=Table([1, 2])), "weights: must be 1000, one for each cell, found 2"),
        (lambda: Table([1, -2]), "weights: each must be finite and at least 0.*found -2"),
        (lambda: Table([1, math.nan]), "weights: .*found nan"),
        (lambda: Table([0, 0]), "weights: .*found a sum of 0"),
        (lambda: LogNormal(std=0), "std: must be above 0 and finite, found 0"),
        (lambda: LogitNormal(mean=math.inf), "mean: must be finite, found inf"),
        (lambda: EDM(sigma_min=2.0, sigma_max=1.0), "sigma_min: must satisfy 0 < sigma_min"),
        (lambda: EDMPreconditioning(sigma_data=0), "sigma_data: must be above 0"),
        (lambda: VPPreconditioning(beta_d=-1), "beta_d: must be above 0"),
        (lambda: VEPreconditioning(sigma_min=0), "sigma_min: must satisfy 0 < sigma_min"),
        (
            lambda: DiscreteDiffusion(ZeroTerminalSNR(LinearSchedule())),
            "prediction_type: must be v or x0 with a terminal SNR of zero, found eps",
        ),
        (lambda: ZeroTerminalSNR(TableSchedule([0.1])), "schedule: must have at least 2"),
        (TableSchedule([1.0, 0.5]), r"betas\[0\] = 1.0"),
        (
            lambda: FlowMatching().convert("x1", torch.zeros(1, 1), torch.zeros(1, 1), T),
            "prediction_type: must be one of x0, eps, v, score, found x1",
        ),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


T = torch.tensor([0.5])
