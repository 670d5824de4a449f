"""The examples in the docs do what they say."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("name", ["eps_loop", "flow_matching_loop"])
def test_plain_loops_learn(name, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    train = runpy.run_path(str(EXAMPLES / f"{name}.py"))["train"]
    history = train(num_steps=200, batch_size=100)
    assert sum(history[-20:]) < 0.85 * sum(history[:20])


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    return runpy.run_path(str(EXAMPLES / "demo.py"))["demo"]


def test_the_demo_runs_to_its_table(demo, tmp_path, capsys):
    options = [
        "--trainer.max_steps=20",
        "--trainer.accelerator=cpu",
        "--model.init_args.sampling.sampler.init_args.num_steps=3",
        "--model.init_args.backbone.init_args.depth=1",
    ]
    demo("dit", tmp_path / "demo", minutes=1.0, options=options)
    out = capsys.readouterr().out
    for words in ("FID to held-out digits", "real against real", "precision", "weight", "images/s"):
        assert words in out
    assert (tmp_path / "demo" / "dit_0" / "1_samples_grid.png").exists()


def test_the_latent_demo_puts_vanilla_and_uw_side_by_side(demo, tmp_path, capsys):
    options = [
        "--trainer.max_steps=2",
        "--trainer.limit_val_batches=1",
        "--trainer.accelerator=cpu",
        "--model.init_args.sampling.sampler.init_args.num_steps=2",
        "--trainer.callbacks=ant_lightning.GenerationMetrics",
        "--trainer.callbacks.init_args.extractor=ant_lightning.DigitsFeatures",
        "--trainer.callbacks.init_args.num_images=70",
    ]
    cli = demo("ldm", tmp_path / "demo", minutes=0.05, options=options)
    assert type(cli.model.balancer).__name__ == "UncertaintyWeighting"
    out = capsys.readouterr().out
    assert out.index("\nvanilla\n") < out.index("\nANT-UW\n")
    assert out.count("class agreement") == 2
    assert (tmp_path / "demo" / "ldm_0.png").stat().st_size > 10_000
    for method in ("vanilla", "ant_uw"):
        assert (tmp_path / "demo" / f"ldm_0_{method}" / "config.yaml").exists()
