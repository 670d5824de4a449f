"""The identity beside stored files."""

from pathlib import Path

import pytest
import torch

from ant_lightning.errors import FileError
from ant_lightning.files.identity import check_identity, differences, tensors_digest
from ant_lightning.files.json_file import write_json


def test_differences_name_each_value_once():
    stored = {"crop": "center", "size": (8, 8), "old": 1}
    assert differences(stored, {"crop": "center", "size": [8, 8], "old": 1}) == {}
    assert differences(stored, {"crop": "resize", "size": [8, 8], "new": 2}) == {
        "crop": ("center", "resize"),
        "new": ("nothing", 2),
        "old": (1, "nothing"),
    }


def test_a_stored_identity_is_compared(tmp_path):
    path = tmp_path / "identity.json"
    assert not check_identity(path, {"seed": 0}, setting="samples.folder")
    write_json(path, {"seed": 0, "scale": 0.1})
    assert check_identity(path, {"scale": 0.1, "seed": 0}, setting="samples.folder")
    with pytest.raises(FileError, match=r"^samples\.folder: .* seed 0, and this run has 1;"):
        check_identity(path, {"scale": 0.1, "seed": 1}, setting="samples.folder")
    with pytest.raises(FileError, match=r"^samples\.npz: all\.npz holds content made with seed 0"):
        check_identity(path, {"seed": 1}, setting="samples.npz", content=Path("all.npz"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_the_digest_sees_every_value_shape_and_dtype(dtype):
    one = torch.zeros(3, 4, dtype=dtype)
    other = one.clone()
    other[2, 3] = 1
    digests = {tensors_digest([t]) for t in (one, other, one.reshape(4, 3), one.to(torch.float64))}
    assert len(digests) == 4
    assert tensors_digest([one.t().contiguous().t()]) == tensors_digest([one])
    assert tensors_digest([torch.zeros(()), torch.zeros(0)]) != tensors_digest([torch.zeros(())])
