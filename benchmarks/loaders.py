"""Do loading and the cache of latents keep up? `python -m benchmarks.loaders`.

Images/s in one process without workers; the compared rows take turns in one run:

* `ImageFolderData` at 256 px (ADM's crop) from files of three kinds, against the images/s that a
training step of DiT-S/2 takes (forward, backward and AdamW on latents of 32 x 32 x 4); *
`LatentsData` through its training loader, against encoding with an autoencoder of the size of
Stable Diffusion's (random weights: the speed does not depend on them).

The images are 1/f noise, about as hard to decode as photographs. After the first pass, files and
cache are in the system's file cache, so decoding and copying are timed and not the disk.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ant_lightning import (
    Batch,
    FirstStage,
    ImageDataModule,
    ImageFolderData,
    LatentsData,
    LatentSpace,
    LatentWriter,
)
from benchmarks.networks import build
from studies.provenance import commit, machine

# Kind -> width, height, suffix, options of the file.
FILES: dict[str, tuple[int, int, str, dict[str, Any]]] = {
    "PNG of 256 x 256": (256, 256, "png", {}),
    "JPEG of 500 x 375, as ImageNet's": (500, 375, "jpg", {"quality": 90}),
    "PNG of 1024 x 1024, as FFHQ's": (1024, 1024, "png", {}),
}
STEP, ENCODE, READ = "DiT-S/2 training step", "encoding, 256 px", "cache of latents"


def noise_picture(generator: np.random.Generator, width: int, height: int) -> Image.Image:
    """A picture whose spectrum falls as 1/f, like that of photographs."""
    rows = np.fft.fftfreq(height)[:, None] * max(width, height)
    columns = np.fft.rfftfreq(width)[None] * max(width, height)
    amplitude = 1 / np.maximum(1.0, np.hypot(rows, columns))
    white = np.fft.rfft2(generator.normal(size=(3, height, width)))
    pixels = np.fft.irfft2(white * amplitude, s=(height, width))
    pixels = 128 + 48 * pixels / pixels.std()
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy())


def write_folder(folder: Path, kind: str, count: int) -> ImageFolderData:
    """Files of one kind, and the data module that reads them."""
    width, height, suffix, options = FILES[kind]
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(count):
        picture = noise_picture(generator, width, height)
        picture.save(folder / f"{i:05d}.{suffix}", **options)
    return ImageFolderData(str(folder), image_size=256, batch_size=8, num_held_out=8, num_workers=0)


class RandomMoments:
    """Replaces the first stage while the cache is written; reading costs the same."""

    space = LatentSpace(kind="kl", scale=1.0, shift=0.0, fingerprint="random", source="random")

    def moments_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Those of Stable Diffusion."""
        return 8, image_shape[1] // 8, image_shape[2] // 8

    def encode_moments(self, images: torch.Tensor) -> torch.Tensor:
        """Normal numbers."""
        return torch.randn(len(images), *self.moments_shape(tuple(images.shape[1:])))  # type: ignore[arg-type]


def batches(data: ImageDataModule) -> Callable[[], int]:
    """Calls that take the next batch of the training loader."""

    def endless() -> Iterator[Batch]:
        loader = data.train_dataloader()
        while True:
            yield from loader

    stream = endless()
    return lambda: len(next(stream).images)


def training_step(batch_size: int) -> Callable[[], int]:
    """A step of DiT-S/2 with AdamW on one batch of latents."""
    network = build("DiT-S/2, ours", batch_size=batch_size, pixels=0)
    parameters = [p for p in network.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> int:
        optimizer.zero_grad()
        network.step()
        optimizer.step()
        return batch_size

    return step


def autoencoder(folder: Path) -> FirstStage:
    """A first stage of Stable Diffusion's size."""
    from diffusers import AutoencoderKL  # noqa: PLC0415 - slow to import

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
    ).save_pretrained(folder)
    return FirstStage(str(folder), kind="kl", batch_size=2)


def images_per_second(
    calls: dict[str, Callable[[], int]], seconds: float, rounds: int
) -> dict[str, list[float]]:
    """Images per second of repeated calls, one number for each round."""
    speeds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()  # the first call includes one-time costs
    for _ in range(rounds):
        for name, call in calls.items():
            start, count = time.perf_counter(), 0
            while time.perf_counter() - start < seconds / rounds:
                count += call()
            speeds[name].append(count / (time.perf_counter() - start))
    return speeds


def main() -> None:
    """Print a table and keep it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=15.0, help="for each row")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--images", type=int, default=40, help="of each kind")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/loaders.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folders = {
            kind: write_folder(root / str(i), kind, args.images) for i, kind in enumerate(FILES)
        }
        first = next(iter(folders.values()))
        LatentWriter(str(root / "cache")).write(first, RandomMoments())
        first_stage = autoencoder(root / "autoencoder")
        few = first.train_images.load([0, 1], epoch=None).images
        streams: dict[str, ImageDataModule] = {
            **folders,
            READ: LatentsData(str(root / "cache"), batch_size=8),
        }
        calls = {kind: batches(data) for kind, data in streams.items()}
        calls[STEP] = training_step(8)
        calls[ENCODE] = lambda: len(first_stage.encode_moments(few))
        speeds = images_per_second(calls, args.seconds, args.rounds)
    medians = {what: float(np.median(found)) for what, found in speeds.items()}
    rows: list[dict[str, Any]] = []
    for what in (*FILES, READ):
        other = ENCODE if what == READ else STEP
        every = np.array(speeds[what]) / np.array(speeds[other])
        rows.append({"what": what, "per": other, "ratio": float(np.median(every)),
                     "range": [float(every.min()), float(every.max())]})  # fmt: skip
    print(f"{machine()}; commit {commit()}\n\n| | images/s | ratio | to |\n|---|---|---|---|")
    for row in rows:
        low, high = row["range"]
        print(
            f"| {row['what']} | {medians[str(row['what'])]:.1f} | {row['ratio']:.1f} "
            f"[{low:.1f}, {high:.1f}] | {row['per']} |"
        )
    for what in (STEP, ENCODE):
        print(f"| {what} | {medians[what]:.2f} | | |")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": machine(),
        "commit": commit(),
        "images_per_second": speeds,
        "ratios": rows,
    }
    args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
