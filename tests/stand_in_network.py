"""The formula that replaces every network in the golden data of continuous-time processes."""

import json
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"


def load(name):
    """Facts and arrays of one file of the golden data."""
    return json.loads((GOLDEN / f"{name}.json").read_text()), np.load(GOLDEN / f"{name}.npz")


def stand_in(facts):
    """`f(x, t, y) = a tanh(b x + c t + e y) + d x`, with one number t and y for each image."""
    a, b, c, d, e = (facts[name] for name in "abcde")

    def network(x, t, y=None):
        shape = (-1, *[1] * (x.ndim - 1))
        inner = b * x + c * t.to(x.dtype).view(shape)
        if y is not None:
            inner = inner + e * y.to(x.dtype).view(shape)
        return a * torch.tanh(inner) + d * x

    return network


def error(found, wanted):
    """Largest difference, relative to the largest entry."""
    found, wanted = np.asarray(found, dtype=np.float64), np.asarray(wanted, dtype=np.float64)
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def state_errors(found, wanted):
    """`error` of each state of a path."""
    return max(error(each, state) for each, state in zip(found, wanted, strict=True))
