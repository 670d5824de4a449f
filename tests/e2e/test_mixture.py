"""The configs of the evidence study, as the study calls them."""

import json
from pathlib import Path

import pytest

from ant_lightning import ExcessRisk, GenerationMetrics
from ant_lightning.cli.parser import run
from ant_lightning.tasks.shuffled import ShuffledClusters
from studies.study import Study

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TINY = [
    "--trainer.max_steps=2",
    "--data.init_args.num_images=64",
    "--data.init_args.num_held_out=64",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


@pytest.mark.filterwarnings("ignore:ckpt_path. there is no checkpoint in:UserWarning")
def test_a_cell_of_the_study_trains_and_its_checkpoint_keeps_the_placebo(tmp_path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    cells = Study.read(CONFIGS.parent / "studies" / "evidence.yaml").cells
    place = [f"--trainer.logger.init_args.save_dir={tmp_path}"]
    place += ["--trainer.logger.init_args.version=0", "--trainer.val_check_interval=2"]
    callback = {"class_path": "ExcessRisk", "init_args": {"images_per_timestep": 1}}
    few = [f"--trainer.callbacks={json.dumps([callback])}"]
    (fit,) = cells["tune/cosine_eps/placebo/lr0.004"].commands
    cli = run([*fit, *TINY, *place, *few])
    rows = (tmp_path / "digits_mixture/version_0/excess_risk.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["images"] == 2 * 64
    trained = cli.model.clusters
    assert isinstance(trained, ShuffledClusters)
    # A resumed fit goes on with the placebo and not with clusters of the same boundaries.
    again = run([*fit, *TINY, "--trainer.max_steps=3", *place, *few])
    assert again.trainer.global_step == 3
    assert again.model.clusters == trained


def test_the_configs_have_what_the_study_collects(tmp_path):
    files = ["mixture", "mixture_final"]
    args = [a for f in files for a in ("--config", str(CONFIGS / "digits" / f"{f}.yaml"))]
    args += [f"--trainer.logger.init_args.save_dir={tmp_path}", "--trainer.limit_val_batches=0"]
    callbacks = run(["fit", *args, *TINY]).trainer.callbacks
    assert next(c for c in callbacks if isinstance(c, GenerationMetrics)).num_images == 10000
    assert next(c for c in callbacks if isinstance(c, ExcessRisk)).images_per_timestep == 20
