"""The engine that `auto` chooses, and what it falls back on."""

import pytest
import torch
from engine_problems import EQUAL, Problem, assert_same
from torch import nn

from ant_lightning import PCGrad, multitask_backward
from ant_lightning.balancing import auto
from ant_lightning.balancing.auto import Auto
from ant_lightning.balancing.engines import Loop
from ant_lightning.balancing.one_pass import OnePass
from ant_lightning.balancing.reduction import Reduction
from ant_lightning.balancing.task_batch import TaskBatch


class Embedded(nn.Module):
    """An embedding with settings of which `OnePass` has no rule."""

    def __init__(self, **settings):
        super().__init__()
        self.table = nn.Embedding(5, 4, **settings)

    def forward(self, x, timesteps, labels):
        return x + self.table(labels)[:, :, None, None]


class Stopped(nn.Module):
    """A weight that is used once as it is, and once, in a view of it, as a constant."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 1)

    def forward(self, x, timesteps, labels):
        with torch.no_grad():
            constant = self.layer.weight.view(4, 4)
        return self.layer(x) + nn.functional.linear(x.movedim(1, 3), constant).movedim(3, 1)


@pytest.mark.parametrize(
    "network",
    [
        lambda: Embedded(padding_idx=0),
        lambda: Embedded(padding_idx=2),
        lambda: Embedded(max_norm=2.0),
        lambda: Embedded(scale_grad_by_freq=True),
        Stopped,
    ],
    ids=["padding 0", "padding 2", "norm", "frequency", "stopped view"],
)
@pytest.mark.filterwarnings("ignore:.*auto uses the loop from now on")
def test_auto_is_right_where_a_layer_means_something_else(network):
    # A limit of the norm changes the weights: a problem for each.
    assert_same(Problem(network, EQUAL).run(Auto()), Problem(network, EQUAL).run(Loop()))


@pytest.mark.parametrize(
    ("in_all", "for_each", "settings", "expected"),
    [
        (501, 0, {}, OnePass),
        (500, 0, {}, Loop),
        (0, 26, {}, OnePass),
        (0, 25, {}, Loop),
        (501, 0, {"micro_batch_size": 9}, Loop),
    ],
)
def test_auto_chooses_by_the_work_of_a_pass_over_one_task(
    in_all, for_each, settings, expected, monkeypatch
):
    monkeypatch.setattr(auto, "_CPU", (in_all, for_each))
    # 10 samples: 5 of a task, at 10 positions, 10 multiplications at each, with 20 parameters.
    layer, unused = nn.Linear(5, 2, bias=False), nn.Parameter(torch.zeros(10))
    x, tasks = torch.ones(10, 10, 5), torch.arange(10) % 2
    engine = Auto()
    for _ in range(2):
        multitask_backward(
            lambda rows: layer(x[rows]).square().mean((1, 2)),
            tasks,
            [layer.weight, unused],
            PCGrad(2),
            engine=engine,
            **settings,
        )
        assert type(engine.used) is expected


def test_multiplications_are_those_of_the_layers():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1),
        nn.ConvTranspose2d(6, 3, 2, stride=2),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(192, 5),
    )
    x, tasks = torch.randn(6, 4, 8, 8), torch.arange(6) % 2
    batch = TaskBatch(
        lambda rows: network(x[rows]).sum(1),
        tasks,
        None,
        2,
        list(network.parameters()),
        reduction=Reduction(),
    )
    state = torch.random.get_rng_state()
    # 6 x 4 x 4 values of 2 x 9 products, 6 x 4 x 4 of 3 x 4, 5 of 192.
    assert auto.multiplications(batch) == 6 * 16 * 18 + 6 * 16 * 12 + 5 * 192
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not batch.values.any()
