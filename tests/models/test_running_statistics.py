"""Batch norm in a backbone: its statistics move once a step, and what is left is said."""

import warnings

import pytest
import tiny_digits
import torch
from torch import nn

from ant_lightning import (
    ConfigError,
    ConflictMonitor,
    DigitsData,
    LinearScalarization,
    NashMTL,
    PCGrad,
    UncertaintyWeighting,
)

SAYS = r"backbone: batch norm normalises each task .* found BatchNorm2d 'norm' \(1 such"
METHODS = {
    "none": {},
    "uw": {"balancer": lambda: UncertaintyWeighting(3)},
    "in parts": {"balancer": lambda: LinearScalarization(3), "accumulate_grad_batches": 4},
    "loop": {"balancer": lambda: PCGrad(3), "engine": "loop"},
    "auto": {"balancer": lambda: PCGrad(3)},
    "nash": {"balancer": lambda: NashMTL(3, update_every=2)},
    "loop in parts": {"balancer": lambda: PCGrad(3), "accumulate_grad_batches": 4},
}


class Normed(tiny_digits.TinyDiT):
    """Looks at the statistics of what it is given in every pass, with the number of samples."""

    def __init__(self, norm=None, **settings):
        super().__init__(**settings)
        self.norm = norm or nn.BatchNorm2d(1, affine=False)
        self.seen = []

    def forward(self, x, timesteps, labels=None):
        if self.norm.training and torch.is_grad_enabled():
            self.seen.append((len(x), x.detach().mean(), x.detach().var()))
        return super().forward(self.norm(x), timesteps, labels)


def module(backbone, balancer=lambda: None, **settings):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", SAYS)
        return tiny_digits.module(backbone, balancer=balancer(), **settings)


def fit(model, folder, *callbacks, steps=4):
    run = tiny_digits.trainer(folder, *callbacks, steps=steps, limit_val_batches=0)
    run.fit(model, datamodule=DigitsData(batch_size=12))


@pytest.mark.parametrize("method", METHODS)
def test_running_statistics_move_once_a_step(tmp_path, method):
    model = module(Normed(), **METHODS[method])
    network, passes = model.backbone, []
    mean, var = torch.zeros(()), torch.ones(())
    fit(model, tmp_path, steps=1)
    for step in range(1, 4):
        passes.append(len(network.seen))
        total = sum(n for n, _, _ in network.seen)
        mean = 0.9 * mean + 0.1 * sum(n * m for n, m, _ in network.seen) / total
        var = 0.9 * var + 0.1 * sum(n * v for n, _, v in network.seen) / total
        torch.testing.assert_close(network.norm.running_mean[0], mean)
        torch.testing.assert_close(network.norm.running_var[0], var)
        assert int(network.norm.num_batches_tracked) == step
        network.seen.clear()
        fit(model, tmp_path, steps=1)
    assert {"none": [1] * 3, "uw": [1] * 3, "loop": [3] * 3}.get(method, passes) == passes


@pytest.mark.parametrize(
    "norm", [nn.InstanceNorm2d(1, track_running_stats=True), nn.BatchNorm2d(1, momentum=None)]
)
def test_so_do_those_of_instance_norm_and_cumulative_averages(tmp_path, norm):
    model = module(Normed(norm), lambda: PCGrad(3), engine="loop")
    fit(model, tmp_path, steps=1)
    first = norm.running_mean.clone()
    assert int(norm.num_batches_tracked) in {0, 1}  # instance norm does not count
    share = norm.momentum or 1.0
    total = sum(n for n, _, _ in model.backbone.seen)
    expected = share * sum(n * m for n, m, _ in model.backbone.seen) / total
    torch.testing.assert_close(first[0], expected)


def test_a_step_that_is_skipped_leaves_the_statistics(tmp_path):
    model = module(Normed(nan_from=0), lambda: PCGrad(3), engine="loop")
    settings = {"max_epochs": 1, "limit_val_batches": 0, "limit_train_batches": 2}
    run = tiny_digits.trainer(tmp_path, steps=-1, **settings)
    run.fit(model, datamodule=DigitsData(batch_size=12))
    assert model.num_skipped_steps == 2
    assert model.backbone.norm.running_mean.tolist() == [0]
    assert int(model.backbone.norm.num_batches_tracked) == 0


def test_looking_at_gradients_leaves_the_statistics(tmp_path):
    model = module(Normed(), lambda: UncertaintyWeighting(3))
    fit(model, tmp_path, ConflictMonitor(probe_every_n_steps=1), steps=3)
    assert len(model.backbone.seen) == 3 + 3 * 3
    assert int(model.backbone.norm.num_batches_tracked) == 3


@pytest.mark.parametrize("method", ["loop", "auto", "nash", "in parts"])
def test_what_batch_norm_does_to_tasks_is_said_when_the_module_is_made(method):
    settings = dict(METHODS[method])
    balancer = settings.pop("balancer")()
    with pytest.warns(UserWarning, match=SAYS):
        tiny_digits.module(Normed(), balancer=balancer, **settings)


def test_nothing_is_said_where_batch_norm_sees_the_whole_batch():
    tiny_digits.module(Normed(), balancer=UncertaintyWeighting(3))
    still = Normed()
    still.norm.eval()
    tiny_digits.module(still, balancer=PCGrad(3))


@pytest.mark.parametrize("engine", ["one_pass", "low_memory"])
def test_engines_of_one_pass_are_refused_with_batch_norm(engine):
    with pytest.raises(ConfigError) as error:
        tiny_digits.module(Normed(), balancer=PCGrad(3), engine=engine)
    assert str(error.value).startswith("tasks.engine: must be 'auto' or 'loop'")
    assert f"found '{engine}' and BatchNorm2d 'norm'" in str(error.value)


def test_synchronised_batch_norm_is_refused_with_task_gradients(tmp_path):
    norm = nn.SyncBatchNorm(1).eval()
    model = module(Normed(norm), lambda: PCGrad(3))
    with pytest.raises(ConfigError, match=r"trainer\.sync_batchnorm: must be false .*, found true"):
        fit(model, tmp_path)
