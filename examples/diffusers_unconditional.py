"""Train a `UNet2DModel` on a folder of images with Accelerate, as diffusers' own loop does.

    python examples/diffusers_unconditional.py --images my_images
    torchrun --nproc-per-node 2 examples/diffusers_unconditional.py --images my_images

The lines marked ANT turn it into a multi-task loop: clusters of timesteps, and `MultiTaskStep` in
place of `accelerator.backward(loss)`. It sums over the processes itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ant_lightning import MultiTaskStep, SNRClustering, UncertaintyWeighting


class Images(Dataset[torch.Tensor]):
    """The images of a folder, `[3, size, size]` in [-1, 1]."""

    def __init__(self, folder: str | Path, size: int) -> None:
        kinds = {".png", ".jpg", ".jpeg", ".webp"}
        self.paths = sorted(path for path in Path(folder).rglob("*") if path.suffix in kinds)
        self.size = size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        picture = Image.open(self.paths[index]).convert("RGB").resize((self.size, self.size))
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def train(
    images: str | Path,
    *,
    network: dict[str, Any],
    output: str | Path | None = None,
    batch_size: int = 16,
    accumulation: int = 1,
    num_steps: int = 1000,
    num_tasks: int = 4,
    learning_rate: float = 1e-4,
    seed: int = 0,
) -> dict[str, Any]:
    """Train; `batch_size` is that of a process. Returns what a test looks at."""
    accelerator = Accelerator(gradient_accumulation_steps=accumulation)
    torch.manual_seed(seed)  # the same weights on every process
    model = UNet2DModel(**network)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    size = int(model.config.sample_size)
    loader = DataLoader(
        Images(images, size),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),
    )
    abar = scheduler.alphas_cumprod.double()
    clusters = SNRClustering(num_tasks)((abar / (1 - abar)).log())  # ANT: tasks
    balancer = UncertaintyWeighting(num_tasks)
    optimizer = torch.optim.AdamW([*model.parameters(), *balancer.parameters()], lr=learning_rate)
    rate = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=num_steps)
    average = EMAModel(model.parameters(), decay=0.999)
    # The scheduler is not prepared: it counts steps of the optimizer, whatever the processes.
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    step = MultiTaskStep(model, balancer)  # ANT: in place of accelerator.backward
    average.to(accelerator.device)
    ranks, rank = accelerator.num_processes, accelerator.process_index
    generator = torch.Generator().manual_seed(seed)
    done, history = 0, []
    while done < num_steps:
        for x_start in loader:
            with accelerator.accumulate(model):
                # Every process draws for all of them and takes its own part, so that the result
                # does not depend on their number.
                t, tasks = clusters.sample(ranks * batch_size, generator=generator)
                shape = (ranks * batch_size, *x_start.shape[1:])
                noise = torch.randn(shape, generator=generator)
                t, tasks, noise = (each.chunk(ranks)[rank] for each in (t, tasks, noise))
                noise, steps = noise.to(x_start), t.to(x_start.device)
                x_t = scheduler.add_noise(x_start, noise, steps)

                def losses(rows: torch.Tensor) -> torch.Tensor:
                    output = model(x_t[rows], steps[rows]).sample
                    return (output - noise[rows]).square().mean((1, 2, 3))

                last = accelerator.sync_gradients
                report = step.backward(losses, tasks, accumulate=not last)  # ANT
                if last and report.finite:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    rate.step()
                    average.step(model.parameters())
                    history.append(report.task_losses.mean().item())
                step.update()
                done += last
            if done == num_steps:
                break
    bare = accelerator.unwrap_model(model)
    weights = {name: value.cpu().clone() for name, value in bare.state_dict().items()}
    if accelerator.is_main_process and output is not None:
        average.copy_to(bare.parameters())
        DDPMPipeline(bare, scheduler).save_pretrained(output)
    return {
        "processes": ranks,
        "wrapper": type(model).__name__,
        "weights": weights,
        "history": history,
    }


def main() -> None:
    """Train a UNet of 9 million weights for images of 64 x 64."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", required=True, help="folder of images")
    parser.add_argument("--output", default="unconditional", help="folder of the pipeline")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16, help="of a process")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--num_steps", type=int, default=10_000)
    options = vars(parser.parse_args())
    network = {
        "sample_size": options.pop("size"),
        "block_out_channels": (64, 128, 128, 256),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
    }
    found = train(options.pop("images"), network=network, **options)
    print(f"last losses {found['history'][-3:]} on {found['processes']} processes")


if __name__ == "__main__":
    main()
