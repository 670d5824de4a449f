"""A file is the new one or the old one, whatever happens while it is written."""

import ast
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import ant_lightning
from ant_lightning.files.atomic import write_atomically, write_figure, write_text

PACKAGE = Path(ant_lightning.__file__).parent


def full(file, **_):
    """A writer on a disk that is full after some bytes."""
    file.write(b"half of")
    raise OSError(28, "No space left on device")


class FullFigure(Figure):
    """A figure whose file does not fit on the disk."""

    def savefig(self, fname, **_):
        full(fname)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_atomically(path, full),
        lambda path: write_figure(path, FullFigure()),
        lambda path: write_text(path, "half of \ud800"),  # has no code in UTF-8
    ],
    ids=["bytes", "figure", "text"],
)
def test_a_writer_that_fails_midway_leaves_the_old_file(tmp_path, write):
    path = tmp_path / "result.png"
    path.write_bytes(b"the last good one")
    with pytest.raises((OSError, UnicodeError)):
        write(path)
    assert path.read_bytes() == b"the last good one"
    assert [each.name for each in tmp_path.iterdir()] == ["result.png"]


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_a_figure_has_the_format_of_its_name(tmp_path, name, start):
    write_figure(tmp_path / "new" / name, Figure())
    assert (tmp_path / "new" / name).read_bytes().startswith(start)


def test_no_command_writes_a_file_in_place():
    files = [p for p in PACKAGE.rglob("*.py") if p.parent.name != "exports"]
    assert len(files) > 200
    assert {str(p.relative_to(PACKAGE)) for p in files if any(_in_place(p))} == {
        "files/atomic.py",
        "cli/export.py",  # as `exports`: in a new folder, which takes its place when it is whole
        "callbacks/sample_files.py",  # thousands of pictures beside their place, none flushed
    }


def _in_place(path):
    """Lines with a call that writes to a path from its start on."""
    for call in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            continue
        name, given = call.func.attr, [a.value for a in call.args if isinstance(a, ast.Constant)]
        opened = name == "open" and {"w", "wb", "x", "xb"} & {*given}
        saved = name == "save" and "Image" in ast.unparse(call.func)
        if saved or name in {"savefig", "write_text", "write_bytes"} or opened:
            yield call.lineno
