"""Tests run the notebooks at a size of seconds; what is stored in them was run at full size."""

import os

import pytest

os.environ["ANT_NOTEBOOKS_SMALL"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

SLOW = ("01", "03", "04", "05", "06")  # 10 to 30 seconds each


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Leave the long ones to `make test-faults`."""
    for item in items:
        if item.path.suffix == ".ipynb" and item.path.name.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
