"""The options of a class, asked for with and without the settings around it."""

import pytest

from ant_lightning import ConfigError
from ant_lightning.cli.class_help import with_classes_around
from ant_lightning.cli.parser import run

MODEL, PROCESS = "--model=MultiTaskDiffusion", "--model.process=DiscreteDiffusion"


@pytest.mark.parametrize(
    ("args", "around"),
    [
        (["--model.help=DiTModule"], []),
        (["--data.help", "ImageFolderData"], []),
        (["--trainer.callbacks.help", "SampleGrid"], []),
        (["--model.tasks.balancer.help", "ant_lightning.PCGrad"], [MODEL]),
        (["--model.process.schedule.help", "CosineSchedule"], [MODEL, PROCESS]),
        (["--model", "DiTModule", "--model.process.help=EDM"], []),
        (["--model.class_path=DiTModule", "--model.process.schedule.help=Own"], [PROCESS]),
        (["--config", "digits/dit", "--model.process.help", "EDM"], []),
        (["--model.process.help"], [MODEL]),  # the parser asks for a value
        (["--trainer.max_steps=3", "--help"], []),
    ],
)
def test_settings_around_a_class_are_given_where_they_lack(args, around):
    assert with_classes_around(["fit", *args]) == ["fit", *around, *args]


@pytest.mark.parametrize(
    ("option", "name", "place"),
    [
        ("model", "EDM", "model.process"),
        ("data", "SampleGrid", "trainer.callbacks"),
        ("model.process", "DDIM", "model.sampling.sampler"),
        ("trainer.callbacks", "DiT", "model.backbone"),
        ("model", "load_run", None),
    ],
)
def test_a_class_of_another_setting_is_sent_there(option, name, place):
    with pytest.raises(ConfigError) as error:
        with_classes_around(["fit", f"--{option}.help={name}"])
    hint = f"; --{place}.help {name} shows its options" if place else ""
    assert str(error.value) == f"{option}.help: must be a class for {option}, found {name}{hint}"


def test_the_options_of_a_part_are_shown_without_a_config(capsys):
    with pytest.raises(SystemExit) as ended:
        run(["fit", "--model.process.schedule.help", "CosineSchedule"])
    assert ended.value.code == 0
    assert "max_beta MAX_BETA" in capsys.readouterr().out


def test_a_class_that_does_not_exist_is_named():
    with pytest.raises(ConfigError, match=r"^model\.process\.help: no class is called 'EDN'"):
        run(["fit", "--model.process.help", "EDN"])
