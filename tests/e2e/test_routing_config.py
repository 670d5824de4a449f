"""`--config routing/dtr` trains, its images are drawn by class, and another routing is another."""

import yaml

from ant_lightning import ChannelRouting, load_run
from ant_lightning.cli.main import main


def test_a_routed_run_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["hidden_size=20", "depth=1", "num_heads=2"]
    options = [f"--model.backbone.{each}" for each in small]
    options += ["--trainer.max_steps=1", "--trainer.accelerator=cpu", "--trainer.callbacks=null"]
    options += ["--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=0"]
    options += ["--model.sampling.sampler.num_steps=2", "--data.batch_size=20"]
    names = ["digits/dit", "balancer/uw", "clustering/snr", "routing/dtr"]
    configs = [f"--config={name}" for name in names]
    assert main(["fit", *configs, *options]) == 0
    (record,) = tmp_path.rglob("config.yaml")
    settings = yaml.safe_load(record.read_text())["model"]["init_args"]["backbone"]["init_args"]
    assert settings["routing"] == {"alpha": 4.0, "beta": 0.8, "last_time": 999.0}
    run = load_run(record.parent)
    assert run.backbone.routing == (4.0, 0.8, 999.0)
    assert run.backbone._routing == ChannelRouting()
    drawn = ["--samples.num_images=2", "--samples.classes=[3, 7]", "--ckpt_path=last"]
    assert main(["predict", *configs, *options, *drawn]) == 0
    assert "2 images are in" in capsys.readouterr().out
    # Weights alone do not tell the routing apart; the identity of the images does.
    other = "--model.backbone.routing.beta=0.5"
    checkpoint = str(next(record.parent.rglob("*.ckpt")))
    again = [*drawn[:2], f"--ckpt_path={checkpoint}", other]
    assert main(["predict", *configs, *options, *again]) == 2
    assert "holds content made with network" in capsys.readouterr().err
