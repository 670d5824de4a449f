"""On a GPU: the numbers of the CPU, exact resume, low precision, engines, memory, evaluation."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_fit
import torch
from lightning.pytorch.plugins import MixedPrecision

from ant_lightning import DDIM, DiT, PCGrad, UNet, multitask_backward
from ant_lightning.balancing.auto import Auto
from ant_lightning.balancing.engines import Loop
from ant_lightning.balancing.one_pass import LowMemory, OnePass
from ant_lightning.cli.parser import run
from ant_lightning.models import draws
from ant_lightning.models.draws import step_noise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GPU = {"accelerator": "gpu", "devices": 1}
ENGINES = {"loop": Loop, "one_pass": OnePass, "low_memory": LowMemory, "auto": Auto}


@pytest.fixture(autouse=True)
def _exact_convolutions():
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.1)


def weights(module):
    return torch.cat([p.detach().double().cpu().flatten() for p in module.backbone.parameters()])


def trained(folder, method, *, model=(), **settings):
    """The network after 11 steps."""
    model = {"optimizer": sgd, **dict(model)}
    return weights(
        tiny_fit.fit(folder, method=method, model=model, **settings).lightning_module.cpu()
    )


@pytest.mark.parametrize("method", tiny_fit.BALANCERS)
def test_training_makes_the_parameters_of_the_cpu(method, tmp_path, monkeypatch):
    def noise(mine, shape, seed, step, device):  # as it is drawn on the CPU
        return step_noise(mine, shape, seed, step, torch.device("cpu")).to(device)

    monkeypatch.setattr(draws, "step_noise", noise)
    start = weights(tiny_fit.module(method))
    expected = trained(tmp_path / "cpu", method) - start
    found = trained(tmp_path / "gpu", method, **GPU) - start
    assert (found - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("method", ["vanilla", "uw", "continuous_uw", "pcgrad", "nash"])
def test_a_stopped_run_resumes_to_the_last_bit(method, tmp_path):
    # The network draws masks on the GPU; sums by index have no fixed order there by default.
    settings = {"method": method, "deterministic": True, "model": {"kind": tiny_fit.Forgetful}}
    tiny_fit.fit(tmp_path / "whole", steps=7, **settings, **GPU)
    tiny_fit.fit(tmp_path / "parts", steps=3, **settings, **GPU)
    stopped = tmp_path / "parts" / "last.ckpt"
    tiny_fit.fit(tmp_path / "parts", steps=7, resume=stopped, **settings, **GPU)
    torch.use_deterministic_algorithms(False)
    tiny_fit.assert_same(tmp_path / "whole" / "step=7.ckpt", tmp_path / "parts" / "step=7.ckpt")


@pytest.mark.parametrize("method", ["vanilla", "uw", "pcgrad", "nash"])
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("bf16-mixed", 0.05), ("16-mixed", 0.01), ("bf16-true", 0.3)]
)
def test_an_update_is_that_of_float32_up_to_rounding(method, precision, tolerance, tmp_path):
    start = weights(tiny_fit.module(method))
    exact = trained(tmp_path / "exact", method, steps=4, **GPU) - start
    kind = {"precision": precision}
    if precision == "16-mixed":
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
        kind = {"plugins": [MixedPrecision("16-mixed", device="cuda", scaler=scaler)]}
    low = trained(tmp_path / "low", method, steps=4, **kind, **GPU)
    if precision == "bf16-true":
        start = start.bfloat16().double()
    error = low - start - exact
    assert 0 < error.norm() < tolerance * exact.norm()


def test_float16_backs_off_by_itself_from_an_overflow(tmp_path):
    trainer = tiny_fit.fit(tmp_path, method="pcgrad", steps=4, precision="16-mixed", **GPU)
    scaler = trainer.precision_plugin.scaler
    assert scaler.is_enabled()
    assert scaler.get_scale() <= 2.0**16
    assert trainer.lightning_module.last_report.finite


def problem(kind, b=26, hidden_size=64):
    """Losses of a network with random weights, and the tasks of its batch."""
    torch.manual_seed(0)
    if kind == "dit":
        network = DiT(
            input_size=8,
            in_channels=4,
            hidden_size=hidden_size,
            depth=2,
            num_heads=2,
            num_classes=0,
        )
    else:
        network = UNet(
            input_size=8,
            in_channels=4,
            out_channels=4,
            model_channels=32,
            channel_mult=(1, 2),
            num_res_blocks=1,
            num_heads=2,
            attention_resolutions=(2,),
        )
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    network = network.cuda()
    x = torch.randn(b, 4, 8, 8).cuda()
    tasks = torch.arange(b) % 5

    def losses(rows):
        output = network(x[rows], 100 * tasks[rows].cuda())
        return (output[:, :4] - 1).square().mean((1, 2, 3)) * (1 + tasks[rows].cuda())

    return network, losses, tasks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dit", "unet"])
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_give_the_gradient_of_the_loop(engine, kind, dtype):
    network, losses, tasks = problem(kind)
    parameters = [p for p in network.parameters() if p.requires_grad]

    def gradient(engine):
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            report = multitask_backward(losses, tasks, parameters, PCGrad(5), engine=engine)
        assert report.finite
        return torch.cat([p.grad.flatten() for p in parameters]).double()

    expected, found = gradient(Loop()), gradient(ENGINES[engine]())
    error = (found - expected).norm() / expected.norm()
    assert error < (1e-4 if dtype == torch.float32 else 0.05)


def test_pcgrad_needs_its_rows_at_most_and_low_memory_none_of_them():
    network, losses, tasks = problem("dit", hidden_size=512)
    parameters = [p for p in network.parameters() if p.requires_grad]
    row = 4 * sum(p.numel() for p in parameters)

    def peak(balancer, engine=None):
        for p in parameters:
            p.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        multitask_backward(losses, tasks, parameters, balancer, num_tasks=5, engine=engine)
        return torch.cuda.max_memory_allocated() - held

    peak(None)  # the work space of the kernels
    vanilla = peak(None)
    assert peak(PCGrad(5), Loop()) < vanilla + 5 * row
    assert peak(PCGrad(5), LowMemory()) + 3 * row < peak(PCGrad(5), OnePass())


def test_a_compiled_network_is_compiled_for_one_size_and_then_for_all(tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = tiny_fit.module("pcgrad")
    plain = trained(tmp_path / "plain", "pcgrad", **GPU) - weights(module)
    compiled = trained(tmp_path / "compiled", "pcgrad", model={"kind": _compiled}, **GPU)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert (compiled - weights(module) - plain).norm() < 0.01 * plain.norm()
    torch._dynamo.reset()


def _compiled(**settings):
    return DiT(**settings, compiled=True)


@pytest.mark.parametrize(
    ("model", "method", "precision"),
    [("dit", "pcgrad", "bf16-mixed"), ("dit", "nash", "16-mixed"), ("adm", "uw", "bf16-mixed")],
)
def test_the_digits_train_and_are_measured_from_the_command_line(
    model, method, precision, tmp_path
):
    arguments = [
        f"--config={CONFIGS}/digits/{model}.yaml",
        f"--config={CONFIGS}/balancer/{method}.yaml",
        f"--config={CONFIGS}/clustering/snr.yaml",
        "--trainer.accelerator=gpu",
        f"--trainer.precision={precision}",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        f"--trainer.logger.save_dir={tmp_path}",
        "--trainer.max_steps=30",
        "--trainer.val_check_interval=30",
        "--trainer.log_every_n_steps=10",
        "--model.sampling.sampler.num_steps=4",
        "--data.batch_size=50",
        "--trainer.callbacks+=ant_lightning.TaskAffinity",
        "--trainer.callbacks.init_args.num_points=5",
        "--trainer.callbacks.init_args.num_images=50",
        "--trainer.callbacks+=ant_lightning.StepCost",
    ]
    cli = run(["fit", *arguments])
    assert cli.model.num_skipped_steps <= 2  # float16 starts with a scale that is too large
    assert all(torch.isfinite(p).all() for p in cli.model.backbone.parameters())
    rows = next(tmp_path.rglob("generation_metrics.jsonl")).read_text().splitlines()
    assert np.isfinite(json.loads(rows[-1])["scores"]["fid"])
    cost = json.loads(next(tmp_path.rglob("step_cost.json")).read_text())
    assert cost["memory_of"] == torch.cuda.get_device_name()
    assert cost["peak_memory_gb"] > 0
    last = next(tmp_path.rglob("last.ckpt"))
    again = run(["validate", *arguments, f"--ckpt_path={last}"])
    found, expected = again.trainer.callback_metrics, cli.trainer.callback_metrics
    assert float(found["val/loss"]) == pytest.approx(float(expected["val/loss"]), rel=1e-3)


def test_sampling_makes_the_images_of_the_cpu():
    module = tiny_fit.module("vanilla", sampler=DDIM(num_steps=5))
    with torch.no_grad():
        for p in module.backbone.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    here = module.sample(range(6))
    there = module.cuda().sample(range(6)).cpu()
    assert (here - there).abs().max() < 1e-2
