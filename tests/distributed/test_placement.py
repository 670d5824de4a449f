"""Task placement: the sorted global batch in equal slices, one for each rank, that go round."""

import pytest
import torch
from rank_processes import run_ranks
from test_ranks_backward import Counted, K, Network
from tiny_runs import TinyData, module, trainer

from ant_lightning import ConfigError, NashMTL, PCGrad, TimestepClusters, multitask_backward
from ant_lightning.balancing.gradients import DenseTaskGradients
from ant_lightning.balancing.placed_gradients import PlacedTaskGradients
from ant_lightning.balancing.reduction import Reduction

B = 24
TASKS = torch.tensor([0] * 5 + [1] * 5 + [2] * 5 + [3] * 4 + [4] * 5)
METHODS = {"pcgrad": lambda: PCGrad(K, seed=3), "nash": lambda: NashMTL(K, update_every=2)}


def train(rank, world_size, method, kind, reduction):
    torch.manual_seed(1)
    x, y = torch.randn(B, 6).double(), torch.randn(B, 3).double()
    network, balancer = Network(), METHODS[method]()
    gradients = kind(K, list(network.parameters()), reduction=reduction)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    size = B // world_size
    held = []
    for step in range(5):
        part = (rank + step) % world_size
        rows_of_rank = torch.arange(part * size, (part + 1) * size)
        held.append(len(TASKS[rows_of_rank].unique()))

        def losses(rows, mine=rows_of_rank):
            here = mine[rows]
            out = network(x[here], TASKS[here])
            return (out - y[here]).square().mean(1) * (1 + TASKS[here])

        report = multitask_backward(
            losses,
            TASKS[rows_of_rank],
            network.parameters(),
            balancer,
            micro_batch_size=4,
            gradients=gradients,
            reduction=reduction,
        )
        optimizer.step()
    return {
        "parameters": torch.cat([p.detach().flatten() for p in network.parameters()]),
        "weights": report.task_weights,
        "gramian": report.gramian,
        "state": str(balancer.state_dict()),
        "sent": getattr(reduction, "sent", {}),
        "held": held,
    }


def both(rank, world_size):
    return {m: train(rank, world_size, m, PlacedTaskGradients, Counted()) for m in METHODS}


def in_lightning(rank):
    model, data = module("pcgrad", placement="sorted"), TinyData()
    run = trainer(ranks=2, steps=2)
    run.fit(model, datamodule=data)
    batch = next(iter(data.train_dataloader()))
    draws = [model.draw(batch, step=step) for step in range(4)]
    weights = torch.cat([p.detach().flatten() for p in model.backbone.parameters()])
    return weights, model.last_report.num_samples, [(d.timesteps, d.tasks) for d in draws]


@pytest.mark.parametrize("world_size", [2, 4, 6])
def test_placed_ranks_equal_one_process_and_send_only_their_rows(tmp_path, world_size):
    ranks = run_ranks(both, world_size, tmp_path, world_size)
    for method in METHODS:
        one = train(0, 1, method, DenseTaskGradients, Reduction())
        for rank in ranks:
            found = rank[method]
            for name in ("parameters", "weights", "gramian"):
                torch.testing.assert_close(found[name], one[name], rtol=1e-6, atol=1e-9)
            assert torch.equal(found["parameters"], ranks[0][method]["parameters"])
            assert found["state"] == ranks[0][method]["state"]
    length = -(-87 // world_size) * world_size
    for rank in ranks:
        sent, held = rank["pcgrad"]["sent"], rank["pcgrad"]["held"]
        row = length * 8 * (world_size - 1) / world_size
        assert sent["reduce_scatter"] == [row] * sum(held)
        assert sent["all_gather"] == [row] * 5
        if world_size >= K:
            vanilla = 2 * row
            assert max(held) * row + sent["all_gather"][0] <= 1.5 * vanilla


def test_in_training_the_slices_go_round_the_ranks(tmp_path):
    first, second = run_ranks(in_lightning, 2, tmp_path)
    assert torch.equal(first[0], second[0])
    assert sorted(first[1].tolist()) == [6, 7, 7]
    for step, ((t0, tasks0), (t1, tasks1)) in enumerate(zip(first[2], second[2], strict=True)):
        low, high = (tasks0, tasks1) if step % 2 == 0 else (tasks1, tasks0)
        assert low.max() <= high.min()
        assert max(len(low.unique()), len(high.unique())) == 2
        assert sorted(torch.cat([low, high]).bincount().tolist()) == [6, 7, 7]
        boundaries = torch.tensor([300, 500])
        assert torch.equal(
            torch.bucketize(torch.cat([t0, t1]), boundaries, right=True),
            torch.cat([tasks0, tasks1]),
        )


def test_placement_without_a_gradient_balancer_is_refused():
    with pytest.raises(ConfigError, match=r"placement: .*'sorted'.*UncertaintyWeighting"):
        module("uw", placement="sorted")


@pytest.mark.parametrize("num_tasks", [2, 5, 8])
def test_at_most_two_tasks_a_rank_and_traffic_at_most_half_more_than_vanilla(num_tasks):
    boundaries = torch.linspace(0, 1000, num_tasks + 1).long().tolist()
    clusters = TimestepClusters(boundaries)
    for world_size in range(num_tasks, 65):
        batch_size = 4 * world_size
        generator = torch.Generator().manual_seed(world_size)
        _, tasks = clusters.sample(batch_size, generator=generator)
        held = [len(part.unique()) for part in tasks.view(world_size, -1)]
        assert max(held) <= 2
        if world_size % num_tasks == 0:
            assert max(held) == 1
