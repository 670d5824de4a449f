"""Images of the ADM evaluator's npz files; for folders see `test_image_search.py`."""

import io
import zipfile

import numpy as np
import pytest
import torch

from ant_lightning import ConfigError, StoredImages


def test_image_batches_are_streamed_in_order(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 5, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "plain.npz", images)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=images, arr_1=np.arange(7))
    for name in ("plain", "packed"):
        batches = list(StoredImages(tmp_path / f"{name}.npz").batches(batch_size=3))
        assert [len(batch) for batch in batches] == [3, 3, 1]
        joined = torch.cat(batches)
        assert joined.dtype == torch.uint8
        np.testing.assert_array_equal(joined.numpy(), images.transpose(0, 3, 1, 2))


def test_grey_images_have_one_channel(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 6), dtype=np.uint8)
    for index, array in enumerate((images, images[..., None])):
        np.savez(tmp_path / f"{index}.npz", array)
        (batch,) = StoredImages(tmp_path / f"{index}.npz").batches()
        np.testing.assert_array_equal(batch.numpy(), images[:, None])


def test_files_that_hold_no_uint8_images_are_refused(tmp_path):
    path = tmp_path / "images.npz"
    for arrays, message in (
        (
            {"images": np.zeros((2, 8, 8, 3), np.uint8)},
            "arr_0 must be uint8 images .* found nothing",
        ),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.uint16)}, "uint8 images.*found uint16"),
        ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, r"found uint8 of shape \[2, 3, 8, 8\]"),
        ({"arr_0": np.zeros((2, 8), np.uint8)}, r"found uint8 of shape \[2, 8\]"),
        ({"arr_0": np.zeros((3, 8, 8, 2), np.uint8).T}, "C order"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(ConfigError, match=message):
            StoredImages(path)


def test_a_header_that_promises_more_than_the_file_holds_is_refused(tmp_path):
    buffer = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (10**12, 8, 8, 3)}
    np.lib.format.write_array_header_1_0(buffer, header)
    with zipfile.ZipFile(tmp_path / "images.npz", "w") as archive:
        archive.writestr("arr_0.npy", buffer.getvalue() + bytes(64))
    with pytest.raises(ConfigError, match="bytes by its header"):
        StoredImages(tmp_path / "images.npz")
