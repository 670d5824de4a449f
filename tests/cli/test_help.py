"""What help says, hints in answers to mistakes, and settings that are right."""

import pytest
import yaml

from ant_lightning.cli import first_look
from ant_lightning.cli.configs import with_paths_of_configs
from ant_lightning.cli.main import main
from ant_lightning.errors import ConfigError


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_help_begins_with_the_call_and_what_the_command_does(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    given = "--config NAME" if command == "fit" else "RUN"
    assert shown.startswith(f"usage: ant-lightning {command} {given} [options] ")
    assert '"best"' not in shown  # which we refuse
    assert "ant_lightning.ShapesData" in shown


@pytest.mark.parametrize("command", ["report", "configs"])
def test_help_of_a_command_without_a_parser(command, capsys):
    assert main([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"`ant-lightning {command}")


def test_a_relative_path_of_a_run_is_said_to_be_one(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_1.ckpt").write_bytes(b"")
    settings = "{root: ../gone, image_size: 8, batch_size: 2}"
    data = f"{{class_path: ant_lightning.ImageFolderData, init_args: {settings}}}"
    (tmp_path / "config.yaml").write_text(f"model: {{class_path: DiTModule}}\ndata: {data}")
    words = f"(as {tmp_path / 'config.yaml'} says, relative to the folder in which `fit` ran)"
    for command in ("validate", "predict", "diagnose"):
        assert main([command, str(tmp_path)]) == 2
        assert capsys.readouterr().err.strip().endswith(f"found nothing at ../gone {words}")
    assert main(["fit", f"--config={tmp_path / 'config.yaml'}"]) == 2  # the user's own path
    assert capsys.readouterr().err.strip().endswith("found nothing at ../gone")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_steps: 4", "max_steps: the command has no such setting; did you mean 'trainer.max_"),
        ("a:\n\tb: 1", "found in line 2: a tab, where YAML has spaces"),
        ("trainer: {logger: {name: x}}", "trainer.logger.name: needs a logger, found none"),
    ],
)
def test_a_mistake_in_a_config_of_ones_own(text, message, tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        first_look.first_look(["fit", f"--config={path}"])


def test_a_config_of_ones_own_without_its_suffix(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").touch()
    assert main(["fit", "--config", "small"]) == 2
    assert capsys.readouterr().err.strip().endswith("found 'small'; did you mean 'small.yaml'?")


def test_a_class_of_a_package_that_is_missing_names_the_extra(monkeypatch):
    found = first_look.find_spec
    monkeypatch.setattr(
        first_look, "find_spec", lambda name: None if name == "torchjd" else found(name)
    )
    weighting = "{class_path: torchjd.aggregation.UPGradWeighting}"
    balancer = "--model.tasks.balancer=TorchJDBalancer"
    args = ["fit", "--model.class_path=DiTModule", "--data=DigitsData", balancer]
    args += [f"--model.tasks.balancer.weighting={weighting}"]
    with pytest.raises(ConfigError, match=r"needs a package, found none; pip .*\[torchjd\]"):
        first_look.first_look(args)


@pytest.mark.parametrize(
    ("config", "option"),
    [
        ("digits/dit", "--model.tasks.engine=loop"),
        ("digits/sit", "--model.process={prediction_type: x0, loss_weighting: velocity}"),
        ("digits/edm", "--model.sampling.sampler.schedule=vp"),
    ],
)
def test_all_settings_of_a_run_written_out_are_not_refused(config, option, tmp_path, capsys):
    fit = ["fit", "--config", config, "--config", "balancer/uw", option]
    with pytest.raises(SystemExit):
        main([*fit, "--print_config"])
    record = tmp_path / "config.yaml"
    record.write_text(capsys.readouterr().out)
    for command in ("fit", "validate", "predict"):
        first_look.first_look([command, f"--config={record}"])
    name, _, value = option.rpartition("=")
    wrong = option.replace(": velocity", ": velocty") if "{" in value else f"{name}=vq"
    with pytest.raises(ConfigError, match=r"must be one of '(auto|velocity|linear)', "):
        first_look.first_look(with_paths_of_configs([*fit, wrong]))


def test_a_process_of_another_class_is_read_with_its_own_defaults(capsys):
    fit = ["fit", "--config=digits/dit", "--model.process=FlowMatching", "--print_config"]
    with pytest.raises(SystemExit):
        main([*fit, "--model.sampling.sampler=ODESampler"])
    found = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["process"]["init_args"]
    assert (found["prediction_type"], found["loss_weighting"]) == ("v", None)


@pytest.mark.parametrize("option", ["--trainer.callbacks+", "--trainer.callbacks"])
@pytest.mark.parametrize("several", [False, True])
def test_a_callback_may_be_given_with_its_settings(option, several):
    callback = "{class_path: ant_lightning.Reclustering, init_args: {recluster_every: 2}}"
    value = f"[ant_lightning.StepCost, {callback}]" if several else callback
    args = ["fit", "--config=digits/dit", f"{option}={value}"]
    first_look.first_look(with_paths_of_configs(args))
    wrong = [each.replace("recluster_every", "recluster_evry") for each in args]
    with pytest.raises(ConfigError, match="recluster_evry: Reclustering has no such setting"):
        first_look.first_look(with_paths_of_configs(wrong))
