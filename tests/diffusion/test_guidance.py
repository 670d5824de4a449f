"""Guidance in an interval and by a second network: what is called, what is equal bit for bit."""

import math

import pytest
import torch
from process_cases import PROCESSES

from ant_lightning import (
    DDIM,
    EDM,
    ConfigError,
    DiscreteDiffusion,
    EDMSampler,
    FlowMatching,
    GuidedDenoiser,
    ODESampler,
    SDESampler,
)

LABELS, NULL = torch.tensor([1, 3]), 9


def counted(process, *, slope=0.1):
    """A network that tells classes apart, and the number of rows of each of its calls."""
    rows = []

    def network(x, times, labels):
        rows.append(len(x))
        scaled, told = process.network_inputs(x, times)
        shift = labels.to(x.dtype).view(-1, 1, 1, 1) + 0.01 * told.view(-1, 1, 1, 1)
        return torch.tanh(slope * scaled + 0.1 * shift)

    return network, rows


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CASES = {
    "ddim": (DiscreteDiffusion(), DDIM(10)),
    "ode": (FlowMatching(), ODESampler(8)),
    "sde": (FlowMatching(), SDESampler(8)),
    "edm": (EDM(), EDMSampler(8)),
    "adaptive": (FlowMatching(), ODESampler(method="bosh3", rtol=1e-2, atol=1e-2)),
}


def run(case, network, *, scale, times=None, **settings):
    process, sampler = CASES[case]
    denoiser = GuidedDenoiser(
        network, LABELS, null_label=NULL, scale=scale, process=process, **settings
    )

    def recorded(x, t):
        if times is not None:
            times.append(t.clone())
        return denoiser(x, t)

    draws = iter(normal(20, 2, 1, 3, 3, seed=2))
    return sampler.sample(
        process, recorded, normal(2, 1, 3, 3), noise=draws.__next__, clip_denoised=False
    )


@pytest.mark.parametrize("case", CASES)
def test_outside_the_interval_samples_are_unguided_at_half_the_calls(case):
    network, rows = counted(CASES[case][0])
    plain = run(case, network, scale=1.0)
    num_plain = sum(rows)
    rows.clear()
    # No noise level of these paths is inside.
    assert torch.equal(run(case, network, scale=3.0, interval=(1e6, 1e7)), plain)
    assert sum(rows) == num_plain
    rows.clear()
    guided = run(case, network, scale=3.0)
    num_guided = sum(rows)
    rows.clear()
    assert torch.equal(run(case, network, scale=3.0, interval=(0.0, math.inf)), guided)
    assert sum(rows) == num_guided
    assert not torch.equal(guided, plain)
    if case != "adaptive":  # whose steps depend on the field
        assert num_guided == 2 * num_plain


@pytest.mark.parametrize("case", CASES)
def test_each_call_is_guided_by_its_own_noise_level(case):
    process, low, high = CASES[case][0], 0.3, 4.0
    network, rows = counted(process)
    times = []
    found = run(case, network, scale=3.0, interval=(low, high), times=times)
    expected = []
    for t in times:
        sigma = (-process.log_snr_at(t) / 2).exp()
        expected.append(2 + int(((sigma > low) & (sigma <= high)).sum()))
    assert rows == expected
    assert {2, 4} <= set(rows)
    assert not torch.equal(found, run(case, network, scale=1.0))
    if case == "adaptive":  # an image at its own time is guided alone
        assert 3 in rows


def test_ends_of_an_interval():
    """Above `low`, up to and with `high`: the noise level of `edges` of EDM, exactly."""
    process = EDM()
    network, rows = counted(process)
    denoiser = GuidedDenoiser(
        network, LABELS, null_label=NULL, scale=2.0, interval=(0.5, 2.0), process=process
    )
    for sigma, num in ((0.5, 2), (0.5001, 4), (2.0, 4), (2.0001, 2)):
        rows.clear()
        denoiser(normal(2, 1, 3, 3), torch.full((2,), sigma, dtype=torch.float64))
        assert rows == [num]


@pytest.mark.parametrize("name", PROCESSES)
def test_scale_one_is_no_guidance_in_every_process(name):
    process = PROCESSES[name]()
    network, rows = counted(process)
    x, times = normal(2, 1, 3, 3), process.times(torch.tensor([10, 500]))

    def never(x, times, labels):
        raise AssertionError("the guide was called")

    plain = network(x, times, LABELS)
    for settings in ({}, {"guide": never}, {"interval": (0.0, 80.0)}):
        rows.clear()
        denoiser = GuidedDenoiser(
            network, LABELS, null_label=NULL, scale=1.0, process=process, **settings
        )
        assert torch.equal(denoiser(x, times), plain)
        assert rows == [2]


def test_a_second_network_guides_without_a_null_class():
    process = FlowMatching()
    network, rows = counted(process)
    weak, weak_rows = counted(process, slope=0.05)
    x, times = normal(2, 1, 3, 3), torch.tensor([0.2, 0.9], dtype=torch.float64)
    strong, other = network(x, times, LABELS), weak(x, times, LABELS)
    rows.clear()
    weak_rows.clear()
    denoiser = GuidedDenoiser(network, LABELS, null_label=None, scale=2.5, guide=weak)
    torch.testing.assert_close(denoiser(x, times), other + 2.5 * (strong - other))
    assert (rows, weak_rows) == ([2], [2])
    # In an interval the weaker network is called for the images inside alone.
    weak_rows.clear()
    denoiser = GuidedDenoiser(
        network, LABELS, null_label=None, scale=2.5, guide=weak, interval=(0, 1), process=process
    )
    found = denoiser(x, times)
    assert weak_rows == [1]
    torch.testing.assert_close(found[0], (other + 2.5 * (strong - other))[0])
    assert torch.equal(found[1], strong[1])
    # Without labels too.
    denoiser = GuidedDenoiser(
        lambda x, t, y: x, None, null_label=None, scale=3.0, guide=lambda x, t, y: 0.5 * x
    )
    torch.testing.assert_close(denoiser(x, times), 2 * x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"interval": (2.0, 1.0), "process": EDM()},
            r"interval: must satisfy 0 .*found 2.0, 1.0",
        ),
        ({"interval": (-1.0, 1.0), "process": EDM()}, r"interval: .*found -1.0, 1.0"),
        ({"interval": (math.nan, 1.0), "process": EDM()}, r"interval: .*found nan, 1.0"),
        ({"interval": (0.0, 1.0)}, r"process: needed with an interval, found None"),
    ],
)
def test_bad_intervals_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        GuidedDenoiser(lambda x, t, y: x, LABELS, null_label=NULL, scale=2.0, **settings)
