"""Arguments of the commands that take runs."""

from inspect import signature

import pytest

from ant_lightning import ConfigError
from ant_lightning.cli import run_arguments
from ant_lightning.cli.export import export
from ant_lightning.cli.first_look import first_look


def test_the_options_of_an_export_are_the_arguments_of_the_function():
    options = [name.removeprefix("--") for name in run_arguments._OPTIONS["export"]]
    assert options == [*signature(export).parameters, "push_to_hub"]


@pytest.mark.parametrize("command", ["app", "export", "sweep"])
def test_help_comes_before_the_imports(command, capsys):
    with pytest.raises(SystemExit) as ended:
        first_look([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: ant-lightning {command} [--" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("export . --to", "to: needs a value"),
        ("export . --too=torch", "too: the command has no such setting; did you mean 'to'"),
        ("export . --to=torch --merge_weights 1", "merge_weights: must be a list"),
        ("export", "run: needed, found nothing"),
        ("sweep . --guidance", "guidance: needs a value"),
        ("sweep . --ema 0.1 x", "ema: must be numbers with spaces between them"),
        ("sweep . --guidance 1 --num_images=x", "num_images: must be a whole number, found x"),
        ("sweep . .. --guidance 1", "the command has no place for it"),
        ("app", "runs: needed, found nothing"),
        ("app . --port=x", "port: must be a whole number, found x"),
    ],
)
def test_a_wrong_argument_is_named(args, message):
    with pytest.raises(ConfigError, match=message):
        first_look(args.split())


def test_a_page_without_gradio_is_refused_before_the_imports(tmp_path, monkeypatch):
    (tmp_path / "a.ckpt").touch()
    monkeypatch.setattr(run_arguments, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^app: needs pip install 'ant-lightning\[app\]'"):
        first_look(["app", str(tmp_path / "a.ckpt")])
    monkeypatch.setattr(run_arguments, "find_spec", lambda name: name)
    first_look(["app", str(tmp_path / "a.ckpt")])
