"""Train the shapes network again: ``python -m ...extractors.shapes_network --output F``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ant_lightning.data.shapes import draw_shapes
from ant_lightning.generation.extractors.shapes import SHAPES_WEIGHTS, shapes_layers

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main", "train_shapes_network"]

_BATCH_SIZE = 128


def train_shapes_network(
    *, seed: int = 0, num_steps: int = 1500
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Train on endless shapes; return the state dict and the metadata of the file.

    Images get noise of up to 0.2, so that the features do not hang on single pixel values.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk, head = shapes_layers()
    network = nn.ModuleDict({"trunk": trunk, "head": head})
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=num_steps)
    for _ in range(num_steps):
        images, labels = _draw(_BATCH_SIZE, generator)
        strength = 0.2 * torch.rand(_BATCH_SIZE, 1, 1, 1, generator=generator)
        images = images + strength * torch.randn(images.shape, generator=generator)
        loss = F.cross_entropy(head(trunk(images.clamp(-1, 1))), labels, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    num_held_out = 4096
    images, labels = _draw(num_held_out, torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        hits = head(trunk(images)).argmax(1) == labels
    metadata = {
        "held_out_accuracy": f"{hits.double().mean().item():.4f}",
        "num_held_out": str(num_held_out),
        "seed": str(seed),
        "settings": json.dumps({"num_steps": num_steps, "batch_size": _BATCH_SIZE}),
        "data": "ant_lightning.data.draw_shapes, 32 x 32, 12 classes",
    }
    return {key: value.contiguous() for key, value in network.state_dict().items()}, metadata


def _draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images as an extractor sees them, and their labels."""
    labels = torch.randint(12, (count,), generator=generator)
    numbers = torch.rand(count, 8, generator=generator)
    images = draw_shapes(numbers, labels=labels, num_classes=12, image_size=32)
    return torch.round((images + 1) * 127.5) / 127.5 - 1, labels


def main(args: Sequence[str] | None = None) -> None:
    """Train, write the safetensors file, print the held-out accuracy."""
    from safetensors.torch import save_file  # noqa: PLC0415

    parser = argparse.ArgumentParser(description="Train the shapes network of the metrics.")
    parser.add_argument("--output", type=Path, default=SHAPES_WEIGHTS, help="safetensors file")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images")
    parser.add_argument("--num_steps", type=int, default=1500)
    options = parser.parse_args(args)
    state, metadata = train_shapes_network(seed=options.seed, num_steps=options.num_steps)
    save_file(state, options.output, metadata=metadata)
    options.output.chmod(0o644)  # safetensors writes 0600, which an installed package cannot use
    print(
        f"held-out accuracy {float(metadata['held_out_accuracy']):.2%} on "
        f"{metadata['num_held_out']} shapes; wrote {options.output}"
    )


if __name__ == "__main__":
    main()
