"""How long rows are held, and what the engines need beside them."""

import gc
import weakref

import pytest
import tiny_digits
import torch
from engine_problems import EQUAL, NETWORKS, Problem
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ant_lightning import MultiTaskStep, NashMTL, PCGrad, multitask_backward, task_gradients
from ant_lightning.balancing.auto import multiplications
from ant_lightning.balancing.engines import Loop
from ant_lightning.balancing.gradients import DenseTaskGradients
from ant_lightning.balancing.one_pass import LowMemory, OnePass
from ant_lightning.balancing.reduction import Reduction
from ant_lightning.balancing.task_batch import TaskBatch
from benchmarks.counted_memory import counted_memory
from benchmarks.memory import LiveBytes
from benchmarks.steps import Cell, K


class Counted(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside."""

    def __init__(self):
        super().__init__()
        self.bytes = LiveBytes()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in tree_iter(result):
            if isinstance(each, torch.Tensor):
                self.bytes.add(each)
        return result


def peak(num_tasks, balancer, engine):
    """Peak bytes of a call on a wide network with few activations, and those of its parameters."""
    torch.manual_seed(0)
    network = nn.Sequential(*[nn.Linear(256, 256) for _ in range(6)], nn.Linear(256, 1024))
    x, tasks = torch.randn(16, 256), torch.arange(16) % num_tasks
    parameters = list(network.parameters())

    def losses(rows):
        return network(x[rows]).square().mean(1)

    for _ in range(2):  # the first call checks that samples do not mix
        for p in parameters:
            p.grad = None
        with Counted() as live:
            multitask_backward(
                losses, tasks, parameters, balancer, num_tasks=num_tasks, engine=engine
            )
    return live.bytes.peak, 4 * sum(p.numel() for p in parameters)


@pytest.mark.parametrize("num_tasks", [2, 16])
def test_few_positions_need_less_than_one_row_more_than_vanilla(num_tasks):
    vanilla, row = peak(num_tasks, None, None)
    found, _ = peak(num_tasks, PCGrad(num_tasks), OnePass())  # here, layers meet one position
    rows, _ = peak(num_tasks, PCGrad(num_tasks), Loop())
    streamed, _ = peak(num_tasks, PCGrad(num_tasks), LowMemory())
    assert vanilla >= row
    assert found <= vanilla + row
    # The gradients of all tasks for the largest layer, 256 x 1024, and once their sum.
    assert streamed <= vanilla + row + 4 * (num_tasks + 1) * 256 * 1024
    assert rows > num_tasks * row


@pytest.mark.parametrize("engine", [OnePass, LowMemory])
def test_nothing_of_a_step_is_held_after_it(engine):
    problem, held = Problem(NETWORKS["everything"], EQUAL), []

    def watch(layer, inputs, output):
        held.append(weakref.ref(output.untyped_storage()))
        held.append(weakref.ref(layer.weight.leaf.grad_fn or output))

    for layer in problem.network.modules():
        if getattr(layer, "weight", None) is not None:
            layer.register_forward_hook(watch)
    gc.collect()
    gc.disable()  # which may come late: a step must not make cycles that hold its activations
    try:
        problem.run(engine())
        assert held
        assert not any(each() for each in held)
    finally:
        gc.enable()


def test_looking_for_layers_that_mix_samples_takes_no_memory():
    tasks, k = torch.arange(160) % 5, 5
    problem = Problem(NETWORKS["unet"], tasks, torch.float32)
    parameters = list(problem.network.parameters())
    rows, engine = DenseTaskGradients(k, parameters, reduction=Reduction()), OnePass()

    def step(balancer, **settings):
        with Counted() as live:
            multitask_backward(problem.losses, tasks, parameters, balancer, num_tasks=k, **settings)
        return live.bytes.peak

    vanilla = step(None)
    step(PCGrad(k), engine=engine, gradients=rows)
    assert not engine._missing
    engine._missing, engine._unknown = set(range(len(parameters))), True
    found = step(PCGrad(k), engine=engine, gradients=rows)
    assert not engine._missing
    # The parameters are counted too where they are taken as constants.
    assert found <= vanilla + 4 * (k + 1.5) * sum(p.numel() for p in parameters)


def test_counting_multiplications_leaves_nothing_behind():
    problem = Problem(NETWORKS["dit"], EQUAL, torch.float32)
    parameters = list(problem.network.parameters())
    settings = {"balancer": None, "num_tasks": 3, "shared": parameters, "reduction": Reduction()}
    batch = TaskBatch(problem.losses, EQUAL, **settings)
    with torch.autocast("cpu", torch.bfloat16), Counted() as live:
        assert multiplications(batch) > 0
        copies = 2 * sum(p.numel() for p in parameters)
        assert live.bytes.now < copies / 10 < live.bytes.peak


@pytest.mark.filterwarnings("ignore:.*auto uses the loop")  # the parameters are stand-ins
@pytest.mark.slow
@pytest.mark.parametrize("network", ["DiT-S/2", "ADM light, 32 px"])
def test_on_a_gpu_pcgrad_adds_its_rows_and_nothing_else(network):
    found, numbers = counted_memory(Cell(network, 64, bf16=True), ["pcgrad"])
    assert found["pcgrad"] <= found["vanilla"] + K * numbers * 4 / 2**20


def test_rows_of_the_last_step_are_gone_before_the_next_are_made():
    problem = Problem(NETWORKS["dit"], EQUAL)
    problem.run(Loop())
    plain, left = problem.losses, []

    def losses(rows):
        left.extend(p for p in problem.network.parameters() if p.grad is not None)
        return plain(rows)

    problem.losses = losses
    problem.run(Loop())
    assert not left


def test_a_combination_is_the_last_use_of_rows():
    problem = Problem(NETWORKS["dit"], EQUAL)
    rows = task_gradients(problem.losses, EQUAL, list(problem.network.parameters()), num_tasks=3)
    assert rows.gramian().shape == (3, 3)
    rows.combine_(torch.ones(3))
    for use in (rows.gramian, rows.rows, lambda: rows.combine_(torch.ones(3))):
        with pytest.raises(AssertionError, match="combine_"):
            use()


@pytest.mark.parametrize("placement", ["spread", "sorted"])
@pytest.mark.parametrize(("every", "held"), [(1, True), (2, False)])
def test_rows_are_held_where_every_step_needs_them(every, held, placement):
    model = tiny_digits.module()
    x, t = torch.randn(6, *model.image_shape), torch.arange(6)

    def losses(rows):
        return (model.backbone(x[rows], t[rows], t[rows]) - 1).square().mean((1, 2, 3))

    balancer = NashMTL(3, update_every=every)
    step = MultiTaskStep(model.backbone, balancer, engine="loop", placement=placement)
    step.backward(losses, t % 3)
    rows, parameters = (
        step._buffers._rows,
        [p for p in model.backbone.parameters() if p.requires_grad],
    )
    buffers = [value for value in vars(rows).values() if isinstance(value, torch.Tensor)]
    most = max(buffer.numel() for buffer in buffers)
    assert most >= 3 * sum(p.numel() for p in parameters) if held else most <= 3 * 3  # a Gramian
    assert all(p.grad is not None for p in parameters)


def test_memory_of_large_blocks_is_used_again_in_the_next_step():
    torch.manual_seed(0)
    layer, x, tasks = (
        nn.Linear(256, 256),
        torch.randn(6, 100, 256),
        torch.tensor([0, 1, 2, 2, 1, 0]),
    )
    parameters, engine = list(layer.parameters()), OnePass()
    rows = DenseTaskGradients(3, parameters, reduction=Reduction())

    def step(engine, **settings):
        report = multitask_backward(
            lambda rows: layer(x[rows]).square().mean((1, 2)),
            tasks,
            parameters,
            PCGrad(3),
            engine=engine,
            **settings,
        )
        return report.gramian, parameters[0].grad.clone()

    places = []
    for _ in range(3):
        x += 0.1
        for found, expected in zip(step(engine, gradients=rows), step(Loop()), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        places.append(rows._spare[0].data_ptr())
    assert places[0] == places[1] == places[2]
    rows.keep = False
    step(engine, gradients=rows)
    assert not rows._spare
