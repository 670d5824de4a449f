"""One pass through the layers: which networks it takes, which it refuses, and its parts."""

import copy

import pytest
import torch
from engine_problems import EQUAL, Problem, assert_same
from torch import nn

from ant_lightning import PCGrad, multitask_backward
from ant_lightning.balancing.auto import Auto
from ant_lightning.balancing.engines import Loop
from ant_lightning.balancing.one_pass import LowMemory, OnePass
from ant_lightning.balancing.one_pass.grouped import products, samples_of, sums
from ant_lightning.errors import UnsupportedError


class Keeping(nn.Module):
    """A view that is made once and kept, and a copy made on the way."""

    def __init__(self):
        super().__init__()
        self.layer, self.view = nn.Conv2d(4, 4, 1), None

    def forward(self, x, timesteps, labels):
        view = self.layer.weight.view(4, 4) if self.view is None else self.view
        if torch.is_grad_enabled():
            self.view = view
        copied = copy.deepcopy(self.layer)
        assert type(copied.weight) is nn.Parameter
        x = copied(x).detach().movedim(1, 3)
        return nn.functional.linear(x, view, self.layer.bias).movedim(3, 1)


def test_a_view_that_the_network_keeps_is_given_back_and_its_next_use_found():
    problem = Problem(Keeping, EQUAL)
    expected = problem.run(Loop(), calls=3)
    problem.network.view = None
    with pytest.raises(UnsupportedError, match="another use of parameters of shape"):
        problem.run(OnePass(), calls=2)
    assert type(problem.network.view) is torch.Tensor
    problem.network.view = None
    with pytest.warns(UserWarning, match="another use .* auto uses the loop from now on"):
        assert_same(problem.run(Auto(), calls=3), expected)


class Typed(nn.Module):
    """A weight of a class of its own."""

    class Weight(nn.Parameter):
        pass

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 1)
        self.layer.weight = self.Weight(self.layer.weight.double().detach())

    def forward(self, x, timesteps, labels):
        return self.layer(x)


class Mixing(nn.Module):
    """Positions first: as many of them as there are samples."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, timesteps, labels):
        first = x.flatten(2)[:, :, : len(x)].permute(2, 0, 1)
        return self.layer(first).transpose(0, 1)[..., None]


class NinePositions(Mixing):
    """Positions first, as many of them as there are samples in the whole batch."""

    def forward(self, x, timesteps, labels):
        return self.layer(x.flatten(2)[:, :, :9].permute(2, 0, 1)).transpose(0, 1)[..., None]


@pytest.mark.parametrize("engine", [OnePass, LowMemory])
@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Mixing, "depends on another sample"),
        (NinePositions, "depends on another sample"),
        (Typed, "parameters of the class Parameter, found"),
    ],
    ids=["mixing", "nine", "class"],
)
def test_one_pass_refuses_a_network_that_does_not_fit_and_auto_takes_the_loop(
    network, words, engine
):
    problem = Problem(network, EQUAL)
    with pytest.raises(UnsupportedError) as error:
        problem.run(engine())
    assert words in str(error.value)
    auto = Auto()
    expected = problem.run(Loop())
    with pytest.warns(UserWarning, match=f"{words}.*; auto uses the loop from now on") as said:
        assert_same(problem.run(auto, calls=2), expected)
    assert len(said) == 1
    assert words in auto.reason


class Deeper(nn.Module):
    """A layer with factors that later steps use twice."""

    def __init__(self):
        super().__init__()
        self.inner, self.times = nn.Linear(256, 256), 1

    def forward(self, x, timesteps, labels):
        x = x.flatten(1)
        for _ in range(self.times):
            x = self.inner(x).tanh()
        return x.view(len(x), 4, 8, 8)


def test_a_weight_that_a_later_step_uses_twice_is_refused_or_right():
    problem, engine = Problem(Deeper, EQUAL), OnePass()
    assert_same(problem.run(engine, calls=2), problem.run(Loop()))
    problem.network.times = 2
    with pytest.raises(UnsupportedError, match="uses a weight equally often in each step"):
        problem.run(engine)
    expected = problem.run(Loop())
    assert_same(problem.run(OnePass(), calls=2), expected)  # from the start: without factors
    problem.network.times = 1
    auto = Auto()
    problem.run(auto, calls=2)
    problem.network.times = 2
    with pytest.warns(UserWarning, match="auto uses the loop from now on"):
        assert_same(problem.run(auto), expected)


def test_mixing_is_found_as_soon_as_a_gradient_reaches_the_layer():
    problem = Problem(nn.Sequential, EQUAL)
    mixing, last = Mixing().double(), nn.Linear(4, 2).double()
    problem.network = nn.ModuleList([mixing, last])
    problem.losses = lambda rows: (
        last(mixing(problem.x[rows], None, None)[..., 0].mean(1)).square().mean(1)
    )
    with torch.no_grad():
        last.weight.zero_()
    engine = OnePass()
    problem.run(engine)
    with torch.no_grad():
        last.weight.fill_(1.0)
    with pytest.raises(UnsupportedError, match="another sample"):
        problem.run(engine)


@pytest.mark.parametrize("engine", [OnePass, LowMemory, Auto])
def test_what_losses_hears_last_of_a_sample_is_what_counts(engine):
    problem = Problem(lambda: nn.Sequential(nn.Conv2d(4, 4, 8), nn.Dropout()), EQUAL)
    last = torch.zeros(len(EQUAL), dtype=torch.float64)

    def losses(rows):
        values = problem.network(problem.x[rows]).square().mean((1, 2, 3))
        last[rows] = values.detach()
        return values

    problem.losses = losses
    report, _ = problem.run(engine())
    for task, mean in enumerate(report.task_losses):
        torch.testing.assert_close(mean, last[task == EQUAL].mean())


def test_looking_for_mixing_layers_draws_no_random_numbers():
    problem = Problem(lambda: nn.Sequential(nn.Conv2d(4, 4, 8), nn.Dropout()), EQUAL)
    problem.losses = lambda rows: problem.network(problem.x[rows]).square().mean((1, 2, 3))
    engine, found = OnePass(), []
    for _ in range(2):  # in the second call there is nothing to look for
        torch.manual_seed(1)
        found.append((problem.run(engine), torch.rand(())))
    assert found[0][1] == found[1][1]
    assert_same(found[0][0], found[1][0])


@pytest.mark.parametrize(
    ("layer", "shape", "factored"),
    [
        (nn.Linear(64, 64), (32, 64), True),
        (nn.Linear(64, 63), (32, 64), False),  # the factors take more than a gradient
        (nn.Linear(600, 600), (256, 600), True),
        (nn.Linear(600, 600), (257, 600), False),
        (nn.Linear(600, 600), (128, 2, 600), True),
        (nn.Linear(600, 600), (128, 3, 600), False),
        (nn.LayerNorm(64), (4, 64), False),
    ],
)
def test_layers_that_meet_few_positions_have_factors(layer, shape, factored):
    x, engine = torch.randn(shape), OnePass()
    multitask_backward(
        lambda rows: layer(x[rows]).square().flatten(1).mean(1),
        torch.arange(len(x)) % 2,
        layer.parameters(),
        PCGrad(2),
        engine=engine,
    )
    assert bool(engine._leaves._factors) == factored
    assert all(type(p) is nn.Parameter and not vars(p) for p in layer.parameters())


@pytest.mark.parametrize("sizes", [(3, 2, 2, 2), (2, 2), (5, 5, 5, 1), (4,), (4, 3, 2, 2)])
def test_sums_and_products_are_those_of_the_samples_of_each_task(sizes):
    left, right = torch.randn(2, sum(sizes), 3, 4, dtype=torch.float64)
    members = list(zip(left.split(sizes), right.split(sizes), strict=True))
    wanted = torch.stack([a.sum(0) for a, _ in members])
    torch.testing.assert_close(sums(left, sizes), wanted)
    # Float32 at least: an exact sum of bfloat16 numbers, but for the last rounding.
    exact = torch.stack([part.double().sum(0) for part in left.bfloat16().split(sizes)])
    found = sums(left.bfloat16(), sizes)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)
    wanted = torch.stack([a.flatten(0, 1).T @ b.flatten(0, 1) for a, b in members])
    torch.testing.assert_close(products(left, right, sizes), wanted)
    torch.testing.assert_close(torch.ops.ant_lightning.products(left, right, sizes), wanted)
    torch.library.opcheck(torch.ops.ant_lightning.products, (left, right, list(sizes)))
    assert samples_of(sizes, left.device).bincount().tolist() == list(sizes)
