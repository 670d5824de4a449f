"""Do loading and the cache of latents keep up? `python -m benchmarks.loaders`.

Images/s of `ImageFolderData` at 256 px (PNG files of procedural shapes) against one training step
of DiT-S/2 on this machine, and of `LatentsData` against encoding with an autoencoder of the size of
Stable Diffusion's (random weights: the speed does not depend on them).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ant_lightning.data import ImageFolderData, LatentsData, LatentWriter, ShapesData, to_uint8
from ant_lightning.modules import FirstStage
from ant_lightning.studies.provenance import commit, machine
from benchmarks.methods import Trainer


def images_per_second(call: Callable[[], int], seconds: float) -> float:
    """Images that repeated calls handle in a second; the first call is not counted."""
    call()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        count += call()
    return count / (time.perf_counter() - start)


def write_images(folder: Path, count: int) -> None:
    """PNG files of 256 px."""
    data = ShapesData(image_size=256, num_images=count + 1, num_held_out=1, batch_size=1)
    images = to_uint8(data.train_images.load(list(range(count)), epoch=None).images)
    for i, image in enumerate(images):
        Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0))).save(folder / f"{i:05d}.png")


def main() -> None:
    """Print a table and keep it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/loaders.json"))
    args = parser.parse_args()
    from diffusers import AutoencoderKL  # noqa: PLC0415 - slow to import

    speeds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "images").mkdir()
        write_images(root / "images", args.images)
        data = ImageFolderData(
            str(root / "images"), image_size=256, batch_size=8, num_held_out=8, num_workers=0
        )
        stream = iter(data.train_dataloader())

        def load() -> int:
            nonlocal stream
            batch = next(stream, None)
            if batch is None:
                stream = iter(data.train_dataloader())
                batch = next(stream)
            return len(batch.images)

        speeds["folder of images, 256 px, one process"] = images_per_second(load, args.seconds)
        trainer = Trainer("vanilla", "33M", 256, 8, "cpu")

        def step() -> int:
            trainer.step()
            return 8

        speeds["DiT-S/2 training step"] = images_per_second(step, args.seconds)
        torch.manual_seed(0)
        AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[128, 256, 512, 512],
            layers_per_block=2,
            latent_channels=4,
        ).save_pretrained(root / "autoencoder")
        first_stage = FirstStage(str(root / "autoencoder"), kind="kl", batch_size=4)
        few = data.train_images.load(list(range(4)), epoch=None).images

        def encode() -> int:
            first_stage.encode_moments(few)
            return len(few)

        speeds["encoding, 256 px"] = images_per_second(encode, args.seconds)
        LatentWriter(str(root / "cache"), flip=False).write(data, first_stage)
        cached = LatentsData(str(root / "cache"), batch_size=8)
        latents = cached.train_images

        def read() -> int:
            return len(latents.load(list(range(32)), epoch=0).images)

        speeds["cache of latents"] = images_per_second(read, args.seconds / 2)
    print(f"{machine()}; commit {commit()}\n\n| | images/s |\n|---|---|")
    for what, speed in speeds.items():
        print(f"| {what} | {speed:.1f} |")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine(), "commit": commit(), "images_per_second": speeds}
    args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
