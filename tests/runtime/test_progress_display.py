"""What is done of what: a few lines where there is no terminal."""

import io

import pytest

from ant_lightning.runtime.progress_display import ProgressDisplay


class Terminal(io.StringIO):
    """Keeps what a terminal would show."""

    def isatty(self):
        return True


def lines(count, capsys, **settings):
    with ProgressDisplay("predict", "images", interval=0.0, **settings) as shown:
        for _ in range(count):
            shown.update()
    return capsys.readouterr().out.splitlines()


def test_many_updates_are_few_lines(capsys):
    found = lines(2000, capsys, total=2000)
    assert found[0] == "predict: 0 of 2,000 images"
    assert found[1].startswith("predict: 200 of 2,000 images, ")
    assert found[1].endswith(" left")
    assert found[-1] == "predict: 2,000 of 2,000 images"
    assert len(found) == 11


def test_what_was_done_before_counts(capsys):
    found = lines(5, capsys, total=20, done=15)
    assert [line.split(",")[0] for line in found] == [
        f"predict: {done} of 20 images" for done in (15, 17, 19, 20)
    ]


def test_the_final_count_is_printed_once_if_the_work_was_quick(capsys):
    with ProgressDisplay("predict", "images", total=20) as shown:
        shown.update(10)
        shown.update(10)
    assert capsys.readouterr().out.splitlines() == [
        "predict: 0 of 20 images",
        "predict: 20 of 20 images",
    ]


def test_a_batch_that_takes_minutes_shows_its_steps(capsys, monkeypatch):
    seconds = 0
    monkeypatch.setattr("time.perf_counter", lambda: seconds)
    with ProgressDisplay("predict", "images", total=20) as shown:
        for step in range(1, 9):
            seconds += 12
            shown.step(20, step, 8)
        shown.update(20)
    found = capsys.readouterr().out.splitlines()
    assert found[1].startswith("predict: 0 of 20 images, step 3 of 8 for the next 20, ")
    assert found[1].endswith(" left")
    assert found[2].startswith("predict: 0 of 20 images, step 6 of 8 for the next 20, ")
    assert found[3:] == ["predict: 20 of 20 images"]


def test_without_a_total_a_display_begins_when_it_is_known(capsys):
    with ProgressDisplay("score", "training images read", interval=0.0) as shown:
        for done in range(0, 100, 50):
            shown.show(done, 100)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("score: 50 of 100 training images read")


@pytest.mark.parametrize("settings", [{"hidden": True}, {"interval": 1e9, "first_line": False}])
def test_nothing_is_printed_if_hidden_or_too_soon(capsys, settings):
    with ProgressDisplay("fit", "batches", total=10, **settings) as shown:
        shown.update(10)
    assert capsys.readouterr().out == ""


def test_a_terminal_has_a_bar_in_place_of_lines(monkeypatch):
    out = Terminal()
    monkeypatch.setattr("sys.stdout", out)
    with ProgressDisplay("predict", "images", total=4, interval=0.0) as shown:
        shown.update(4)
    monkeypatch.undo()
    assert "\rpredict: 4 of 4 images |##########|" in out.getvalue()
    assert "\n" not in out.getvalue()
