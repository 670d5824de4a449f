"""Loggers by short names, and where they log."""

import inspect
import json
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser
from lightning import Trainer
from lightning.pytorch import loggers
from torch.utils.tensorboard import SummaryWriter
from wrong_settings import DIT, looked

import ant_lightning.cli.parser  # noqa: F401 - sets how YAML is read
from ant_lightning.cli.logger_names import places_of
from ant_lightning.cli.source_names import arguments_of
from ant_lightning.cli.trainer_settings import with_classes_of_loggers

CSV = "{class_path: csv}"
WANDB = "{class_path: wandb, init_args: {offline: true}, dict_kwargs: {new: [a]}}"
SEVERAL = {  # options, and the loggers that they make
    "a dict": (["--trainer.logger", CSV], "CSV"),
    "a class path": (["--trainer.logger.class_path", "csv"], "CSV"),
    "in the trainer": (["--trainer", "{logger: csv}"], "CSV"),
    "in a file of the trainer": (["--trainer", "trainer.yaml"], "CSV"),
    "in a file of the logger": (["--trainer.logger=logger.yaml"], "CSV"),
    "a list": (["--trainer.logger", "[wandb, csv]"], "Wandb CSV"),
    "dicts in a list": (["--trainer.logger", f"[{WANDB}, {CSV}]"], "Wandb CSV"),
    "a list in the trainer": (["--trainer={logger: [wandb, csv]}"], "Wandb CSV"),
    "added": (["--trainer.logger=wandb", "--trainer.logger+=csv"], "Wandb CSV"),
    "added to the config's": (["--trainer.logger+", "CSV"], "TensorBoard CSV"),
    "added to a dict": (["--trainer.logger", WANDB, "--trainer.logger+", CSV], "Wandb CSV"),
    "added to a file": (["--trainer", "trainer.yaml", "--trainer.logger+=wandb"], "CSV Wandb"),
    "a list added": (["--trainer.logger+", "[csv, wandb]"], "TensorBoard CSV Wandb"),
    "two added": (
        ["--trainer.logger+", "csv", "--trainer.logger+", "wandb"],
        "TensorBoard CSV Wandb",
    ),
    "after somebody's": (
        [f"--trainer.logger+={__name__}.TheirLogger", "--trainer.logger+=csv"],
        "TensorBoard Their CSV",
    ),
    "with a setting": (
        ["--trainer.logger=wandb", "--trainer.logger.offline", "true", "--trainer.logger+=csv"],
        "Wandb CSV",
    ),
    "a setting in a list": (
        [
            "--trainer.logger=[csv, wandb]",
            "--trainer.logger.offline=true",
            "--trainer.logger+=mlflow",
        ],
        "CSV Wandb MLFlow",
    ),
    "a list in a file": (["--config", "list.yaml"], "Wandb CSV"),
    "a list in a file, one added": (
        ["--config=list.yaml", "--trainer.logger+=csv"],
        "Wandb CSV CSV",
    ),
    "one in a file, one added": (["--config=one.yaml", "--trainer.logger+=wandb"], "CSV Wandb"),
}
FIRST = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "logs", "name": "n"}}


class TheirLogger(loggers.CSVLogger):
    def __init__(self, save_dir: str = "logs", name: str = "n"):
        super().__init__(save_dir, name)


@pytest.fixture(scope="module")
def loggers_of(tmp_path_factory):
    """The loggers that the parser makes of options."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Trainer, "trainer")

    def made(options):
        args = with_classes_of_loggers(["fit", *options])
        assert looked([*args, "--print_config"]) is None
        found = parser.parse_args(args[1:]).trainer.logger
        return found if isinstance(found, list) else [found]

    return made


def kinds(made):
    return [each.class_path.rpartition(".")[2].removesuffix("Logger") for each in made]


@pytest.mark.parametrize("name", ["tensorboard", "WandB", "mlflow", "CSV", "comet", "csvlogger"])
def test_loggers_have_short_names_on_the_command_line(name):
    (kind,) = with_classes_of_loggers([f"--trainer.logger={name}"])
    assert with_classes_of_loggers(["--trainer.logger", name]) == [kind]
    kind = kind.partition("=")[2]
    made = getattr(loggers, kind)
    assert issubclass(made, loggers.Logger)
    assert places_of(kind).keys() <= set(inspect.signature(made).parameters)
    assert with_classes_of_loggers(["--x", name, f"--trainer.logger={kind}"])[1] == name
    message = looked(["fit", "--config", str(DIT), f"--trainer.logger={kind}"])
    assert message is None or message.startswith(f"trainer.logger: {kind} needs a package, found")
    assert looked(["predict", "--config", str(DIT), f"--trainer.logger={kind}"]) is None


@pytest.mark.parametrize(
    "option",
    [
        ["--trainer.logger", "mlflow"],
        ["--trainer.logger.class_path=MLflow"],
        ["--trainer.logger={class_path: mlflow, init_args: {tracking_uri: 'sqlite:///a.db'}}"],
    ],
)
def test_the_name_of_a_run_becomes_the_experiment_of_mlflow(option):
    found = with_classes_of_loggers(["fit", "--config", str(DIT), *option])
    assert found[-1] == "--trainer.logger.experiment_name=digits_dit"
    named = [*option[:-1], option[-1], "--trainer.logger.experiment_name=mine"]
    assert with_classes_of_loggers(["fit", "--config", str(DIT), *named])[-1] == named[-1]
    own = "{class_path: mlflow, init_args: {experiment_name: mine}}"
    given = with_classes_of_loggers(["fit", "--config", str(DIT), "--trainer.logger", own])
    assert not any(each.startswith("--trainer.logger.experiment_name") for each in given)


def test_a_logger_needs_its_package(monkeypatch):
    found = "trainer.logger: {} needs a package, found none; pip install {}"
    monkeypatch.setattr("ant_lightning.cli.logger_names.find_spec", lambda _: None)
    for given, kind, install in (
        ("comet", "CometLogger", "comet_ml"),
        ("[csv, wandb]", "WandbLogger", "'ant-lightning[wandb]'"),
        ("{class_path: mlflow}", "MLFlowLogger", "'ant-lightning[mlflow]'"),
    ):
        options = with_classes_of_loggers([f"--trainer.logger={given}"])
        args = ["fit", "--config", str(DIT), *options]
        assert looked(args) == found.format(kind, install)
        assert looked([*args, "--print_config"]) is None


@pytest.mark.parametrize("what", SEVERAL)
def test_loggers_by_short_names_log_where_the_configs_would(
    what, loggers_of, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("list.yaml").write_text("trainer: {logger: [wandb, csv]}")
    Path("one.yaml").write_text("trainer: {logger: {class_path: csv}}")
    Path("trainer.yaml").write_text("logger: csv")
    Path("logger.yaml").write_text("class_path: csv")
    options, expected = SEVERAL[what]
    made = loggers_of(["--config", json.dumps({"trainer": {"logger": FIRST}}), *options])
    assert kinds(made) == expected.split()
    for each in made:
        assert each.init_args.save_dir == "logs"
        assert each.init_args.get("name", "n") == "n"
        if "setting" in what and hasattr(each.init_args, "offline"):
            assert each.init_args.offline is True
        if WANDB in options:
            assert "Wandb" not in each.class_path or each.dict_kwargs == {"new": ["a"]}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--trainer.logger+", "csv"], "CSV"),
        (["--trainer.logger=true", "--trainer.logger+", "csv"], "TensorBoard CSV"),
        (["--trainer.logger=false", "--trainer.logger+", "csv"], "CSV"),
        ([f"--trainer.logger=[{WANDB}, csv]"], "Wandb CSV"),
        ([f"--trainer.logger=[comet, {CSV}]"], "Comet CSV"),
        (["--trainer.logger=csv"], "CSV"),
        (["--trainer.logger=lightning.pytorch.loggers.CSVLogger"], "CSV"),
        (["--trainer.logger", WANDB], "Wandb"),
        (["--trainer.logger", WANDB, "--trainer.logger+=csv"], "Wandb CSV"),
        (["--config={trainer: {logger: [wandb, csv]}}"], "Wandb CSV"),
    ],
)
def test_loggers_without_a_place_log_into_runs(options, expected, loggers_of):
    made = loggers_of(options)
    assert kinds(made) == expected.split()
    assert {each.init_args.get("save_dir", "runs") for each in made} == {"runs"}
    assert made[-1].init_args.save_dir == "runs"


@pytest.mark.parametrize("name", ["CSVLogger", "MLFlowLogger", "TensorBoardLogger", "WandbLogger"])
def test_the_arguments_of_loggers_are_those_of_the_class(name):
    if name == "WandbLogger":
        wandb = pytest.importorskip("wandb", reason="needs the extra wandb")
        own = set(inspect.signature(wandb.init).parameters)
    else:
        own = set(inspect.signature(SummaryWriter).parameters) if "Tensor" in name else set()
    own |= set(inspect.signature(getattr(loggers, name)).parameters) - {"kwargs"}
    assert arguments_of(name) == own
