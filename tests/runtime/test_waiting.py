"""How often the host waits for a GPU, and that the numbers there are those of the CPU."""

import warnings
from contextlib import nullcontext
from itertools import product

import pytest
import tiny_fit
import torch
from engine_problems import NEARLY, FewPositions, Problem, dit, unet
from pretended_gpu import GPU, PretendedGPU, Remote
from torch.utils._pytree import tree_map_only

from ant_lightning import (
    EDM,
    EMA,
    ContinuousUncertainty,
    DiT,
    FeatureAlignment,
    FlowMatching,
    LogitNormal,
    MinSNR,
    NashMTL,
    PCGrad,
    UncertaintyWeighting,
    multitask_backward,
)
from ant_lightning.balancing.auto import Auto
from ant_lightning.balancing.engines import Loop
from ant_lightning.balancing.one_pass import LowMemory, OnePass
from ant_lightning.models import draws
from ant_lightning.models.draws import step_noise

MOST = {"pcgrad": 0, "nash": 1}
BALANCERS = {
    "pcgrad": lambda: PCGrad(5),
    "nash": lambda: NashMTL(5, update_every=1),
    "uw": lambda: UncertaintyWeighting(5),
    "continuous": lambda: ContinuousUncertainty(5),
    "vanilla": lambda: None,
}
ENGINES = {"loop": Loop, "one_pass": OnePass, "low_memory": LowMemory, "auto": Auto}
NETWORKS = {"dit": lambda: dit(num_classes=5), "unet": unet, "few positions": FewPositions}


def random_gramian():
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return rows @ rows.T


@pytest.mark.parametrize("name", MOST)
def test_balancers_wait_for_the_device_at_most_once(name, monkeypatch):
    gramian, balancer, local = random_gramian(), BALANCERS[name](), BALANCERS[name]()
    with PretendedGPU(monkeypatch) as gpu:
        weights = balancer(Remote(gramian))
    assert len(gpu.waits) <= MOST[name], gpu.waits
    torch.testing.assert_close(weights.value, local(gramian))


def steps(network, engine, balancer, gpu=None):
    """Calls of `multitask_backward`, on the CPU or on a GPU that is not there.

    Returns:
        The last report and gradient, and the waits of each call.
    """
    problem, move = Problem(NETWORKS[network], NEARLY), lambda value: value
    if gpu is not None:
        move = Remote
        for each in (problem.network, *([balancer] if balancer else [])):
            gpu.move(each)
    x, labels, levels = map(move, (problem.x, problem.labels, 100 * NEARLY))
    factors, scale = move(1.0 + NEARLY.double()), move(torch.tensor(8.0))

    def losses(rows):
        rows = rows.to(x.device, non_blocking=True)
        output = problem.network(x[rows], levels[rows], labels[rows])
        return (output - 1).square().mean((1, 2, 3)) * factors[rows]

    parameters, waits = list(problem.network.parameters()), []
    with gpu or nullcontext():
        # One layer of `few positions` stays unproven until one pass gives up trying.
        for _ in range(11 if network == "few positions" else 3):
            report = multitask_backward(
                losses,
                NEARLY,
                parameters,
                balancer,
                num_tasks=5,
                engine=engine,
                log_snr=torch.linspace(-3, 3, len(NEARLY)),
                loss_scale=scale,
            )
            waits.append(gpu.waits if gpu else [])
            if gpu:
                gpu.waits = []
        values = [p.grad for p in parameters if p.requires_grad]
        values += [p.grad for p in (balancer.parameters() if balancer else ())]
        return report, torch.cat([getattr(v, "value", v).flatten().double() for v in values]), waits


def cases():
    """Every network, engine and balancer with one of the others, all in the slow tests."""
    for network, engine, name in product(NETWORKS, ENGINES, BALANCERS):
        usual = (network == "dit") + (engine == "auto") + (name == "pcgrad")
        quick = usual >= 2
        marks = () if quick else (pytest.mark.slow,)
        yield pytest.param(network, engine, name, marks=marks)


@pytest.mark.parametrize(("network", "engine", "name"), list(cases()))
def test_a_step_on_a_gpu_gives_the_numbers_of_the_cpu_and_waits_for_its_end(
    network, engine, name, monkeypatch
):
    _, expected, _ = steps(network, ENGINES[engine](), BALANCERS[name]())
    gpu = PretendedGPU(monkeypatch)
    report, found, waits = steps(network, ENGINES[engine](), BALANCERS[name](), gpu)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert report.grad_norm.device == GPU
    assert len(waits[-1]) <= MOST.get(name, 0) + 1, waits[-1]


def aligned():
    """An auxiliary term on the tiny network."""
    features = torch.nn.Conv2d(1, 5, 4, stride=4)
    sizes = {"width": 8, "feature_width": 5, "hidden_size": 8}
    return {"auxiliary": FeatureAlignment(block="blocks.0", features=features, **sizes)}


def eps_only(**settings):
    return DiT(**settings, learn_sigma=False)


PROCESSES = {
    "ddpm": lambda: {"loss_weighting": MinSNR(), "weighting": "by_size"},
    "flow": lambda: {"process": FlowMatching(density=LogitNormal(), num_timesteps=100)},
    "flow, gvp": lambda: {
        "process": FlowMatching("gvp", prediction_type="eps", loss_weighting="velocity")
    },
    "edm": lambda: {"process": EDM(num_timesteps=100), "kind": eps_only, "weighting": "by_size"},
    "aligned": lambda: {"process": FlowMatching(num_timesteps=100), **aligned()},
}
METHODS = ["vanilla", "uw", "continuous_uw", "pcgrad", "nash", "upgrad"]


@pytest.mark.parametrize(
    ("name", "process"),
    [*((name, "ddpm") for name in METHODS)]
    + [("uw", process) for process in PROCESSES if process != "ddpm"]
    + [
        pytest.param(name, process, marks=pytest.mark.slow)
        for name, process in product(("pcgrad", "continuous_uw"), PROCESSES)
        if process != "ddpm"
    ],
)
def test_a_training_step_waits_for_a_gpu_no_more_than_its_gradients_do(
    name, process, tmp_path, monkeypatch
):
    settings = PROCESSES[process]()
    module = tiny_fit.fit(tmp_path, method=name, steps=1, model=settings).lightning_module
    ema = next(each for each in module.trainer.callbacks if isinstance(each, EMA))
    batch = next(iter(module.trainer.train_dataloader))
    gpu = PretendedGPU(monkeypatch)
    gpu.move(module)
    if module.auxiliary is not None:
        gpu.move(module.auxiliary._features[0])
    monkeypatch.setattr(module, "_device", GPU)
    monkeypatch.setattr(module, "lr_schedulers", lambda: None)

    def noise(mine, shape, seed, step, device):  # generators there are none of
        return Remote(step_noise(mine, shape, seed, step, torch.device("cpu")))

    monkeypatch.setattr(draws, "step_noise", noise)
    with gpu:
        (optimizer,), _ = module.configure_optimizers()
        monkeypatch.setattr(module, "optimizers", lambda: optimizer)
        module.on_fit_start()
        ema._averages = {key: Remote(value) for key, value in ema._averages.items()}
        batch = tree_map_only(torch.Tensor, Remote, batch)
        # In the last one Nash is refreshed; `auto` has chosen an engine by the fourth.
        for _ in range(8 if name == "nash" else 4):
            gpu.waits, ema._last_step = [], None
            outputs = module.training_step(batch, 0)
            ema.on_train_batch_end(module.trainer, module)
    assert outputs["loss"].device == GPU
    assert len(gpu.waits) <= MOST.get(name, 0) + 1, gpu.waits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", MOST)
def test_balancers_wait_for_a_gpu_at_most_once(name):
    balancer, gramian = BALANCERS[name](), random_gramian().cuda()
    balancer(gramian)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            balancer(gramian)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    waits = [str(each.message) for each in said if "called a synchronizing" in str(each.message)]
    assert len(waits) <= MOST[name], waits
