"""Extractors: one pass in batches, frozen, checked; the digits network and how it was made."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn

from ant_lightning import ConfigError, DigitsFeatures, ImageFeatures, ModuleFeatures
from ant_lightning.generation.extractor import Features
from ant_lightning.generation.shipped_networks import weights_file
from studies.extractor_networks import main


def statistics_of(batches, extractor):
    images = ImageFeatures(extractor)
    for batch in batches:
        images.update(batch)
    return images.compute()


class _Pixels(nn.Module):
    """Pixel values as features; counts the images it sees."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.9)
        self.mix = nn.Linear(4, 3)
        self.num_seen = 0

    def forward(self, images):
        self.num_seen += len(images)
        return self.mix(self.dropout(images.flatten(1).float()))


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (23, 1, 2, 2), dtype=np.uint8))


def test_one_pass_in_batches_equals_one_batch(images):
    network = _Pixels()
    extractor = ModuleFeatures(network, num_features=3, name="pixels")
    found = statistics_of(images.split(5), extractor)
    assert network.num_seen == 23
    assert found.logits is None
    weight, bias = (x.detach().numpy() for x in network.mix.parameters())
    expected = images.flatten(1).numpy() @ weight.T + bias
    np.testing.assert_allclose(found.features.numpy(), expected, rtol=1e-5, atol=1e-4)
    again = statistics_of([images[:20], images[:0], images[20:]], extractor)
    torch.testing.assert_close(again.features, found.features, rtol=1e-5, atol=1e-4)


def test_an_extractor_is_frozen_and_stays_in_evaluation_mode(images):
    owner = nn.ModuleDict({"extractor": ModuleFeatures(_Pixels(), num_features=3, name="p")})
    owner.train()
    extractor = owner["extractor"]
    assert not extractor.module.dropout.training
    assert not any(p.requires_grad for p in extractor.parameters())
    assert torch.equal(extractor(images), extractor(images))


def test_autocast_does_not_reach_the_extractor(images):
    extractor = ModuleFeatures(_Pixels(), num_features=3, name="p")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = statistics_of([images], extractor).features
    assert torch.equal(inside, statistics_of([images], extractor).features)


def test_images_that_are_not_uint8_batches_are_refused(images):
    extractor = ModuleFeatures(_Pixels(), num_features=3, name="p")
    for bad, message in (
        (images.float(), "uint8.*found torch.float32"),
        (images.to(torch.uint16), "uint8.*found torch.uint16"),
        (images[0], r"\[n, c, h, w\], found \[1, 2, 2\]"),
        (images.expand(-1, 2, -1, -1), "1 or 3 channels for the extractor, found 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            extractor(bad)
        with pytest.raises(ConfigError, match=message):
            statistics_of([bad], extractor)
    with pytest.raises(ConfigError, match="at least 2 for a covariance, found 0"):
        statistics_of([images[:0]], extractor)
    with pytest.raises(ConfigError, match=r"p must give .* shape \[23, 5\], found \[23, 3\]"):
        statistics_of([images], ModuleFeatures(_Pixels(), num_features=5, name="p"))


def test_features_that_are_not_finite_name_the_image(images):
    class Inverse(nn.Module):
        def forward(self, batch):
            return 1 / batch.flatten(1).float()

    images = images.clamp(min=1)
    images[17, 0, 0, 0] = 0
    with pytest.raises(ConfigError, match="infinity for image 17"):
        statistics_of(images.split(4), ModuleFeatures(Inverse(), num_features=4, name="inverse"))


# --- the digits network -------------------------------------------------------------------------


def test_the_shipped_network_has_the_held_out_accuracy_that_its_header_states():
    assert weights_file("digits").stat().st_size <= 300_000
    extractor = DigitsFeatures()
    stated = float(extractor.metadata["held_out_accuracy"])
    assert stated >= 0.95
    digits = load_digits()
    seed = int(extractor.metadata["seed"])
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(seed))
    held_out = order[int(extractor.metadata["num_train"]) :].numpy()
    assert len(held_out) == int(extractor.metadata["num_held_out"]) == 359
    pixels = np.rint((digits.images[held_out] / 8 - 1 + 1) * 127.5).astype(np.uint8)
    features, logits = extractor.extract(torch.from_numpy(pixels)[:, None])
    accuracy = (logits.argmax(1).numpy() == digits.target[held_out]).mean()
    assert accuracy == pytest.approx(stated, abs=1e-4)
    assert features.shape == (359, extractor.num_features)
    # regular: FID takes its fast path
    assert np.linalg.matrix_rank(np.cov(features.double().numpy(), rowvar=False)) == 64


def test_the_command_makes_a_file_that_loads_and_the_seed_decides_it(tmp_path, capsys):
    num_threads = torch.get_num_threads()
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for path in paths:
        main(["digits", "--output", str(path), "--seed", "3", "--length", "1"])
    assert torch.get_num_threads() == num_threads
    printed = capsys.readouterr().out.splitlines()
    first, second = (DigitsFeatures(path) for path in paths)
    other = DigitsFeatures()
    accuracy = float(first.metadata["held_out_accuracy"])
    assert accuracy > 0.5
    assert f"held-out accuracy {accuracy:.2%} on 359 digits" in printed[0]
    assert first.name == second.name != other.name
    images = torch.full((1, 1, 8, 8), 7, dtype=torch.uint8)
    assert torch.equal(first(images), second(images))
    assert not torch.equal(first(images), other(images))


def test_digits_features_refuse_other_images_and_other_files(tmp_path):
    extractor = DigitsFeatures()
    assert isinstance(extractor.extract(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)), Features)
    with pytest.raises(ConfigError, match=r"8 x 8 digits, found \[16, 16\]"):
        extractor(torch.zeros(2, 1, 16, 16, dtype=torch.uint8))
    with pytest.raises(ConfigError, match="1 channels for DigitsFeatures, found 3"):
        extractor(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ConfigError, match=r"missing\.safetensors: .*such file"):
        DigitsFeatures(tmp_path / "missing.safetensors")
    save_file({"other": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="digits network"):
        DigitsFeatures(tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(ConfigError, match="not a safetensors file"):
        DigitsFeatures(tmp_path / "text.safetensors")
