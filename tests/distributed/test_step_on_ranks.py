"""`MultiTaskStep` on two ranks equals one process, with losses that call the DDP wrapper."""

from itertools import pairwise

import torch
from rank_processes import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ant_lightning import (
    DWA,
    FAMO,
    GLS,
    IMTLL,
    RLW,
    STCH,
    Balancer,
    ContinuousUncertainty,
    GradNorm,
    GradVac,
    MultiTaskStep,
    PCGrad,
    UncertaintyWeighting,
)

K = 3
TASKS = torch.tensor([0, 2, 1, 0, 0, 2, 1, 0, 2, 2, 2, 1, 2, 2, 2, 1])
LEVELS = torch.linspace(-3, 3, len(TASKS))


class ByLosses(Balancer):
    """Weights equal to the losses of the step."""

    needs_losses = True

    @property
    def task_weights(self):
        return torch.ones(self.num_tasks)

    def step_weights(self, step):
        return step.by_task(step.shown_losses.nan_to_num())


METHODS = {
    "vanilla": lambda: None,
    "uw": lambda: UncertaintyWeighting(K),
    "continuous": lambda: ContinuousUncertainty(K, num_features=8),
    "by losses": lambda: ByLosses(K),
    "pcgrad": lambda: PCGrad(K, seed=1),
    "dwa": lambda: DWA(K, window=1),
    "rlw": lambda: RLW(K, seed=7),
    "gls": lambda: GLS(K),
    "imtl_l": lambda: IMTLL(K),
    "stch": lambda: STCH(K, mu=0.5),
    "famo": lambda: FAMO(K),
    "gradvac": lambda: GradVac(K, seed=3),
    "gradnorm": lambda: GradNorm(K, initial_steps=1),
    "gradnorm of names": lambda: GradNorm(K, initial_steps=1, shared_parameters=["0.*"]),
}
# Their parameters are float32, whose gradients are summed in another order on two ranks.
IN_FLOAT32 = {"continuous", "uw", "imtl_l", "gradnorm", "gradnorm of names"}


def trained(rank, ranks=2):
    """Weights and reports after four steps of every method, and of accumulation."""
    found = {}
    for name in [*METHODS, "uw in parts", "by losses in passes"]:
        method = name.split(" in ")[0]
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
        x = torch.randn(len(TASKS), 4, dtype=torch.float64)
        balancer = METHODS[method]()
        model = DistributedDataParallel(network) if ranks > 1 else network
        step = MultiTaskStep(
            model,
            balancer,
            num_tasks=K,
            micro_batch_size=3 if "passes" in name and ranks > 1 else None,
        )
        own = [] if balancer is None else list(balancer.parameters())
        optimizer = torch.optim.SGD([*network.parameters(), *own], lr=0.1)
        # The first 8 and the last 8 samples have their tasks in different proportions.
        start, stop = (rank * 8, rank * 8 + 8) if ranks > 1 else (0, 16)
        edges = [start, start + 3, stop] if "parts" in name and ranks > 1 else [start, stop]
        counts = torch.bincount(TASKS[start:stop], minlength=K) if len(edges) > 2 else None
        for _ in range(4):
            for a, b in pairwise(edges):

                def losses(rows, a=a, b=b, model=model, x=x):
                    errors = (model(x[a:b][rows]) - 1).square().mean(1)
                    return errors * (1 + TASKS[a:b][rows])

                report = step.backward(
                    losses,
                    TASKS[a:b],
                    log_snr=LEVELS[a:b],
                    accumulate=b < stop,
                    num_samples=counts,
                )
            optimizer.step()
            step.update()
        weights = [p.detach().flatten().double() for p in [*network.parameters(), *own]]
        found[name] = torch.cat([*weights, report.task_losses, report.task_weights])
    return found


def test_two_ranks_equal_one_process(tmp_path):
    first, second = run_ranks(trained, 2, tmp_path)
    one = trained(0, ranks=1)
    for name, expected in one.items():
        assert torch.equal(first[name], second[name]), name
        close = 1e-6 if name.split(" in ")[0] in IN_FLOAT32 else 1e-10
        torch.testing.assert_close(first[name], expected, rtol=close, atol=close, msg=name)
