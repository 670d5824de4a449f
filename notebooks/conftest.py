"""Tests run the notebooks at a size of seconds; what is stored in them was run at full size."""

import os

import pytest

os.environ["ANT_NOTEBOOKS_SMALL"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

SLOW = {"05_negative_transfer_gap.ipynb", "06_noise_processes.ipynb"}  # half a minute each


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Leave the long ones to `make test-faults`."""
    for item in items:
        if item.path.name in SLOW:
            item.add_marker(pytest.mark.slow)
