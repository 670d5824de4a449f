"""One pass through the layers: which networks it takes, which it refuses, and its parts."""

import copy

import pytest
import torch
from engine_problems import EQUAL, Problem, Scaled, assert_same, dit
from torch import nn
from torch.utils.checkpoint import checkpoint

from ant_lightning.balancing.auto import Auto
from ant_lightning.balancing.engines import Loop, UnsupportedError
from ant_lightning.balancing.factors import layers_to_factor
from ant_lightning.balancing.groups import Groups
from ant_lightning.balancing.low_memory import LowMemory
from ant_lightning.balancing.one_pass import OnePass
from ant_lightning.balancing.taps import Taps


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


@pytest.mark.parametrize("engine", [OnePass, LowMemory, Auto])
def test_a_network_may_keep_a_view_of_a_parameter_and_copies_are_not_watched(engine):
    problem = Problem(Keeping, EQUAL)
    expected = problem.run(Loop(), calls=3)
    problem.network.view = None
    assert_same(problem.run(engine(), calls=3), expected)
    assert type(problem.network.view) is torch.Tensor


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


class Flat(nn.Module):
    """A linear layer with one output, and no dimension for it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x, timesteps, labels):
        return nn.functional.linear(x.movedim(1, 3), self.weight)[:, None]


class Recomputed(nn.Module):
    """Where what is saved without taps has the shapes of what is saved with them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(9, 9), nn.Linear(9, 9)

    def forward(self, x, timesteps, labels):
        h = self.first(x.flatten(1)[:, :9])
        h = checkpoint(lambda h: self.second(h).tanh(), h, use_reentrant=False)
        return h[..., None, None]


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
        (Scaled, "found another use of parameters of shape [4, 1, 1]"),
        (Mixing, "depends on another sample"),
        (NinePositions, "found another use of parameters of shape [4, 4]"),
        (Typed, "parameters of the class Parameter, found"),
        (Flat, "found another use of parameters of shape [4]"),
        (lambda: dit(num_classes=5, gradient_checkpointing=True), "without gradient checkpointing"),
        (Recomputed, "without gradient checkpointing"),
    ],
    ids=["parameter", "mixing", "nine", "class", "flat", "checkpointing", "square checkpointing"],
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
    assert_same(problem.run(auto, calls=2), expected)
    assert words in auto.reason


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
        (nn.Conv2d(128, 128, 3, padding=1), (28, 128, 2, 2), True),
        (nn.Conv2d(128, 128, 3, padding=1), (29, 128, 2, 2), False),
        (nn.Conv2d(128, 128, 3, padding=1, groups=2), (25, 128, 2, 2), False),
        (nn.LayerNorm(64), (4, 64), False),
    ],
)
def test_layers_that_meet_few_positions_have_factors(layer, shape, factored):
    taps = Taps(list(layer.parameters()), shape[0])
    with taps:
        layer(torch.randn(shape))
    assert layers_to_factor(taps) == (taps.layers if factored else [])
    assert all(type(p) is nn.Parameter and not hasattr(p, "taps") for p in layer.parameters())
    assert len(taps.layers) == 1


@pytest.mark.parametrize(
    "sizes", [[2, 3, 2, 2], [2, 2], [3, 0, 2, 2], [1, 5, 5, 5], [4], [2, 4, 2, 3]]
)
def test_sums_of_groups_are_those_of_their_samples(sizes):
    starts = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    groups = Groups(starts)
    given = torch.repeat_interleave(torch.tensor(sizes))
    assert torch.equal(groups.order.sort().values, torch.arange(sum(sizes)))
    assert torch.equal(groups.of_samples(torch.device("cpu")), given[groups.order])
    left, right = torch.randn(2, sum(sizes), 3, 4, dtype=torch.float64)
    members = [left[given == group] for group in range(len(sizes))]
    wanted = torch.stack([part.sum((0, 1)) for part in members])
    torch.testing.assert_close(groups.sums(left[groups.order], (1,)), wanted)
    rows = torch.full((len(sizes), 9), torch.nan, dtype=torch.float64)  # summed in their precision
    coarse = left.bfloat16()
    exact = torch.stack([coarse[given == g].double().sum((0, 1)) for g in range(len(sizes))])
    found = groups.sums(coarse[groups.order], (1,), out=rows[:, 2:6])
    torch.testing.assert_close(rows[:, 2:6], exact)
    assert found.data_ptr() == rows[:, 2:6].data_ptr()
    products = [
        part.flatten(0, 1).T @ right[given == group].flatten(0, 1)
        for group, part in enumerate(members)
    ]
    for out in (None, torch.full((len(sizes), 4, 4), torch.nan, dtype=torch.float64)):
        found = groups.products(left[groups.order], right[groups.order], out=out)
        torch.testing.assert_close(found, torch.stack(products))
        assert out is None or found.data_ptr() == out.data_ptr()
    pieces = torch.zeros(len(sizes), 3, 4, dtype=torch.float64)
    for group, piece in groups.pieces():
        pieces[group] += left[groups.order][piece].sum(0)
    torch.testing.assert_close(pieces.sum(1), wanted)
