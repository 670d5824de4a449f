"""Statistics of real images are never those of other images, another crop or another network."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from ant_lightning import ConfigError, FeatureExtractor, ImageFolderData
from ant_lightning.generation.extractor import Features
from ant_lightning.generation.reference import real_statistics


class Projection(FeatureExtractor):
    """Whose name says nothing of its weights."""

    def __init__(self, seed, scale=1.0):
        super().__init__(num_features=2, name="projection")
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("weight", scale * torch.randn(8 * 8 * 3, 2, generator=generator))

    def extract(self, images):
        return Features(images.flatten(1).float() @ self.weight)


def fill(root, seed):
    root.mkdir(exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = 3
    for i in range(6):
        noise = np.random.default_rng((seed, i)).integers(0, 256, (8, 12, 3), dtype=np.uint8)
        # The same size of the file whatever the pixels, and the time that an archive gives it.
        Image.fromarray(noise).save(root / f"{i}.png", compress_level=0, exif=exif)
        os.utime(root / f"{i}.png", (0, 0))


def mean(root, cache, extractor=0, **options):
    settings = {"image_size": 8, "batch_size": 1, "num_held_out": 3, "num_workers": 0}
    data = ImageFolderData(str(root), **{**settings, **options})
    found = real_statistics(data.held_out_images, Projection(extractor), cache_dir=cache)
    return found.gaussian.mean


@pytest.mark.filterwarnings("ignore::ant_lightning.generation.frechet.RankDeficientWarning")
@pytest.mark.parametrize(
    "changed", [{"extractor": 1}, {"crop": "resize"}, {"exif_rotation": False}, {"split_seed": 3}]
)
def test_another_network_crop_rotation_or_split_is_computed_anew(tmp_path, changed):
    root, cache = tmp_path / "images", tmp_path / "cache"
    fill(root, seed=0)
    before = mean(root, cache)
    assert torch.equal(mean(root, cache), before)
    assert len(list(cache.iterdir())) == 1
    found = mean(root, cache, **changed)
    assert len(list(cache.iterdir())) == 2
    torch.testing.assert_close(found, mean(root, tmp_path / "other", **changed))


@pytest.mark.filterwarnings("ignore::ant_lightning.generation.frechet.RankDeficientWarning")
def test_other_images_of_the_same_names_sizes_and_times_are_computed_anew(tmp_path):
    root, cache = tmp_path / "images", tmp_path / "cache"
    fill(root, seed=0)
    before = mean(root, cache)
    sizes = [path.stat().st_size for path in sorted(root.iterdir())]
    fill(root, seed=1)
    assert [path.stat().st_size for path in sorted(root.iterdir())] == sizes
    found = mean(root, cache)
    assert not torch.allclose(found, before)
    torch.testing.assert_close(found, mean(root, tmp_path / "other"))


@pytest.mark.filterwarnings("ignore::ant_lightning.generation.frechet.RankDeficientWarning")
def test_a_damaged_renamed_or_older_file_is_made_again_with_a_warning(tmp_path):
    root, cache = tmp_path / "images", tmp_path / "cache"
    fill(root, seed=0)
    before = mean(root, cache)
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.warns(UserWarning, match=rf"computed again: .*{path.name}.*truncated"):
        assert torch.equal(mean(root, cache), before)
    mean(root, cache, extractor=1)
    (other,) = set(cache.iterdir()) - {path}
    other.replace(path)
    with pytest.warns(UserWarning, match="its metadata fingerprint must be"):
        assert torch.equal(mean(root, cache), before)
    assert path.read_bytes() == whole
    path.replace(path.with_suffix(".npz"))
    with pytest.warns(UserWarning, match=r"the \.npz beside it was written by ant_lightning 0\.1"):
        assert torch.equal(mean(root, cache), before)


def test_a_failed_computation_leaves_nothing_behind(tmp_path):
    root, cache = tmp_path / "images", tmp_path / "cache"
    fill(root, seed=0)
    data = ImageFolderData(str(root), image_size=8, batch_size=1, num_held_out=3, num_workers=0)
    with pytest.raises(ConfigError, match="finite features"):
        real_statistics(data.held_out_images, Projection(0, scale=torch.inf), cache_dir=cache)
    assert not cache.exists()
