"""Files from elsewhere run nothing, and nothing large that they claim is believed."""

import io
import json
import pickle
import resource
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from readers import READERS, TENSORS

from ant_lightning.errors import ConfigError, FileError
from ant_lightning.files.npz import open_npz
from ant_lightning.files.torch_file import read_torch


class Harmful:
    """Unpickling it makes a file."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


def npy(header, data=b"", *, version=1):
    text = header.encode() + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + data


def header(descr="'<f8'", shape="(2, 2)"):
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"


def archive(path, *, compression=zipfile.ZIP_STORED, **arrays):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in arrays.items():
            file.writestr(f"{name}.npy", content)
    return path


@pytest.mark.parametrize("name", READERS)
def test_a_good_file_is_read(tmp_path, name):
    file, write, read = READERS[name]
    write(tmp_path / file)
    read(tmp_path / file)


@pytest.mark.parametrize("protocol", [0, 4])
@pytest.mark.parametrize("name", READERS)
def test_a_pickle_in_place_of_the_file_is_refused_and_does_not_run(tmp_path, name, protocol):
    file, _, read = READERS[name]
    path, trace = tmp_path / file, tmp_path / "trace"
    path.write_bytes(pickle.dumps(Harmful(trace), protocol=protocol))
    with pytest.raises(FileError, match=path.name.replace(".", r"\.")):
        read(path)
    assert not trace.exists()
    pickle.loads(path.read_bytes())  # it is as harmful as the test says
    assert trace.exists()


@pytest.mark.parametrize("name", [n for n, (f, *_) in READERS.items() if f.endswith(".npz")])
def test_a_pickle_inside_an_archive_is_refused_and_does_not_run(tmp_path, name):
    file, write, read = READERS[name]
    path, trace = tmp_path / file, tmp_path / "trace"
    write(path)
    with np.load(path) as good:
        arrays = dict(good)
    for key in arrays:
        path.unlink()
        np.savez(path, **{**arrays, key: np.array([Harmful(trace)], dtype=object)})
        with pytest.raises(FileError, match="no plain numbers"):
            read(path)
    assert not trace.exists()


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", ["checkpoint", "inception weights"])
def test_a_pickle_beside_tensors_is_refused_and_does_not_run(tmp_path, name, old):
    path, trace = tmp_path / "c.pt", tmp_path / "trace"
    content = {**TENSORS, "x": Harmful(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    with pytest.raises(FileError, match=r"c\.pt: refused, because reading it would call"):
        READERS[name][2](path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        (npy(header(shape="(1152921504606846976, 8)")), "bytes, 73786976294838206552 bytes by its"),
        (npy(header(shape="(-2, -2)"), b"\0" * 32), "no plain numbers"),
        (npy(header(shape=f"({2**70},)")), "by its header"),
        (npy(header("'|O'"), b"\0" * 32), "no plain numbers"),
        (npy(header("[('a', '<f8')]"), b"\0" * 32), "no plain numbers"),
        (npy(header("'<M8[s]'"), b"\0" * 32), "no plain numbers"),
        (npy(header("'<f4000000000'"), b"\0" * 32), "descr is not a valid dtype"),
        (npy("__import__('os').getcwd()"), "malformed node"),
        (npy("(" * 5000), "readable npz file, found"),
        (npy("-" * 5000 + "1"), "readable npz file, found"),
        (npy("{}" + " " * 20_000, version=2), "is large and may not be safe"),
        (npy(header(), b"\0" * 31), "by its header"),
        (npy(header(), struct.pack("<4d", 1, float("nan"), 0, 1)), "must be finite"),
        (b"\x93NUMPY\x09\x00", "version"),
    ],
)
def test_arrays_that_cannot_be_are_refused(tmp_path, content, finding):
    path = archive(tmp_path / "a.npz", a=content)
    with pytest.raises(FileError, match=r"a\.npz: ") as caught, open_npz(path) as file:
        file.read("a", shape=(2, 2), kinds="f", finite=True)
    assert finding in str(caught.value)


def test_text_of_no_characters_is_refused(tmp_path):
    path = archive(tmp_path / "a.npz", a=npy(header("'<U4'", "()"), b"\xff" * 16))
    with pytest.raises(FileError, match=r"a\.npz: "), open_npz(path) as file:
        file.text("a")


@pytest.mark.parametrize("shape", [(2,), (2, 3), (1, 2, 2)])
def test_another_shape_or_type_is_refused_before_it_is_read(tmp_path, shape):
    np.savez(tmp_path / "a.npz", a=np.zeros((2, 2), np.float32))
    with open_npz(tmp_path / "a.npz") as file:
        with pytest.raises(FileError, match=r"a\.npz: must hold a of kind iuf and shape"):
            file.read("a", shape=shape)
        with pytest.raises(FileError, match=r"of kind iu and shape \[2, 2\], found float32"):
            file.read("a", shape=(2, 2), kinds="iu")


def test_a_zip_bomb_is_refused_without_being_unpacked(tmp_path):
    size = 2**26 + 2**20
    data = npy(header("'|u1'", f"({size},)")) + b"\0" * size
    path = archive(tmp_path / "bomb.npz", compression=zipfile.ZIP_DEFLATED, arr_0=data)
    del data
    assert path.stat().st_size < 2**19
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("affinity", "affinity result", "reference", "images"):
        with pytest.raises(FileError, match=r"bomb\.npz: .*arr_0 of 68157\d{3} bytes in \d+"):
            READERS[name][2](path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss == before


def test_entries_that_overlap_are_refused(tmp_path):
    data = npy(header("'|u1'", "(4000,)")) + bytes(4000)
    path = archive(tmp_path / "quine.npz", a=data, b=data)
    content = bytearray(path.read_bytes())
    # The second entry of the directory points at the bytes of the first.
    second = content.rindex(b"PK\x01\x02")
    first = content.index(b"PK\x01\x02")
    content[second + 42 : second + 46] = content[first + 42 : first + 46]
    content[second + 46] = content[first + 46]
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"quine\.npz"), open_npz(path):
        pass


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_packers_are_refused(tmp_path, method):
    path = archive(tmp_path / "a.npz", compression=method, a=npy(header(), bytes(32)))
    with pytest.raises(FileError, match="not packed as numpy packs"), open_npz(path):
        pass


def test_absurd_numbers_of_timesteps_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, affinity=np.eye(1), timesteps=np.array([0]), num_timesteps=np.array(2**60))
    with pytest.raises(ConfigError, match="must have the schedule's 10 timesteps, found 115292150"):
        READERS["affinity"][2](path)


def test_numbers_of_the_other_byte_order_are_read(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.arange(4, dtype=">i4").reshape(2, 2, order="F"))
    with open_npz(tmp_path / "a.npz") as file:
        found = file.read("a", shape=(2, None), kinds="i")
    assert found.tolist() == [[0, 2], [1, 3]]
    assert found.dtype.isnative


@pytest.mark.parametrize("field", ["image_shape", "moments_shape", "num_images", "views", "space"])
@pytest.mark.parametrize("value", [[2**60, 8, 8], [-1, 8, 8], None, 2**70, {}, True])
def test_absurd_caches_of_latents_are_refused(tmp_path, field, value):
    file, write, read = READERS["latent index"]
    write(tmp_path / file)
    content = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps({**content, field: value}))
    with pytest.raises(FileError, match=r"index\.json"):
        read(tmp_path / file)


@pytest.mark.parametrize("name", ["../../etc", "..", "a/b", "a\\b", "", "a\0b", "/etc"])
def test_a_class_that_leads_out_of_the_folder_is_refused(tmp_path, name):
    path = tmp_path / "map.json"
    path.write_text(json.dumps({name: 0, "ant": 1}))
    with pytest.raises(FileError, match=r"map\.json: a class must have the name of a folder"):
        READERS["class map"][2](path)


@pytest.mark.parametrize("name", ["class map", "latent index", "identity of samples"])
@pytest.mark.parametrize("text", ["[" * 200_000, "1" * 20_000, "\udc80", '{"a": NaN', " " * 2**25])
def test_hostile_json_is_refused(tmp_path, name, text):
    file, _, read = READERS[name]
    (tmp_path / file).write_bytes(text.encode("utf8", "surrogatepass"))
    with pytest.raises(FileError, match=file.replace(".", r"\.")):
        read(tmp_path / file)


def test_a_packed_record_of_a_checkpoint_is_refused(tmp_path):
    torch.save({"a": torch.zeros(2**20)}, tmp_path / "good.pt")
    with (
        zipfile.ZipFile(tmp_path / "good.pt") as good,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for record in good.infolist():
            bomb.writestr(record.filename, good.read(record))
    assert (tmp_path / "bomb.pt").stat().st_size < 2**16
    with pytest.raises(FileError, match=r"bomb\.pt: refused, its record .*unpacks to more"):
        read_torch(tmp_path / "bomb.pt")


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("shape", [(2**60,), (2**20, 2**20)])
def test_a_tensor_larger_than_its_file_is_refused(tmp_path, shape, old):
    path = tmp_path / "wide.pt"
    torch.save({"a": torch.zeros(1).expand(shape)}, path, _use_new_zipfile_serialization=not old)
    with pytest.raises(FileError, match=r"wide\.pt: refused, a tensor says the shape"):
        read_torch(path)


def test_a_storage_that_is_not_there_is_refused(tmp_path):
    torch.save({"a": torch.zeros(5)}, tmp_path / "good.pt")
    with (
        zipfile.ZipFile(tmp_path / "good.pt") as good,
        zipfile.ZipFile(tmp_path / "short.pt", "w") as short,
    ):
        for record in good.infolist():
            data = good.read(record)
            if record.filename.endswith("data.pkl"):
                # `5`, the numbers in the storage and in the shape, becomes 2^40.
                data = data.replace(b"K\x05", b"\x8a\x06\x00\x00\x00\x00\x00\x01")
            short.writestr(record.filename, data)
    with pytest.raises(FileError, match=r"short\.pt"):
        read_torch(tmp_path / "short.pt")


@pytest.mark.parametrize("size", [2**60, 10**8, 101_000_000, 0, 7])
def test_an_absurd_header_of_safetensors_is_refused(tmp_path, size):
    path = tmp_path / "c.safetensors"
    path.write_bytes(struct.pack("<Q", size) + b'{"a":{"dtype":"F32","shape":[4294967296,')
    with pytest.raises(FileError, match=r"c\.safetensors"):
        READERS["safetensors"][2](path)


@pytest.mark.parametrize("shape", [[2**31, 2**31], [-1], [2**70], "x"])
def test_absurd_shapes_in_safetensors_are_refused(tmp_path, shape):
    path = tmp_path / "c.safetensors"
    entry = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}
    text = json.dumps(entry).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(FileError, match=r"c\.safetensors"):
        READERS["safetensors"][2](path)


def test_postscript_with_another_name_is_not_interpreted(tmp_path):
    path = tmp_path / "p.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(FileError, match=r"p\.png: cannot be decoded"):
        READERS["png"][2](path)


@pytest.mark.parametrize(("format_", "at"), [("GIF", 6), ("PNG", 16)])
def test_a_picture_of_more_pixels_than_its_bytes_can_hold_is_refused(tmp_path, format_, at):
    from PIL import Image

    stream = io.BytesIO()
    Image.new("L", (1, 1)).save(stream, format=format_)
    content = bytearray(stream.getvalue())
    size = struct.pack("<HH" if format_ == "GIF" else ">II", 8000, 8000)
    content[at : at + len(size)] = size
    if format_ == "PNG":
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path = tmp_path / f"p.{format_.lower()}"
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"bytes must have at most \d+ pixels, found 8000 x 8000"):
        READERS[format_.lower()][2](path)


@pytest.mark.parametrize("format_", ["GIF", "PNG"])
def test_a_picture_of_one_colour_is_read(tmp_path, format_):
    from PIL import Image

    path = tmp_path / f"p.{format_.lower()}"
    Image.new("1", (3000, 3000), 1).save(path, optimize=True)
    assert READERS[format_.lower()][2](path).size == (3000, 3000)
    assert READERS[format_.lower()][2](io.BytesIO(path.read_bytes())).size == (3000, 3000)


def test_a_picture_of_absurd_size_is_refused_before_it_is_decoded(tmp_path):
    from PIL import Image

    stream = io.BytesIO()
    Image.new("L", (1, 1)).save(stream, format="BMP")
    content = bytearray(stream.getvalue())
    content[18:26] = struct.pack("<ii", 60_000, 60_000)
    (tmp_path / "p.bmp").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(FileError, match=r"p\.bmp"):
            READERS["bmp"][2](tmp_path / "p.bmp")


@pytest.mark.parametrize(
    ("field", "value"),
    [("scale", 10**400), ("shift", 10**400), ("kind", "rgb"), ("source", 3), ("fingerprint", None)],
)
def test_a_cache_of_no_possible_first_stage_is_refused(tmp_path, field, value):
    file, write, read = READERS["latent index"]
    write(tmp_path / file)
    content = json.loads((tmp_path / file).read_text())
    content["space"][field] = value
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(FileError, match=r"index\.json"):
        read(tmp_path / file)
