"""Tiny networks of diffusers as backbones, modules of them, and data with their conditions."""

import json
from pathlib import Path

import diffusers
import torch
from tiny_digits import trainer
from torch.utils.data import DataLoader, Dataset

from ant_lightning import (
    Batch,
    Checkpoints,
    CosineSchedule,
    DiffusersBackbone,
    DiscreteDiffusion,
    FlowMatching,
    MultiTaskDiffusion,
    Optimization,
    SNRClustering,
    Tasks,
)

GOLDEN = Path(__file__).parent / "golden" / "M_diffusers"
SHAPES = {"encoder_hidden_states": (3, 12), "pooled_projections": (10,)}
NETWORKS = [*(path.stem.removeprefix("manifest_") for path in sorted(GOLDEN.glob("manifest_*")))]
FLUX = "FluxTransformer2DModel"
CASES = [*NETWORKS, f"{FLUX} with guidance", "UNet2DModel with labels"]


def network(case, **settings):
    name, _, variant = case.partition(" with ")
    config = json.loads((GOLDEN / f"manifest_{name}.json").read_text())["config"]
    if name == FLUX:
        config |= {"in_channels": 16, "guidance_embeds": variant == "guidance"}
    if variant == "labels":
        config["num_class_embeds"] = 5
    torch.manual_seed(0)
    made = getattr(diffusers, name)(**config | settings)
    with torch.no_grad():  # some layers start at 0, and their inputs would not matter
        for p in made.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return made


def backbone(case):
    null = 4 if case.endswith("labels") else None
    size = (4, 6) if case.startswith(FLUX) else None
    return DiffusersBackbone(network(case), input_size=size, null_class=null)


def process_for(net):
    if type(net.network).__name__.startswith(("SD3", "Flux", "Sana")):
        return FlowMatching()
    kind = "learned_range" if net.out_channels == 2 * net.in_channels else "fixed_small"
    return DiscreteDiffusion(CosineSchedule(100), variance_type=kind)


def module(case="SD3Transformer2DModel", balancer=None, **settings):
    net = backbone(case)
    process = settings.pop("process", None) or process_for(net)
    return MultiTaskDiffusion(
        net,
        process=process,
        tasks=Tasks(SNRClustering(3), balancer=balancer),
        optimization=Optimization(lambda groups: torch.optim.AdamW(groups, lr=1e-2)),
        class_dropout=0.3 if net.null_condition else 0.0,
        seed=0,
        **settings,
    )


class Images(Dataset):
    def __init__(self, net):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(6, net.in_channels, *net.input_size, generator=generator).tanh()
        names = [name for name in net.null_condition if name != "labels"]
        self.told = {n: torch.randn(6, *SHAPES[n], generator=generator) for n in names}

    def __len__(self):
        return 6

    def __getitem__(self, i):
        told = {name: each[i] for name, each in self.told.items()}
        return Batch(self.images[i], torch.tensor(i % 4), torch.tensor(i), told)


def fit(folder, made, steps, resume=None):
    saves = Checkpoints(dirpath=folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    run = trainer(folder, saves, steps=steps, enable_checkpointing=True, limit_val_batches=0)
    loader = DataLoader(Images(made.backbone), 6)
    run.fit(made, loader, loader, ckpt_path=resume)
    return torch.load(folder / f"step={steps}.ckpt", weights_only=True)["state_dict"]
