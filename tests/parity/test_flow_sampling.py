"""Samplers of flow matching against SiT and flow_matching, whose time is 1 - t."""

import json

import numpy as np
import pytest
import torch
from flow_matching_paths import PATHS
from stand_in_network import GOLDEN, error, load, stand_in, state_errors

from ant_lightning import (
    ConfigError,
    FlowMatching,
    GuidedDenoiser,
    ODESampler,
    SDESampler,
    flow_log_likelihood,
)
from ant_lightning.diffusion.samplers.adaptive import solve_each
from ant_lightning.diffusion.samplers.flow_field import FlowField
from ant_lightning.diffusion.samplers.flow_times import edm_times, sampling_interval, shifted
from ant_lightning.diffusion.samplers.runge_kutta import runge_kutta_step, tableau

ODE, ODE_ARRAYS = load("I_flow/sit_ode")
SDE, SDE_ARRAYS = load("I_flow/sit_sde")
FM, FM_ARRAYS = load("I_flow/fm_ode")
NETWORK = stand_in(ODE["stand_in"])
PREDICTIONS = {"velocity": "v", "noise": "eps", "score": "score"}
METHODS = {
    "euler": "euler",
    "heun2": "heun",
    "midpoint": "midpoint",
    "heun3": "heun3",
    "rk4": "rk4",
}
RUNS = sorted({key.removesuffix("/euler/x") for key in ODE_ARRAYS if key.endswith("/euler/x")})
INTERVALS = json.loads((GOLDEN / "I_flow" / "sit_intervals.json").read_text())["rows"]


def network(x, t):
    """The stand-in is told SiT's time."""
    return NETWORK(x, 1 - t)


def flow(name):
    path, prediction = name.split("/")[:2]
    return FlowMatching(path.lower(), prediction_type=PREDICTIONS[prediction])


def states(sampler, process, x, **options):
    steps = sampler.trajectory(process, network, x, clip_denoised=False, **options)
    return [step.x for step in steps]


def array(arrays, key, dtype=torch.float64):
    return torch.from_numpy(arrays[key]).to(dtype)


def float32_bound(measured):
    """Three times the error of the official code, and at least 4 roundings: it may be lucky."""
    return max(3 * measured, 4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("run", RUNS)
def test_sit_ode(run):
    process = flow(run)
    times = ODESampler(8).path_times(process)
    np.testing.assert_allclose(1 - np.array(times), ODE_ARRAYS[f"{run}/t"], rtol=0, atol=1e-15)
    for method in ("euler", "heun2", "midpoint"):
        sampler = ODESampler(ODE["num_steps"] - 1, method=METHODS[method])
        wanted = ODE_ARRAYS[f"{run}/{method}/x"]
        for dtype, bound in (
            (torch.float64, 1e-9),
            (torch.float32, float32_bound(ODE["max_rel_err_32_vs_64"][f"{run}/{method}"])),
        ):
            x = array(ODE_ARRAYS, "x0", dtype)
            found = states(sampler, process, x)
            assert {state.dtype for state in found} == {dtype}
            assert state_errors(found, wanted[1:]) <= bound


@pytest.mark.parametrize("run", RUNS)
def test_sit_limit(run):
    """dopri5 at 1e-11 is the solution; an adaptive method of higher order finds it in less time."""
    process, limit = flow(run), ODE_ARRAYS[f"{run}/dopri5/x"]
    start, stop = sampling_interval(process)
    middle, x = (start + stop) / 2, array(ODE_ARRAYS, "x0")
    field, options = FlowField(process, network), {"method": "dopri8", "rtol": 1e-7, "atol": 1e-7}
    for t, t_next, wanted in ((start, middle, limit[1]), (middle, stop, limit[2])):
        x = solve_each(lambda x, t: field.at(x, t).v, x, t, t_next, **options)
        assert error(x, wanted) < 1e-6


@pytest.mark.parametrize("run", [key[:-2] for key in ODE_ARRAYS if key.endswith("euler_reverse/x")])
def test_sit_reverse_ode(run):
    """The official reverse run of VP goes over [1, eps]: the times are given to our steps."""
    wanted, field = ODE_ARRAYS[f"{run}/x"], FlowField(flow(run), network)
    times, x = 1 - ODE_ARRAYS[f"{run}/t"], array(ODE_ARRAYS, "x1_reverse")
    for i, state in enumerate(wanted[1:]):
        # At the very end of VP our formula is 0 times infinity; its limit is finite.
        v = field.at(x, max(times[i], 1e-13)).v
        x = x + (times[i + 1] - times[i]) * v
        assert error(x, state) < 1e-9
    if not run.startswith("VP"):  # where the interval is our own, `invert` makes the same run
        sampler = ODESampler(len(wanted) - 1, method="euler")
        found = sampler.invert(flow(run), network, array(ODE_ARRAYS, "x1_reverse"))
        assert error(found, wanted[-1]) < 1e-9


@pytest.mark.parametrize("case", SDE["cases"])
def test_sit_sde(case):
    facts = SDE["cases"][case]
    last = facts["last_step"]
    # SiT's num_steps counts the last step too, and one more without it.
    sampler = SDESampler(
        SDE["num_steps"] if last else SDE["num_steps"] - 1,
        method=facts["sampling_method"].lower(),
        diffusion=facts["diffusion_form"].lower().replace("inccreasing-", "increasing_"),
        diffusion_norm=facts["diffusion_norm"],
        last_step=last and last.lower(),
        last_step_size=facts["last_step_size"] or 0.04,
    )
    process, wanted = flow(case), SDE_ARRAYS[case]
    times = sampler.path_times(process)
    assert times[0] == 1 - facts["t0"]
    assert 1 - times[-1] == facts["t1"]
    single = float32_bound(facts["max_rel_err_32_vs_64"])
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, single)):
        draws = iter(array(SDE_ARRAYS, "noise", dtype))
        x = array(SDE_ARRAYS, "x0", dtype)
        found = states(sampler, process, x, noise=draws.__next__)
        # Without a last step SiT lists its last state twice.
        assert state_errors(found, wanted if last else wanted[:-1]) <= bound
        assert next(draws, None) is None  # one draw for each step but the last
        assert len(found) == sampler.path_length(process)


@pytest.mark.parametrize("case", SDE["default_settings_give_nan"])
def test_what_is_nan_in_sit_is_refused(case):
    with pytest.raises(ConfigError, match=r"diffusion: must be finite at t = 1.*found sbdm"):
        SDESampler(8, diffusion="sbdm").check(flow(case.removeprefix("trap: ")))


def margin_of(row):
    """SiT ignores what is given for a velocity on linear and GVP, and one eps without the other."""
    ignored = row["prediction"] == "velocity" and row["path"] != "VP"
    both = row["given_train_eps"] is not None and row["given_sample_eps"] is not None
    return row["given_sample_eps"] if both and not ignored else None


@pytest.mark.parametrize("row", INTERVALS, ids=lambda row: f"{row['path']}-{row['prediction']}")
def test_sit_intervals(row):
    process = flow(f"{row['path']}/{row['prediction']}")
    margin = margin_of(row)
    start, stop = sampling_interval(process, margin)
    if row["ode"] == "TypeError":  # its sample_eps is None; ours has its default
        assert margin is None
        assert 1 - stop == 0.999
    else:
        assert [1 - start, 1 - stop] == pytest.approx(row["ode"], abs=1e-16)
        if row["path"] != "VP":  # SiT's reversed run of VP cuts the wrong end
            assert [1 - stop, 1 - start] == pytest.approx(row["ode_reverse"], abs=1e-16)
    for last in ("0", "0.04"):
        sampler = SDESampler(
            8, last_step="mean" if last == "0.04" else None, last_step_size=0.04, margin=margin
        )
        times = [1 - t for t in sampler.path_times(process)]
        for form in ("SBDM", "sigma"):
            wanted = row[f"sde_{form}_last{last}"]
            if wanted == "TypeError":
                continue
            assert times[-1] == pytest.approx(wanted[1], abs=1e-16)
            if wanted[0] is not None:
                assert times[0] == pytest.approx(wanted[0], abs=1e-16)


def test_sit_guidance():
    facts, arrays = load("I_flow/sit_cfg")
    model = stand_in(facts["stand_in"])
    x, t, y = (torch.from_numpy(arrays[key]) for key in ("x", "t", "y"))
    n = len(x) // 2
    process = FlowMatching(prediction_type="v")
    assert facts["cfg_scales"] == [1.0, 1.5, 4.0]
    for scale in facts["cfg_scales"]:
        denoiser = GuidedDenoiser(
            lambda x, t, y: model(x, 1 - t, y),
            y[:n],
            null_label=facts["null_class"],
            scale=scale,
            guided_channels=3,
        )
        wanted = arrays[f"cfg{scale:g}/out"]
        assert error(denoiser(x[:n], 1 - t[:n]), wanted[:n]) < 1e-10
        # Its second half repeats the guided channels, and has the null class in the fourth.
        np.testing.assert_array_equal(wanted[n:, :3], wanted[:n, :3])
        sampler = ODESampler(facts["num_steps"] - 1, method="euler")
        found = [
            step.x for step in sampler.trajectory(process, denoiser, x[:n], clip_denoised=False)
        ]
        assert state_errors(found, arrays[f"cfg{scale:g}/euler_x"][1:]) < 1e-10


@pytest.mark.parametrize("method", METHODS)
def test_flow_matching_ode(method):
    process, x = FlowMatching(), array(FM_ARRAYS, "x_init")

    def path(times):
        sampler = ODESampler(times=list(1 - times), method=METHODS[method])
        return np.stack([x, *states(sampler, process, x)])

    for grid in ("time_grid", "uniform_grid"):
        wanted = FM_ARRAYS[f"{grid.split('_')[0].replace('time', 'grid')}/{method}/x"]
        assert error(path(FM_ARRAYS[grid]), wanted) < 1e-9
    # With a step size: our steps, and its states between them by linear interpolation.
    num_steps = FM["steps"]
    found, size = path(np.linspace(0, 1, num_steps + 1)), FM["step_size"]
    assert error(found[-1], FM_ARRAYS[f"step_size/{method}/final"]) < 1e-9
    at = FM_ARRAYS["time_grid"] / size
    left = np.minimum(at.astype(int), num_steps - 1)
    part = (at - left).reshape(-1, 1, 1, 1, 1)
    between = found[left] + part * (found[left + 1] - found[left])
    assert error(between, FM_ARRAYS[f"step_size/{method}/x"]) < 1e-9
    back = ODESampler(num_steps, method=METHODS[method]).invert(process, network, x)
    assert error(back, FM_ARRAYS[f"backward/{method}/x"][-1]) < 1e-9


def test_flow_matching_limit():
    options = {"method": "dopri5", "rtol": 1e-8, "atol": 1e-8}
    x = array(FM_ARRAYS, "x_init")
    found = ODESampler(**options).sample(FlowMatching(), network, x, clip_denoised=False)
    assert error(found, FM_ARRAYS["dopri5/x"][-1]) < 1e-6
    field, start = FlowField(FlowMatching(), network), 1.0
    for t, wanted in zip(1 - FM_ARRAYS["time_grid"][1:], FM_ARRAYS["dopri5/x"][1:], strict=True):
        x, start = solve_each(lambda x, t: field.at(x, t).v, x, start, t, **options), t
        assert error(x, wanted) < 1e-6


@pytest.mark.parametrize("pair", load("I_flow/fm_transform")[0]["pairs"], ids="-".join)
def test_flow_matching_on_another_path(pair):
    _, arrays = load("I_flow/fm_transform")
    name = "_to_".join(pair)
    trained, walked = (PATHS[each]() for each in pair)
    r = 1 - array(arrays, "r")
    times = trained.times_at(walked.log_snr_at(r))
    assert error(1 - times, arrays[f"{name}/t_r"]) < 1e-7
    scale = walked.levels(r, r).s / trained.levels(r, times).s
    assert error(scale, arrays[f"{name}/s_r"]) < 1e-7
    field = FlowField(trained, network, walked=walked)
    assert error(-field.at(array(arrays, "x"), r).v, arrays[f"{name}/u"]) < 1e-7
    # Whole runs.
    times = 1 - FM_ARRAYS[f"transformed/{name}/t"]
    x, wanted = array(FM_ARRAYS, "x_init"), FM_ARRAYS[f"transformed/{name}/midpoint/x"]
    for i, state in enumerate(wanted[1:]):
        velocity = lambda x, t: field.at(x, t).v  # noqa: E731
        x = runge_kutta_step(velocity, x, times[i], times[i + 1], tableau("midpoint"))
        assert error(x, state) < 1e-9
    if pair[1] in {"cosine", "condot"} and pair[0] != "poly2":  # by the sampler's own setting
        path = {"cosine": "gvp", "condot": "linear"}[pair[1]]
        sampler = ODESampler(times=list(times), method="midpoint", path=path)
        assert error(states(sampler, trained, array(FM_ARRAYS, "x_init"))[-1], wanted[-1]) < 1e-9


@pytest.mark.parametrize("method", ["euler", "midpoint"])
def test_flow_matching_likelihood(method):
    x = array(FM_ARRAYS, "likelihood/x_1")
    sampler = ODESampler(FM["steps"], method=method)
    x = x[:, :, None, None]
    found, noise = flow_log_likelihood(FlowMatching(), network, x, sampler=sampler)
    assert error(noise.flatten(1), FM_ARRAYS[f"likelihood/{method}/x_0"]) < 1e-9
    assert error(found, FM_ARRAYS[f"likelihood/{method}/log_p"]) < 1e-9


def test_flow_matching_examples():
    facts, arrays = load("I_flow/fm_examples")
    for num_steps in (5, 18):
        for suffix, rho in (("", 7.0), ("_rho5", 5.0)):
            wanted = arrays[f"time_discretization/nfe{num_steps}{suffix}"]
            assert error(1 - np.array(edm_times(num_steps, rho=rho)), wanted) < 1e-12
    assert ODESampler(5, grid="edm").path_times(FlowMatching()) == edm_times(5)
    # The skewed training times are a shift, too: t = sigmoid(1.2 - 1.2 z), clipped.
    skewed = np.clip(1 / (1 + np.exp(1.2 * arrays["z"] - 1.2)), 1e-4, 1)
    assert error(skewed, arrays["skewed_t"]) < 1e-12
    model, x = stand_in(facts["stand_in"]), torch.from_numpy(arrays["x"]).float()
    label, t = torch.from_numpy(arrays["label"]), torch.from_numpy(arrays["t"]).float()
    for scale in facts["cfg_scales"]:  # 0 is no guidance there: ours minus 1
        denoiser = GuidedDenoiser(
            lambda x, t, y: model(x, 1 - t, y), label, null_label=0, scale=scale + 1
        )
        found = denoiser(x, (1 - t).expand(len(x)))
        assert error(found, arrays[f"cfg{scale:g}/out"]) < 1e-6


def test_the_shift_is_that_of_sd3_applied_once():
    sampler = ODESampler(10, shift=3.0)
    arrays = load("L_density/schedules")[1]
    wanted = arrays["shift3_given_sigmas/sigmas"]
    np.testing.assert_allclose(sampler.path_times(FlowMatching()), wanted, rtol=2e-6, atol=1e-8)
    assert shifted(0.5, 1.0) == 0.5
