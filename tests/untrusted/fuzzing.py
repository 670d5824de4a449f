"""One reader under many wrong files: it reads them, or refuses them by our own errors."""

import io
import struct
import warnings
from collections import Counter

import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from mutations import EDITS, HEADERS, VALUES, edited, json_text, npy, repacked, replaced
from readers import READERS

from ant_lightning import ConfigError

WRONG = st.one_of(
    st.tuples(st.just("bytes"), EDITS),
    st.tuples(st.just("inside"), EDITS, st.integers(0, 50)),
    st.tuples(st.just("header"), HEADERS, st.integers(0, 50)),
    st.tuples(st.just("value"), VALUES, st.floats(0, 1)),
)


def fuzz(name, folder, count, *, derandomize):
    """Read `count` wrong files; returns how many were read and how many refused."""
    file, write, read = READERS[name]
    write(folder / file)
    path, good = folder / file, (folder / file).read_bytes()
    seen = Counter()

    @settings(
        max_examples=count,
        derandomize=derandomize,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(WRONG)
    def check(change):
        path.write_bytes(wrong(good, path, *change))
        seen[outcome(lambda: read(path))] += 1

    check()
    return seen


def outcome(read):
    """Whether a file was read or refused; any error but ours is raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read()
        except ConfigError:
            return "refused"
    return "read"


def wrong(good, path, way, what, where=0):
    """A wrong file of the kind of a good one; where a way does not fit the kind, bytes change."""
    kind, is_zip = path.suffix, good.startswith(b"PK")
    if way == "inside" and is_zip:
        return repacked(good, where, lambda data: edited(data, what))
    if way == "header" and kind in {".npz", ".npy"}:
        return npy(what) if kind == ".npy" else repacked(good, where, lambda _: npy(what))
    if way == "value":
        return with_value(good, path, where, what)
    if way == "header":
        return edited(good, [("number", where / 50, what[4], "start")])
    return edited(good, what)


def with_value(good, path, share, value):
    """A file with one of the values in it, or in its header, replaced."""
    kind, is_zip = path.suffix, good.startswith(b"PK")
    if kind == ".json":
        return json_text(good, share, value)
    if kind == ".safetensors":
        (length,) = struct.unpack("<Q", good[:8])
        text = json_text(good[8 : 8 + length], share, value)
        return struct.pack("<Q", len(text)) + text + good[8 + length :]
    if kind in {".pt", ".pth", ".ckpt"}:
        content = torch.load(io.BytesIO(good), weights_only=True)
        stream = io.BytesIO()
        changed = replaced(content, share, value)
        torch.save(changed, stream, _use_new_zipfile_serialization=is_zip)
        return stream.getvalue()
    return edited(good, [("number", share, len(str(value)), "anywhere")])
