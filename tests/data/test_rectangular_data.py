"""Images whose height is not their width: crops, floats, folders."""

import numpy as np
import pytest
import torch
from PIL import Image

from ant_lightning import ConfigError, ImageFolderData, MapStyleData
from ant_lightning.data.pictures import fitted_pixels


def picture(width, height):
    """Red is the row and green the column, from 0 to 255."""
    rows = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    columns = np.linspace(0, 255, width)[None].repeat(height, 0)
    pixels = np.stack([rows, columns, np.zeros_like(rows)], axis=2)
    return Image.fromarray(pixels.round().astype(np.uint8))


@pytest.mark.parametrize("given", [(64, 32), (40, 40), (128, 20), (9, 70)])
def test_a_crop_covers_the_rectangle_and_keeps_proportions(given):
    pixels = fitted_pixels(picture(*given), image_size=(8, 16), crop="center_adm").astype(float)
    assert pixels.shape == (8, 16, 3)
    # One pixel down is as far in the picture as one pixel to the right.
    down = (pixels[-1, 8, 0] - pixels[0, 8, 0]) / 7 * (given[1] - 1)
    right = (pixels[4, -1, 1] - pixels[4, 0, 1]) / 15 * (given[0] - 1)
    assert down == pytest.approx(right, rel=0.1)
    # The middle of the picture is the middle of the crop.
    assert pixels[3:5, 7:9, :2].mean() == pytest.approx(127.5, abs=8)


def test_a_square_is_cropped_as_before():
    whole = picture(37, 23)
    pair = fitted_pixels(whole, image_size=(8, 8), crop="center_adm")
    assert np.array_equal(pair, fitted_pixels(whole, image_size=8, crop="center_adm"))


def test_a_folder_gives_rectangles(tmp_path):
    for i in range(4):
        picture(20 + i, 30).save(tmp_path / f"{i}.png")
    data = ImageFolderData(str(tmp_path), image_size=(8, 16), batch_size=2, num_workers=0)
    assert data.shape_and_classes() == ((3, 8, 16), 0)
    data.setup("fit")
    assert data.train_images.load([0], epoch=None).images.shape == (1, 3, 8, 16)
    with pytest.raises(ConfigError, match=r"image_size: must be at least 1, .*found 0"):
        ImageFolderData(str(tmp_path), image_size=0, batch_size=2)


def test_samples_keep_their_own_rectangle():
    images = [torch.zeros(3, 4, 6, dtype=torch.uint8) for _ in range(4)]
    assert MapStyleData(images, batch_size=2).image_shape == (3, 4, 6)
    floats = [torch.zeros(3, 4, 6) for _ in range(4)]
    with pytest.raises(ConfigError, match=r"must be \[3, 6, 4\], found \[3, 4, 6\]"):
        MapStyleData(floats, batch_size=2, image_size=(6, 4))
