"""Names and shapes of a checkpoint without PyTorch."""

import pickle
import random
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

from ant_lightning.files.torch_outline import TensorOutline, read_outline


class Harmful:
    """Unpickling it makes a file."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


def test_names_shapes_and_plain_values_are_those_of_torch_load(tmp_path):
    weights = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)).state_dict()
    transposed = torch.ones(2, 5, dtype=torch.bfloat16).T
    parameter, scalar = nn.Parameter(torch.zeros(4)), torch.tensor(1)
    plain = {"step": 7, "cuts": [0, 3, 9], "pair": (1.5, None), "text": "ü", "flag": True}
    torch.save(
        {"w": weights, "more": [transposed, parameter, scalar], **plain}, tmp_path / "c.ckpt"
    )
    found = read_outline(tmp_path / "c.ckpt")
    assert isinstance(found["w"], OrderedDict)
    shapes = {name: TensorOutline(tuple(value.shape)) for name, value in weights.items()}
    assert dict(found["w"]) == shapes
    assert found["more"] == [TensorOutline((5, 2)), TensorOutline((4,)), TensorOutline(())]
    assert {name: found[name] for name in plain} == plain


def test_no_code_of_the_file_runs(tmp_path):
    torch.save({"a": Harmful(tmp_path / "trace"), "step": 3}, tmp_path / "c.ckpt")
    assert read_outline(tmp_path / "c.ckpt")["step"] == 3
    assert not (tmp_path / "trace").exists()


def test_what_is_no_checkpoint_of_torch_or_damaged_gives_none_or_an_outline(tmp_path):
    path = tmp_path / "c.ckpt"
    torch.save({"w": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    assert read_outline(path) is None
    torch.save({"w": torch.zeros(3)}, path)
    with zipfile.ZipFile(path) as archive:
        record = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        good = archive.read(record)
    random.seed(0)
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(random.randint(1, 4)):
            bad[random.randrange(len(bad))] = random.randrange(256)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(record, bytes(bad))
        read_outline(path)  # raises nothing
    # A number of the memo that would reserve 64 GB in the unpickler written in C.
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(record, b"\x80\x02}r\xff\xff\xff\x7f.")
    assert read_outline(path) == {}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(record, pickle.dumps(b"0" * 10**6))
    assert read_outline(path) is None
