"""Every engine gives the gradients of the loop, or says why it cannot."""

from itertools import product

import pytest
import timestep_features
import tiny_digits
import torch
import torch._dynamo
from engine_problems import (
    EQUAL,
    NEARLY,
    NETWORKS,
    UNEQUAL,
    FewPositions,
    Problem,
    assert_same,
)
from torch import nn

from ant_lightning import ConfigError, DigitsData, NashMTL, PCGrad, multitask_backward
from ant_lightning.balancing.auto import Auto
from ant_lightning.balancing.engines import Loop
from ant_lightning.balancing.one_pass import LowMemory, OnePass

LR, EPS = 1e-3, 1e-8


SIZES = {"equal": EQUAL, "nearly equal": NEARLY, "unequal": UNEQUAL}


@pytest.mark.parametrize("engine", [OnePass, LowMemory, Auto])
@pytest.mark.parametrize(
    ("network", "sizes"),  # the U-Net takes long, and the other networks try each size
    [(n, s) for n, s in product(NETWORKS, SIZES) if n != "unet" or s == "unequal"],
)
def test_engines_give_the_numbers_of_the_loop(network, sizes, engine):
    problem = Problem(NETWORKS[network], SIZES[sizes])
    expected = problem.run(Loop())
    made = engine()
    assert_same(problem.run(made, calls=2, loss_scale=1.0), expected)
    scaled = problem.run(made, loss_scale=torch.tensor(8.0))
    assert_same((scaled[0], scaled[1] / 8), expected)
    assert getattr(made, "reason", None) is None


@pytest.mark.parametrize("engine", [Loop, OnePass])
def test_gradients_have_the_memory_layout_of_their_parameters(engine):
    problem = Problem(FewPositions, EQUAL)
    problem.network.to(memory_format=torch.channels_last)
    assert not problem.network.conv.weight.is_contiguous()
    problem.run(engine())
    for p in problem.network.parameters():
        assert p.grad is None or p.grad.stride() == p.stride()


@pytest.mark.parametrize("network", ["dit", "few positions"])
@pytest.mark.parametrize("engine", [OnePass, LowMemory])
def test_in_bfloat16_autocast_rows_differ_by_rounding(engine, network):
    problem = Problem(NETWORKS[network], EQUAL, torch.float32)
    exact = problem.run(Loop())
    with torch.autocast("cpu", torch.bfloat16):
        loop, found = problem.run(Loop()), problem.run(engine())
    assert not torch.equal(found[1], exact[1])
    error = (found[1] - exact[1]).norm() / exact[1].norm()
    assert error < 2 * (loop[1] - exact[1]).norm() / exact[1].norm() + 1e-3


@pytest.mark.parametrize("engine", [OnePass, LowMemory])
def test_whole_batch_engines_refuse_parts(engine):
    problem = Problem(NETWORKS["dit"], EQUAL)
    with pytest.raises(ConfigError, match=r"micro_batch_size: .*found 4; Loop"):
        problem.run(engine(), micro_batch_size=4)


def test_a_compiled_network_recompiles_once_per_shape():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
    compiled = torch.compile(network, backend="aot_eager", dynamic=False)
    x = torch.randn(15, 4)

    def losses(rows):
        return compiled(x[rows]).square().mean(1)

    balancer = PCGrad(3)
    parameters = list(network.parameters())

    def step(tasks):
        multitask_backward(losses, tasks, parameters, balancer, engine=Loop())
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    equal = torch.arange(15) % 3
    assert [step(equal) for _ in range(4)] == [1] * 4
    # Tasks of 4, 5 and 6 samples: two new shapes, once each.
    unequal = torch.tensor([0] * 4 + [1] * 5 + [2] * 6)
    assert [step(unequal) for _ in range(4)] == [3] * 4
    assert [step(equal) for _ in range(2)] == [3] * 2
    torch._dynamo.reset()


@pytest.mark.parametrize("engine", ["one_pass", "low_memory", "auto"])
def test_training_is_the_same_with_every_engine(engine, tmp_path):
    def weights(name):
        backbone = timestep_features.exact(tiny_digits.TinyDiT())
        model = tiny_digits.module(
            backbone,
            balancer=NashMTL(3, update_every=2),
            engine=name,
            optimizer=lambda groups: torch.optim.AdamW(groups, lr=LR, eps=EPS),
        )
        run = tiny_digits.trainer(tmp_path, steps=3, limit_val_batches=0, precision="64-true")
        run.fit(model, datamodule=DigitsData(batch_size=14))
        losses = model.last_report.task_losses
        return torch.cat([p.detach().flatten() for p in model.backbone.parameters()]), losses

    expected, found = weights("loop"), weights(engine)
    assert expected[0].dtype == expected[1].dtype == torch.float64
    # Engines add in different orders: gradients of norm 1 (they are clipped) differ by some
    # 1e3 * 2^-53 = 1e-13. A step of Adam, lr m / (sqrt(v) + eps), turns that into lr / eps = 1e5
    # times as much where a gradient is about zero, so 1e-8 in three steps. Float32 has 1e9 times
    # the rounding: there, a weight can be off by the whole of every step.
    assert (found[0] - expected[0]).norm() < 1e-7
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=0)
    start = torch.cat([p.detach().flatten() for p in tiny_digits.TinyDiT().parameters()])
    assert (expected[0] - start).norm() > 1e-3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"engine": "one_pass", "accumulate_grad_batches": 2},
            ["tasks.engine", "one_pass", "'loop'"],
        ),
        ({"engine": "low_memory", "placement": "sorted"}, ["placement: ", "low_memory"]),
    ],
)
def test_settings_that_contradict_the_engine_are_refused(settings, words):
    with pytest.raises(ConfigError) as error:
        tiny_digits.module(balancer=PCGrad(3), **settings)
    assert all(word in str(error.value) for word in words)
