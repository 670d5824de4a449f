"""Train a network of the metrics again: `python -m studies.extractor_networks digits --output F`.

The files in `ant_lightning/generation` that `DigitsFeatures` and `ShapesFeatures` read were made by
it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ant_lightning.data.shapes import draw_shapes
from ant_lightning.generation.shipped_networks import NETWORKS, weights_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

__all__ = ["main"]

_SHAPES_BATCH = 128
_SHAPES_HELD_OUT = 4096
_DIGITS_BATCH = 64


def train_digits_network(*, seed: int, length: int = 60) -> tuple[nn.ModuleDict, dict[str, str]]:
    """Train on 80% of scikit-learn's digits for `length` epochs; the network and its metadata.

    Images are shifted by up to one pixel and get noise of up to 0.2, so that the features do not
    hang on single pixel values; they are rounded to uint8 steps as the extractor's input is.
    """
    from sklearn.datasets import load_digits  # noqa: PLC0415 - only the digits need it

    digits = load_digits()
    images = _rounded(torch.from_numpy(digits.images).float()[:, None] / 8 - 1)
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    cut = round(0.8 * len(images))
    train, held_out = order[:cut], order[cut:]
    num_batches = cut // _DIGITS_BATCH
    generator = torch.Generator().manual_seed(seed + 1)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(length):
            shuffled = train[torch.randperm(cut, generator=generator)]
            for rows in shuffled[: num_batches * _DIGITS_BATCH].split(_DIGITS_BATCH):
                yield _shifted(images[rows], generator), labels[rows]

    network = _initial("digits", seed)
    _fit(network, batches(), num_steps=length * num_batches, max_lr=4e-3)
    return network, {
        **_accuracy(network, images[held_out], labels[held_out]),
        "num_train": str(cut),
        "seed": str(seed),
        "split": "torch.randperm(1797) by a CPU generator of this seed, the first 80% for training",
        "settings": json.dumps({"num_epochs": length, "batch_size": _DIGITS_BATCH}),
        "data": "sklearn.datasets.load_digits",
    }


def train_shapes_network(*, seed: int, length: int = 1500) -> tuple[nn.ModuleDict, dict[str, str]]:
    """Train on `length` batches of new shapes; the network and its metadata.

    Images get noise of up to 0.2, so that the features do not hang on single pixel values.
    """
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(length):
            images, labels = _shapes(_SHAPES_BATCH, generator)
            strength = 0.2 * torch.rand(_SHAPES_BATCH, 1, 1, 1, generator=generator)
            noise = torch.randn(images.shape, generator=generator)
            yield (images + strength * noise).clamp(-1, 1), labels

    network = _initial("shapes", seed)
    _fit(network, batches(), num_steps=length, max_lr=6e-3)
    held_out = _shapes(_SHAPES_HELD_OUT, torch.Generator().manual_seed(seed + 1))
    return network, {
        **_accuracy(network, *held_out),
        "seed": str(seed),
        "settings": json.dumps({"num_steps": length, "batch_size": _SHAPES_BATCH}),
        "data": "ant_lightning.data.draw_shapes, 32 x 32, 12 classes",
    }


_TRAIN = {"digits": train_digits_network, "shapes": train_shapes_network}


def main(args: Sequence[str] | None = None) -> None:
    """Train, write the safetensors file, print the held-out accuracy."""
    parser = argparse.ArgumentParser(description="Train a network of the metrics.")
    parser.add_argument("network", choices=sorted(_TRAIN))
    parser.add_argument("--output", type=Path, help="safetensors file, by default the shipped one")
    parser.add_argument("--seed", type=int, default=0, help="of images, weights and batches")
    parser.add_argument("--length", type=int, help="epochs of digits, steps of shapes")
    options = parser.parse_args(args)
    output = options.output or weights_file(options.network)
    length = {} if options.length is None else {"length": options.length}
    network, metadata = _TRAIN[options.network](seed=options.seed, **length)
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(state, output, metadata=metadata)
    output.chmod(0o644)  # safetensors writes 0600, which an installed package cannot use
    print(
        f"held-out accuracy {float(metadata['held_out_accuracy']):.2%} on "
        f"{metadata['num_held_out']} {options.network}; wrote {output}"
    )


def _initial(name: str, seed: int) -> nn.ModuleDict:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[name].layers()


def _fit(
    network: nn.ModuleDict,
    batches: Iterator[tuple[Tensor, Tensor]],
    *,
    num_steps: int,
    max_lr: float,
) -> None:
    """Train in place."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr, total_steps=num_steps)
    num_threads = torch.get_num_threads()
    # The sums do not depend on the number of cores then, and steps this small are faster.
    torch.set_num_threads(1)
    try:
        for images, labels in batches:
            logits = network["head"](network["trunk"](images))
            loss = F.cross_entropy(logits, labels, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    finally:
        torch.set_num_threads(num_threads)


@torch.no_grad()
def _accuracy(network: nn.ModuleDict, images: Tensor, labels: Tensor) -> dict[str, str]:
    hits = network["head"](network["trunk"](images)).argmax(1) == labels
    return {
        "held_out_accuracy": f"{hits.double().mean().item():.4f}",
        "num_held_out": str(len(images)),
    }


def _rounded(images: Tensor) -> Tensor:
    """Images in [-1, 1] in the 256 steps that an extractor sees."""
    return torch.round((images + 1) * 127.5) / 127.5 - 1


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by -1, 0 or 1 pixels a side, with noise of a random strength."""
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    count = len(images)
    # Half of the draws are not shifted: at 8x8 one pixel is already a lot.
    offsets = torch.randint(0, 3, (2, count), generator=generator)
    offsets = torch.where(torch.rand(2, count, generator=generator) < 0.5, 1, offsets)
    rows = offsets[0][:, None] + torch.arange(8)
    columns = offsets[1][:, None] + torch.arange(8)
    shifted = padded[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]]
    strength = 0.2 * torch.rand(count, 1, 1, generator=generator)
    noise = torch.randn(shifted.shape, generator=generator)
    return (shifted + strength * noise).clamp(-1, 1)[:, None]


def _shapes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images as an extractor sees them, and their labels."""
    labels = torch.randint(12, (count,), generator=generator)
    numbers = torch.rand(count, 8, generator=generator)
    images = draw_shapes(numbers, labels=labels, num_classes=12, image_size=32)
    return _rounded(images), labels


if __name__ == "__main__":
    main()
