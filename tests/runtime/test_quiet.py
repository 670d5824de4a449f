"""Warnings of a command are one line each, begin like its errors, and are said once."""

import subprocess
import sys
import warnings

import pytest

from ant_lightning.runtime.quiet import keep_quiet

CODE = """
import warnings
from ant_lightning.runtime.quiet import warn_in_lines
warn_in_lines()
for category in (UserWarning, RuntimeWarning):
    for _ in range(2):
        warnings.warn("two\\nlines", category)
        with warnings.catch_warnings():  # Python now forgets what was said
            warnings.simplefilter("ignore")
warnings.warn_explicit("ours", UserWarning, "/x/ant_lightning/data/module.py", 3)
Ours = type("Ours", (UserWarning,), {"__module__": "ant_lightning.data"})
warnings.warn_explicit("ours too", Ours, "/x/torchmetrics/metric.py", 3)
"""
LACKS = (
    "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be "
    "provided during `Trainer` instantiation. Please add the following callbacks: {}."
)


def test_a_warning_is_one_line_and_is_said_once():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == [
        "ant-lightning: warning: two lines (<string>:7)",
        "ant-lightning: warning: ours",
        "ant-lightning: warning: ours too",
    ]


@pytest.mark.parametrize(
    ("command", "missing", "said"),
    [
        ("fit", ["GenerationMetrics"], False),
        ("fit", ["Mine", "GenerationMetrics"], True),
        ("validate", ["Mine"], False),
    ],
)
def test_callbacks_that_a_resumed_run_lacks(command, missing, said, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        keep_quiet(command)
        warnings.warn(LACKS.format(missing), stacklevel=1)
    assert len(caught) == said
    for each in caught:
        line = warnings.formatwarning(each.message, each.category, "/lightning/call.py", 1)
        assert line == (
            "ant-lightning: warning: trainer.callbacks: lacks some of the checkpoint, whose state "
            "ends: ['Mine', 'GenerationMetrics']\n"
        )
