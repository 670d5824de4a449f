"""The configs of coloured shapes from the command line, and the network that scores them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ant_lightning import ConfigError, ShapesData, ShapesFeatures
from ant_lightning.cli.parser import run
from ant_lightning.generation.shipped_networks import weights_file
from studies.extractor_networks import main

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
QUICK = [
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=2",
    "--trainer.limit_val_batches=1",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.accelerator=cpu",
    "--data.batch_size=10",
    "--data.num_images=30",
    "--data.num_held_out=10",
]


def fit(folder, *files, options=()):
    configs = [x for file in files for x in ("--config", str(CONFIGS / f"{file}.yaml"))]
    return run(["fit", *configs, *QUICK, f"--trainer.logger.save_dir={folder}", *options])


@pytest.mark.filterwarnings("ignore::ant_lightning.generation.frechet.RankDeficientWarning")
@pytest.mark.parametrize("name", [pytest.param("adm", marks=pytest.mark.slow), "dit", "ldm"])
def test_every_config_of_shapes_trains_and_is_scored(tmp_path, name):
    options = ["--model.sampling.sampler.num_steps=2"]
    if name == "ldm":
        export = tmp_path / "export"
        fit(tmp_path, "shapes/autoencoder", options=[f"--model.export={export}"])
        options += [f"--model.first_stage.source={export}"]
    cli = fit(tmp_path, f"shapes/{name}", "balancer/uw", "clustering/snr", options=options)
    assert cli.model.image_shape == ((4, 8, 8) if name == "ldm" else (3, 32, 32))
    found = cli.trainer.callback_metrics
    assert np.isfinite([float(found[f"val/{m}"]) for m in ("fid", "inception_score")]).all()
    assert 0 <= float(found["val/class_agreement"]) <= 1


def test_the_shipped_network_knows_the_shapes_at_every_size():
    assert weights_file("shapes").stat().st_size <= 150_000
    extractor = ShapesFeatures()
    stated = float(extractor.metadata["held_out_accuracy"])
    assert stated >= 0.95
    for size in (32, 64):
        data = ShapesData(image_size=size, num_images=1, num_held_out=400)
        pixels = torch.cat(list(data.pixels(data.held_out_images)))
        features, logits = extractor.extract(pixels)
        labels = data.held_out_images.load(list(range(400)), epoch=None).labels
        assert float((logits.argmax(1) == labels).double().mean()) >= stated - 0.04
        # regular: FID takes its fast path
        assert np.linalg.matrix_rank(np.cov(features.double().numpy(), rowvar=False)) == 64


def test_the_command_makes_a_file_that_loads(tmp_path, capsys):
    path = tmp_path / "new.safetensors"
    main(["shapes", "--output", str(path), "--length", "2", "--seed", "3"])
    accuracy = float(ShapesFeatures(path).metadata["held_out_accuracy"])
    assert f"held-out accuracy {accuracy:.2%} on 4096 shapes" in capsys.readouterr().out
    assert ShapesFeatures(path).name != ShapesFeatures().name
    with pytest.raises(ConfigError, match="3 channels for ShapesFeatures, found 1"):
        ShapesFeatures()(torch.zeros(1, 1, 32, 32, dtype=torch.uint8))
    save_file({"other": torch.zeros(3)}, path)
    with pytest.raises(ConfigError, match="must hold the weights of the shapes network"):
        ShapesFeatures(path)
