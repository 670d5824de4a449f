"""`MultiTaskStep`: auxiliary values, accumulation, networks of all kinds, and what it remembers."""

import copy
import gc
import inspect
import weakref
from itertools import pairwise

import pytest
import torch
from torch import nn

import ant_lightning
from ant_lightning import (
    Balancer,
    ConfigError,
    ContinuousUncertainty,
    LinearScalarization,
    MultiTaskStep,
    NashMTL,
    PCGrad,
    SNRClustering,
    TimestepClustering,
    TorchJDBalancer,
    UncertaintyWeighting,
    multitask_backward,
)
from ant_lightning.balancing.engines import Engine, Loop
from ant_lightning.balancing.one_call import remembered

K, B = 3, 12
TASKS = torch.tensor([0, 2, 1, 0, 1, 2, 2, 1, 0, 0, 2, 1])
UNEQUAL = torch.tensor([0, 0, 0, 2, 1, 0, 2, 1, 2, 2, 2, 0])
LEVELS = torch.linspace(-3, 3, B)


class Problem:
    def __init__(self, tasks=TASKS):
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
        self.x = torch.randn(B, 4, dtype=torch.float64)
        self.tasks = tasks
        self.called = self.network

    def losses(self, rows):
        return (self.called(self.x[rows]) - 1).square().mean(1) * (1 + self.tasks[rows])

    def losses_from(self, start):
        return lambda rows: self.losses(rows + start)

    def grad(self):
        return torch.cat([p.grad.flatten() for p in self.network.parameters()])


BALANCERS = {
    "vanilla": lambda: None,
    "linear": lambda: LinearScalarization(K, weights=[1, 2, 3]),
    "uw": lambda: UncertaintyWeighting(K),
    "continuous": lambda: ContinuousUncertainty(K),
    "pcgrad": lambda: PCGrad(K, seed=1),
    "nash": lambda: NashMTL(K, update_every=2),
}


@pytest.mark.parametrize("engine", ["auto", "loop", "one_pass", "low_memory"])
@pytest.mark.parametrize("name", BALANCERS)
def test_a_run_of_steps_equals_calls_of_multitask_backward(name, engine):
    one, other = Problem(), Problem()
    balancer, twin = BALANCERS[name](), BALANCERS[name]()
    step = MultiTaskStep(one.network, balancer, num_tasks=K, engine=engine)
    for _ in range(3):
        found = step.backward(one.losses, TASKS, log_snr=LEVELS)
        expected = multitask_backward(
            other.losses,
            TASKS,
            other.network.parameters(),
            twin,
            num_tasks=K,
            engine="loop",
            log_snr=LEVELS,
        )
        torch.testing.assert_close(one.grad(), other.grad())
        torch.testing.assert_close(found.task_weights, expected.task_weights)
        for problem in (one, other):
            with torch.no_grad():
                for p in problem.network.parameters():
                    p.sub_(0.01 * p.grad)
        step.update()


@pytest.mark.parametrize("name", ["vanilla", "uw", "pcgrad"])
@pytest.mark.parametrize("size", [None, 5])
@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_what_losses_return_beside_the_loss_is_reported_in_the_order_of_the_batch(
    name, size, shape
):
    problem = Problem()
    beside = torch.randn(B, *shape)
    step = MultiTaskStep(
        problem.network, BALANCERS[name](), num_tasks=K, micro_batch_size=size, engine="loop"
    )
    report = step.backward(
        lambda rows: (problem.losses(rows), (2 * beside[rows]).requires_grad_()), TASKS
    )
    assert torch.equal(report.aux, 2 * beside)
    assert not report.aux.requires_grad
    expected = problem.grad()
    assert step.backward(problem.losses, TASKS).aux is None
    if name != "pcgrad":  # which draws other orders in a second step
        torch.testing.assert_close(problem.grad(), expected)


def parts_of(problem, balancer, cuts, *, num_samples=None, **settings):
    """The report of the last part."""
    step = MultiTaskStep(problem.network, balancer, num_tasks=K, **settings)
    edges = [0, *cuts, B]
    for start, stop in pairwise(edges):
        report = step.backward(
            problem.losses_from(start),
            problem.tasks[start:stop],
            log_snr=LEVELS[start:stop],
            accumulate=stop < B,
            num_samples=num_samples,
        )
        if stop < B:
            assert all(p.grad is None for p in problem.network.parameters())
            assert report.grad_norm.isnan()
            assert report.finite
    return report


@pytest.mark.parametrize(
    ("name", "tasks", "cuts", "counted"),
    [
        ("vanilla", UNEQUAL, [3, 4], False),
        ("continuous", UNEQUAL, [3, 4], False),
        ("linear", TASKS, [6], False),
        ("uw", TASKS, [6], False),
        ("uw", UNEQUAL, [3, 4], True),
        ("linear", UNEQUAL, [5], True),
        ("vanilla", UNEQUAL, [5], True),
    ],
)
def test_parts_of_a_step_give_the_gradient_of_the_joined_batch(name, tasks, cuts, counted):
    one, other = Problem(tasks), Problem(tasks)
    balancer, twin = BALANCERS[name](), BALANCERS[name]()
    found = parts_of(one, balancer, cuts, num_samples=torch.bincount(tasks) if counted else None)
    expected = MultiTaskStep(other.network, twin, num_tasks=K).backward(
        other.losses, tasks, log_snr=LEVELS
    )
    torch.testing.assert_close(one.grad(), other.grad())
    for field in ("objective", "task_losses", "task_weights", "num_samples", "grad_norm"):
        torch.testing.assert_close(getattr(found, field), getattr(expected, field))
    if balancer is not None:
        for p, q in zip(balancer.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


def test_parts_in_other_proportions_are_refused_where_these_count():
    with pytest.raises(ConfigError, match=r"num_samples: must be passed with Uncertainty.*\[3"):
        parts_of(Problem(UNEQUAL), UncertaintyWeighting(K), [3])
    wrong = torch.bincount(UNEQUAL) + 1
    with pytest.raises(ConfigError, match=r"num_samples: must be the samples of all parts"):
        parts_of(Problem(UNEQUAL), UncertaintyWeighting(K), [3], num_samples=wrong)


@pytest.mark.parametrize("name", ["pcgrad", "nash"])
def test_balancers_that_need_the_whole_batch_refuse_parts(name):
    with pytest.raises(ConfigError, match=r"accumulate: must be False with .* micro_batch_size"):
        parts_of(Problem(), BALANCERS[name](), [6])


def test_a_part_that_is_not_finite_spoils_the_step():
    problem, balancer = Problem(), UncertaintyWeighting(K)
    step = MultiTaskStep(problem.network, balancer)
    first = step.backward(lambda rows: problem.losses(rows) * torch.inf, TASKS, accumulate=True)
    last = step.backward(problem.losses, TASKS)
    assert not first.finite
    assert not last.finite
    assert all(p.grad is None for p in [*problem.network.parameters(), *balancer.parameters()])
    assert step.backward(problem.losses, TASKS).finite


def test_frozen_and_thawed_parameters_are_followed():
    problem = Problem()
    step = MultiTaskStep(problem.network, PCGrad(K))
    step.backward(problem.losses, TASKS)
    first = problem.network[0].requires_grad_(False)
    step.backward(problem.losses, TASKS)
    assert first.weight.grad is None
    assert problem.network[2].weight.grad is not None
    first.requires_grad_(True)
    step.backward(problem.losses, TASKS)
    assert first.weight.grad is not None


def test_chosen_parameters_alone_get_a_gradient():
    problem = Problem()
    last = problem.network[2]
    step = MultiTaskStep(problem.network, PCGrad(K), parameters=last.parameters())
    step.backward(problem.losses, TASKS)
    assert last.weight.grad is not None
    assert problem.network[0].weight.grad is None


@pytest.mark.parametrize("name", ["vanilla", "uw", "pcgrad"])
def test_a_compiled_network_gives_the_same_gradient(name):
    one, other = Problem(), Problem()
    one.called = torch.compile(one.network, backend="aot_eager")
    MultiTaskStep(one.called, BALANCERS[name](), num_tasks=K).backward(one.losses, TASKS)
    MultiTaskStep(other.network, BALANCERS[name](), num_tasks=K).backward(other.losses, TASKS)
    torch.testing.assert_close(one.grad(), other.grad())


@pytest.mark.parametrize("name", ["uw", "continuous", "pcgrad", "nash"])
def test_a_resumed_run_equals_an_unbroken_one(name):
    def run(problem, balancer, steps, state=None):
        step = MultiTaskStep(problem.network, balancer)
        own = list(balancer.parameters())
        optimizer = torch.optim.SGD([*problem.network.parameters(), *own], lr=0.1)
        if state is not None:
            step.load_state_dict(state)
        for _ in range(steps):
            step.backward(problem.losses, TASKS, log_snr=LEVELS)
            optimizer.step()
            step.update()
        return copy.deepcopy(step.state_dict())

    one, other = Problem(), Problem()
    run(one, BALANCERS[name](), 5)
    state = run(other, BALANCERS[name](), 2)
    run(other, BALANCERS[name](), 3, state)
    for p, q in zip(one.network.parameters(), other.network.parameters(), strict=True):
        assert torch.equal(p, q)


def test_state_is_not_given_away_in_the_middle_of_a_step():
    problem = Problem()
    step = MultiTaskStep(problem.network, UncertaintyWeighting(K))
    step.backward(problem.losses, TASKS, accumulate=True)
    with pytest.raises(ConfigError, match="state_dict: must be called between steps"):
        step.state_dict()
    step.backward(problem.losses, TASKS)
    assert "log_vars" in step.state_dict()["balancer"]


@pytest.mark.parametrize("name", ["auto", "loop"])
def test_what_one_call_keeps_is_for_the_next_and_keeps_no_network_alive(name):
    problem, other = Problem(), Problem()
    first, frozen = next(problem.network.parameters()), problem.network[-1].bias

    def call(at, engine=name, balancer=None):
        balancer = balancer or PCGrad(K)
        multitask_backward(at.losses, TASKS, at.network.parameters(), balancer, engine=engine)
        return [p.grad for p in at.network.parameters()]

    call(problem)
    kept = remembered(name, first)
    rows, differentiation = kept._rows, kept.differentiation
    memory = rows._rows.data_ptr()
    for balancer in (NashMTL(K, update_every=1), UncertaintyWeighting(K), PCGrad(K)):
        call(problem, balancer=balancer)
        assert remembered(name, first) is kept
        assert (kept._rows, kept.differentiation) == (rows, differentiation)
        assert rows._rows.data_ptr() == memory
    assert remembered("low_memory", first) is not kept
    # Others when another number of parameters is trained, or after an error; with the same result.
    frozen.requires_grad_(False)
    call(problem)
    assert kept._rows is not rows
    frozen.requires_grad_(True)
    with pytest.raises(ZeroDivisionError):
        multitask_backward(lambda rows: 1 / 0, TASKS, problem.network.parameters(), engine=name)
    assert kept._rows is None
    found, expected = call(problem), call(other, Loop())
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True)) or name == "auto"
    torch.testing.assert_close(found, expected)
    dead, engine = weakref.ref(first), weakref.ref(kept.engine)
    del problem, first, frozen, kept, rows, differentiation, found
    gc.collect()
    assert dead() is None
    assert engine() is None


def test_one_call_takes_an_engine_of_the_users_own():
    class Counted(Loop):
        calls = 0

        def task_gradients(self, *args):
            self.calls += 1
            return super().task_gradients(*args)

    problem, engine = Problem(), Counted()
    assert isinstance(engine, Engine)
    multitask_backward(
        problem.losses, TASKS, problem.network.parameters(), PCGrad(K), engine=engine
    )
    assert engine.calls == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_tasks": 4}, "num_tasks: must be the 3 of the balancer, found 4"),
        ({"engine": "fast"}, "engine: must be one of .*, found 'fast'"),
        ({"placement": "here"}, "placement: must be 'spread' or 'sorted', found 'here'"),
        ({"num_tasks": "5"}, "num_tasks: must be a whole number, found '5'"),
        ({"num_tasks": 2.5, "balancer": None}, "num_tasks: must be a whole number, found 2.5"),
        ({"balancer": PCGrad}, "balancer: must be a Balancer, .* found the class PCGrad"),
        ({"balancer": "PCGrad"}, "balancer: must be a Balancer, .* found 'PCGrad'"),
        ({"model": None}, "model: must be a Module, .* found None"),
        ({"micro_batch_size": "2"}, "micro_batch_size: must be a whole number, found '2'"),
        ({"micro_batch_size": 0}, "micro_batch_size: must be at least 1, found 0"),
        ({"parameters": []}, "parameters: must have at least one"),
    ],
)
def test_bad_arguments_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        MultiTaskStep(**{"model": Problem().network, "balancer": PCGrad(K), **settings})


def test_bad_arguments_of_a_call_are_refused():
    problem = Problem()
    step = MultiTaskStep(problem.network, PCGrad(K))
    with pytest.raises(ConfigError, match=r"losses: must be a function .*, found Tensor"):
        step.backward(torch.ones(len(TASKS)), TASKS)
    with pytest.raises(ConfigError, match="tasks: must be a tensor, found list"):
        step.backward(problem.losses, TASKS.tolist())
    with pytest.raises(ConfigError, match=r"state: must be the state_dict of .*, found \['a'\]"):
        step.load_state_dict({"a": 1})


def all_with_a_number_of_tasks():
    made = [getattr(ant_lightning, name) for name in ant_lightning.__all__]
    bases = (Balancer, TimestepClustering, SNRClustering)
    kinds = [kind for kind in made if isinstance(kind, type) and issubclass(kind, bases)]
    return [kind for kind in kinds if not inspect.isabstract(kind)]


@pytest.mark.parametrize("kind", all_with_a_number_of_tasks())
@pytest.mark.parametrize("num_tasks", ["5", 2.5, [3]])
def test_a_number_of_tasks_is_a_whole_number(kind, num_tasks):
    others = {"weighting": nn.Identity()} if kind is TorchJDBalancer else {}
    with pytest.raises(ConfigError, match="num_tasks: must be a whole number, found ") as caught:
        kind(num_tasks=num_tasks, **others)
    assert str(caught.value).endswith(repr(num_tasks))


def test_values_beside_the_losses_must_be_one_for_each_row():
    problem = Problem()
    step = MultiTaskStep(problem.network, num_tasks=K)
    with pytest.raises(ConfigError, match=r"losses: .* a first dimension of 12.* found shape \[1"):
        step.backward(lambda rows: (problem.losses(rows), torch.zeros(1)), TASKS)


def test_the_state_of_another_balancer_is_refused():
    model = torch.nn.Linear(3, 1)
    state = MultiTaskStep(model, NashMTL(2)).state_dict()
    with pytest.raises(ConfigError, match="balancer: must be the NashMTL of the state, found PCG"):
        MultiTaskStep(model, PCGrad(2)).load_state_dict(state)
    MultiTaskStep(model, NashMTL(2)).load_state_dict(state)
    del state["kind"]  # an earlier version's
    MultiTaskStep(model, NashMTL(2)).load_state_dict(state)


def test_parts_without_a_balancer_may_lack_the_last_tasks():
    torch.manual_seed(0)
    x = torch.randn(6, 3, dtype=torch.float64)
    found = []
    for parts in ([slice(0, 6)], [slice(0, 2), slice(2, 5), slice(5, 6)]):
        torch.manual_seed(1)
        model = torch.nn.Linear(3, 1).double()
        step = MultiTaskStep(model)
        for number, part in enumerate(parts):
            of_part = x[part]
            report = step.backward(
                lambda rows, x=of_part, model=model: model(x[rows]).square().mean(1),
                torch.tensor([0, 0, 1, 3, 1, 0])[part],
                accumulate=number < len(parts) - 1,
            )
        found.append((model.weight.grad, report.task_losses, report.num_samples))
    for one, several in zip(*found, strict=True):
        torch.testing.assert_close(several, one, equal_nan=True)
