"""The digits' other models from the command line: an autoencoder, an LDM on it, and an ADM."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from ant_lightning import EMA, AutoencoderModule, ConfigError, FirstStage
from ant_lightning.cli.main import main
from ant_lightning.cli.parser import run
from ant_lightning.data.digits import load_digits

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
QUICK = [
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=2",
    "--trainer.limit_val_batches=1",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.accelerator=cpu",
    "--data.batch_size=20",
]


def arguments(folder, *files, command="fit"):
    configs = [x for file in files for x in ("--config", str(CONFIGS / f"{file}.yaml"))]
    return [command, *configs, *QUICK, f"--trainer.logger.save_dir={folder}"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder that the autoencoder's `fit` writes, and the run."""
    folder = tmp_path_factory.mktemp("autoencoder")
    cli = run([*arguments(folder, "digits/autoencoder"), f"--model.export={folder / 'export'}"])
    return folder / "export", cli


def test_the_autoencoder_exports_its_averaged_weights_and_the_scale_of_its_latents(trained):
    folder, cli = trained
    assert cli.trainer.global_step == 2
    assert np.isfinite(float(cli.trainer.callback_metrics["val/reconstruction"]))
    ema = next(c for c in cli.trainer.callbacks if isinstance(c, EMA))
    network = AutoencoderKL.from_pretrained(folder).eval()
    averages = ema.state_dict()["averages"]
    for name, value in network.named_parameters():
        torch.testing.assert_close(value.detach(), averages[name])
    live = dict(cli.model.backbone.named_parameters())
    assert any(not torch.equal(live[name], averages[name]) for name in live)
    images = cli.datamodule.held_out_images.images
    with torch.no_grad():
        z = network.encode(images).latent_dist.mean.double().numpy()
    space = FirstStage(str(folder)).space
    assert space.scale == pytest.approx(1 / z.std(), rel=1e-3)
    assert space.shift == pytest.approx(z.mean(), abs=1e-4)


def test_its_loss_is_reconstruction_and_divergence_as_defined():
    images = load_digits()[0][:6]
    module = AutoencoderModule(
        in_channels=1, latent_channels=2, widths=(16, 16), reconstruction="l2"
    )
    noise = torch.randn(6, 2, 4, 4)
    with torch.no_grad():
        error, divergence = module.losses(images, noise)
        moments = module.backbone.encode(images).latent_dist.parameters
        mean, log_variance = np.split(moments.double().numpy(), 2, axis=1)
        z = mean + np.exp(log_variance / 2) * noise.double().numpy()
        decoded = module.backbone.decode(torch.from_numpy(z).float()).sample
    wanted = ((decoded - images).double().numpy() ** 2).mean()
    assert float(error) == pytest.approx(wanted, rel=1e-4)
    kl = 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance).mean()
    assert float(divergence) == pytest.approx(kl, rel=1e-4)


def test_latent_diffusion_on_it_trains_measures_and_writes_images(trained, tmp_path, capsys):
    folder, _ = trained
    files = ("digits/ldm", "balancer/uw", "clustering/snr")
    options = [
        f"--model.first_stage.source={folder}",
        "--model.sampling.sampler.num_steps=2",
    ]
    cli = run([*arguments(tmp_path, *files), *options])
    assert cli.model.image_shape == (4, 4, 4)
    assert not cli.model.clip_denoised
    assert np.isfinite(float(cli.trainer.callback_metrics["val/fid"]))
    last = next(tmp_path.rglob("last.ckpt"))
    names = torch.load(last, weights_only=True)["state_dict"]
    assert all(name.startswith(("backbone.", "balancer.")) for name in names)
    predict = [
        *arguments(tmp_path, *files, command="predict"),
        *options,
        f"--ckpt_path={last}",
        "--samples.num_images=3",
        f"--samples.folder={tmp_path / 'samples'}",
    ]
    assert main(predict) == 0
    assert len(list((tmp_path / "samples").glob("*.png"))) == 3
    capsys.readouterr()
    wrong = [*arguments(tmp_path, *files), *options, "--model.backbone.input_size=8"]
    assert main(wrong) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "(4, 4, 4)" in error
    assert "(4, 8, 8)" in error


def test_adm_on_the_pixels_trains(tmp_path):
    files = ("digits/adm", "balancer/pcgrad", "clustering/timestep")
    cli = run([*arguments(tmp_path, *files), "--model.sampling.sampler.num_steps=2"])
    assert cli.trainer.global_step == 2
    assert cli.model.process.variance_type == "learned_range"
    assert cli.model.clip_denoised


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"widths": (16,)}, ["widths", "two", "[16]"]),
        ({"widths": (16, 24)}, ["widths", "16", "[16, 24]"]),
        ({"kl_weight": -1.0}, ["kl_weight", "-1"]),
    ],
)
def test_bad_autoencoder_settings_are_named(options, words):
    with pytest.raises(ConfigError) as error:
        AutoencoderModule(**options)
    assert all(word in str(error.value) for word in words)


def test_an_autoencoder_refuses_images_of_other_channels(tmp_path, capsys):
    args = [*arguments(tmp_path, "digits/autoencoder"), "--model.in_channels=3"]
    assert main(args) == 2
    assert "model.in_channels" in capsys.readouterr().err.strip().splitlines()[-1]
