"""Reading files that may come from elsewhere: nothing in them runs, nothing large is believed.

Every reader of the package goes through these: sizes, shapes and types are compared with the bytes
that are there before memory is reserved, and what is found wrong is a `FileError` that names the
file.
"""

from ant_lightning.files.atomic import write_atomically
from ant_lightning.files.finite import not_finite
from ant_lightning.files.identity import check_identity, differences, tensors_digest, write_identity
from ant_lightning.files.json_file import read_json
from ant_lightning.files.npy import ArrayHeader, map_npy
from ant_lightning.files.npz import NpzFile, open_npz
from ant_lightning.files.safetensors_file import read_safetensors, read_tensors, write_tensors
from ant_lightning.files.torch_file import read_torch

__all__ = [
    "ArrayHeader",
    "NpzFile",
    "check_identity",
    "differences",
    "map_npy",
    "not_finite",
    "open_npz",
    "read_json",
    "read_safetensors",
    "read_tensors",
    "read_torch",
    "tensors_digest",
    "write_atomically",
    "write_identity",
    "write_tensors",
]
