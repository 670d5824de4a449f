"""Train a LoRA of Stable Diffusion on captioned images with Accelerate, as diffusers' loop does.

    python examples/diffusers_text_to_image_lora.py --model stable_diffusion_folder --images photos
    torchrun --nproc-per-node 2 examples/diffusers_text_to_image_lora.py --model ... --images ...

The images lie beside a `metadata.jsonl` with lines `{"file_name": "0.png", "text": "a red car"}`.
The lines marked ANT turn it into a multi-task loop over the LoRA's weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTextModel, CLIPTokenizer

from ant_lightning import MultiTaskStep, SNRClustering, UncertaintyWeighting


class Captioned(Dataset[dict[str, torch.Tensor]]):
    """Images `[3, size, size]` in [-1, 1] and the tokens of their captions."""

    def __init__(self, folder: str | Path, size: int, tokenizer: CLIPTokenizer) -> None:
        lines = (Path(folder) / "metadata.jsonl").read_text(encoding="utf8").splitlines()
        self.rows = [json.loads(line) for line in lines if line.strip()]
        self.folder, self.size, self.tokenizer = Path(folder), size, tokenizer

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index]
        picture = Image.open(self.folder / row["file_name"]).convert("RGB")
        pixels = np.array(picture.resize((self.size, self.size)))
        tokens = self.tokenizer(
            row["text"],
            max_length=self.tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_ids[0]
        return {
            "pixels": torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1,
            "tokens": tokens,
        }


def unet_with_adapter(model: str | Path, *, rank: int, seed: int) -> UNet2DConditionModel:
    """The UNet, frozen but for a LoRA of its attention, which is the same on every process."""
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").requires_grad_(False)
    torch.manual_seed(seed)
    attention = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=attention))
    return unet


def train(
    model: str | Path,
    images: str | Path,
    *,
    output: str | Path | None = None,
    size: int = 512,
    batch_size: int = 4,
    accumulation: int = 1,
    num_steps: int = 1000,
    num_tasks: int = 4,
    rank: int = 4,
    learning_rate: float = 1e-4,
    seed: int = 0,
) -> dict[str, Any]:
    """Train; `batch_size` is that of a process. Returns what a test looks at."""
    accelerator = Accelerator(gradient_accumulation_steps=accumulation)
    device = accelerator.device
    tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
    scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    text_encoder = CLIPTextModel.from_pretrained(model, subfolder="text_encoder").to(device)
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae").to(device)
    unet = unet_with_adapter(model, rank=rank, seed=seed)
    adapter = [each for each in unet.parameters() if each.requires_grad]
    loader = DataLoader(
        Captioned(images, size, tokenizer),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),
    )
    abar = scheduler.alphas_cumprod.double()
    clusters = SNRClustering(num_tasks)((abar / (1 - abar)).log())  # ANT: tasks
    balancer = UncertaintyWeighting(num_tasks)
    optimizer = torch.optim.AdamW([*adapter, *balancer.parameters()], lr=learning_rate)
    unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)
    step = MultiTaskStep(unet, balancer)  # ANT: in place of accelerator.backward
    ranks, place = accelerator.num_processes, accelerator.process_index
    generator = torch.Generator().manual_seed(seed)

    def own(drawn: torch.Tensor) -> torch.Tensor:
        """This process' part of what was drawn for all of them."""
        return drawn.chunk(ranks)[place]

    done, history = 0, []
    while done < num_steps:
        for batch in loader:
            with accelerator.accumulate(unet):
                with torch.no_grad():  # neither is trained
                    moments = vae.encode(batch["pixels"]).latent_dist
                    text = text_encoder(batch["tokens"])[0]
                shape = (ranks * batch_size, *moments.mean.shape[1:])
                sampled, noise = (
                    own(torch.randn(shape, generator=generator)).to(device) for _ in range(2)
                )
                x_start = (moments.mean + moments.std * sampled) * vae.config.scaling_factor
                t, tasks = (
                    own(each) for each in clusters.sample(ranks * batch_size, generator=generator)
                )
                steps = t.to(device)
                x_t = scheduler.add_noise(x_start, noise, steps)
                v_prediction = scheduler.config.prediction_type == "v_prediction"
                target = scheduler.get_velocity(x_start, noise, steps) if v_prediction else noise

                def losses(rows: torch.Tensor) -> torch.Tensor:
                    output = unet(x_t[rows], steps[rows], text[rows]).sample
                    return (output - target[rows]).square().mean((1, 2, 3))

                last = accelerator.sync_gradients
                report = step.backward(losses, tasks, accumulate=not last)  # ANT
                if last and report.finite:
                    accelerator.clip_grad_norm_(adapter, 1.0)
                    optimizer.step()
                    history.append(report.task_losses.mean().item())
                step.update()
                done += last
            if done == num_steps:
                break
    weights = get_peft_model_state_dict(accelerator.unwrap_model(unet))
    if accelerator.is_main_process and output is not None:
        layers = convert_state_dict_to_diffusers(weights)
        StableDiffusionPipeline.save_lora_weights(output, unet_lora_layers=layers)
    return {
        "processes": ranks,
        "wrapper": type(unet).__name__,
        "weights": {name: value.cpu().clone() for name, value in weights.items()},
        "history": history,
    }


def main() -> None:
    """Train with the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a Stable Diffusion pipeline")
    parser.add_argument("--images", required=True, help="folder with images and metadata.jsonl")
    parser.add_argument("--output", default="lora", help="folder for the LoRA")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=4, help="of a process")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--num_steps", type=int, default=1000)
    parser.add_argument("--rank", type=int, default=4)
    options = vars(parser.parse_args())
    found = train(options.pop("model"), options.pop("images"), **options)
    print(f"last losses {found['history'][-3:]} on {found['processes']} processes")


if __name__ == "__main__":
    main()
