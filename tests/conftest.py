"""What every test has: one thread, so that parallel workers do not wait for each other.

And the same examples of hypothesis in every run: a change is to blame for a failure, not luck.
"""

import functools
import gc
import importlib.metadata
import multiprocessing
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # LightningCLI's calls

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("same examples", derandomize=True)
settings.load_profile("same examples")

# Lightning asks for the entry points of all packages whenever a Trainer is made.
importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)


def pytest_collection_finish():
    """The garbage collector need not look through what the imports made, again and again."""
    gc.collect()
    gc.freeze()


# Ranks and runs that are killed are forks of one server, which imports this once. It is the same
# list for all tests: the server starts with the first of them and keeps what it has then.
multiprocessing.set_forkserver_preload(
    [
        "pytest",
        "torchjd.aggregation",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "ant_lightning.callbacks.sample_writer",
        "ant_lightning.cli.parser",
        "ant_lightning.data.digits",
        "ant_lightning.models",
    ]
)
