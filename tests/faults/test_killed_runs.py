"""Runs that are killed at any moment and go on from `last` end as the run that was not."""

import multiprocessing
import os
import random
import signal
import sys
import threading
import time

import pytest
import torch
from tiny_fit import assert_same, fit

from ant_lightning.runtime.checkpoint_files import furthest_whole

_CONTEXT = multiprocessing.get_context("forkserver")
STEPS = 12


def short_run(folder, kill):
    """Train in this process, from the newest checkpoint; it kills itself, or is killed."""
    torch.set_num_threads(1)
    if isinstance(kill, tuple):
        sys.addaudithook(KillAt(*kill))
    elif kill is not None:
        # From when the run is under way: most of it is over before a slow machine notices.
        timer = threading.Timer(kill, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    found = furthest_whole(folder.glob("*.ckpt"))
    fit(folder, steps=STEPS, every=2, resume=found and found[0], checkpoint={"save_top_k": 1})


class KillAt:
    """Dies at the n-th time that the system is asked to do something with a checkpoint.

    `open`: the file is there and empty. `rename`: it is whole and has no name yet. `remove`: a
    new one is there and an old one as well.
    """

    def __init__(self, event, count):
        self.event, self.count = event, count

    def __call__(self, event, args):
        if event == self.event and ".ckpt" in str(args[0]):
            self.count -= event != "open" or "w" in str(args[1])
            if self.count == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def half_written(folder):
    """Dies in the middle of the write of a checkpoint: a signal of the system's, not of ours."""
    import resource

    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    size = max(path.stat().st_size for path in folder.glob("*.ckpt"))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
    resume, _ = furthest_whole(folder.glob("*.ckpt"))
    fit(folder, steps=STEPS, every=2, resume=resume, checkpoint={"save_top_k": 1})


def process(function, *args):
    """The exit code of a process that runs `function`."""
    run = _CONTEXT.Process(target=function, args=args)
    run.start()
    run.join(60)
    assert not run.is_alive()
    return run.exitcode


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    fit(folder, steps=STEPS, every=2, checkpoint={"save_top_k": 1})
    return folder / "last.ckpt"


@pytest.mark.slow
@pytest.mark.parametrize("kill", [("open", 3), ("os.rename", 3), ("os.remove", 2)])
def test_killed_while_a_checkpoint_is_written(tmp_path, whole, kill):
    assert process(short_run, tmp_path, kill) == -signal.SIGKILL
    assert process(short_run, tmp_path, None) == 0
    assert_same(whole, tmp_path / "last.ckpt")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_killed_in_the_middle_of_a_write(tmp_path, whole):
    assert process(short_run, tmp_path, ("os.rename", 4)) == -signal.SIGKILL
    assert process(half_written, tmp_path) == -signal.SIGXFSZ
    assert any(path.stat().st_size for path in tmp_path.glob(".*.tmp"))
    assert process(short_run, tmp_path, None) == 0
    assert_same(whole, tmp_path / "last.ckpt")
    assert not list(tmp_path.glob(".*"))


def test_killed_between_its_last_two_files(tmp_path, whole):
    assert process(short_run, tmp_path, ("os.rename", STEPS)) == -signal.SIGKILL
    newest, _ = furthest_whole(tmp_path.glob("*.ckpt"))
    assert newest.name != "last.ckpt"
    assert_same(whole, newest)
    assert process(short_run, tmp_path, None) == 0
    assert_same(whole, tmp_path / "last.ckpt")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_runs_killed_at_random_moments(tmp_path, whole):
    assert process(short_run, tmp_path / "first", None) == 0  # it also waits for imports
    start = time.monotonic()
    assert process(short_run, tmp_path / "timed", None) == 0
    length = time.monotonic() - start
    draw = random.Random(0)
    killed = 0
    for run in range(20):
        folder = tmp_path / str(run)
        for _ in range(3):  # some are killed again when they go on
            code = process(short_run, folder, draw.uniform(0.05, length))
            killed += code == -signal.SIGKILL
            assert code in {0, -signal.SIGKILL}
        assert process(short_run, folder, None) == 0
        assert_same(whole, folder / "last.ckpt")
    assert killed >= 20
