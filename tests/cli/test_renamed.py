"""Names of version 0.1: refused with the new ones, and translated where a run has them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from ant_lightning import DDIM, DiTModule, UncertaintyWeighting, load_run
from ant_lightning.cli.first_look import first_look
from ant_lightning.cli.main import main
from ant_lightning.cli.renamed import with_new_names
from ant_lightning.errors import ConfigError
from ant_lightning.runtime.changed_settings import changed_settings

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "H_checkpoints"
OLD = GOLDEN / "v1_uw_config.yaml"
DIT = GOLDEN.parents[2] / "configs" / "digits" / "dit.yaml"
PAIRS = {
    "model.schedule": "model.process.schedule",
    "model.variance_type": "model.process.variance_type",
    "model.balancer": "model.tasks.balancer",
    "model.task_weighting": "model.tasks.weighting",
    "model.timestep_sampling": "model.timesteps.method",
    "model.train_interval": "model.timesteps.interval",
    "model.optimizer": "model.optimization.optimizer",
    "model.guidance_scale": "model.sampling.guidance_scale",
    "ant_lightning.modules.DiTModule": "ant_lightning.DiTModule",
    "ant_lightning.clustering.SNRClustering": "ant_lightning.SNRClustering",
    "ant_lightning.diffusion.DDIM": "ant_lightning.DDIM",
}


@pytest.fixture
def old_run(tmp_path):
    """The folder of a run of version 0.1, as it lies on somebody's disk."""
    run = tmp_path / "run" / "version_0"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(GOLDEN / "v1_uw.ckpt", run / "checkpoints" / "last.ckpt")
    shutil.copy(OLD, run / "config.yaml")
    (run / "metrics.csv").write_text("epoch,step,train/loss\n0,6,1.0\n")
    return run


def test_all_old_names_of_a_config_are_refused_in_one_line(capsys):
    assert main(["fit", "--config", str(OLD)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "config: must have the names of version 0.2, found " in line
    for old, new in PAIRS.items():
        assert f"{old} for {new}" in line


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--model.balancer=PCGrad", "model.balancer for model.tasks.balancer"),
        ("--model.init_args.clip_grad_norm=3", "model.clip_grad_norm for model.optimization.clip"),
        ("--optimizer=SGD", "optimizer for model.optimization.optimizer"),
        ("--data=ant_lightning.data.DigitsData", "ant_lightning.data.DigitsData for ant_light"),
        (
            "--trainer.callbacks="
            + json.dumps([{"class_path": "TaskAffinity", "init_args": {"state_dir": "x"}}]),
            "trainer.callbacks[0].state_dir for trainer.callbacks[0].resume_dir",
        ),
    ],
)
def test_an_old_option_is_refused_with_the_new_name(option, words):
    with pytest.raises(ConfigError) as error:
        first_look(["fit", "--config", str(DIT), option])
    assert words in str(error.value)


def test_names_of_today_and_of_others_are_left_alone():
    settings = yaml.safe_load(DIT.read_text())
    assert with_new_names(settings) == settings
    own = {"class_path": "mine.Module", "init_args": {"optimizer": "SGD", "schedule": 3}}
    assert with_new_names({"model": own}) == {"model": own}
    shuffled = {"class_path": "ShuffledClustering", "init_args": {"clustering": "SNRClustering"}}
    assert with_new_names(shuffled) == shuffled


@pytest.mark.parametrize(("learn_sigma", "out_channels"), [(True, 6), (False, 3)])
def test_the_channels_of_a_published_network_are_translated(learn_sigma, out_channels):
    init_args = {"learn_sigma": learn_sigma, "dropout": 0.1}
    old = {"class_path": "ant_lightning.backbones.adm_p2_light", "init_args": init_args}
    assert with_new_names(old) == {
        "class_path": "ant_lightning.adm_p2_light",
        "init_args": {"dropout": 0.1, "out_channels": out_channels},
    }


def test_a_run_of_version_0_1_is_loaded(old_run):
    saved = torch.load(GOLDEN / "v1_uw.ckpt", weights_only=True)
    module = load_run(old_run)
    assert type(module) is DiTModule
    assert isinstance(module.balancer, UncertaintyWeighting)
    assert (module.process.num_timesteps, module.num_tasks) == (100, 3)
    assert module.process.variance_type == "learned_range"
    assert (module.class_dropout, module.seed, module.trained_steps) == (0.1, 0, 6)
    assert isinstance(module.sampling.sampler, DDIM)
    assert (module.sampling.sampler.num_steps, module.sampling.guidance_scale) == (5, 1.5)
    assert module.optimization.warmup_steps == 7
    state = module.backbone.state_dict()
    for name, value in saved["callbacks"]["EMA"]["averages"].items():
        assert torch.equal(state[name], value)


def test_settings_of_both_versions_are_compared_by_todays_names():
    old = yaml.safe_load(OLD.read_text())
    new = with_new_names(old)
    assert changed_settings(new, with_new_names(yaml.safe_load(OLD.read_text()))) == {}
    new["model"]["init_args"]["tasks"]["balancer"]["init_args"]["lr"] = 0.5
    assert changed_settings(with_new_names(old), new) == {"model.tasks.balancer.lr": (0.025, 0.5)}


def test_last_goes_on_with_a_run_of_version_0_1(old_run, capsys):
    today = old_run.parents[1] / "today.yaml"
    settings = with_new_names(yaml.safe_load(OLD.read_text()))
    logger = settings["trainer"]["logger"]["init_args"]
    logger |= {"save_dir": str(old_run.parents[1]), "name": "run"}
    settings["trainer"] |= {"enable_progress_bar": False, "limit_val_batches": 0}
    today.write_text(yaml.safe_dump(settings))
    args = ["fit", "--config", str(today), "--ckpt_path=last", "--trainer.max_steps=7"]
    assert main([*args, "--ema.decay=0.5"]) == 2
    assert "the same ema.decay, found 0.9 in" in capsys.readouterr().err
    assert main(args) == 0
    state = torch.load(old_run / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 7


def test_a_run_with_an_engine_that_is_gone_takes_auto():
    old = {"class_path": "ant_lightning.modules.DiTModule", "init_args": {"engine": "vmap"}}
    new = with_new_names(old)["init_args"]
    assert new["tasks"]["engine"] == "auto"
