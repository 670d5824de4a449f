"""One pass on networks that others wrote: diffusers, PEFT's LoRA, timm. Nothing is downloaded."""

import json
from pathlib import Path

import pytest
import torch

from ant_lightning import LoRA, MultiTaskStep, NashMTL, multitask_backward
from ant_lightning.balancing import Loop, OnePass, auto
from ant_lightning.models.adapters import insert

MANIFESTS = sorted((Path(__file__).parents[1] / "golden" / "M_diffusers").glob("manifest_*.json"))
TASKS = torch.tensor([0, 1, 2, 2, 1, 0, 2])
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def random_weights(network):
    """Float64, and nothing is zero: otherwise many gradients would be."""
    with torch.no_grad():
        for p in network.double().parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return network


def of_diffusers(path):
    """A tiny network, and the arguments of a call, the batch first where `True` is beside them."""
    diffusers = pytest.importorskip("diffusers")
    manifest = json.loads(path.read_text())
    torch.manual_seed(0)
    network = getattr(diffusers, path.stem.removeprefix("manifest_"))(**manifest["config"])
    arguments = {}
    for name, of in manifest["call"].items():
        shape, dtype = list(of["shape"]), getattr(torch, of["dtype"].removeprefix("torch."))
        batched = shape[0] == 2
        if batched:
            shape[0] = len(TASKS)
        numbers = torch.randint(0, 4, shape)
        if dtype.is_floating_point:
            numbers = torch.randn(shape, dtype=torch.float64)
            numbers = numbers.abs() if name == "timestep" else numbers
        arguments[name] = (numbers, batched)
    # In training mode the DiT of diffusers draws labels that it drops, other ones in each call.
    return random_weights(network).eval(), arguments


def run(network, arguments, engine, *, call=None, calls=1):
    def losses(rows):
        given = {
            name: each[rows] if batched else each for name, (each, batched) in arguments.items()
        }
        output = network(**given) if call is None else call(**given)
        output = output if isinstance(output, torch.Tensor) else output[0]
        return output.square().flatten(1).mean(1) * (1 + TASKS[rows])

    parameters = [p for p in network.parameters() if p.requires_grad]
    for _ in range(calls):
        report = multitask_backward(losses, TASKS, parameters, NashMTL(3), engine=engine)
    return report.gramian, torch.cat([p.grad.flatten() for p in parameters])


def assert_equal(found, expected):
    # Sums of the same float64 numbers in another order.
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a / b.abs().max(), b / b.abs().max(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem.removeprefix("manifest_"))
def test_one_pass_gives_the_numbers_of_the_loop_on_networks_of_diffusers(path):
    network, arguments = of_diffusers(path)
    assert_equal(run(network, arguments, OnePass(), calls=2), run(network, arguments, Loop()))


COMPILED = {"SanaTransformer2DModel"}


@pytest.mark.parametrize(
    "path",
    [
        path
        if path.stem.removeprefix("manifest_") in COMPILED
        else pytest.param(path, marks=pytest.mark.slow)
        for path in MANIFESTS
    ],
    ids=lambda path: path.stem.removeprefix("manifest_"),
)
def test_compiled_whole_in_one_graph_they_give_the_same(path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    network, arguments = of_diffusers(path)
    expected = run(network, arguments, Loop())
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=False)
    assert_equal(run(network, arguments, OnePass(), call=compiled, calls=3), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_adapters_of_peft(settings):
    peft = pytest.importorskip("peft")
    path = next(path for path in MANIFESTS if "SD3" in path.stem)
    network, arguments = of_diffusers(path)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS, **settings)
    network.add_adapter(config)
    network.double()
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if "lora" in name:
                p.add_(torch.randn_like(p), alpha=0.1)
    assert_equal(run(network, arguments, OnePass(), calls=2), run(network, arguments, Loop()))


def test_auto_takes_one_pass_for_an_adapter_however_long_a_pass_is(monkeypatch):
    monkeypatch.setattr(auto, "_CPU", (0, 0))  # any network is large
    path = next(path for path in MANIFESTS if "SD3" in path.stem)
    network, arguments = of_diffusers(path)
    given = {name: each for name, (each, _) in arguments.items()}

    def losses(rows):
        return network(**{n: e[rows] for n, e in given.items()}).sample.square().mean((1, 2, 3))

    used = {}
    for kind in ("whole", "adapter"):
        if kind == "adapter":
            network.requires_grad_(False)
            insert(LoRA(r=1), network.double())
            network.double()
        step = MultiTaskStep(network, NashMTL(3))
        step.backward(losses, TASKS)
        used[kind] = type(step.engine.used)
    assert used == {"whole": Loop, "adapter": OnePass}


def test_a_vision_transformer_of_timm():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    network = random_weights(timm.models.VisionTransformer(**sizes, num_classes=3, init_values=0.1))
    arguments = {"x": (torch.randn(len(TASKS), 3, 8, 8, dtype=torch.float64), True)}
    assert_equal(run(network, arguments, OnePass(), calls=2), run(network, arguments, Loop()))
