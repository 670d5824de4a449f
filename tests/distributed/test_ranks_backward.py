"""`multitask_backward` on several ranks, without Lightning: values, bytes, faults."""

import functools

import pytest
import torch
from rank_processes import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ant_lightning import (
    ContinuousUncertainty,
    LinearScalarization,
    NashMTL,
    PCGrad,
    UncertaintyWeighting,
    multitask_backward,
)
from ant_lightning.balancing.auto import Auto
from ant_lightning.balancing.engines import Loop
from ant_lightning.balancing.one_pass import LowMemory, OnePass
from ant_lightning.balancing.placed_gradients import PlacedTaskGradients
from ant_lightning.balancing.reduction import GroupReduction, Reduction, default_reduction

K = 5
TASKS = torch.tensor([0, 0, 1, 3, 3, 3, 4, 0, 1, 2, 2, 3, 4, 4, 2, 1, 3, 3, 4, 3, 4, 3])
# Where the parts of the ranks end: of unequal size; no rank has samples of every task.
PARTS = {1: [0, 22], 2: [0, 9, 22], 4: [0, 3, 9, 15, 22]}
METHODS = {
    "vanilla": lambda: None,
    "linear": lambda: LinearScalarization(K, weights=[0.1, 0.2, 0.3, 0.4, 0.5]),
    "uw": lambda: UncertaintyWeighting(K),
    "continuous": lambda: ContinuousUncertainty(K, num_features=8),
    "pcgrad": lambda: PCGrad(K, seed=3),
    "nash": lambda: NashMTL(K, update_every=2),
}
WORLDS = [pytest.param(2, marks=pytest.mark.slow), 4]
ENGINES = {"one_pass": OnePass, "low_memory": LowMemory, "auto": Auto}


class Network(nn.Module):
    """`only_task_3` is used by one task, `never` by none; 87 numbers, no multiple of 2 or 4."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
        self.only_task_3 = nn.Parameter(torch.ones(3, dtype=dtype))
        self.never = nn.Parameter(torch.ones(1, dtype=dtype))

    def forward(self, x, tasks):
        out = self.body(x)
        if (tasks == 3).any():
            out = out + self.only_task_3 * (tasks == 3)[:, None]
        return out


class Counted(GroupReduction):
    """Notes the bytes that a rank sends in each collective."""

    def __init__(self):
        super().__init__()
        self.sent = {"all_reduce": [], "reduce_scatter": [], "all_gather": []}

    def _count(self, name, tensor, rounds):
        share = (self.world_size - 1) / self.world_size
        self.sent[name].append(rounds * share * tensor.numel() * tensor.element_size())

    def start_all_reduce_(self, tensor):
        self._count("all_reduce", tensor, 2)
        return super().start_all_reduce_(tensor)

    def reduce_scatter(self, shard, full, holders=None):
        if full is not None:
            self._count("reduce_scatter", full, 1)
        return super().reduce_scatter(shard, full, holders)

    def all_gather_(self, full):
        self._count("all_gather", full, 1)
        return super().all_gather_(full)


def train(
    rank,
    world_size,
    method,
    *,
    wrap=False,
    bad_step=None,
    reduction=None,
    engine=None,
    placed=False,
):
    """Five steps; gives the parameters, the balancer's state and the reports."""
    torch.manual_seed(1)
    x, y = torch.randn(22, 6).double(), torch.randn(22, 3).double()
    start, stop = PARTS[world_size][rank : rank + 2]
    x, y, tasks = x[start:stop].clone(), y[start:stop], TASKS[start:stop]
    network = Network()
    called = DistributedDataParallel(network) if wrap else network
    rows = None
    if placed:
        rows = PlacedTaskGradients(K, [*network.parameters()], reduction=default_reduction())
    balancer = METHODS[method]()
    own = list(balancer.parameters()) if balancer else []
    optimizer = torch.optim.Adam([*network.parameters(), *own], lr=0.01, eps=1e-3)
    finite = []
    for step in range(5):
        # Here and there a NaN on the last rank alone.
        inputs = x * torch.nan if step == bad_step and rank == world_size - 1 else x

        def losses(rows, inputs=inputs):
            out = called(inputs[rows], tasks[rows])
            return (out - y[rows]).square().mean(1) * (1 + tasks[rows])

        report = multitask_backward(
            losses,
            tasks,
            network.parameters(),
            balancer,
            num_tasks=K,
            micro_batch_size=3 if engine is None else None,
            engine=engine or "auto",
            gradients=rows,
            reduction=reduction,
            log_snr=4 * x[:, 0],
        )
        finite.append(report.finite)
        if report.finite:
            norm = nn.utils.clip_grad_norm_(network.parameters(), 0.5)
            torch.testing.assert_close(norm, report.grad_norm.to(norm))
            optimizer.step()
    return {
        "parameters": torch.cat([p.detach().flatten() for p in [*network.parameters(), *own]]),
        "state": str(balancer.state_dict()) if balancer else "",
        "finite": finite,
        "weights": report.task_weights,
        "losses": report.task_losses,
        "num_samples": report.num_samples,
        "sent": reduction.sent if isinstance(reduction, Counted) else {},
    }


def every_method(rank, world_size):
    plain = {name: train(rank, world_size, name, reduction=Counted()) for name in METHODS}
    wrapped = {name: train(rank, world_size, name, wrap=True) for name in METHODS}
    bad = {name: train(rank, world_size, name, bad_step=2) for name in METHODS}
    engines = {
        (name, bad_step, placed): train(
            rank, world_size, "nash", engine=make(), bad_step=bad_step, placed=placed
        )
        for name, make in ENGINES.items()
        for bad_step in (None, 2)
        for placed in ((False,) if name == "low_memory" else (False, True))
    }
    return {"plain": plain, "wrapped": wrapped, "bad": bad, "engines": engines}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return functools.cache(lambda n: run_ranks(every_method, n, folder / str(n), n))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["plain", "wrapped"])
@pytest.mark.parametrize("world_size", WORLDS)
def test_ranks_equal_one_process_on_the_concatenated_batch(ranks, world_size, kind, method):
    one = train(0, 1, method, reduction=Reduction())
    for rank in ranks(world_size):
        found = rank[kind][method]
        for name in ("parameters", "weights", "losses", "num_samples"):
            torch.testing.assert_close(found[name], one[name], rtol=1e-6, atol=1e-9)
        assert found["state"] == ranks(world_size)[0][kind][method]["state"]
        assert torch.equal(found["parameters"], ranks(world_size)[0][kind][method]["parameters"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("world_size", WORLDS)
def test_a_nan_on_one_rank_makes_all_skip_and_moves_nothing(ranks, world_size, method):
    one = train(0, 1, method, bad_step=2, reduction=Reduction())
    assert one["finite"] == [True, True, False, True, True]
    for rank in ranks(world_size):
        assert rank["bad"][method]["finite"] == one["finite"]
        torch.testing.assert_close(
            rank["bad"][method]["parameters"], one["parameters"], rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize("bad_step", [None, 2])
@pytest.mark.parametrize("world_size", WORLDS)
def test_every_engine_is_right_on_ranks(ranks, world_size, bad_step):
    one = train(0, 1, "nash", bad_step=bad_step, reduction=Reduction(), engine=Loop())
    for rank in ranks(world_size):
        for key, found in rank["engines"].items():
            if key[1] != bad_step:
                continue
            assert found["finite"] == one["finite"], key
            assert found["state"] == ranks(world_size)[0]["engines"][key]["state"], key
            for name in ("parameters", "weights", "losses"):
                torch.testing.assert_close(found[name], one[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("world_size", WORLDS)
def test_bytes_sent_are_at_most_half_of_k_plus_1_times_those_of_vanilla(ranks, world_size):
    for rank in ranks(world_size):
        sent = {name: rank["plain"][name]["sent"] for name in METHODS}
        # Rows of 88 numbers (87 padded to a multiple of the ranks), 8 bytes each.
        row = 88 * 8 * (world_size - 1) / world_size
        vanilla = max(sent["vanilla"]["all_reduce"])
        assert vanilla == 2 * 87 / 88 * row
        assert sent["pcgrad"]["reduce_scatter"] == [row] * (5 * K)
        assert sent["pcgrad"]["all_gather"] == [row] * 5
        large = sum(sent["pcgrad"]["reduce_scatter"]) + sum(sent["pcgrad"]["all_gather"])
        assert large / 5 <= (K + 1) / 2 * vanilla * 88 / 87
        # What else crosses: counts, losses and the Gramian, some k or k x k numbers.
        assert max(sent["pcgrad"]["all_reduce"]) == K * K * 8 * 2 * (world_size - 1) / world_size
        assert len(sent["pcgrad"]["all_reduce"]) == 5 * 3
        # Nash refreshes in steps 0, 2 and 4 and sends what vanilla does between.
        assert len(sent["nash"]["reduce_scatter"]) == 3 * K
        assert sum(each == vanilla for each in sent["nash"]["all_reduce"]) == 2
        for name in ("linear", "uw", "vanilla"):
            assert sent[name]["reduce_scatter"] == []
            assert sum(each == vanilla for each in sent[name]["all_reduce"]) == 5
            # And once the order in which gradients arrive.
            assert len(sent[name]["all_reduce"]) == 5 * 3 + 1
