"""Spikes, one task, clusters of one timestep, batches of one image: whole runs of each method."""

import copy

import lightning as L
import pytest
import torch
from grouped import grouped

from ant_lightning import (
    ConfigError,
    ConflictMonitor,
    ContinuousUncertainty,
    CosineSchedule,
    DigitsData,
    DiT,
    DiTModule,
    LinearScalarization,
    LossWeighting,
    NashMTL,
    PCGrad,
    TimestepClustering,
    UncertaintyWeighting,
)

LR, CLIP = 0.1, 0.01
METHODS = {
    "vanilla": lambda k: None,
    "linear": LinearScalarization,
    "uw": UncertaintyWeighting,
    "continuous_uw": ContinuousUncertainty,
    "pcgrad": PCGrad,
    "nash": NashMTL,
}


class Factor(LossWeighting):
    """One weight for all timesteps, that a test can change."""

    def x0_weights(self, snr):
        raise AssertionError("`__call__` is replaced, so nobody asks")

    def __call__(self, snr, prediction_type):
        self.weights = torch.ones_like(snr)
        return self.weights


class Spikes(L.Callback):
    """Multiplies the losses of some batches, and measures the steps they make."""

    def __init__(self, factor, factors):
        self.factor, self.factors = factor, factors
        self.lengths, self.before, self.same_balancer = {}, None, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.factor.weights.fill_(self.factors.get(batch_idx, 1.0))
        self.before = copy.deepcopy(pl_module.state_dict())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        after = pl_module.state_dict()
        own = [name for name in after if name.startswith("balancer.")]
        self.same_balancer[batch_idx] = all(torch.equal(after[n], self.before[n]) for n in own)
        moved = [after[n] - self.before[n] for n in after if n.startswith("backbone.")]
        self.lengths[batch_idx] = float(torch.cat([m.flatten() for m in moved]).norm())


def fit(balancer, *, k=3, num_timesteps=100, batch_size=30, steps=2, callbacks=(), **settings):
    torch.manual_seed(0)
    size = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 8}
    module = DiTModule(
        DiT(**size, depth=1, num_heads=1, num_classes=10),
        **grouped(
            schedule=CosineSchedule(num_timesteps),
            clustering=TimestepClustering(k),
            balancer=balancer,
            optimizer=lambda groups: torch.optim.SGD(groups, lr=LR),
            seed=0,
            **settings,
        ),
    )
    trainer = L.Trainer(
        max_steps=steps,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        limit_train_batches=steps + 1,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(module, DigitsData(batch_size=batch_size))
    assert trainer.global_step == steps
    assert all(p.isfinite().all() for p in module.parameters())
    assert all(value.isfinite() for value in trainer.callback_metrics.values())
    return module


@pytest.mark.parametrize("method", METHODS)
def test_a_spike_makes_a_step_of_the_clipped_length_and_an_infinity_none(method):
    """For Nash batch 0 refreshes the weights, and spikes meet those of before."""
    factor = Factor()
    spikes = Spikes(factor, {1: 1e4, 2: 1e8, 3: torch.inf})
    settings = {"clip_grad_norm": CLIP, "loss_weighting": factor}
    module = fit(METHODS[method](3), steps=4, callbacks=[spikes], **settings)
    for batch in (1, 2):
        assert spikes.lengths[batch] == pytest.approx(LR * CLIP, rel=1e-3)
    assert 0 < spikes.lengths[4] < LR * CLIP * 1.001
    assert spikes.lengths[3] == 0
    assert spikes.same_balancer[3]
    assert module.num_skipped_steps == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("k", "num_timesteps"), [(1, 100), (4, 4)])
def test_one_task_and_tasks_of_one_timestep_train_and_validate(method, k, num_timesteps):
    monitor = ConflictMonitor(log_every_n_steps=1, probe_every_n_steps=1)
    fit(METHODS[method](k), k=k, num_timesteps=num_timesteps, callbacks=[monitor])


@pytest.mark.filterwarnings("ignore:tasks. the expected number of images of a task")
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_one_image_trains_or_is_refused_by_name(method):
    if method in {"pcgrad", "nash"}:
        with pytest.raises(ConfigError, match=r"data\.batch_size: .* the 3 tasks .*, found 1"):
            fit(METHODS[method](3), batch_size=1)
    else:
        fit(METHODS[method](3), batch_size=1)
