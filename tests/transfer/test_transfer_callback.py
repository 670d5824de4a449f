"""The negative-transfer gap from checkpoints: its definition, its shortcut, its bad input."""

import json
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny_digits import T, TinyDiT, module, trainer

from ant_lightning import (
    DDIM,
    DDPM,
    EMA,
    Checkpoints,
    ConfigError,
    DigitsData,
    DigitsFeatures,
    LinearSchedule,
    NegativeTransferGap,
    TransferGapResult,
    frechet_distance,
    load_official_checkpoint,
)
from ant_lightning.data.batch import to_uint8
from ant_lightning.generation.frechet import GaussianStatistics
from ant_lightning.transfer.switching import SpecialistSampler

STEPS = 4
SAMPLER = DDPM(num_steps=10)  # random: a trajectory that starts in the middle must skip noise


def fit(folder, **settings):
    """Train for some steps; the folder then has checkpoints of steps 2 and 4."""
    model = module(**{"sampler": SAMPLER, **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = Checkpoints(dirpath=folder, at_steps=[2, STEPS])
        run = trainer(
            folder,
            EMA(decay=0.5),
            kept,
            steps=STEPS,
            enable_checkpointing=True,
            limit_val_batches=0,
        )
        run.fit(model, DigitsData(batch_size=16))
    return model


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A multi-task model, and a specialist for each of its clusters."""
    folder = tmp_path_factory.mktemp("runs")
    boundaries = fit(folder / "multitask").clusters.boundaries
    intervals = list(pairwise(boundaries))
    for i, interval in enumerate(intervals):
        fit(folder / f"specialist_{i}", interval=interval)
    return folder, intervals


def paths(folder, step=STEPS):
    return [str(folder / f"specialist_{i}" / f"step_{step}.ckpt") for i in range(3)]


def measure(folder, where, model=None, **settings):
    callback = NegativeTransferGap(**settings)
    run = trainer(where, EMA(decay=0.5), callback, limit_val_batches=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
        run.validate(
            model or module(sampler=SAMPLER),
            DigitsData(batch_size=16),
            ckpt_path=folder / "multitask" / f"step_{STEPS}.ckpt",
            verbose=False,
            weights_only=True,
        )
    return callback.result, run


@pytest.mark.filterwarnings("ignore::ant_lightning.generation.frechet.RankDeficientWarning")
def test_gaps_of_checkpoints(runs, tmp_path):
    folder, intervals = runs
    extractor = DigitsFeatures()
    settings = {"num_draws": 2, "num_held_out": 40, "num_resamples": 5, "batch_size": 13}
    result, run = measure(
        folder,
        tmp_path,
        by_iterations=paths(folder),
        by_samples=paths(folder, 2),
        extractor=extractor,
        num_images=30,
        **settings,
    )
    assert [(g.start, g.stop) for g in result.of_budget("samples")] == intervals
    assert {g.specialist_steps for g in result.of_budget("iterations")} == {STEPS}
    assert {g.specialist_steps for g in result.of_budget("samples")} == {2}
    assert result.sampler_steps < result.sampler_steps_unshared == 7 * 10

    # The definition, written out for one interval: switch networks by the timestep, from noise.
    start, stop = intervals[1]
    networks = []
    for name in ("multitask", "specialist_1"):
        network = TinyDiT().eval()
        load_official_checkpoint(network, folder / name / f"step_{STEPS}.ckpt", weights="ema")
        networks.append(network)
    plain = module(networks[0], sampler=SAMPLER)

    def switched(x, t, labels):
        return networks[int(start <= int(t[0]) < stop)](x, t, labels)

    data = DigitsData()
    held_out = torch.cat(list(data.pixels(data.held_out_images)))
    reference = GaussianStatistics.from_features(extractor(held_out))
    fids = []
    for denoise in (plain.denoise, switched):
        noise = plain.image_noise(range(30))
        images = SAMPLER.sample(
            plain.process, plain.guided(range(30), denoise=denoise), noise(), noise=noise
        )
        features = extractor(to_uint8(images))
        fids.append(frechet_distance(GaussianStatistics.from_features(features), reference))
    gap = result.of_budget("iterations")[1]
    assert gap.multitask_fid == pytest.approx(fids[0], rel=1e-4)
    assert gap.specialist_fid == pytest.approx(fids[1], rel=1e-4)
    assert gap.fid_gap.value == pytest.approx(fids[1] - fids[0], rel=1e-2, abs=1e-3)
    assert gap.fid_gap.value != 0
    assert gap.fid_gap.low < gap.fid_gap.value < gap.fid_gap.high
    assert gap.loss_gap.value == pytest.approx(gap.specialist_loss - gap.multitask_loss)

    row = json.loads((tmp_path / "negative_transfer_gap.jsonl").read_text())
    assert TransferGapResult.from_row({k: row[k] for k in result.row()}) == result
    assert TransferGapResult.load(tmp_path / "negative_transfer_gap.jsonl") == result
    assert (tmp_path / "6_transfer_negative_transfer_gap.png").stat().st_size > 5000
    logged = run.callback_metrics["ntg/iterations/task_1/fid"]
    assert float(logged) == pytest.approx(gap.fid_gap.value, rel=1e-5)


def test_a_specialist_is_better_in_its_own_interval(runs, tmp_path):
    """Longer training on one interval alone must show as a gap below 0 there."""
    folder, intervals = runs
    trained = trainer(tmp_path, EMA(decay=0.5), steps=40, limit_val_batches=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = module(
            sampler=SAMPLER,
            interval=intervals[2],
            optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2),
        )
        trained.fit(model, DigitsData(batch_size=64))
        trained.save_checkpoint(tmp_path / "long.ckpt")
    result, _ = measure(
        folder,
        tmp_path,
        by_samples=[str(tmp_path / "long.ckpt")],
        intervals=[intervals[2]],
        num_draws=2,
    )
    (gap,) = result.gaps
    assert gap.loss_gap.high < 0
    assert np.isnan(gap.fid_gap.value)
    assert result.num_images == 0


@pytest.mark.parametrize("sampler", [DDPM(num_steps=8), DDIM(num_steps=8)])
def test_with_itself_as_specialist_every_image_is_the_same(sampler):
    model = module(sampler=sampler)
    intervals = [(0, 30), (30, 70), (70, T)]
    switched = SpecialistSampler(model, intervals)
    images = switched.sample([5, 3])
    assert torch.equal(images, model.sample([5, 3]))
    assert switched.num_steps == 8
    assert (
        switched.first_step[0, 30] > switched.first_step[30, 70] > switched.first_step[70, T] == 0
    )
    for interval in intervals:
        again = switched.sample_with(model.backbone, interval, [5, 3])
        assert torch.equal(again, images)
        other = switched.sample_with(TinyDiT(seed=1), interval, [5, 3])
        assert not torch.allclose(other, images)


def test_bad_specialists_are_named(runs, tmp_path):
    folder, intervals = runs
    files = paths(folder)
    wide = type("OtherNet", (TinyDiT,), {})
    cases = [
        (
            {"by_iterations": files[:2]},
            rf"found 2; the first .* is for \[{intervals[2][0]}",
        ),
        ({"by_iterations": [*files[:2], "gone.ckpt"]}, r"by_iterations\[2\].*found no gone.ckpt"),
        ({"by_iterations": files[::-1]}, r"by_iterations\[0\].*model.timesteps.interval"),
        ({"by_iterations": paths(folder, 2)}, "must have optimizer steps 4 .*, found 2"),
        (
            {"by_iterations": [str(folder / "multitask" / "step_4.ckpt"), *files[1:]]},
            "must be the checkpoint of a specialist",
        ),
        ({"by_samples": files, "intervals": [(0, 10), (10, 20), (20, T + 1)]}, rf"\[20, {T + 1}\)"),
        (
            {"by_samples": files[:1], "intervals": [(intervals[0][0], 1)]},
            "must have model.timesteps.interval",
        ),
    ]
    for settings, words in cases:
        with pytest.raises(ConfigError, match=words):
            measure(folder, tmp_path, **settings)
    for model, words in [
        (module(sampler=SAMPLER, schedule=LinearSchedule(T)), "process.schedule"),
        (module(wide(), sampler=SAMPLER), "model.backbone"),
    ]:
        model.on_load_checkpoint = lambda checkpoint: None  # its own check would come first
        with pytest.raises(ConfigError, match=rf"by_samples\[0\].*{words}"):
            measure(folder, tmp_path, model, by_samples=files)
    with pytest.raises(ConfigError, match="must have a timestep in"):
        SpecialistSampler(module(sampler=DDIM(num_steps=2)), [(1, 5)]).sample([0])
    with pytest.raises(ConfigError, match="found neither"):
        NegativeTransferGap()
    with pytest.raises(ConfigError, match="num_draws: must be at least 1, found 0"):
        NegativeTransferGap(by_samples=files, num_draws=0)


def test_a_checkpoint_on_the_way_is_that_of_a_shorter_run(runs, tmp_path):
    """So one run of a specialist serves both budgets."""
    folder, intervals = runs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = trainer(tmp_path, EMA(decay=0.5), steps=2, limit_val_batches=0)
        run.fit(module(interval=intervals[0]), DigitsData(batch_size=16))
        run.save_checkpoint(tmp_path / "short.ckpt")
    short, long = (
        torch.load(path, weights_only=True)
        for path in (tmp_path / "short.ckpt", paths(folder, 2)[0])
    )
    averages = [next(s for s in c["callbacks"].values() if "averages" in s) for c in (short, long)]
    assert averages[0]["num_updates"] == averages[1]["num_updates"] == 2
    for ours, theirs in [
        (short["state_dict"], long["state_dict"]),
        [a["averages"] for a in averages],
    ]:
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
