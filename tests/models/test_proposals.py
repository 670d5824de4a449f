"""Draws by importance: the loss keeps its mean, and a run resumes with what it has learned."""

import math

import pytest
import torch
from tiny_digits import trainer
from tiny_fit import SIZE

from ant_lightning import (
    Batch,
    ConfigError,
    DigitsData,
    DiT,
    DiTModule,
    FlowMatching,
    LogitNormal,
    LossSecondMoment,
    PCGrad,
    SNRClustering,
    SpeeD,
    Tasks,
    TimestepSampling,
)


def module(proposal, density=None):
    torch.manual_seed(0)
    return DiTModule(
        DiT(**SIZE, depth=1, num_heads=1, num_classes=10, learn_sigma=False),
        process=FlowMatching(density=density or LogitNormal(), num_timesteps=20),
        tasks=Tasks(SNRClustering(num_tasks=3)),
        timesteps=TimestepSampling(proposal=proposal),
        seed=0,
    )


def fit(model, folder, steps, *, resume=None):
    run = trainer(folder, steps=steps, limit_val_batches=0)
    run.fit(model, datamodule=DigitsData(batch_size=64, seed=0), ckpt_path=resume)
    return run


def test_the_corrected_loss_has_the_mean_under_the_process_own_density():
    process = FlowMatching(density=LogitNormal(0.5, 0.8), num_timesteps=20)
    proposal = LossSecondMoment(history=2)
    losses = torch.linspace(1, 4, 20).double()
    cells = torch.arange(20).repeat(2)
    assert torch.equal(proposal.shares(process), process.density)
    proposal.record(cells, losses[cells])
    q = proposal.shares(process)
    wanted = process.density * losses
    torch.testing.assert_close(q, 0.999 * wanted / wanted.sum() + 0.001 * process.density)
    # E_q[L p / q] = E_p[L], and with q ~ p L its variance is nearly 0.
    drawn = torch.multinomial(q, 4000, replacement=True, generator=torch.Generator().manual_seed(0))
    terms = losses[drawn] * (process.density / q)[drawn]
    assert float(terms.mean()) == pytest.approx(float(wanted.sum()), rel=1e-3)
    assert float(terms.std()) < 0.01


def test_a_run_resumes_bit_for_bit_with_the_losses_it_has_seen(tmp_path):
    whole = module(LossSecondMoment(history=2))
    fit(whole, tmp_path, 8)
    half = fit(module(LossSecondMoment(history=2)), tmp_path, 4)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = module(LossSecondMoment(history=2))
    fit(resumed, tmp_path, 8, resume=str(tmp_path / "half.ckpt"))
    for one, two in zip(whole.backbone.parameters(), resumed.backbone.parameters(), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(whole.proposal._losses, resumed.proposal._losses)
    shares = whole.proposal.shares(whole.process)
    assert int(whole.proposal._counts.sum()) == 8 * 64
    assert float(shares.sum()) == pytest.approx(1)


def test_speed_draws_cells_where_the_noise_level_stays_less_often(tmp_path):
    model = module(SpeeD(suppression=4.0, threshold=5e-4))
    shares = SpeeD(suppression=4.0, threshold=5e-4).shares(model.process)
    ratio = shares / model.process.density
    assert float(ratio.max() / ratio.min()) == pytest.approx(4.0)
    batch = Batch(torch.zeros(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64), torch.arange(8))
    draws = model.draws(batch, model.clusters, step=0, rank=0, world_size=1)
    assert draws.importance is not None
    assert draws.correction is None
    assert fit(model, tmp_path, 2).global_step == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LossSecondMoment(history=0), "history: must be at least 1, found 0"),
        (lambda: LossSecondMoment(own_share=math.nan), "own_share: must be from 0 to 1"),
        (lambda: SpeeD(suppression=0.5), "suppression: must be at least 1, found 0.5"),
        (lambda: SpeeD(threshold=0), "threshold: must be above 0, found 0"),
        (
            lambda: TimestepSampling("stratified", proposal=SpeeD()),
            "method: must be 'uniform' with a proposal.*found 'stratified'",
        ),
        (
            lambda: DiTModule(
                DiT(**SIZE, depth=1, num_heads=1, num_classes=10, learn_sigma=False),
                process=FlowMatching(),
                tasks=Tasks(SNRClustering(num_tasks=3), balancer=PCGrad(3)),
                timesteps=TimestepSampling(proposal=SpeeD()),
            ),
            "timesteps.method: must be 'stratified', because a gradient balancer",
        ),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
