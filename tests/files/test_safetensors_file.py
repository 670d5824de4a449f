"""Our own files: tensors of the shape, type and metadata that the reader expects, or one error."""

import pytest
import torch
from safetensors.torch import save_file

from ant_lightning.errors import FileError
from ant_lightning.files.safetensors_file import read_tensors, write_tensors

TENSORS = {"a": torch.arange(6.0).reshape(3, 2), "b": torch.ones(3, dtype=torch.int64)}
EXPECTED = {"a": (torch.float32, ("n", 2)), "b": (torch.int64, ("n",))}
METADATA = {"format": "test", "seed": 3, "scale": 0.5, "name": "x", "sides": [1, 2], "none": None}


@pytest.fixture
def path(tmp_path):
    write_tensors(tmp_path / "new" / "t.safetensors", TENSORS, METADATA)
    return tmp_path / "new" / "t.safetensors"


def test_what_is_written_is_read(path):
    rules = {"format": "test", "seed": int, "scale": float, "name": str, "sides": list}
    tensors, metadata = read_tensors(path, EXPECTED, rules)
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert metadata == METADATA
    assert [file.name for file in path.parent.iterdir()] == ["t.safetensors"]


def test_the_same_content_gives_the_same_bytes(path, tmp_path):
    write_tensors(tmp_path / "again", dict(reversed(TENSORS.items())), METADATA)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_a_view_is_written_as_it_looks(tmp_path):
    write_tensors(tmp_path / "t", {"a": torch.arange(6.0).reshape(2, 3).mT}, {})
    tensors, _ = read_tensors(tmp_path / "t", {"a": (torch.float32, (3, 2))})
    assert tensors["a"].tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize(
    ("expected", "finding"),
    [
        (
            {"c": (torch.float32, (3,))},
            r"hold c as torch.float32 of shape \[3\], found nothing",
        ),
        ({"a": (torch.float64, (3, 2))}, r"must hold a as torch.float64 of shape \[3, 2\], found"),
        ({"a": (torch.float32, (3,))}, r"of shape \[3\], found torch.float32 of shape \[3, 2\]"),
        ({"a": (torch.float32, (3, 4))}, r"of shape \[3, 4\], found"),
        ({"a": (torch.float32, ("n", "n"))}, r"of shape \[3, 3\], found"),
        (
            {"a": (torch.float32, (3, "n")), "b": (torch.int64, ("n",))},
            r"b as torch.int64 .*\[2\]",
        ),
    ],
)
def test_other_tensors_are_refused(path, expected, finding):
    with pytest.raises(FileError, match=rf"t\.safetensors: .*{finding}"):
        read_tensors(path, expected)


@pytest.mark.parametrize(
    ("rules", "finding"),
    [
        ({"format": "other"}, "metadata format must be 'other', found 'test'"),
        ({"missing": int}, "metadata missing must be of type int, found None"),
        ({"scale": int}, "metadata scale must be of type int, found 0.5"),
        ({"seed": str}, "metadata seed must be of type str, found 3"),
    ],
)
def test_other_metadata_is_refused(path, rules, finding):
    with pytest.raises(FileError, match=rf"t\.safetensors: its {finding}"):
        read_tensors(path, EXPECTED, rules)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000])
def test_metadata_must_be_a_json_object(tmp_path, text):
    save_file(TENSORS, tmp_path / "t", metadata={"ant_lightning": text})
    with pytest.raises(FileError, match="its metadata must be a JSON object"):
        read_tensors(tmp_path / "t", EXPECTED)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(FileError, match="t"):
        read_tensors(tmp_path / "t", EXPECTED)
