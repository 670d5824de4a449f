"""What every test has: one thread, so that parallel workers do not wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # LightningCLI's calls

import torch

torch.set_num_threads(1)
