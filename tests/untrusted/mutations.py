"""Wrong files made of good ones: bytes changed, parts moved, headers that cannot be."""

import io
import json
import struct
import zipfile

from hypothesis import strategies as st

_NUMBERS = [0, 1, 2, 7, 0x7F, 0xFF, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63]
_SCALARS = [None, True, -1, 0, 1, 3, 2**31, 2**63, 2**70, -(2**65), 0.5, -1e308, float("nan")]
_SCALARS += [float("inf"), "", "x", "..", "a/b", "\0", "float32", "KL", "9" * 30, [], {}, [[]]]
VALUES = st.sampled_from(_SCALARS) | st.recursive(
    st.sampled_from(_SCALARS),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("ab01"), inner, max_size=3)
    ),
    max_leaves=5,
)
# What, where (0 .. 1 of the length), a number, and whether near the start, the end or anywhere.
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "byte", "cut", "drop", "double", "move", "number", "digit"]),
        st.floats(0, 1),
        st.integers(0, 2**16),
        st.sampled_from(["start", "end", "anywhere"]),
    ),
    min_size=1,
    max_size=4,
)
_DESCR = ["'<f8'", "'<f4'", "'|u1'", "'<i8'", "'|O'", "'<U3'", "'<U999999'", "'|V8'", "'<c8'", "3"]
_DESCR += ["[('a', '<f8')]", "'<M8[s]'", "'>f8'", "'|b1'", "'<f16'", "None"]
_SIDES = ["0", "1", "2", "3", "10", "-1", str(2**31), str(2**62), str(2**70), "True", "1.5", "'x'"]
HEADERS = st.tuples(
    st.sampled_from(_DESCR),
    st.sampled_from(["False", "True", "3", "None"]),
    st.lists(st.sampled_from(_SIDES), max_size=5),
    st.sampled_from([1, 2, 3, 4, 0]),
    st.integers(0, 80),
)


def edited(content, edits):
    """The bytes after some changes."""
    data = bytearray(content)
    for what, share, number, where in edits:
        if not data:
            break
        span = len(data) if where == "anywhere" else min(len(data), 256)
        at = min(int(share * span), span - 1) + (len(data) - span if where == "end" else 0)
        if what == "flip":
            data[at] ^= 1 << number % 8
        elif what == "byte":
            data[at] = number % 256
        elif what == "cut":
            del data[at:]
        elif what == "drop":
            del data[at : at + 1 + number % 16]
        elif what == "double":
            data[at:at] = data[at : at + 1 + number % 64]
        elif what == "move":
            source = number % len(data)
            data[at : at + 16] = data[source : source + 16]
        elif what == "number":
            data[at : at + 8] = struct.pack("<Q", _NUMBERS[number % len(_NUMBERS)])[
                : 1 + number % 8
            ]
        elif what == "digit":
            digits = [i for i, byte in enumerate(data[:4096]) if chr(byte).isdigit()]
            if digits:
                i = digits[int(share * (len(digits) - 1))]
                data[i : i + 1] = str(_NUMBERS[number % len(_NUMBERS)]).encode()
    return bytes(data)


def repacked(content, index, change):
    """A zip file with one entry changed and all checksums right, so that readers look into it."""
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as good,
        zipfile.ZipFile(stream, "w") as bad,
    ):
        entries = good.infolist()
        for i, entry in enumerate(entries):
            data = good.read(entry)
            bad.writestr(entry.filename, change(data) if i == index % len(entries) else data)
    return stream.getvalue()


def npy(header):
    """An array whose header says what is drawn."""
    descr, fortran, sides, version, length = header
    shape = f"({', '.join(sides)}{',' if len(sides) == 1 else ''})"
    text = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
    size = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + size + text + bytes(length)


def replaced(content, share, value):
    """Nested containers with one value, of all that are in them, replaced."""
    places = list(_places(content))
    if not places:
        return value
    path = places[min(int(share * len(places)), len(places) - 1)]
    return _with(content, path, value)


def json_text(content, share, value):
    """JSON text with one value replaced."""
    return json.dumps(replaced(json.loads(content), share, value)).encode()


def _places(content, path=()):
    if path:
        yield path
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _places(value, (*path, key))
    elif isinstance(content, list | tuple):
        for i, value in enumerate(content):
            yield from _places(value, (*path, i))


def _with(content, path, value):
    if not path:
        return value
    key, *rest = path
    if isinstance(content, dict):
        return {**content, key: _with(content[key], rest, value)}
    items = list(content)
    items[key] = _with(items[key], rest, value)
    return type(content)(items) if type(content) in (list, tuple) else items
