"""Runs the two loops of `examples/` that use Accelerate, alone or under torchrun.

torchrun --nproc-per-node 2 accelerate_loops.py FOLDER RESULT.pt
"""

import json
import os
import runpy
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NETWORK = {
    "sample_size": 8,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
}


def run_loops(folder, *, batch_size):
    """What both loops return, on as many processes as there are; `batch_size` is that of one."""
    found = {}
    for accumulation in (1, 2):
        loop = runpy.run_path(str(EXAMPLES / "diffusers_unconditional.py"))["train"]
        common = {"accumulation": accumulation, "num_steps": 2, "num_tasks": 2}
        common |= {"learning_rate": 1e-3, "batch_size": batch_size}
        found[f"unconditional {accumulation}"] = loop(
            folder / "images", network=NETWORK, output=folder / "pipeline", **common
        )
        loop = runpy.run_path(str(EXAMPLES / "diffusers_text_to_image_lora.py"))["train"]
        found[f"lora {accumulation}"] = loop(
            folder / "model", folder / "images", size=16, output=folder / "lora", **common
        )
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = run_loops(Path(sys.argv[1]), batch_size=2)
    if os.environ["RANK"] == "0":
        torch.save(result, sys.argv[2])
    other = {name: each["weights"] for name, each in result.items()}
    torch.save(other, f"{sys.argv[2]}.{os.environ['RANK']}")
    print(json.dumps({name: each["processes"] for name, each in result.items()}))
