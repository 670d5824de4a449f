"""One callback object in several runs: each ends as a run with an object of its own would."""

import json

import lightning as L
import pytest
import torch
from tiny_digits import T, TinyDiT, module, trainer

import ant_lightning
from ant_lightning import (
    Checkpoints,
    ConfigError,
    ConflictMonitor,
    Dashboard,
    DigitsData,
    DigitsMixtureData,
    DiT,
    ExcessRisk,
    FeatureExtractor,
    GenerationMetrics,
    LinearSchedule,
    ModuleFeatures,
    Reclustering,
    SampleGrid,
    StepCost,
    TaskAffinity,
    TimestepClustering,
    TransferMatrix,
)
from ant_lightning.callbacks.base import RunCallback
from ant_lightning.generation.extractor import Features
from ant_lightning.models.optimizer_step import SkippedSteps

pytestmark = pytest.mark.filterwarnings(
    "ignore::ant_lightning.generation.frechet.RankDeficientWarning"
)


class Corner(FeatureExtractor):
    """Four pixels as they are."""

    def __init__(self):
        super().__init__(num_features=4, name="corner")

    def extract(self, images):
        return Features(images[:, 0, 3:5, 3:5].flatten(1).float() / 255)


MAKERS = {
    "ConflictMonitor": lambda: ConflictMonitor(log_every_n_steps=2, probe_every_n_steps=3),
    "Dashboard": Dashboard,
    "GenerationMetrics": lambda: GenerationMetrics(Corner(), num_images=12),
    "SampleGrid": lambda: SampleGrid(num_images=4),
    "StepCost": lambda: StepCost(skip_steps=0),
    "TaskAffinity": lambda: TaskAffinity(num_points=2, num_images=2),
    "TransferMatrix": lambda: TransferMatrix(num_images=4),
}
# Own tests: EMA by its weights, the gap and the experts need specialists, and a diagnosis is one
# measurement of many.
OTHERS = {"Diagnosis", "EMA", "ExpertComparison", "NegativeTransferGap"}


def test_every_callback_with_state_is_tried_here():
    public = [getattr(ant_lightning, name) for name in ant_lightning.__all__]
    callbacks = [
        each for each in public if isinstance(each, type) and issubclass(each, RunCallback)
    ]
    assert {each.__name__ for each in callbacks if each.run_state} == {*MAKERS, *OTHERS}


def test_a_callback_refuses_modules_that_are_not_ours():
    error = "model: must be a MultiTaskDiffusion for ConflictMonitor, found LightningModule"
    with pytest.raises(ConfigError, match=error):
        ConflictMonitor().setup(L.Trainer(logger=False), L.LightningModule(), "fit")


def run(folder, callback, model, data, *, steps, valid=True):
    """Train, with a validation at the end."""
    others = [SampleGrid(num_images=4), callback] if isinstance(callback, Dashboard) else [callback]
    settings = {"val_check_interval": steps, "check_val_every_n_epoch": None}
    trainer(
        folder,
        *others,
        steps=steps,
        **(settings | {"limit_val_batches": 1} if valid else {"limit_val_batches": 0}),
    ).fit(model, data)


def flat(value):
    """Everything in a state that does not depend on the clock or the folder."""
    if isinstance(value, dict):
        return {name: flat(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [flat(each) for each in value]
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if hasattr(value, "half_dots"):
        return value.half_dots.tolist()
    return getattr(value, "name", value)


def state(callback):
    return flat({name: getattr(callback, name) for name in callback.run_state})


def second():
    """A run that differs in everything from the first."""
    model = module(TinyDiT(seed=1), schedule=LinearSchedule(T), clustering=TimestepClustering(3))
    return model, DigitsData(batch_size=20, split_seed=1)


@pytest.mark.parametrize("kind", MAKERS)
def test_another_run_finds_nothing_of_the_first(tmp_path, kind):
    reused, fresh = MAKERS[kind](), MAKERS[kind]()
    model, data = module(), DigitsData(batch_size=30)
    run(tmp_path / "a", reused, model, data, steps=2)
    before = state(reused)
    assert before != state(fresh)
    # An evaluation of the module that was trained goes on; it counts as many steps.
    trainer(tmp_path / "a", reused, limit_val_batches=0).validate(model, data, verbose=False)
    assert model.trained_steps == 2
    assert state(reused) == before
    # Another training, which measures nothing that a result of the first could be taken for.
    measured = kind in {"ConflictMonitor", "TaskAffinity"}
    run(tmp_path / "b", reused, *second(), steps=4, valid=measured)
    run(tmp_path / "c", fresh, *second(), steps=4, valid=measured)
    if kind == "StepCost":
        assert len(reused._seconds) == len(fresh._seconds) == 4
        assert json.loads((tmp_path / "b" / "step_cost.json").read_text())["num_steps"] == 4
    else:
        assert state(reused) == state(fresh)
    # An evaluation of another module.
    trainer(tmp_path, reused, limit_val_batches=0).validate(module(), data, verbose=False)
    assert state(reused) == state(MAKERS[kind]())


def scores(folder, callback, data):
    run = trainer(folder, callback, limit_val_batches=1)
    run.validate(module(), data, verbose=False)
    return callback.last_scores


@pytest.mark.parametrize("with_cache", [True, False])
def test_the_reference_is_that_of_the_data_and_of_the_extractor(tmp_path, with_cache):
    cache = {"cache_dir": str(tmp_path / "cache")} if with_cache else {}

    def fresh(extractor):
        return GenerationMetrics(extractor, num_images=12, with_train=False, **cache)

    def features(scale):
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
        torch.nn.init.constant_(network[1].bias, 0.0)
        with torch.no_grad():
            network[1].weight.copy_(torch.eye(64)[20:23] * scale)
        return ModuleFeatures(Float(network), num_features=3, name="mine")

    reused = fresh(Corner())
    first, other = DigitsData(), DigitsData(split_seed=1)
    scores(tmp_path, reused, first)
    assert scores(tmp_path, reused, other) == scores(tmp_path, fresh(Corner()), other)
    # An extractor is its weights, whatever its name.
    one = scores(tmp_path, fresh(features(1.0)), first)
    two = scores(tmp_path, fresh(features(2.0)), first)
    assert two["fid"] == pytest.approx(4 * one["fid"], rel=1e-3)


class Float(torch.nn.Module):
    """A network of floats for uint8 images."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images.float() / 255)


def test_the_excess_risk_is_of_this_process(tmp_path):
    data = DigitsMixtureData(num_images=64, num_held_out=8, batch_size=8)
    size = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 8}
    backbone = DiT(**size, depth=1, num_heads=1, num_classes=0)

    def risk(callback, **settings):
        made = module(backbone, clip_denoised=False, **settings)
        trainer(tmp_path, callback).validate(made, data, verbose=False)
        return json.loads((tmp_path / "excess_risk.jsonl").read_text().splitlines()[-1])["mean"]

    reused, fresh = (ExcessRisk(images_per_timestep=1) for _ in range(2))
    risk(reused)
    assert risk(reused, schedule=LinearSchedule(T)) == risk(fresh, schedule=LinearSchedule(T))


def test_a_page_shows_pictures_of_its_own_run_only(tmp_path):
    run(tmp_path, SampleGrid(num_images=4), module(), DigitsData(batch_size=30), steps=1)
    assert (tmp_path / "1_samples_grid.png").exists()
    page = trainer(tmp_path, Dashboard(), limit_val_batches=1)
    page.validate(module(), DigitsData(), verbose=False)
    assert not (tmp_path / "0_page_overview.png").exists()


def test_counts_and_clusters_of_a_module_that_trains_again(tmp_path):
    data, probe = DigitsData(batch_size=30), {"num_points": 12, "num_images": 2}
    model = module()
    settings = model.clusters.boundaries
    first = trainer(tmp_path, Reclustering(recluster_every=2, **probe), steps=2)
    first.fit(model, data)
    assert [step for step, _ in model.cluster_history] == [0, 2]
    model._step.skipped = SkippedSteps(7, 7)
    first.save_checkpoint(tmp_path / "first.ckpt")
    clusters = model.clusters.boundaries
    again = trainer(tmp_path, steps=1, limit_val_batches=1)
    again.fit(model, data)
    assert model._step.skipped == SkippedSteps(0, 0)
    assert model.clusters.boundaries == clusters
    changed = [(0, clusters)] if clusters != settings else []
    assert model.cluster_history == [(0, settings), *changed]
    # A checkpoint brings its own, also over clusters that another run left.
    resumed = trainer(tmp_path, steps=3, limit_val_batches=1)
    resumed.fit(model, data, ckpt_path=tmp_path / "first.ckpt")
    assert [step for step, _ in model.cluster_history] == [0, 2]
    assert model.num_skipped_steps == 7
    assert model.trained_steps == 3
    # An evaluation names the steps of the module, not those of whatever its trainer trained.
    resumed.validate(module(), data, verbose=False)
    assert resumed.global_step == 3
    assert resumed.callback_metrics["step"] == 0


@pytest.mark.parametrize("given", [True, False], ids=["a folder given", "the run's folder"])
def test_a_second_training_leaves_the_checkpoints_of_the_first(tmp_path, given):
    where = {"dirpath": tmp_path / "both"} if given else {}
    kept = Checkpoints(filename="{step}", save_last=True, every_n_train_steps=1, **where)
    settings = {"enable_checkpointing": True, "limit_val_batches": 0}

    def written(name):
        run = trainer(tmp_path / name, kept, steps=3, **settings)
        run.fit(module(), DigitsData(batch_size=30))
        folder = tmp_path / ("both" if given else name)
        assert kept.last_model_path.startswith(str(folder))
        return {p: p.read_bytes() for p in folder.rglob("*.ckpt")}

    first = written("first")
    second = written("second")
    assert len(first) == 3  # the newest two, and last
    for path, content in first.items():
        assert path.read_bytes() == content
    assert len(second) == (6 if given else 3)
