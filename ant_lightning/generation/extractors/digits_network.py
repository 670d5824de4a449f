"""Train the digits network again: ``python -m ...extractors.digits_network --output F``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ant_lightning.generation.extractors.digits import DIGITS_WEIGHTS, digits_layers

__all__ = ["digits_images", "digits_split", "main", "train_digits_network"]


def digits_images() -> tuple[Tensor, Tensor]:
    """All digits of scikit-learn: images ``[1797, 1, 8, 8]`` in [-1, 1], labels ``[1797]``."""
    from sklearn.datasets import load_digits  # noqa: PLC0415

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    return images, torch.from_numpy(digits.target).long()


def digits_split(num_images: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training 80% and the held-out 20%, a random permutation cut once."""
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))
    cut = round(0.8 * num_images)
    return order[:cut], order[cut:]


def train_digits_network(
    *, seed: int = 0, num_epochs: int = 60, batch_size: int = 64
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Train on 80% of the digits; return the state dict and the metadata of the file.

    Images are shifted by up to one pixel and get noise of up to 0.2, so that the features do not
    hang on single pixel values; they are rounded to uint8 steps as the extractor's input is.
    """
    images, labels = digits_images()
    images = torch.round((images + 1) * 127.5) / 127.5 - 1
    train, held_out = digits_split(len(images), seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk, head = digits_layers()
    network = nn.ModuleDict({"trunk": trunk, "head": head})
    num_threads = torch.get_num_threads()
    # the sums do not depend on the number of cores then, and steps this small are faster
    torch.set_num_threads(1)
    try:
        _fit(trunk, head, images[train], labels[train], num_epochs, batch_size, seed=seed)
    finally:
        torch.set_num_threads(num_threads)
    with torch.no_grad():
        hits = head(trunk(images[held_out])).argmax(1) == labels[held_out]
    metadata = {
        "held_out_accuracy": f"{hits.double().mean().item():.4f}",
        "num_train": str(len(train)),
        "num_held_out": str(len(held_out)),
        "seed": str(seed),
        "split": "torch.randperm(1797) by a CPU generator of this seed, the first 80% for training",
        "settings": json.dumps({"num_epochs": num_epochs, "batch_size": batch_size}),
        "data": "sklearn.datasets.load_digits",
    }
    return {key: value.contiguous() for key, value in network.state_dict().items()}, metadata


def _fit(
    trunk: nn.Module,
    head: nn.Module,
    images: Tensor,
    labels: Tensor,
    num_epochs: int,
    batch_size: int,
    *,
    seed: int,
) -> None:
    """Train both modules in place."""
    generator = torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.AdamW(
        [*trunk.parameters(), *head.parameters()], lr=2e-3, weight_decay=1e-2
    )
    num_steps = num_epochs * (len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=num_steps)
    for _ in range(num_epochs):
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: len(order) // batch_size * batch_size].split(batch_size):
            batch = _augment(images[rows], generator=generator)
            loss = F.cross_entropy(head(trunk(batch)), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def _augment(images: Tensor, *, generator: torch.Generator) -> Tensor:
    """Shift each image by -1, 0 or 1 pixels a side, and add noise of a random strength."""
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    count = len(images)
    # no shift in most draws: at 8x8 one pixel is already a lot
    offsets = torch.randint(0, 3, (2, count), generator=generator)
    offsets = torch.where(torch.rand(2, count, generator=generator) < 0.5, 1, offsets)
    rows = offsets[0][:, None] + torch.arange(8)
    columns = offsets[1][:, None] + torch.arange(8)
    shifted = padded[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]]
    strength = 0.2 * torch.rand(count, 1, 1, generator=generator)
    noise = torch.randn(shifted.shape, generator=generator)
    return (shifted + strength * noise).clamp(-1, 1)[:, None]


def main(args: Sequence[str] | None = None) -> None:
    """Train, write the safetensors file, print the held-out accuracy."""
    from safetensors.torch import save_file  # noqa: PLC0415

    parser = argparse.ArgumentParser(description="Train the digits network of the metrics.")
    parser.add_argument("--output", type=Path, default=DIGITS_WEIGHTS, help="safetensors file")
    parser.add_argument("--seed", type=int, default=0, help="of split, weights and batches")
    parser.add_argument("--num_epochs", type=int, default=60)
    options = parser.parse_args(args)
    state, metadata = train_digits_network(seed=options.seed, num_epochs=options.num_epochs)
    save_file(state, options.output, metadata=metadata)
    options.output.chmod(0o644)  # safetensors writes 0600, which an installed package cannot use
    print(
        f"held-out accuracy {float(metadata['held_out_accuracy']):.2%} on "
        f"{metadata['num_held_out']} digits; wrote {options.output}"
    )


if __name__ == "__main__":
    main()
