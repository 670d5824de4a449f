"""Our networks against the same sizes elsewhere: `python -m benchmarks.backbones`.

Forward + backward in turns, one process; ratios above 1 mean that ours is faster. Peak memory is
that of a process of its own for each network. UNets are compared at equal widths; where diffusers'
has another number of multiplications, the ratio per multiplication is given as well.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ant_lightning.backbones import adm_p2_light, dit_s_2
from ant_lightning.studies.provenance import commit, machine

DIT = {"input_size": 32, "in_channels": 4, "num_classes": 1000, "learn_sigma": False}
ADM_PIXELS = 64


class ViTBlock(nn.Module):
    """A DiT block as it is written on top of a ViT library: attention, MLP, six modulations."""

    def __init__(self, hidden: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.fc1, self.fc2 = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.modulation = nn.Linear(hidden, 6 * hidden)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c))[:, None].chunk(
            6, dim=-1
        )
        h = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = rearrange(self.qkv(h), "b n (t h d) -> t b h n d", t=3, h=self.num_heads)
        h = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        x = x + gate1 * self.proj(h)
        h = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


class ViTBlocks(nn.Module):
    """Twelve such blocks on tokens: the part of DiT-S/2 that costs the time."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ViTBlock(384, 6) for _ in range(12))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, c)
        return x


class OurBlocks(nn.Module):
    """The blocks of our DiT-S/2, alone."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = dit_s_2(**DIT).blocks

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, c)
        return x


def networks(batch_size: int) -> dict[str, Callable[[], Callable[[], Tensor]]]:
    """Name to a maker of a call that computes a scalar."""

    def dit_inputs() -> tuple[Tensor, Tensor, Tensor]:
        return (
            torch.randn(batch_size, 4, 32, 32),
            torch.randint(0, 1000, (batch_size,)),
            torch.randint(0, 1000, (batch_size,)),
        )

    def ours_dit() -> Callable[[], Tensor]:
        model, (x, t, y) = dit_s_2(**DIT), dit_inputs()
        return lambda: model(x, t, y).square().mean()

    def theirs_dit() -> Callable[[], Tensor]:
        from diffusers import DiTTransformer2DModel  # noqa: PLC0415 - slow to import

        model = DiTTransformer2DModel(
            num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=4,
            num_layers=12, sample_size=32, patch_size=2, num_embeds_ada_norm=1000,
        )  # fmt: skip
        x, t, y = dit_inputs()
        return lambda: model(x, timestep=t, class_labels=y).sample.square().mean()

    def blocks(kind: type[nn.Module]) -> Callable[[], Tensor]:
        model = kind()
        x, c = torch.randn(batch_size, 256, 384), torch.randn(batch_size, 384)
        return lambda: model(x, c).square().mean()

    def adm_inputs() -> tuple[Tensor, Tensor]:
        return torch.randn(1, 3, ADM_PIXELS, ADM_PIXELS), torch.randint(0, 1000, (1,))

    def ours_adm() -> Callable[[], Tensor]:
        model, (x, t) = adm_p2_light(input_size=ADM_PIXELS), adm_inputs()
        return lambda: model(x, t).square().mean()

    def theirs_adm() -> Callable[[], Tensor]:
        from diffusers import UNet2DModel  # noqa: PLC0415 - slow to import

        down = ["DownBlock2D"] * 6
        up = ["UpBlock2D"] * 6
        down[4], up[1] = "AttnDownBlock2D", "AttnUpBlock2D"  # attention at one level, as ours
        model = UNet2DModel(
            sample_size=ADM_PIXELS, in_channels=3, out_channels=6, layers_per_block=1,
            block_out_channels=[128, 128, 256, 256, 512, 512], attention_head_dim=64,
            down_block_types=tuple(down), up_block_types=tuple(up),
            resnet_time_scale_shift="scale_shift", downsample_type="resnet",
            upsample_type="resnet",
        )  # fmt: skip
        x, t = adm_inputs()
        return lambda: model(x, t).sample.square().mean()

    return {
        "DiT-S/2, ours": ours_dit,
        "DiT-S/2, diffusers": theirs_dit,
        "DiT-S/2 blocks, ours": lambda: blocks(OurBlocks),
        "DiT-S/2 blocks, ViT style": lambda: blocks(ViTBlocks),
        "lightweight ADM, ours": ours_adm,
        "lightweight ADM, diffusers": theirs_adm,
    }


PAIRS = [
    ("DiT-S/2, ours", "DiT-S/2, diffusers"),
    ("DiT-S/2 blocks, ours", "DiT-S/2 blocks, ViT style"),
    ("lightweight ADM, ours", "lightweight ADM, diffusers"),
]


def peak_memory(name: str, batch_size: int, queue: mp.Queue) -> None:
    """MiB that three steps add to the process."""
    torch.set_num_threads(2)
    import diffusers  # noqa: F401, PLC0415 - both sides start from the same imports

    torch.ones(8, 8, requires_grad=True).square().sum().backward()
    before = _status("VmRSS")
    call = networks(batch_size)[name]()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    for _ in range(3):
        call().backward()
    queue.put((_status("VmHWM") - before) / 1024)


def _status(field: str) -> int:
    """KiB of this process, from the kernel."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def compare(rounds: int, batch_size: int) -> list[dict[str, object]]:
    """Time, multiplications and memory of each pair."""
    makers, rows = networks(batch_size), []
    context = mp.get_context("spawn")
    for ours, theirs in PAIRS:
        calls = {name: makers[name]() for name in (ours, theirs)}
        flops = {}
        for name, call in calls.items():
            with FlopCounterMode(display=False) as counter:
                call().backward()
            flops[name] = counter.get_total_flops()
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                start = time.perf_counter()
                call().backward()
                times[name].append(time.perf_counter() - start)
        quotients = np.array(times[theirs]) / np.array(times[ours])
        picks = np.random.default_rng(0).integers(0, rounds, (2000, rounds))
        low, high = np.percentile(np.median(quotients[picks], axis=1), [2.5, 97.5])
        memory = {}
        for name in calls:
            queue = context.Queue()
            process = context.Process(target=peak_memory, args=(name, batch_size, queue))
            process.start()
            memory[name] = queue.get()
            process.join()
        rows.append(
            {
                "pair": f"{ours} against {theirs.split(', ')[1]}",
                "speed": float(np.median(quotients)),
                "interval": [float(low), float(high)],
                "flops": flops[ours] / flops[theirs],
                "memory": memory[ours] / memory[theirs],
                "ours_ms": 1e3 * float(np.median(times[ours])),
            }
        )
    return rows


def main() -> None:
    """Print a table and keep it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/backbones.json"))
    args = parser.parse_args()
    rows = compare(args.rounds, args.batch_size)
    print(f"{machine()}; commit {commit()}\n")
    print(
        "| pair | speed [95%] | multiplications | peak memory | ours, ms |\n|---|---|---|---|---|"
    )
    for row in rows:
        low, high = row["interval"]  # type: ignore[misc]
        print(
            f"| {row['pair']} | {row['speed']:.2f} [{low:.2f}, {high:.2f}] | {row['flops']:.2f} | "
            f"{row['memory']:.2f} | {row['ours_ms']:.0f} |"
        )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine(), "commit": commit(), "rows": rows}
    args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
