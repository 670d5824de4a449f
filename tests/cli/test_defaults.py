"""Defaults that are objects: records can hold them, and they lend nothing to another class."""

import inspect

import pytest
import torch
from jsonargparse import ArgumentParser, Namespace

import ant_lightning
from ant_lightning import DiscreteDiffusion, NoiseProcess, ScaledLinearSchedule
from ant_lightning.cli.configs import config_names
from ant_lightning.cli.derived_settings import derived_settings
from ant_lightning.cli.own_defaults import own_defaults
from ant_lightning.cli.parts import make_part

PUBLIC = [getattr(ant_lightning, name) for name in ant_lightning.__all__]
CLASSES = [x for x in PUBLIC if inspect.isclass(x) and not issubclass(x, Exception)]
GROUPS = {"Optimization", "Sampling", "TimestepSampling"}  # always of the same class


def needs_nothing(kind):
    return all(
        p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        for p in inspect.signature(kind).parameters.values()
    )


def object_defaults():
    """Class, argument and default of each argument whose default is an object of ours."""
    for kind in filter(needs_nothing, CLASSES):
        for name, each in inspect.signature(kind).parameters.items():
            owner = type(each.default)
            if owner.__module__.startswith("ant_lightning.") and owner.__name__ not in GROUPS:
                yield pytest.param(kind, name, each.default, id=f"{kind.__name__}.{name}")


def parsed(kind, *args):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "part", required=True)
    found = parser.parse_args([f"--part={kind.__name__}", *args])
    return parser, found


@pytest.mark.parametrize(("kind", "name", "default"), [*object_defaults()])
def test_a_record_can_hold_a_default(kind, name, default):
    parser, found = parsed(kind)
    text = parser.dump(found)
    assert type(default).__name__ in text
    again = parser.parse_string(text)
    assert again == found


@pytest.mark.parametrize(("kind", "name", "default"), [*object_defaults()])
def test_a_default_lends_no_arguments_to_another_class(kind, name, default):
    base = inspect.signature(kind).parameters[name].annotation
    others = [each for each in CLASSES if base in [c.__name__ for c in each.__mro__]]
    others = [x for x in others if needs_nothing(x) and not inspect.isabstract(x)]
    assert type(default) in others
    for other in others:
        alone = parsed(other)[1].part
        settings = {"class_path": f"ant_lightning.{kind.__name__}", name: other.__name__}
        own = [f"--{path}={value}" for path, value in own_defaults(settings, "part").items()]
        inside = parsed(kind, f"--part.{name}={other.__name__}", *own)[1].part.init_args[name]
        assert inside.class_path == alone.class_path
        assert (inside.get("init_args") or Namespace()) == (alone.get("init_args") or Namespace())


def test_a_process_in_place_of_that_of_the_module_keeps_its_own_settings():
    args = ["--model.class_path=DiTModule", "--model.process=FlowMatching"]
    found = derived_settings(args)
    assert "--model.init_args.process.init_args.prediction_type=v" in found
    assert not any("prediction_type" in x for x in derived_settings([*args[:1], "--model.seed=1"]))
    args += ["--model.process.prediction_type=x0"]
    assert not any("prediction_type" in each for each in derived_settings(args))
    nested = "{class_path: DiscreteDiffusion, init_args: {schedule: ScaledLinearSchedule}}"
    found = derived_settings([*args[:1], f"--model.process={nested}"])
    assert "--model.init_args.process.init_args.schedule.init_args.beta_end=0.0195" in found


@pytest.mark.parametrize("name", ["ffhq/ldm", "celebahq/ldm"])
def test_the_paper_latent_models_have_the_betas_of_latent_diffusion(name):
    found = derived_settings(["--config", str(config_names()[name])])
    path = "--model.init_args.process.init_args.schedule.init_args"
    assert f"{path}.beta_start=0.0015" in found
    assert f"{path}.beta_end=0.0195" in found


def test_a_part_made_from_few_settings_has_own_defaults_too():
    part = {
        "class_path": "ant_lightning.DiscreteDiffusion",
        "init_args": {"schedule": "ScaledLinearSchedule"},
    }
    made = make_part(part, NoiseProcess)
    own = DiscreteDiffusion(ScaledLinearSchedule())
    torch.testing.assert_close(made.log_snr, own.log_snr, rtol=0, atol=0)
