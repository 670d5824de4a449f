"""Tests run the notebooks at a size of seconds; what is stored in them was run at full size."""

import os

os.environ["ANT_NOTEBOOKS_SMALL"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
