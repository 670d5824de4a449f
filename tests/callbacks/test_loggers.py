"""What every logger holds of a run besides its numbers: pictures, settings and files."""

import csv
import json
import struct
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import yaml
from jsonargparse import Namespace
from lightning.pytorch.loggers import Logger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from ant_lightning.cli.main import main
from ant_lightning.cli.run_versions import RunVersions

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "digits" / "dit.yaml"
SMALL = [
    "--trainer.limit_val_batches=1",
    "--trainer.val_check_interval=1",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
    "--data.init_args.batch_size=20",
    "--model.init_args.backbone.init_args.hidden_size=8",
    "--model.init_args.backbone.init_args.depth=1",
    "--model.init_args.backbone.init_args.num_heads=1",
    "--model.init_args.sampling.sampler.init_args.num_steps=2",
]
LR = "model.optimization.optimizer.lr"
# The resumed run has other settings (its last step), so another record.
FILES = {"config.yaml", "config_1.yaml", "loggers.json", "validate.yaml"}


class CometLike(Logger):
    """Keeps what Comet's `Experiment` would be given, by its methods."""

    kept: ClassVar[dict[str, list]] = {}

    class Experiment:
        def log_image(self, image_data, name=None, *, step=None):
            CometLike.kept.setdefault("images", []).append((name, step, np.asarray(image_data)))

        def log_asset(self, file_data, file_name=None, *, overwrite=False):
            assert overwrite
            CometLike.kept.setdefault("files", []).append((file_name, Path(file_data).read_bytes()))

    def __init__(self, name: str = "digits", experiment_key: str = "one"):
        self._name, self._version = name, experiment_key

    name = property(lambda self: self._name)
    version = property(lambda self: self._version)
    experiment = property(lambda self: self.Experiment())

    def log_metrics(self, metrics, step=None):
        self.kept.setdefault("metrics", []).append((step, metrics))

    def log_hyperparams(self, params):
        self.kept.setdefault("hparams", []).append(params)


def run(folder, loggers, command="fit", *more):
    """A command on a run of two steps, with a grid of images at each."""
    settings = {
        "trainer": {
            "logger": loggers,
            "callbacks": [
                {"class_path": "ant_lightning.SampleGrid", "init_args": {"num_images": 4}}
            ],
            "default_root_dir": str(folder),
        }
    }
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    args = [command, f"--config={CONFIG}", f"--config={path}", "--trainer.max_steps=2", *SMALL]
    assert main([*args, *more]) == 0


def logger(kind, **init_args):
    return {"class_path": kind, "init_args": init_args}


def lightning(kind, **init_args):
    return logger(f"lightning.pytorch.loggers.{kind}", **init_args)


def validated(folder, loggers, *, ended=lambda: None):
    """Train for two steps, resume to step 4, then validate; returns the run's folder.

    `ended` does what the end of a command's process does.
    """
    run(folder, loggers)
    ended()
    run(folder, loggers, "fit", "--trainer.max_steps=4", "--ckpt_path=last")
    ended()
    (found,) = folder.rglob("last.ckpt")
    run(folder, loggers, "validate", f"--ckpt_path={found}")
    ended()
    assert (found.parent.parent / "1_samples_grid.png").is_file()
    return found.parent.parent


def picture(folder):
    return np.asarray(Image.open(folder / "1_samples_grid.png").convert("RGB"))


def test_tensorboard_and_a_logger_like_comet_at_once(tmp_path):
    CometLike.kept.clear()
    comet = logger(f"{__name__}.CometLike")
    folder = validated(tmp_path, [lightning("TensorBoardLogger", save_dir=str(tmp_path)), comet])
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()
    assert [image.step for image in events.Images("1_samples/grid")][:4] == [1, 2, 3, 4]
    assert [value.step for value in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [value.step for value in events.Scalars("val/loss")][:4] == [1, 2, 3, 4]
    assert "hp_metric" not in events.Tags()["scalars"]
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    shown = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert shown[LR].number_value == 2e-3
    assert shown["model.tasks.clustering"].string_value == "SNRClustering"
    assert yaml.safe_load((folder / "hparams.yaml").read_text())[LR] == 2e-3

    kept = CometLike.kept
    assert [step for step, values in kept["metrics"] if "train/loss" in values] == [1, 2, 3, 4]
    assert [params[LR] for params in kept["hparams"]] == [2e-3, 2e-3]
    assert {(name, step) for name, step, _ in kept["images"]} >= {
        ("1_samples/grid", 1),
        ("1_samples/grid", 2),
        ("1_samples/grid", 4),
        ("0_page/overview", 4),
    }
    assert np.array_equal(kept["images"][-2][2], picture(folder))
    assert dict(kept["files"])["config.yaml"] == (folder / "config.yaml").read_bytes()
    assert {name for name, _ in kept["files"]} == FILES


def wandb_records(content):
    """The records of an offline run: LevelDB's log, 7 bytes of mark, blocks of 32 KiB."""
    record, start = b"", 7
    while start + 7 <= len(content):
        if (left := 2**15 - start % 2**15) < 7:  # too little for a header: zeros
            start += left
            continue
        _, length, kind = struct.unpack("<IHB", content[start : start + 7])
        start += 7 + length
        record += content[start - length : start]
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


@pytest.mark.parametrize(
    ("given", "environment", "project", "name"),
    [
        ({"name": "digits_dit"}, None, "digits_dit", "version_3"),
        ({"name": "digits_dit"}, "ours", None, "digits_dit"),
        ({"name": "first", "project": "mine"}, None, "mine", "first"),
        ({"project": "mine"}, "ours", "mine", None),
    ],
)
def test_a_run_of_wandb_is_called_as_its_folder(monkeypatch, given, environment, project, name):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    if environment:
        monkeypatch.setenv("WANDB_PROJECT", environment)
    init = Namespace(save_dir="runs", **given)
    wandb = Namespace(class_path="lightning.pytorch.loggers.WandbLogger", init_args=init)
    RunVersions([wandb], [Path("runs/digits_dit")], None).bind(Path("runs/digits_dit/version_3"))
    assert (init.get("project"), init.get("name"), init.resume) == (project, name, "allow")


@pytest.mark.slow
def test_wandb_offline(tmp_path, capfd):
    wandb = pytest.importorskip("wandb", reason="needs the extra wandb")
    from wandb.proto import wandb_internal_pb2 as records

    loggers = [lightning("WandbLogger", save_dir=str(tmp_path), name="digits", offline=True)]

    def ended():
        wandb.finish()
        wandb.teardown()  # its service may still write after `finish`

    folder = validated(tmp_path, loggers, ended=ended)
    said = capfd.readouterr().err
    assert "wandb sync" in said
    assert "Symlinked" not in said
    assert "anonymous" not in said
    run(tmp_path, loggers, "predict", f"--ckpt_path={folder}", "--samples.num_images=2")
    ids, config, logged, files, steps = set(), {}, set(), set(), []
    paths = sorted(tmp_path.rglob("run-*.wandb"))
    assert len(paths) == 3, "W&B's rule: offline, a folder for each process"
    for path in paths:
        for data in wandb_records(path.read_bytes()):
            record = records.Record.FromString(data)
            for each in record.run.config.update:
                config[each.key] = json.loads(each.value_json)
            for each in record.config.update:
                config[each.key or ".".join(each.nested_key)] = json.loads(each.value_json)
            # A picture has several keys below its tag.
            logged |= {[*item.nested_key, item.key][0] for item in record.history.item}
            values = {
                ".".join([*i.nested_key, i.key][:1]): i.value_json for i in record.history.item
            }
            if "train/loss" in values:
                steps.append(int(values["trainer/global_step"]))
            files |= {each.path for each in record.files.files}
            if record.run.run_id:
                ids.add(record.run.run_id)
                assert (record.run.project, record.run.display_name) == ("digits", "version_0")
                assert record.run.resume, "`wandb sync` joins it to the run of the same id"
    assert len(ids) == 1, "a resumed run and validate log into the run of their checkpoint"
    assert steps == [1, 2, 3, 4]
    assert config[LR] == 2e-3
    assert {"train/loss", "val/loss", "1_samples/grid", "0_page/overview"} <= logged
    assert files >= FILES
    stored = [np.asarray(Image.open(path).convert("RGB")) for path in tmp_path.rglob("*grid*.png")]
    assert sum(np.array_equal(each, picture(folder)) for each in stored) >= 2  # ours, and W&B's


@pytest.mark.slow
def test_mlflow_in_sqlite(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="needs the extra mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    settings = {"experiment_name": "digits", "artifact_location": f"{tmp_path}/artifacts"}
    folder = validated(tmp_path, [lightning("MLFlowLogger", tracking_uri=uri, **settings)])
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("digits")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "version_0"
    assert found.data.params[LR] == "0.002"
    assert "val/loss" in found.data.metrics
    logged = client.get_metric_history(found.info.run_id, "train/loss")
    assert [value.step for value in logged] == [1, 2, 3, 4]
    artifacts = {each.path for each in client.list_artifacts(found.info.run_id)}
    assert artifacts >= FILES
    stored = [np.asarray(Image.open(p)) for p in (tmp_path / "artifacts").rglob("*.png")]
    assert any(np.array_equal(each, picture(folder)) for each in stored)


def test_mlflow_keeps_a_database_where_runs_are_unless_it_is_told(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def settings(**init):
        init = Namespace(save_dir=str(tmp_path / "runs"), experiment_name="digits", **init)
        logger = Namespace(class_path="lightning.pytorch.loggers.MLFlowLogger", init_args=init)
        RunVersions.of(Namespace(trainer=Namespace(logger=logger, default_root_dir=None)))
        return init.get("tracking_uri"), init.get("artifact_location")

    assert settings(tracking_uri="sqlite:///mine.db") == ("sqlite:///mine.db", None)
    assert not (tmp_path / "runs").exists()
    assert settings() == (
        f"sqlite:///{tmp_path}/runs/mlflow.db",
        f"{tmp_path}/runs/mlflow_artifacts",
    )
    assert (tmp_path / "runs").is_dir()  # SQLite makes none
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    assert settings() == (None, None)


@pytest.mark.parametrize("loggers", [False, [lightning("CSVLogger", save_dir="logs")]])
def test_without_one_that_shows_pictures_they_lie_in_the_runs_folder(
    tmp_path, monkeypatch, loggers
):
    monkeypatch.chdir(tmp_path)
    run(tmp_path, loggers)
    run(tmp_path, loggers)
    folders = {path.parent for path in tmp_path.rglob("1_samples_grid.png")}
    assert len(folders) == 2, "two runs never share one"
    for folder in folders:
        assert (folder / "config.yaml").is_file()
        assert (folder / "0_page_overview.png").is_file()


def test_csv_of_a_resumed_run(tmp_path):
    folder = validated(tmp_path, [lightning("CSVLogger", save_dir=str(tmp_path))])
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in ("train/loss", "val/loss"):
        assert [int(row["step"]) for row in rows if row[name]][:4] == [1, 2, 3, 4]
    assert yaml.safe_load((folder / "hparams.yaml").read_text())[LR] == 2e-3
    assert {path.name for path in folder.iterdir()} >= FILES
