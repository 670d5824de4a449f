"""Wrong settings, one by one: exit code 2, and one line that names the setting and the remedy."""

import lightning  # noqa: F401 - sets the level of its log, which the fixture below changes
import pytest
import torch
import torch.distributed as dist
from wrong_settings import CONFIGS, SETTINGS, arguments

from ant_lightning import ConfigError
from ant_lightning.cli.main import main
from ant_lightning.cli.trainer_settings import check_trainer_settings


@pytest.fixture(autouse=True)
def _quiet(caplog):
    """Lightning's log goes to standard error too; and no process group is left to other tests."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        caplog.set_level("ERROR", logger=name)
    yield
    if dist.is_initialized():  # by a strategy, before the setting was refused
        dist.destroy_process_group()


def refused(args, capsys):
    """The line that a command ends with."""
    capsys.readouterr()
    code = main(args)
    lines = capsys.readouterr().err.splitlines()
    assert (code, len(lines)) == (2, 1), lines
    assert lines[0].startswith("ant-lightning: error: ")
    assert len(lines[0]) < 600, lines[0]
    assert "Union subtypes" not in lines[0]
    return lines[0]


def every_third(cases, *others):
    """Neighbours are alike, so every third case and `others` are quick; the rest are slow."""
    names = list(cases)
    quick = {*names[::3], *others}
    return [pytest.param(each, marks=() if each in quick else pytest.mark.slow) for each in names]


@pytest.mark.parametrize(
    "name", every_third(SETTINGS, "a program as a class", "checkpoint that runs code")
)
def test_a_wrong_setting_ends_in_one_line_that_names_it(tmp_path, capsys, name):
    options, words = SETTINGS[name]
    line = refused(arguments(tmp_path, *options), capsys)
    missing = [word for word in words if word not in line]
    assert not missing, line


CONTENTS = {
    "a list": ("- 1\n- 2\n", "settings by name, found a list"),
    "a word": ("words", "settings by name, found one value"),
    "nothing": ("", "settings by name, found nothing"),
    "no YAML": ("model: {init_args: [\n", "found in line 2"),
    "a tab": ("model:\n\tinit_args: 3\n", "found in line 2"),
    "bytes": (b"\xff\xfe\x80", "must be plain YAML in UTF-8"),
    "unknown setting": ("modle: {init_args: {}}\n", "did you mean 'model'"),
    "unknown setting within": ("trainer: {max_stepz: 1}\n", "max_stepz"),
    "a number for a name": ("1: 2\n", "line 1: 1: the command has no such setting"),
    "the same twice": ("ema: {decay: 0.1}\nema: {decay: 0.2}\n", "line 2 has 'ema' twice"),
    "linked value set twice": ("data: {batch_size: 2,\n batch_size: 3}\n", "'batch_size' twice"),
    "code": ("model: !!python/object/apply:os.system [exit]\n", "could name code"),
    "too deep": ("x: " + "[" * 100 + "]" * 100, "more than 60 levels"),
    "deeper": ("[" * 5000, "nesting depth"),
    "itself": ("trainer: &a {callbacks: *a}\n", "an alias inside what it stands for"),
    "a bomb": (
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(
            f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
            for before, name in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "aliases that unfold to more than 50000 values",
    ),
    "too long": ("# " + "x" * 2**20, "at most 1048576 bytes"),
    "no trainer": ("trainer: null\n", "trainer: must hold settings by name, found None"),
    "a number for a trainer": ("trainer: 3\n", "trainer: must hold settings by name, found 3"),
    "no model": ("model: null\n", "model: needed, found nothing"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_that_is_no_config_is_named_with_what_is_wrong(tmp_path, capsys, name):
    content, words = CONTENTS[name]
    path = tmp_path / "c.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refused(arguments(tmp_path, f"--config={path}"), capsys)
    assert words in line
    if "trainer:" not in words and "model:" not in words and "max_stepz" not in words:
        assert "c.yaml" in line


@pytest.mark.parametrize("name", ["detect_anomaly", "overfit_batches"])
def test_a_flag_that_needs_a_value_is_named_where_a_file_has_none(tmp_path, capsys, name):
    path = tmp_path / "c.yaml"
    path.write_text(f"trainer: {{{name}: null}}\n")
    line = refused(arguments(tmp_path, f"--config={path}"), capsys)
    assert f"trainer.{name}: must have a value or be left out, found None" in line


@pytest.mark.parametrize("value", ["[1]", '{"x": 1}'])
def test_a_number_that_may_be_a_tensor_is_asked_for_as_a_number(tmp_path, capsys, value):
    line = refused(arguments(tmp_path, f"--model.optimization.optimizer.lr={value}"), capsys)
    assert "model.optimization.optimizer.lr: must be a number, found " in line


def test_an_empty_model_names_no_class(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("model: {}\ndata: {class_path: DigitsData}\n")
    line = refused(["fit", f"--config={path}"], capsys)
    assert "model.class_path: needed, found none" in line


def test_a_number_of_steps_that_is_null_is_named():
    with pytest.raises(ConfigError, match=r"trainer\.max_steps: must have a value"):
        check_trainer_settings({"max_steps": None})


def test_a_file_of_a_part_of_the_settings_may_not_unfold_either(tmp_path, capsys):
    path = tmp_path / "part.yaml"
    path.write_text(CONTENTS["a bomb"][0])
    assert "model" in refused(arguments(tmp_path, f"--model.backbone={path}"), capsys)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoint of a run of one step with uncertainty weighting."""
    folder = tmp_path_factory.mktemp("run")
    assert main(arguments(folder)) == 0
    return next(folder.rglob("last.ckpt"))


OTHERS = {
    "width": (["--model.backbone.hidden_size=24"], "uw", ["backbone", "24", "16"]),
    "depth": (["--model.backbone.depth=2"], "uw", ["backbone", "blocks.1", "found"]),
    "tasks": (
        ["--model.tasks.clustering.num_tasks=3", "--model.tasks.balancer.num_tasks=3"],
        "uw",
        ["tasks.clustering", "[0, 291, 724, 1000]", "881"],
    ),
    "schedule": (["--model.process.schedule.max_beta=0.5"], "uw", ["process.schedule"]),
    "timesteps": (
        ["--model.process.schedule.num_timesteps=500"],
        "uw",
        ["tasks.clustering", "500"],
    ),
    "prediction": (
        ["--model.process.prediction_type=v"],
        "uw",
        ["process.prediction_type", "eps", "v"],
    ),
    "balancer": ([], "nash", ["tasks.balancer", "UncertaintyWeighting", "NashMTL"]),
    "no balancer": ([], "vanilla", ["tasks.balancer", "UncertaintyWeighting", "None"]),
    "optimizer": (
        ['--model.optimization.optimizer={"class_path": "SGD", "init_args": {"lr": 0.1}}'],
        "uw",
        ["optimization.optimizer", "AdamW", "SGD"],
    ),
}


@pytest.mark.parametrize("name", every_third(OTHERS, "balancer"))
def test_a_checkpoint_of_other_settings_is_refused_and_both_are_named(
    tmp_path, trained, capsys, name
):
    options, balancer, words = OTHERS[name]
    args = arguments(tmp_path, *options, f"--ckpt_path={trained}", balancer=balancer)
    line = refused(args, capsys)
    assert all(word in line for word in words), line


DAMAGE = {
    "no version": (lambda c: c["ant_lightning"].pop("format_version"), "format_version"),
    "version in words": (lambda c: c["ant_lightning"].update(format_version="x"), "'x'"),
    "newer": (lambda c: c["ant_lightning"].update(format_version=99), "newer ant_lightning"),
    "history": (lambda c: c["ant_lightning"].update(cluster_history=3), "the record of a run"),
    "clusters": (lambda c: c["ant_lightning"].update(cluster_history=[(0, [5, 1])]), "the record"),
    "endless count": (
        lambda c: c["ant_lightning"].update(num_skipped_steps=float("inf")),
        "the record of a run",
    ),
    "last clusters": (
        lambda c: c["ant_lightning"]["cluster_history"].append((1, [0, 5, 9])),
        "its last clusters must be 5 of 1000 timesteps, found 2 of 9",
    ),
    "no weights": (lambda c: c.pop("state_dict"), "must hold state_dict"),
    "a list of weights": (lambda c: c.update(state_dict=[1]), "dictionary as state_dict"),
    "a number as weight": (lambda c: c["state_dict"].update({"backbone.x": 5}), "backbone"),
    "no optimizer": (lambda c: c.pop("optimizer_states"), "cannot be resumed"),
    "no state of it": (lambda c: c.update(optimizer_states=[3]), "cannot be resumed"),
    "averages": (
        lambda c: c["callbacks"].update(EMA={"averages": {}, "num_updates": "x"}),
        "cannot be resumed",
    ),
    "callbacks": (lambda c: c.update(callbacks=7), "dictionary as callbacks, found int"),
    "Lightning's version": (lambda c: c.update({"pytorch-lightning_version": "a"}), "'a'"),
    "another's": (lambda c: [c.pop(key) for key in list(c)], "pytorch-lightning_version"),
}


@pytest.mark.parametrize("name", every_third(DAMAGE))
def test_a_file_that_is_no_checkpoint_of_a_run_is_refused(tmp_path, trained, capsys, name):
    change, words = DAMAGE[name]
    content = torch.load(trained, weights_only=True)
    change(content)
    torch.save(content, tmp_path / "c.ckpt")
    line = refused(arguments(tmp_path, f"--ckpt_path={tmp_path / 'c.ckpt'}"), capsys)
    assert words in line


def test_weights_of_a_network_are_refused_by_an_autoencoder(tmp_path, trained, capsys):
    base = ["--config", str(CONFIGS / "digits" / "autoencoder.yaml")]
    args = ["validate", *base, "--trainer.accelerator=cpu", f"--ckpt_path={trained}"]
    line = refused([*args, f"--trainer.logger.save_dir={tmp_path}"], capsys)
    assert "backbone: must be that of the checkpoint in ckpt_path" in line


def test_images_that_cannot_be_written_are_refused(tmp_path, trained, capsys):
    target = ["--samples.npz=/proc/x.npz", f"--ckpt_path={trained}"]
    line = refused(arguments(tmp_path, *target, command="predict"), capsys)
    assert "samples.npz: must be writable, found /proc/x.npz" in line


ENCODE = ["encode", "--data=DigitsData", "--first_stage.source=/nope", "--cache.output=/nope/cache"]
COMMANDS = {
    "encode nothing": (["encode"], "first_stage.source, cache.output, data: needed"),
    "encode by halves": ([*ENCODE, "--cache.shard=3"], "cache.shard: "),
    "encode with nothing": (
        [*ENCODE, "--data.batch_size=0"],
        "data.batch_size: must be at least 1",
    ),
    "encode by what is not there": (ENCODE, "first_stage.source: no such file or folder"),
    "encode by a folder": (["encode", f"--config={CONFIGS}"], "config: must be a YAML file"),
    "report nothing": (["report"], "report: needs the log folders of runs, found none"),
    "report what is not there": (["report", "/nope"], "/nope: must be the folder of a run"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_other_commands_end_in_one_line_too(capsys, name):
    args, words = COMMANDS[name]
    assert words in refused(args, capsys)


@pytest.mark.parametrize("text", ["[1", "[1]", "model: 3", "\ud800", CONTENTS["a bomb"][0]])
def test_a_folder_of_something_else_is_not_reported(tmp_path, capsys, text):
    (tmp_path / "config.yaml").write_bytes(text.encode("utf8", "surrogatepass"))
    assert str(tmp_path) in refused(["report", str(tmp_path)], capsys)


def test_a_device_that_is_not_there_is_refused():
    from ant_lightning import ConfigError
    from ant_lightning.cli.encode import _device

    with pytest.raises(ConfigError, match=r"device: must be auto, cpu, cuda .* found 'foo'"):
        _device("foo")


@pytest.mark.parametrize("name", ["num_res_blocks", "transformer_depth"])
def test_networks_of_absurd_depth_are_refused_before_they_are_made(name):
    from ant_lightning import ConfigError, UNet

    size = {"input_size": 8, "in_channels": 1, "out_channels": 1, "model_channels": 32}
    with pytest.raises(ConfigError, match=f"{name}: must be from 1 to 100, found 10"):
        UNet(**size, attention_resolutions=(), **{name: 10**12})


def test_autoencoders_of_absurd_depth_are_refused_before_they_are_made():
    from ant_lightning import AutoencoderModule, ConfigError

    with pytest.raises(ConfigError, match="layers_per_block: must be from 1 to 64, found 10"):
        AutoencoderModule(layers_per_block=10**12)
