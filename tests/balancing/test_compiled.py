"""One pass on compiled networks: one graph, the numbers of the loop."""

import pytest
import torch
import torch._dynamo
from engine_problems import EQUAL, Everything, Problem, assert_same, dit
from torch import nn

from ant_lightning import MultiTaskStep, PCGrad, multitask_backward
from ant_lightning.balancing import Loop, LowMemory, OnePass, UnsupportedError
from ant_lightning.balancing.auto import Auto

# Of torch's own code, for a compiled block whose input is a result.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

# Eight samples of three tasks; in each step other tasks have three of them.
STEPS = [
    torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]),
    torch.tensor([2, 0, 1, 1, 2, 0, 2, 0]),
    torch.tensor([1, 1, 1, 2, 2, 2, 0, 0]),
]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def num_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compiled(network, **settings):
    return torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=False, **settings)


class Everywhere(nn.Module):
    """Parameters added, multiplied, concatenated, indexed, and combined with each other."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.positions = nn.Parameter(torch.randn(5, 6))
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.table = nn.Parameter(torch.randn(3, 6))
        self.norm = nn.RMSNorm(6)
        self.a, self.b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(6, 2))

    def forward(self, x):
        x = self.first(x) + self.positions
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        shift, scale, gate = (self.table[None] + x.mean(1, keepdim=True)).chunk(3, dim=1)
        x = self.norm(x) * (1 + scale) + shift
        return nn.functional.linear(x, self.a.T @ self.b.mT) * gate


def everywhere():
    torch.manual_seed(0)
    network = Everywhere().double()
    x = torch.randn(8, 5, 4, dtype=torch.float64)
    return network, x


def step(call, network, x, tasks, engine):
    parameters = list(network.parameters())
    report = multitask_backward(
        lambda rows: call(x[rows]).square().mean((1, 2)),
        tasks,
        parameters,
        PCGrad(3),
        engine=engine,
    )
    return report, torch.cat([p.grad.flatten() for p in parameters])


@pytest.mark.parametrize("engine", [OnePass, LowMemory])
def test_every_use_of_a_parameter_has_a_rule(engine):
    network, x = everywhere()
    made = engine()
    for tasks in STEPS:
        assert_same(
            step(network, network, x, tasks, made), step(network, network, x, tasks, Loop())
        )


@pytest.mark.parametrize("engine", [OnePass, LowMemory])
def test_a_whole_run_compiles_once_although_other_tasks_get_the_odd_sample(engine):
    network, x = everywhere()
    call, made = compiled(network), engine()
    expected = [step(network, network, x, tasks, Loop()) for tasks in STEPS]
    for tasks, wanted in zip(STEPS, expected, strict=True):
        assert_same(step(call, network, x, tasks, made), wanted)
        assert num_graphs() == 1
    # Without task gradients, as between refreshes and in validation: one graph more.
    call(x)
    step(call, network, x, STEPS[0], made)
    assert num_graphs() == 2


@pytest.mark.parametrize(
    ("by_block", "checkpointing"),
    [
        (True, True),
        pytest.param(True, False, marks=pytest.mark.slow),
        pytest.param(False, True, marks=pytest.mark.slow),
        (False, False),
    ],
)
def test_a_dit_is_compiled_whole_or_block_by_block(by_block, checkpointing):
    settings = {"num_classes": 5, "gradient_checkpointing": checkpointing}
    make = lambda: dit(2 if by_block else 1, **settings)  # noqa: E731
    problem = Problem(make, EQUAL)
    expected = problem.run(Loop())
    if by_block:
        for block in problem.network.blocks:
            block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    else:
        network = problem.network
        problem.network = compiled(network)
    assert_same(problem.run(OnePass(), calls=2), expected)
    assert num_graphs() >= 1


def test_a_use_that_the_compiler_hides_is_refused():
    # In torch 2.14 `x @ weight` with an ordinary x asks the class of `weight` nothing.
    network, x = everywhere()
    call = torch.compile(lambda x: x @ network.b.T, backend="aot_eager", fullgraph=True)
    x = x.repeat(1, 1, 2)[..., :6]
    with pytest.raises(
        UnsupportedError, match=r"found another use of parameters of shape \[6, 2\]"
    ):
        step(call, network, x @ torch.ones(6, 2).double(), STEPS[0], OnePass())


def test_in_autocast_a_compiled_network_differs_by_rounding():
    network, x = everywhere()
    network, x, tasks, engine = network.float(), x.float(), STEPS[0], OnePass()
    exact = step(network, network, x, tasks, Loop())
    with torch.autocast("cpu", torch.bfloat16):
        loop = step(network, network, x, tasks, Loop())
        call = compiled(network)
        for _ in range(2):
            found = step(call, network, x, tasks, engine)
    rounding = (loop[1] - exact[1]).norm() / exact[1].norm()
    assert (found[1] - exact[1]).norm() / exact[1].norm() < 2 * rounding + 1e-3


def test_channels_last_stays_channels_last():
    problem = Problem(Everything, EQUAL)
    problem.network.conv2.to(memory_format=torch.channels_last)
    expected = problem.run(Loop())
    problem.network.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    assert_same(problem.run(OnePass(), calls=2), expected)
    weight = problem.network.conv2.weight
    assert weight.grad.stride() == weight.stride()


def test_auto_counts_a_compiled_network_as_it_was_written():
    counted = []
    for wrap in (lambda network: network, compiled):
        network = Deeper(whole=True)
        step = MultiTaskStep(wrap(network), PCGrad(num_tasks=3))
        x, labels = torch.randn(6, 4, 8, 8), torch.arange(6) % 5

        def losses(rows, call=step.model, x=x, labels=labels):
            return call(x[rows], rows, labels[rows]).sub(1).square().mean((1, 2, 3))

        step.backward(losses, torch.tensor([0, 0, 1, 1, 2, 2]))
        counted.append(step.engine._per_sample)
    assert counted[0] == counted[1] > 0


class Broken(torch.nn.Linear):
    """Compiles with ordinary parameters alone."""

    def forward(self, x, timesteps, labels):
        if type(self.weight) is not torch.nn.Parameter:
            torch._dynamo.graph_break()
        return super().forward(x.flatten(1)).view_as(x)


def test_what_the_compiler_cannot_take_is_refused_and_auto_takes_the_loop():
    problem = Problem(lambda: Broken(256, 256), EQUAL)
    expected = problem.run(Loop())
    problem.network.compile(backend="aot_eager", fullgraph=True)
    with pytest.raises(UnsupportedError, match="one pass needs a network that compiles with task"):
        problem.run(OnePass())
    with pytest.warns(UserWarning, match="compiles with task .* auto uses the loop from now on"):
        assert_same(problem.run(Auto(), calls=2), expected)


class Deeper(nn.Module):
    """A compiled layer with factors that later steps use twice."""

    def __init__(self, whole):
        super().__init__()
        self.inner, self.times = nn.Linear(256, 256), 1
        if not whole:
            self.inner.compile(backend="aot_eager", fullgraph=True, dynamic=False)

    def forward(self, x, timesteps, labels):
        x = x.flatten(1)
        for _ in range(self.times):
            x = self.inner(x).tanh()
        return x.view(len(x), 4, 8, 8)


@pytest.mark.parametrize("whole", [True, False])
def test_a_weight_that_a_later_step_uses_twice_is_refused(whole):
    problem, engine = Problem(lambda: Deeper(whole), EQUAL), OnePass()
    network = problem.network
    if whole:
        problem.network = compiled(network)
    expected = problem.run(Loop())
    assert_same(problem.run(engine, calls=2), expected)
    graphs = num_graphs()
    assert_same(problem.run(engine), expected)
    assert num_graphs() == graphs
    network.times = 2
    with pytest.raises(UnsupportedError, match="uses a weight equally often in each step"):
        problem.run(engine)
    assert_same(problem.run(OnePass(), calls=2), problem.run(Loop()))
    network.times = 1
    assert_same(problem.run(engine), expected)
