"""Whatever way parameters are stored: every engine and balancer is right, or all refuse them."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from kinds_of_parameters import (
    BALANCERS,
    REFUSED,
    RIGHT,
    TASKS,
    B,
    K,
    Network,
    assert_right,
    batch,
    losses_of,
)
from torch import nn

from ant_lightning import (
    ConfigError,
    PCGrad,
    UncertaintyWeighting,
    multitask_backward,
    task_gradients,
    transfer_matrix,
)
from ant_lightning.affinity.gradient import FlatGradient
from ant_lightning.balancing.auto import Auto
from ant_lightning.balancing.engines import Loop
from ant_lightning.balancing.gradients import DenseTaskGradients
from ant_lightning.balancing.one_pass import LowMemory, OnePass
from ant_lightning.balancing.reduction import Reduction
from ant_lightning.errors import UnsupportedError

ENGINES = [Loop, Auto, OnePass, LowMemory]
METHODS = [("none", Loop), ("uw", Loop), *(("pcgrad", engine) for engine in ENGINES)]
TOLERANCE = {"none": 1e-12, "uw": 1e-6, "pcgrad": 1e-12}  # the weights of UW are float32
methods = pytest.mark.parametrize(("method", "engine"), METHODS)


def step(network, method, engine, parameters=None, **arguments):
    return multitask_backward(
        losses_of(network, batch(), TASKS),
        TASKS,
        list(network.parameters()) if parameters is None else parameters,
        BALANCERS[method](),
        num_tasks=K,
        engine=engine,
        **arguments,
    )


@methods
@pytest.mark.parametrize("kind", RIGHT)
def test_gradients_and_gramian_are_those_of_autograd(kind, method, engine):
    network, made = RIGHT[kind](), engine()
    assert_right(network, step(network, method, made), tolerance=TOLERANCE[method])


@methods
@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_engine_is_right_for_is_refused_by_all(kind, method, engine):
    make, words = REFUSED[kind]
    network = make()
    with pytest.raises(ConfigError) as error:
        step(network, method, engine())
    assert str(error.value).startswith("parameters: ")
    assert "found parameter 0" in str(error.value) or "found parameter 6" in str(error.value)
    assert words in str(error.value)
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("kind", REFUSED)
def test_analyses_refuse_the_same(kind):
    make, words = REFUSED[kind]
    network = make()
    losses = losses_of(network, batch(), TASKS)

    def rows(task):
        return (task == TASKS).nonzero()[:, 0]

    def affinity():
        return transfer_matrix(
            lambda task: losses(rows(task)).mean(),
            parameters=network.parameters(),
            num_tasks=K,
            lr=0.1,
        )

    def halves():
        return FlatGradient(lambda t, half: losses(rows(t)).mean(), parameters=network.parameters())

    def gradients():
        return task_gradients(losses, TASKS, network.parameters(), num_tasks=K)

    for analysis in (affinity, halves, gradients):
        with pytest.raises(ConfigError) as error:
            analysis()
        assert words in str(error.value)


def test_a_result_of_an_operation_is_no_parameter():
    network = RIGHT["ordinary"]()
    with pytest.raises(ConfigError, match=r"must be a leaf.* found parameter 1 of .*MulBackward"):
        step(network, "none", Loop(), [network.conv.weight, network.out.weight * 2])


@methods
def test_a_parameter_given_twice_counts_once(method, engine):
    network = RIGHT["ordinary"]()
    twice = [*network.parameters(), *network.linear.parameters()]
    tolerance = TOLERANCE[method]
    assert_right(network, step(network, method, engine(), twice), tolerance=tolerance)


@st.composite
def layouts(draw):
    """A weight of a linear layer: dimensions of a larger tensor swapped, cut and stepped over."""
    swap = draw(st.booleans())
    steps = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    offsets = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    extra = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    lengths = [o + s * n + e for o, s, n, e in zip(offsets, steps, (16, 16), extra, strict=True)]
    cut = [slice(o, o + s * 16, s) for o, s in zip(offsets, steps, strict=True)]
    memory = torch.randn(lengths, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = memory[tuple(cut)]
    return found.t() if swap else found


@settings(max_examples=20, deadline=None, derandomize=True)
@given(layouts(), st.sampled_from(ENGINES))
def test_any_slice_of_a_tensor_is_right(weight, engine):
    network = Network(lambda network: setattr(network.linear, "weight", nn.Parameter(weight / 8)))
    assert_right(network, step(network, "pcgrad", engine()))


@methods
def test_parameters_may_be_frozen_and_thawed_between_steps(method, engine):
    network, made = RIGHT["ordinary"](), engine()
    buffers = DenseTaskGradients(K, [*network.parameters()], reduction=Reduction())
    tolerance = TOLERANCE[method]
    # Frozen, thawed, and one for another of the same shape.
    conv = ["conv.weight", "conv.bias"]
    for frozen in ([], conv, [], ["linear.bias"], ["out.bias", *conv], []):
        for name, p in network.named_parameters():
            p.requires_grad_(name not in frozen)
        report = step(network, method, made, gradients=buffers)
        assert_right(network, report, tolerance=tolerance)
        report = step(network, method, made, gradients=buffers)
        assert_right(network, report, tolerance=tolerance)


@pytest.mark.parametrize("engine", [Loop, OnePass])
def test_buffers_follow_a_change_of_two_parameters_of_one_shape(engine):
    network = RIGHT["ordinary"]()
    network.again = network.out = nn.Linear(16, 16).double()
    network.linear.requires_grad_(False)
    buffers = DenseTaskGradients(
        K, [p for p in network.parameters() if p.requires_grad], reduction=Reduction()
    )
    made = engine()
    step(network, "pcgrad", made, gradients=buffers)
    network.linear.requires_grad_(True)
    network.out.requires_grad_(False)
    assert_right(network, step(network, "pcgrad", made, gradients=buffers))


@pytest.mark.parametrize("balancer", [None, UncertaintyWeighting(K), PCGrad(K)])
def test_what_is_frozen_moves_no_more(balancer):
    network = RIGHT["ordinary"]()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    losses = losses_of(network, batch(), TASKS)
    for frozen in (False, False, True, True):
        network.linear.requires_grad_(not frozen)
        before = network.linear.weight.detach().clone()
        multitask_backward(losses, TASKS, network.parameters(), balancer, num_tasks=K)
        optimizer.step()
        assert torch.equal(network.linear.weight, before) == frozen


class Mixing(nn.Module):
    """The trained layer is followed by one that mixes samples, through a layer thawed later."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mixed, self.apart = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()

    def forward(self, x):
        mixed = self.mixed(x).tanh()
        return self.apart(x) + mixed.mean(0)


@pytest.mark.parametrize("engine", [OnePass, LowMemory])
def test_a_thawed_layer_is_looked_at_before_it_counts(engine):
    network, made = Mixing(), engine()
    x = torch.randn(B, 4, dtype=torch.float64)
    network.mixed.requires_grad_(False)

    def call():
        return multitask_backward(
            lambda rows: network(x[rows]).square().mean(1),
            TASKS,
            network.parameters(),
            PCGrad(K),
            engine=made,
        )

    call()
    network.mixed.requires_grad_(True)
    with pytest.raises(UnsupportedError, match="do not mix samples"):
        call()


def test_a_measurement_refuses_parameters_that_are_thawed_on_its_way():
    network = RIGHT["frozen"]()
    losses = losses_of(network, batch(), TASKS)
    rows = FlatGradient(
        lambda t, half: losses(TASKS.argsort()).mean(), parameters=network.parameters()
    )
    rows(0, 0)
    network.conv.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"parameters: .*frozen or thawed since"):
        rows(0, 1)


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32]


@methods
@pytest.mark.parametrize("dtype", INTEGERS)
def test_tasks_of_any_integer_are_those_of_int64(dtype, method, engine):
    def run(tasks):
        network = RIGHT["ordinary"]()
        report = multitask_backward(
            losses_of(network, batch(), TASKS),
            tasks,
            network.parameters(),
            BALANCERS[method](),
            num_tasks=K,
            engine=engine(),
        )
        return [report.task_losses, report.num_samples, *(p.grad for p in network.parameters())]

    for found, expected in zip(run(TASKS.to(dtype)), run(TASKS), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_tasks_that_are_no_integers_are_refused(dtype):
    network = RIGHT["ordinary"]()
    with pytest.raises(ConfigError, match=r"tasks: one integer .*found torch\.(float32|complex64)"):
        multitask_backward(
            losses_of(network, batch(), TASKS), TASKS.to(dtype), network.parameters()
        )


def test_two_tasks_may_be_booleans():
    network, second = RIGHT["ordinary"](), TASKS > 0
    losses = losses_of(network, batch(), TASKS)
    found = multitask_backward(losses, second, network.parameters(), num_tasks=2)
    expected = multitask_backward(losses, second.long(), network.parameters(), num_tasks=2)
    assert torch.equal(found.task_losses, expected.task_losses)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.LSTM(4, 4)])
def test_one_pass_says_which_layer_it_has_no_rule_for(layer):
    network = nn.Sequential(layer)
    x = torch.randn(B, 4)

    def losses(rows):
        found = network(x[rows])
        return (found[0] if isinstance(found, tuple) else found).square().mean(1)

    with pytest.raises(UnsupportedError, match="engine: one pass"):
        multitask_backward(losses, TASKS, network.parameters(), PCGrad(K), engine=OnePass())
