"""A command of a study: the final weights of uncertainty weighting as a linear scalarization.

`[studies.freeze, --checkpoint, "<uw>/checkpoints/last.ckpt", --output, "<>"]` writes
`frozen.yaml` with a `LinearScalarization` of these weights. A comparison of the two runs then shows
whether learning the weights matters, or only their final values.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml

from ant_lightning.balancing.uncertainty import UncertaintyWeighting
from ant_lightning.errors import ConfigError
from ant_lightning.files.atomic import write_text

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


def main(args: Sequence[str]) -> int:
    """Write `frozen.yaml`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--min-loss", type=float, default=0.0, help="as the run had it")
    settings = parser.parse_args(args)
    state = torch.load(settings.checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    if "balancer.log_vars" not in state:
        raise ConfigError(
            f"freeze: needs a checkpoint of uncertainty weighting, found {settings.checkpoint}"
        )
    balancer = UncertaintyWeighting(len(state["balancer.log_vars"]), min_loss=settings.min_loss)
    balancer.load_state_dict({"log_vars": state["balancer.log_vars"]})
    linear = {
        "class_path": "ant_lightning.LinearScalarization",
        "init_args": {
            "num_tasks": balancer.num_tasks,
            "weights": balancer.loss_weights().tolist(),
        },
    }
    content = {"model": {"init_args": {"tasks": {"balancer": linear}}}}
    write_text(settings.output / "frozen.yaml", yaml.safe_dump(content))
    return 0
