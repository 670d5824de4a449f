"""An object names its own argument; the command line puts the path in front."""

import json
import warnings
from functools import partial

import pytest
from jsonargparse import ArgumentParser
from PIL import Image
from wrong_settings import arguments

from ant_lightning import ConfigError, ImageDataModule
from ant_lightning.cli.parser import run
from ant_lightning.cli.setting_paths import SettingPaths


class Part:
    """Refuses a wrong size when it is made, and a wrong color when it is used."""

    def __init__(self, size: int = 1, color: str = "red"):
        if size < 1:
            raise ConfigError(f"size: must be at least 1, found {size}")
        self.color = color

    def use(self, message="color: must be red, found {}"):
        if self.color != "red":
            raise ConfigError(message.format(self.color))


class Whole:
    def __init__(self, parts: list[Part], other: Part | None = None, size: int = 0):
        self.parts = parts
        self.other = other

    def use(self, *message):
        for part in [*self.parts, self.other]:
            if part is not None:
                part.use(*message)


class Outer:
    def __init__(self, images: ImageDataModule):
        self.images = images


def part(**init_args):
    return {"class_path": f"{__name__}.Part", "init_args": init_args}


def whole(parts, other=None):
    init_args = {"parts": parts, "other": other}
    return {"whole": {"class_path": f"{__name__}.Whole", "init_args": init_args}}


def message(settings, use=Whole.use, kind=Whole):
    """The error of making and using an object of these settings."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "whole")
    with pytest.raises(ConfigError) as error, SettingPaths() as paths:
        use(paths.make(parser, lambda: parser.parse_object(settings)).whole)
    return str(error.value)


FORM = warnings.formatwarning


@pytest.fixture
def printed(capsys, monkeypatch):
    """What Python prints while objects of settings are made and used."""

    def run_it(settings, kind, use):
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(kind, "whole")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            # pytest catches warnings before they are printed.
            say = lambda *warning: print(warnings.formatwarning(*warning[:4]))  # noqa: E731
            monkeypatch.setattr(warnings, "showwarning", say)
            monkeypatch.setattr(warnings, "formatwarning", FORM)  # commands change it
            with SettingPaths() as paths:
                use(paths.make(parser, lambda: parser.parse_object(settings)).whole)
        return capsys.readouterr().out

    return run_it


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (whole([part(size=0)]), "whole.parts[0].size: must be at least 1, found 0"),
        (whole([part(), part(size=-1)]), "whole.parts[1].size: must be at least 1, found -1"),
        (whole([], part(size=0)), "whole.other.size: must be at least 1, found 0"),
        (whole([part(), part(color="blue")]), "whole.parts[1].color: must be red, found blue"),
        (whole([part()], part(color="pink")), "whole.other.color: must be red, found pink"),
    ],
)
def test_the_object_that_refuses_is_found(settings, expected):
    assert message(settings) == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("parts.color: must be red", "whole.parts.color: must be red"),
        ("size, color: must fit", "whole.other.size, color: must fit"),
        ("data.batch_size: must be 1", "data.batch_size: must be 1"),
        ("/nope.npz: no such file", "/nope.npz: no such file"),
        ("the size is wrong", "the size is wrong"),
    ],
)
def test_only_a_first_word_that_is_an_argument_gets_a_path(said, expected):
    settings = whole([], part(color="blue"))
    assert message(settings, use=lambda made: made.use(said)) == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("color: is blue", "whole.parts[1].color: is blue"),
        ("color: 1; size: 3", "whole.parts[1].color: 1; whole.parts[1].size: 3"),
        ("parts.color: is blue; size: 3", "whole.parts.color: is blue; whole.size: 3"),
        ("the color is blue; size: 3", "the color is blue; size: 3"),
        ("loader: is slow", "loader: is slow"),
    ],
)
def test_a_warning_gets_the_path_that_an_error_would_get(said, expected, printed, monkeypatch):
    warn = partial(warnings.warn, said, stacklevel=2)
    monkeypatch.setattr(Part, "use", lambda self: self.color == "red" or warn())
    settings = whole([part(), part(color="blue")])
    assert f"Warning: {expected}\n" in printed(settings, Whole, Whole.use)
    assert warnings.formatwarning is FORM


def test_a_warning_of_a_data_module_names_the_whole_setting(tmp_path, printed):
    for i in range(3):
        Image.new("L", (8, 8), i).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes((tmp_path / "0.png").read_bytes()[:40])
    init_args = {"root": str(tmp_path), "image_size": 8, "num_held_out": 1, "batch_size": 1}
    folder = {
        "class_path": "ant_lightning.ImageFolderData",
        "init_args": {**init_args, "validate_images": "skip"},
    }
    settings = {"whole": {"class_path": f"{__name__}.Outer", "init_args": {"images": folder}}}
    said = printed(settings, Outer, lambda made: made.images.setup("fit"))
    assert "whole.images.root: left out 1 broken image: " in said


def test_callbacks_are_named_by_their_place(tmp_path):
    callbacks = [
        {"class_path": "LearningRateMonitor"},
        {"class_path": "ConflictMonitor", "init_args": {"log_every_n_steps": 0}},
    ]
    with pytest.raises(ConfigError) as error:
        run(arguments(tmp_path, f"--trainer.callbacks={json.dumps(callbacks)}"))
    assert str(error.value).startswith("trainer.callbacks[1].log_every_n_steps: must be")


def test_a_data_module_inside_another_setting_is_named_by_its_own_path(tmp_path):
    (tmp_path / "empty").mkdir()
    init_args = {"root": str(tmp_path / "empty"), "image_size": 8, "num_held_out": 1}
    folder = {
        "class_path": "ant_lightning.ImageFolderData",
        "init_args": {**init_args, "batch_size": 1},
    }
    settings = {"whole": {"class_path": f"{__name__}.Outer", "init_args": {"images": folder}}}
    said = message(settings, use=lambda made: made.images.setup("fit"), kind=Outer)
    assert said.startswith("whole.images.root: ")
