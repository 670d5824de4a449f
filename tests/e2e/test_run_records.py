"""What a run leaves of itself, and which run `--ckpt_path last` means."""

import json
import os
import shutil
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger

from ant_lightning.cli import path_settings
from ant_lightning.cli.main import main
from ant_lightning.runtime.csv_rows import _AddingWriter
from ant_lightning.runtime.run_files import newest_record

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "digits" / "dit.yaml"
CSV = "lightning.pytorch.loggers.CSVLogger"


def arguments(folder, *more, command="fit", steps=2, logger=CSV):
    return [
        command,
        f"--config={CONFIG}",
        f"--trainer.logger.class_path={logger}",
        f"--trainer.logger.init_args.save_dir={folder}",
        "--trainer.logger.init_args.name=run",
        "--trainer.callbacks=[]",
        f"--trainer.max_steps={steps}",
        "--trainer.limit_val_batches=1",
        "--trainer.val_check_interval=2",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.accelerator=cpu",
        "--data.init_args.batch_size=20",
        "--model.init_args.backbone.init_args.hidden_size=8",
        "--model.init_args.backbone.init_args.depth=1",
        "--model.init_args.backbone.init_args.num_heads=1",
        "--model.init_args.sampling.sampler.init_args.num_steps=2",
        *more,
    ]


class NeverStarted(CSVLogger):
    @property
    def experiment(self):
        raise AssertionError("started")

    def finalize(self, status):
        assert status == "failed"


def steps_of(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


def refused(capsys, args):
    """The line with which a command is refused."""
    capsys.readouterr()
    assert main(args) == 2
    return capsys.readouterr().err.splitlines()[-1].removeprefix("ant-lightning: error: ")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of the logs of a run of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(arguments(folder)) == 0
    return folder


@pytest.fixture
def logs(trained, tmp_path):
    """A copy of it that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "logs"))


class TestRecord:
    def test_only_fit_writes_the_settings_of_the_run(self, logs):
        run = logs / "run" / "version_0"
        record = (run / "config.yaml").read_bytes()
        checkpoint = f"--ckpt_path={run}/checkpoints/last.ckpt"
        for command, scale in (("validate", 2), ("validate", 3), ("validate", 3), ("test", 2)):
            more = [checkpoint, f"--model.init_args.sampling.guidance_scale={scale}"]
            assert main(arguments(logs, *more, command=command)) == 0
        assert main(arguments(logs, checkpoint, "--samples.num_images=2", command="predict")) == 0
        assert (run / "config.yaml").read_bytes() == record
        names = sorted(path.name for path in run.glob("*.yaml") if path.name != "hparams.yaml")
        assert names == [
            "config.yaml",
            "predict.yaml",
            "test.yaml",
            "validate.yaml",
            "validate_1.yaml",
        ]
        assert sorted(path.name for path in run.parent.iterdir()) == ["version_0"]
        assert newest_record(run) == run / "config.yaml"

    def test_predict_logs_nothing_and_starts_no_logger(self, logs):
        run = logs / "run" / "version_0"
        own = {"class_path": f"{__name__}.NeverStarted", "init_args": {"save_dir": str(logs)}}
        args = [f"--trainer.logger={json.dumps(own)}", "--num_images=4"]
        assert main(["predict", str(run), *args]) == 0
        assert [path.name for path in (logs / "run").iterdir()] == ["version_0"]

    def test_a_record_starts_a_run_of_its_own(self, logs):
        run = logs / "run" / "version_0"
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        more = [
            f"--config={run}/config.yaml",
            "--model.init_args.optimization.optimizer.init_args.lr=0.5",
        ]
        more += [f"--trainer.logger.init_args.save_dir={logs}"]
        assert main(["fit", *more]) == 0
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
        again = logs / "run" / "version_1" / "config.yaml"
        settings = yaml.safe_load(again.read_text())
        assert settings["model"]["init_args"]["optimization"]["optimizer"]["init_args"]["lr"] == 0.5

    @pytest.mark.parametrize("name", ["config.yaml", "mine.yaml"])
    def test_a_file_of_the_user_is_not_replaced(self, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        shutil.copy(CONFIG, name)
        before = Path(name).read_bytes()
        given = [a for a in arguments(tmp_path)[2:] if "logger" not in a]
        args = ["fit", f"--config={name}", *given, "--trainer.logger=false"]
        assert main(args) == 0
        assert main(args) == 0
        assert Path(name).read_bytes() == before
        runs = sorted(path.name for path in Path("lightning_logs").iterdir())
        assert runs == ["version_0", "version_1"]
        for run in runs:
            assert (Path("lightning_logs") / run / "config.yaml").is_file()
            assert steps_of(Path("lightning_logs") / run) == 2

    @pytest.mark.parametrize(
        "mistake",
        [
            "--model.init_args.num_tasks=5",
            "--model.init_args.backbone.init_args.input_size=16",
            "--model.init_args.optimization.warmup_steps=-1",
            "--ckpt_path=nowhere.ckpt",
            "--data.init_args.batch_size=0",
            "--data.init_args.batch_size=5000",  # found when the folder is there
        ],
    )
    def test_a_refused_command_leaves_no_run(self, tmp_path, capsys, mistake):
        refused(capsys, arguments(tmp_path / "new", mistake))
        assert list(tmp_path.iterdir()) == []
        if "5000" in mistake:
            version = "--trainer.logger.init_args.version=mine"
            refused(capsys, arguments(tmp_path / "new", mistake, version))
            assert list(tmp_path.iterdir()) == []

    def test_folders_that_were_there_stay_where_a_command_is_refused(self, tmp_path, capsys):
        (tmp_path / "run").mkdir()
        refused(capsys, arguments(tmp_path, "--data.init_args.batch_size=5000"))
        assert list(tmp_path.rglob("*")) == [tmp_path / "run"]

    def test_images_are_decoded_before_a_logger_starts(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(path_settings, "_FEW_IMAGES", 0)  # the first look decodes none
        for name in ("a", "b", "c"):
            (tmp_path / f"{name}.png").write_bytes(b"no image")
        own = f"--trainer.logger.class_path={__name__}.NeverStarted"
        data = ["--data=ImageFolderData", f"--data.root={tmp_path}", "--data.image_size=8"]
        line = refused(capsys, [*arguments(tmp_path / "logs", *data, "--data.channels=1"), own])
        assert line.startswith("data.validate_images: 3 broken images: "), line

    @pytest.mark.parametrize("logger", [CSV, "lightning.pytorch.loggers.TensorBoardLogger"])
    def test_a_checkpoint_that_does_not_fit_leaves_no_run(self, logs, tmp_path, capsys, logger):
        last = logs / "run" / "version_0" / "checkpoints" / "last.ckpt"
        other = "--model.init_args.backbone.init_args.hidden_size=16"
        new = tmp_path / "new"
        line = refused(capsys, arguments(new, f"--ckpt_path={last}", other, logger=logger))
        assert line.startswith("model.backbone: ")
        assert not [path for path in new.rglob("*") if path.is_file()]
        assert not list(new.glob("run/*"))

    def test_resuming_adds_rows_to_the_csv_file(self, logs):
        run = logs / "run" / "version_0"
        before = (run / "metrics.csv").read_text().splitlines()
        assert main(arguments(logs, "--ckpt_path=last", steps=4)) == 0
        after = (run / "metrics.csv").read_text().splitlines()
        assert after[: len(before)] == before
        steps = [line.split(",")[before[0].split(",").index("step")] for line in after[1:]]
        assert {"1", "2", "3", "4"} <= set(steps)
        validate = arguments(logs, f"--ckpt_path={run}/checkpoints/last.ckpt", command="validate")
        assert main(validate) == 0
        assert (run / "metrics.csv").read_text().splitlines()[: len(after)] == after

    def test_rows_of_a_killed_run_and_new_columns_are_kept(self, tmp_path):
        path = tmp_path / "metrics.csv"
        path.write_text("a,step\n1.0,1\n2.0")
        writer = _AddingWriter(str(tmp_path))
        writer.log_metrics({"b": 3.0}, 3)
        writer.save()
        assert path.read_text().split() == ["a,b,step", "1.0,,1", "2.0,,", ",3.0,3"]


class TestLast:
    """`last` is of this run, of these settings, and the furthest whole one."""

    @pytest.mark.parametrize(
        ("option", "name"),
        [
            (
                "--model.init_args.optimization.optimizer.init_args.lr=0.5",
                "model.optimization.optimizer.lr",
            ),
            ("--model.init_args.backbone.init_args.depth=2", "model.backbone.depth"),
            *(
                pytest.param(*case, marks=pytest.mark.slow)
                for case in (
                    (
                        "--model.init_args.optimization.lr_scheduler=StepLR",
                        "model.optimization.lr_scheduler",
                    ),
                    (
                        "--model.init_args.optimization.warmup_steps=3",
                        "model.optimization.warmup_steps",
                    ),
                    ("--model.init_args.class_dropout=0.5", "model.class_dropout"),
                    ("--model.init_args.process.schedule=LinearSchedule", "model.process.schedule"),
                    (
                        "--model.init_args.tasks.clustering.class_path=TimestepClustering",
                        "model.tasks.clustering",
                    ),
                    ("--ema.decay=0.5", "ema.decay"),
                )
            ),
            ("--model.init_args.tasks.balancer=PCGrad", "model.tasks.balancer"),
            ("--data.init_args.batch_size=30", "data.batch_size"),
            ("--seed_everything=7", "seed_everything"),
        ],
    )
    def test_another_setting_is_named(self, logs, capsys, option, name):
        more = [option, "--ckpt_path=last"]
        if "StepLR" in option:
            more.insert(1, "--model.init_args.optimization.lr_scheduler.init_args.step_size=1")
        if "PCGrad" in option:
            more.insert(1, "--model.init_args.tasks.balancer.init_args.num_tasks=5")
        line = refused(capsys, arguments(logs, *more, steps=4))
        assert line.startswith(f"ckpt_path: 'last' must be of a run with the same {name}, found ")
        assert steps_of(logs / "run" / "version_0") == 2
        assert len(list((logs / "run").iterdir())) == 1

    @pytest.mark.parametrize(
        "option",
        ["--model.init_args.sampling.guidance_scale=3", "--model.init_args.tasks.engine=loop"],
    )
    def test_what_is_trained_may_be_sampled_and_computed_otherwise(self, logs, option):
        assert main(arguments(logs, option, "--ckpt_path=last", steps=4)) == 0
        assert steps_of(logs / "run" / "version_0") == 4

    def test_each_point_of_a_sweep_finds_its_own_run(self, logs):
        other = "--model.init_args.optimization.optimizer.init_args.lr=0.5"
        assert main(arguments(logs, other)) == 0
        for more in ([], [other]):
            assert main(arguments(logs, "--ckpt_path=last", *more, steps=4)) == 0
        runs = [logs / "run" / f"version_{i}" for i in (0, 1)]
        assert [steps_of(run) for run in runs] == [4, 4]
        assert sorted(path.name for path in (logs / "run").iterdir()) == [r.name for r in runs]

    def test_the_copy_of_a_folder_does_not_hide_its_newest_step(self, logs):
        run = logs / "run" / "version_0"
        assert main(arguments(logs, "--ckpt_path=last", steps=4)) == 0
        for i, path in enumerate(sorted((run / "checkpoints").iterdir(), reverse=True)):
            os.utime(path, (i, i))
        assert main(arguments(logs, "--ckpt_path=last", steps=6)) == 0
        assert steps_of(run) == 6
        rows = (run / "metrics.csv").read_text().splitlines()
        column = rows[0].split(",").index("step")
        assert [row.split(",")[column] for row in rows[1:]].count("4") <= 2  # not trained again

    def test_another_data_set_of_the_same_size_is_named(self, logs, capsys):
        record = logs / "run" / "version_0" / "checkpoints" / "last.ckpt"
        content = torch.load(record, weights_only=True)
        content["ant_lightning"]["settings"]["data"]["class_path"] = "ant_lightning.ShapesData"
        for path in record.parent.iterdir():
            torch.save(content, path)
        line = refused(capsys, arguments(logs, "--ckpt_path=last", steps=4))
        assert "the same data, found ShapesData in " in line

    def test_a_version_of_its_own_starts_from_the_beginning(self, logs):
        version = "--trainer.logger.init_args.version=other"
        with pytest.warns(UserWarning, match="no checkpoint in .*other"):
            assert main(arguments(logs, version, "--ckpt_path=last")) == 0
        assert sorted(path.name for path in (logs / "run").iterdir()) == ["other", "version_0"]

    def test_a_new_run_does_not_write_into_the_folder_of_another(self, logs, capsys):
        version = "--trainer.logger.init_args.version=0"
        line = refused(capsys, arguments(logs, version))
        assert line.startswith("trainer.logger.version: must be free for a new run, found ")
        dirpath = logs / "run" / "version_0" / "checkpoints"
        line = refused(capsys, arguments(logs, f"--checkpoint.dirpath={dirpath}"))
        assert line.startswith("checkpoint.dirpath: must be free for a new run, found ")
        assert main(arguments(logs, version, "--ckpt_path=last", steps=4)) == 0

    def test_fast_dev_run_leaves_nothing(self, tmp_path):
        folder = f"--checkpoint.dirpath={tmp_path / 'checkpoints'}"
        args = arguments(tmp_path, folder, "--checkpoint.at_steps=[1]")
        assert main([*args, "--trainer.fast_dev_run=true"]) == 0
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
        assert main(args) == 0
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        assert main([*args, "--trainer.fast_dev_run=true", "--ckpt_path=last"]) == 0
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before

    def test_with_a_logger_that_names_its_runs_at_random(self, tmp_path):
        kind = f"{__name__}.ServiceLogger"
        assert main(arguments(tmp_path, logger=kind)) == 0
        (first,) = ServiceLogger.seen
        assert main(arguments(tmp_path, "--ckpt_path=last", logger=kind, steps=4)) == 0
        assert ServiceLogger.seen == [first, first]
        assert steps_of(tmp_path / "run" / "version_0") == 4
        assert (tmp_path / "run" / "version_0" / "config.yaml").is_file()


class ServiceLogger(CSVLogger):
    """Logs as services do: a random id for each run, and no folder of its own."""

    seen: ClassVar[list[str]] = []

    def __init__(self, save_dir: str, name: str = "run", run_id: str | None = None):
        self.id = run_id or f"id{len(self.seen)}"
        self.seen.append(self.id)
        super().__init__(save_dir=f"{save_dir}/service", name=name, version=self.id)
        self._where = save_dir

    @property
    def save_dir(self):
        return self._where


class TestOldRuns:
    def test_a_run_of_an_older_version_is_known_by_its_config(self, logs, capsys):
        run = logs / "run" / "version_0"
        for path in (run / "checkpoints").iterdir():
            content = torch.load(path, weights_only=True)
            for name in ("settings", "optimization", "run_folder"):
                del content["ant_lightning"][name]
            torch.save(content, path)
        (run / "loggers.json").unlink()
        line = refused(capsys, arguments(logs, "--ckpt_path=last", "--ema.decay=0.5", steps=4))
        assert "the same ema.decay, found 0.999 in " in line
        assert main(arguments(logs, "--ckpt_path=last", steps=4)) == 0
        assert steps_of(run) == 4


class TestFolders:
    """A folder belongs to one run, wherever its checkpoints and its loggers are."""

    def test_checkpoints_beside_the_users_files_do_not_make_them_a_run(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        shutil.copy(CONFIG, "config.yaml")
        Path("metrics.csv").write_text("my,own\n1,2\n")
        before = {name: Path(name).read_bytes() for name in ("config.yaml", "metrics.csv")}
        args = arguments("logs", "--checkpoint.dirpath=checkpoints")
        assert main(args) == 0
        assert main([*args, "--ckpt_path=last", "--trainer.max_steps=4"]) == 0
        validate = arguments("logs", "--ckpt_path=checkpoints/last.ckpt", command="validate")
        assert main(validate) == 0
        assert {name: Path(name).read_bytes() for name in before} == before
        assert sorted(path.name for path in Path().iterdir()) == [
            "checkpoints",
            "config.yaml",
            "logs",
            "metrics.csv",
        ]
        assert [path.name for path in Path("logs/run").iterdir()] == ["version_0"]
        assert Path("logs/run/version_0/validate.yaml").is_file()
        rows = Path("logs/run/version_0/metrics.csv").read_text().splitlines()
        column = rows[0].split(",").index("step")
        assert "4" in [row.split(",")[column] for row in rows]

    def test_a_number_is_free_for_every_logger(self, logs, tmp_path):
        loggers = [
            {"class_path": CSV, "init_args": {"save_dir": str(tmp_path / "other"), "name": "x"}},
            {"class_path": CSV, "init_args": {"save_dir": str(logs), "name": "run"}},
        ]
        before = (logs / "run" / "version_0" / "metrics.csv").read_bytes()
        args = [each for each in arguments(logs) if "logger" not in each]
        assert main([*args, f"--trainer.logger={json.dumps(loggers)}"]) == 0
        assert (logs / "run" / "version_0" / "metrics.csv").read_bytes() == before
        assert (logs / "run" / "version_1" / "metrics.csv").is_file()
        assert (tmp_path / "other" / "x" / "version_1" / "config.yaml").is_file()

    def test_checkpoints_elsewhere_do_not_free_a_version(self, logs, tmp_path, capsys):
        more = ["--trainer.logger.init_args.version=0", f"--checkpoint.dirpath={tmp_path / 'ck'}"]
        line = refused(capsys, arguments(logs, *more))
        assert line.startswith("trainer.logger.version: must be free for a new run, found ")

    def test_an_explicit_checkpoint_goes_on_in_its_own_version(self, logs):
        last = logs / "run" / "version_0" / "checkpoints" / "last.ckpt"
        more = ["--trainer.logger.init_args.version=0", f"--ckpt_path={last}", "--ema.decay=0.5"]
        assert main(arguments(logs, *more, steps=4)) == 0
        run = logs / "run" / "version_0"
        assert newest_record(run) == run / "config_1.yaml"
        # The old settings again: the furthest checkpoint with them is that of step 2.
        assert main(arguments(logs, "--ckpt_path=last", steps=3)) == 0
        assert newest_record(run) == run / "config_2.yaml"

    def test_a_moved_run_is_found_from_within(self, logs, tmp_path, monkeypatch):
        moved = Path(shutil.move(logs, tmp_path / "moved")) / "run" / "version_0"
        monkeypatch.chdir(moved / "checkpoints")
        assert main(arguments("elsewhere", "--ckpt_path=last.ckpt", command="validate")) == 0
        assert (moved / "validate.yaml").is_file()
        assert not Path("elsewhere").exists()

    def test_nothing_left_to_train_is_said(self, logs, capsys):
        assert main(arguments(logs, "--ckpt_path=last", steps=2)) == 0
        assert "nothing left to train, the checkpoint is at step 2" in capsys.readouterr().out

    def test_images_of_a_checkpoint_lie_in_its_run_without_a_logger_too(self, logs):
        run = logs / "run" / "version_0"
        args = [each for each in arguments(logs, command="predict") if "logger" not in each]
        args += ["--trainer.logger=false", f"--ckpt_path={run}/checkpoints/last.ckpt"]
        assert main([*args, "--samples.num_images=2"]) == 0
        assert len(list((run / "samples").glob("*.png"))) == 2
