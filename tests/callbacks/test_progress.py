"""One bar for all steps of a run, or lines where the output is no terminal."""

import fcntl
import io
import os
import re
import struct
import termios

import pytest
from tiny_fit import BALANCERS, BATCHES, fit, module

from ant_lightning import (
    DDIM,
    SampleGrid,
    SNRClustering,
    TrainingProgress,
    UncertaintyWeighting,
)
from ant_lightning.callbacks.progress import showing_steps
from ant_lightning.runtime.progress_display import ProgressDisplay


class Terminal(io.StringIO):
    """Keeps what a terminal of some columns would show."""

    def __init__(self, columns=200):
        super().__init__()
        self.ends = os.openpty()
        fcntl.ioctl(self.ends[0], termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    def isatty(self):
        return True

    def fileno(self):
        return self.ends[0]

    def __del__(self):
        for end in self.ends:
            os.close(end)


def progress(folder, monkeypatch, *, terminal, columns=200, **settings):
    """The lines, or the states of the bar, of a run of one rank."""
    out = Terminal(columns) if terminal else io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    callback = TrainingProgress(refresh_rate=1, line_interval=settings.pop("line_interval", 0.0))
    fit(folder, callbacks=[callback], enable_progress_bar=True, **settings)
    monkeypatch.undo()
    return [line.strip() for line in re.split(r"[\r\n]", out.getvalue()) if line.strip()]


def test_lines_count_the_steps_of_the_run_across_epochs(tmp_path, monkeypatch):
    steps = 2 * BATCHES + 2
    lines = progress(tmp_path, monkeypatch, terminal=False, steps=steps)
    assert len(lines) == steps
    for step, line in enumerate(lines, start=1):
        assert line.startswith(f"step {step}/{steps}, ")
        assert bool(re.search(r"\d:\d\d:\d\d left", line)) == (step < steps)
        assert "images/s" in line


def test_a_short_run_prints_one_line_and_a_validation_another(tmp_path, monkeypatch):
    settings = {"terminal": False, "steps": 6, "line_interval": 1e9}
    (line,) = progress(tmp_path, monkeypatch, **settings)
    assert line.startswith("step 6/6, ")
    lines = progress(tmp_path, monkeypatch, **settings, val_interval=4)
    assert [line.split(",")[0] for line in lines] == ["step 4/6", "step 6/6"]
    assert all("val/loss" in line for line in lines)


@pytest.mark.parametrize(
    ("limits", "total"),
    [
        ({"steps": -1, "max_epochs": 2}, f"/{2 * BATCHES}"),
        ({"steps": 5, "max_epochs": 2}, "/5"),
        ({"steps": -1, "max_epochs": 1, "limit_train_batches": 3}, "/3"),
        ({"steps": -1, "max_time": {"seconds": 0.2}}, ""),
    ],
)
def test_the_total_is_whatever_ends_the_run(tmp_path, monkeypatch, limits, total):
    lines = progress(tmp_path, monkeypatch, terminal=False, **limits)
    assert lines[0].startswith(f"step 1{total}, ")
    if total:
        assert lines[-1].startswith(f"step {total[1:]}{total}, ")


def test_with_a_limit_of_time_the_time_left_is_shown(tmp_path, monkeypatch):
    limits = {"steps": 3, "max_time": {"hours": 2}}
    lines = progress(tmp_path, monkeypatch, terminal=False, **limits)
    assert all(re.search(r"max_time in (2:00:00|1:5\d:\d\d)", line) for line in lines)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_that_is_resumed_starts_at_its_step(tmp_path, monkeypatch, terminal):
    fit(tmp_path, steps=6)
    resume = tmp_path / "step=6.ckpt"
    shown = progress(tmp_path, monkeypatch, terminal=terminal, steps=9, resume=resume)
    text = "\n".join(shown)
    assert "6/9" in shown[0] if terminal else shown[0].startswith("step 7/9")
    assert "9/9" in shown[-1]
    assert not re.search(r"\b[1-5]/9", text)


def test_a_terminal_has_one_bar_that_never_goes_back(tmp_path, monkeypatch):
    steps = 2 * BATCHES + 1
    shown = progress(tmp_path, monkeypatch, terminal=True, steps=steps, val_interval=BATCHES)
    counts = [int(n) for line in shown for n in re.findall(rf"(\d+)/{steps} \[", line)]
    assert counts == sorted(counts)
    assert set(counts) == set(range(steps + 1))
    assert all(line.startswith("Training: ") for line in shown)
    assert any(line.endswith(", validating]") or ", validating, " in line for line in shown)
    assert "validating" not in shown[-1]
    assert shown[-1].startswith("Training: 100%")
    assert "images/s" in shown[-1]
    assert not any(line.startswith("step ") for line in shown)


@pytest.mark.parametrize(
    ("columns", "weights"), [(60, False), (80, False), (100, False), (170, True)]
)
def test_a_bar_leaves_out_what_does_not_fit(tmp_path, monkeypatch, columns, weights):
    settings = {"terminal": True, "steps": 6, "val_interval": 3, "columns": columns}
    shown = progress(tmp_path, monkeypatch, **settings)
    items = ("validating", r"val/loss=[\d.]+", r"train/loss=[\d.]+", r"images/s=\d+")
    items = (*items, r"weights of the 3 tasks=\d+/\d+/\d+ %")
    whole = r"Training: +\d+%\|.*\| \d/6 \[\S+, .* steps/s" + "".join(f"(, {i})?" for i in items)
    assert all(re.fullmatch(whole + r"\]", line) for line in shown), shown
    # Where not even the bar alone fits, the terminal would break the line.
    assert columns < 70 or {len(line) for line in shown} == {columns - 1}
    assert (", weights of the 3 tasks=" in shown[-1]) is weights


def test_of_many_tasks_a_line_has_the_smallest_and_the_largest_weight(tmp_path, monkeypatch):
    monkeypatch.setitem(BALANCERS, "twelve", lambda: UncertaintyWeighting(12))
    settings = {"method": "twelve", "model": {"clustering": SNRClustering(12)}}
    (line,) = progress(
        tmp_path, monkeypatch, terminal=False, steps=1, line_interval=9e9, **settings
    )
    assert line.endswith("weights of the 12 tasks 8.3 to 8.3 %")


def test_a_bar_in_a_terminal_is_a_sentence_from_the_start(monkeypatch):
    for columns in (81, 51):
        out = Terminal(columns)
        monkeypatch.setattr("sys.stdout", out)
        with ProgressDisplay("fit", "images drawn for the grid", total=1056) as shown:
            shown.step(56, 0, 4)
            shown._bar.mininterval = 0.0
            shown.step(56, 1, 4)
            shown.update(528)
        lines = [line.strip() for line in out.getvalue().split("\r") if line.strip()]
        monkeypatch.undo()
        assert {len(line) for line in lines} == {columns - 1}
        start, begun, step, half = (re.sub(r" \|[^|]*\|$", "", line) for line in lines)
        assert start == "fit: 0 of 1,056 images drawn for the grid"
        wide = columns > 60
        assert begun == start + ", step 0 of 4 for the next 56" * wide
        assert re.fullmatch(start + r", \d:\d\d:\d\d left" * wide, step)
        assert half.startswith("fit: 528 of 1,056 images drawn for the grid")


def test_a_long_validation_counts_its_batches(tmp_path, monkeypatch):
    lines = progress(
        tmp_path, monkeypatch, terminal=False, steps=4, val_interval=4, limit_val_batches=2
    )
    counts = [line.split(",")[0] for line in lines if line.startswith("fit: ")]
    assert counts == ["fit: 1 of 2 batches", "fit: 2 of 2 batches"]
    assert lines[-1].startswith("step 4/4")


def test_the_images_of_a_grid_are_counted(tmp_path, monkeypatch):
    callback, out = TrainingProgress(line_interval=0.0), io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.chdir(tmp_path)  # where the grid is written without a logger
    grid = SampleGrid(num_images=4)
    settings = {"model": {"sampler": DDIM(num_steps=2)}, "enable_progress_bar": True}
    fit(tmp_path, callbacks=[callback, grid], steps=1, val_interval=1, **settings)
    monkeypatch.undo()
    assert "fit: 4 of 4 images drawn for the grid\n" in out.getvalue()


def test_the_steps_of_the_sampler_are_shown_while_images_are_drawn(capsys, monkeypatch):
    monkeypatch.setattr("ant_lightning.runtime.progress_display.LONGEST_SILENCE", 0.0)
    model = module("vanilla")
    with showing_steps(model, ProgressDisplay("predict", "images", total=3, interval=0.0)):
        model.sample(3, sampler=DDIM(num_steps=4))
    model.sample(3, sampler=DDIM(num_steps=4))
    found = [line.rpartition(",")[0] for line in capsys.readouterr().out.splitlines()]
    steps = [f"predict: 0 of 3 images, step {step} of 4 for the next 3" for step in (1, 2, 3)]
    assert found[1:] == steps


def test_no_bar_and_no_line_if_it_is_switched_off(tmp_path, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    fit(tmp_path, callbacks=[TrainingProgress(refresh_rate=0)], enable_progress_bar=True, steps=2)
    assert out.getvalue() == ""
