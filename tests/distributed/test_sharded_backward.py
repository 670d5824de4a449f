"""`multitask_backward` on parameters that FSDP2 shards, in a plain loop."""

import math

import pytest
import torch
from rank_processes import needs_unused_shards, run_ranks
from test_ranks_backward import METHODS, PARTS, TASKS, Counted, K, Network
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from ant_lightning import ConfigError, multitask_backward
from ant_lightning.balancing.reduction import Reduction, default_reduction
from ant_lightning.errors import DivergedRanksError
from ant_lightning.runtime.rank_agreement import check_ranks_agree


def sharded(mesh):
    """On a mesh of [shards], or of [replicas, shards]."""
    network = Network(torch.float32)
    mesh = init_device_mesh("cpu", mesh, mesh_dim_names=("replicas", "shards")[-len(mesh) :])
    fully_shard(network.body, mesh=mesh)
    fully_shard(network, mesh=mesh)
    for unit in (u for u in network.modules() if isinstance(u, FSDPModule)):
        unit.set_reduce_scatter_unused_params(True)
    return network


def train(rank, ranks, method, *, mesh=None):
    """Five steps with clipping; one with a NaN on the last rank alone."""
    torch.manual_seed(1)
    x, y = torch.randn(22, 6), torch.randn(22, 3)
    start, stop = PARTS[ranks][rank : rank + 2]
    x, y, tasks = x[start:stop], y[start:stop], TASKS[start:stop]
    network = Network(torch.float32) if mesh is None else sharded(mesh)
    shard, balancer = mesh is not None, METHODS[method]()
    own = list(balancer.parameters()) if balancer else []
    groups = [{"params": list(network.parameters())}, *([{"params": own}] if own else [])]
    optimizer = torch.optim.Adam(groups, lr=0.01, eps=1e-3)
    reduction = Counted() if shard else Reduction()
    finite = []
    for step in range(5):
        inputs = x * torch.nan if step == 2 and rank == ranks - 1 else x

        def losses(rows, inputs=inputs):
            out = network(inputs[rows], tasks[rows])
            return (out - y[rows]).square().mean(1) * (1 + tasks[rows])

        report = multitask_backward(
            losses,
            tasks,
            network.parameters(),
            balancer,
            num_tasks=K,
            micro_batch_size=3,
            reduction=reduction,
            log_snr=4 * x[:, 0],
        )
        finite.append(report.finite)
        if report.finite:
            factor = (0.5 / (report.grad_norm + 1e-6)).clamp(max=1).float()
            for p in network.parameters():
                p.grad *= float(factor)
            optimizer.step()
    full = [p.full_tensor() if shard else p for p in network.parameters()]
    return {
        "parameters": torch.cat([p.detach().flatten() for p in [*full, *own]]),
        "grad_norm": report.grad_norm,
        "weights": report.task_weights,
        "losses": report.task_losses,
        "finite": finite,
        "state": str(balancer.state_dict()) if balancer else "",
        "sent": max(reduction.sent["all_reduce"]) if shard else 0,
    }


def parted(rank, mesh):
    """What is said of one weight that has another value on rank 3."""
    network = sharded(mesh)
    check_ranks_agree(network, None, [5], device=torch.device("cpu"))
    if rank == 3:
        with torch.no_grad():
            network.body[0].weight.to_local()[0, 0] += 1e-6
    try:
        check_ranks_agree(network, None, [5], device=torch.device("cpu"))
    except DivergedRanksError as error:
        return str(error)
    return None


def every_method(rank, ranks, mesh):
    found = {name: train(rank, ranks, name, mesh=mesh) for name in METHODS}
    return found, parted(rank, mesh) if ranks == 4 else None


def mixed(rank):
    network = Network(torch.float32)
    fully_shard(network.body, mesh=init_device_mesh("cpu", (2,)))
    try:
        multitask_backward(
            lambda rows: network(torch.ones(len(rows), 6), rows).sum(1),
            torch.tensor([0, 1]),
            network.parameters(),
            reduction=default_reduction(),
        )
    except ConfigError as error:
        return str(error)
    return None


@needs_unused_shards
@pytest.mark.parametrize(
    "mesh", [pytest.param((2,), id="2", marks=pytest.mark.slow), pytest.param((2, 2), id="2 x 2")]
)
def test_sharded_ranks_equal_one_process_on_the_concatenated_batch(tmp_path, mesh):
    ranks = math.prod(mesh)
    every, said = zip(*run_ranks(every_method, ranks, tmp_path, ranks, mesh), strict=True)
    # Ranks 1 and 3 hold the same part.
    words = "shards of the backbone: must be the same on all 4 ranks with the same part, found "
    words += "another on ranks [1, 3] at step 5; no checkpoint was written"
    assert said == (words if ranks == 4 else None,) * ranks
    for method in every[0]:
        one = train(0, 1, method)
        for rank in every:
            found = rank[method]
            assert found["finite"] == one["finite"] == [True, True, False, True, True]
            for name in ("parameters", "grad_norm", "weights", "losses"):
                torch.testing.assert_close(
                    found[name].double(), one[name].double(), rtol=1e-5, atol=1e-6
                )
            assert torch.equal(found["parameters"], every[0][method]["parameters"])
            assert found["state"] == every[0][method]["state"]
            # No row crosses here: FSDP2 has summed them.
            assert found["sent"] <= 8 * K * K * 2 * (ranks - 1) / ranks


def test_a_whole_parameter_among_sharded_ones_is_refused(tmp_path):
    for message in run_ranks(mixed, 2, tmp_path):
        assert "over all 2 ranks" in message
        assert "a whole one" in message
