"""What is not finite is not stored, scored or loaded, and what was there before stays."""

import lightning as L
import numpy as np
import pytest
import tiny_digits
import torch
from first_stages import save_first_stages
from safetensors.torch import load_file, save_file

from ant_lightning import (
    AutoencoderModule,
    ConfigError,
    DigitsData,
    FirstStage,
    GaussianStatistics,
    ImageStatistics,
    LatentWriter,
    SampleWriter,
    ShapesData,
    load_official_checkpoint,
)
from ant_lightning.errors import FileError, NonFiniteError
from ant_lightning.models.autoencoder import _replace_folder


class Breaks(L.Callback):
    """Changes the weights before the first or after the last step."""

    def __init__(self, change, *, first):
        self.change, self.first = change, first

    def on_train_start(self, trainer, pl_module):
        if self.first:
            self.change(pl_module.backbone)

    def on_train_end(self, trainer, pl_module):
        if not self.first:
            self.change(pl_module.backbone)


@torch.no_grad()
def nan_weight(network):
    next(network.decoder.parameters())[0] = torch.nan


@torch.no_grad()
def constant_latents(network):
    network.quant_conv.weight.zero_()
    network.quant_conv.bias.zero_()


@torch.no_grad()
def overflow(network):
    network.encoder.conv_out.weight.fill_(torch.inf)


def train_autoencoder(folder, *callbacks, **settings):
    torch.manual_seed(0)
    widths = {"widths": (4, 4), "norm_num_groups": 2, "latent_channels": 2}
    model = AutoencoderModule(in_channels=1, export=str(folder / "export"), **widths)
    run = tiny_digits.trainer(folder, *callbacks, steps=1, limit_val_batches=0, **settings)
    run.fit(model, DigitsData(batch_size=8))
    return model


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoencoder")
    train_autoencoder(folder)
    assert sorted(content(folder / "export")) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    return folder


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (nan_weight, "the first is decoder.conv_in.weight"),
        (overflow, "the first is encoder.conv_out.weight"),
        (constant_latents, "1 of its tensors are not finite, the first is its scale"),
    ],
)
def test_a_diverged_autoencoder_leaves_the_first_stage_that_is_there(exported, change, found):
    before = content(exported / "export")
    with pytest.raises(NonFiniteError, match=rf"export: \S*export stays as it was.*{found}"):
        train_autoencoder(exported, Breaks(change, first=False))
    assert content(exported / "export") == before
    assert [path.name for path in exported.iterdir() if "export" in path.name] == ["export"]
    FirstStage(str(exported / "export"))


def test_a_diverged_autoencoder_stops_when_its_loss_is_logged(exported):
    before = content(exported / "export")
    with pytest.raises(NonFiniteError, match="the loss of step 0 is nan"):
        train_autoencoder(exported, Breaks(nan_weight, first=True))
    assert content(exported / "export") == before


def test_a_dry_run_exports_nothing(exported):
    before = content(exported / "export")
    train_autoencoder(exported, Breaks(constant_latents, first=False), fast_dev_run=True)
    assert content(exported / "export") == before


@pytest.mark.parametrize("killed_at", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_a_killed_export_leaves_the_first_stage_that_is_there(exported, killed_at):
    before = content(exported / "export")

    def save(folder):
        folder.mkdir()
        (folder / killed_at).write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _replace_folder(exported / "export", save)
    assert content(exported / "export") == before
    assert [path.name for path in exported.iterdir() if "export" in path.name] == ["export"]


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    return save_first_stages(tmp_path_factory.mktemp("first_stages"))


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_weights_that_are_not_finite_are_not_loaded(tmp_path, stages, value):
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(stages / "kl" / path.name)
    weights["decoder.conv_in.bias"][1] = value
    save_file(weights, path)
    (tmp_path / "config.json").write_text((stages / "kl" / "config.json").read_text())
    with pytest.raises(FileError, match=r"decoder.conv_in.bias is not"):
        FirstStage(str(tmp_path))

    network = tiny_digits.TinyDiT()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    damaged = {**before, "x_embedder.proj.bias": torch.full((8,), value)}
    torch.save(damaged, tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match=r"1 not finite: x_embedder\.proj\.bias$"):
        load_official_checkpoint(network, tmp_path / "weights.pt")
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


class Offset:
    """A first stage that adds a number to its moments."""

    def __init__(self, stage, value):
        self.stage, self.value, self.space = stage, value, stage.space
        self.moments_shape = stage.moments_shape

    def encode_moments(self, images):
        return self.stage.encode_moments(images) + self.value


@pytest.mark.parametrize(("dtype", "value"), [("float32", torch.nan), ("float16", 1e6)])
def test_latents_that_are_not_finite_are_not_stored(tmp_path, stages, dtype, value):
    data = ShapesData(image_size=16, num_images=13, num_held_out=5)
    data.setup("fit")
    writer = LatentWriter(str(tmp_path), dtype=dtype, shard_size=8)
    with pytest.raises(ConfigError, match=rf"dtype: .*finite in {dtype}, found .* image 0 of"):
        writer.write(data, Offset(FirstStage(str(stages / "kl")), value))
    assert not list(tmp_path.rglob("*moments*"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_reference_that_is_not_finite_leaves_the_file_that_is_there(tmp_path, value):
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(9, 3)))
    path = tmp_path / "reference.safetensors"
    ImageStatistics(GaussianStatistics.from_features(features)).save(path)
    before = path.read_bytes()
    features[4, 1] = value
    with pytest.raises(ConfigError, match="mean: must be finite to be stored"):
        ImageStatistics(GaussianStatistics.from_features(features)).save(path)
    assert path.read_bytes() == before
    assert ImageStatistics.load(path).gaussian.num_samples == 9


def test_images_of_a_diverged_network_are_neither_stored_nor_scored(tmp_path):
    model = tiny_digits.module(tiny_digits.TinyDiT(nan_from=0))
    writer = SampleWriter(num_images=3, folder=str(tmp_path / "samples"))
    run = tiny_digits.trainer(tmp_path, writer)
    with pytest.raises(NonFiniteError, match="3 of 3 images have a NaN or an infinity"):
        run.predict(model, DigitsData(), return_predictions=False)
    assert not list(tmp_path.rglob("*.png"))
