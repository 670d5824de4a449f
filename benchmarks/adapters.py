"""PCGrad against vanilla where an adapter is trained: `python -m benchmarks.adapters`.

One `SD3Transformer2DModel` with LoRA, the same weights and batch for both. They take turns, step by
step, in an order that turns round every time, so that drifts of the machine affect both. Printed is
vanilla's median time over PCGrad's (1 is as fast, below 1 slower), with a 95% bootstrap interval
over rounds, and the same of processor time, which other processes disturb less; so do the quietest
fifth of the steps of each. With `--keep` the allocator keeps what is freed. By default glibc gives
the free top of its heap back to the kernel, and the steps that follow fault it in again; which of
the two steps that meets depends on where the other's tensors lie, and changes from run to run.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import resource
import time
from collections.abc import Callable

import numpy as np
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from ant_lightning import (
    DiffusersBackbone,
    FlowMatching,
    LoRA,
    MultiTaskStep,
    PCGrad,
    SNRClustering,
)
from ant_lightning.models.adapters import insert

K, TOKENS = 5, 32


def main() -> None:
    """Time both and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=20)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--size", type=int, default=16, help="side of the latents")
    parser.add_argument("--keep", action="store_true", help="no memory goes back to the kernel")
    given = parser.parse_args()
    if given.keep and platform.libc_ver()[0] == "glibc":
        for what in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(what, 2**31 - 1)
    if given.device == "cpu":
        torch.set_num_threads(1)
    steps = {
        name: _step(given, balancer)
        for name, balancer in (("vanilla", None), ("pcgrad", PCGrad(K)))
    }
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in steps}
    for number in range(-3, given.rounds):
        for name in list(steps)[:: 1 if number % 2 else -1]:
            wall, processor, faults = time.perf_counter(), time.process_time(), _page_faults()
            steps[name]()
            if given.device != "cpu":
                torch.cuda.synchronize()
            if number >= 0:
                seconds = time.perf_counter() - wall, time.process_time() - processor
                times[name].append((*seconds, _page_faults() - faults))
    found = {name: np.array(each) for name, each in times.items()}
    for name, each in found.items():
        print(f"{name}: {each[:, 2].mean():.0f} page faults a step")
    draws = np.random.default_rng(0).integers(given.rounds, size=(2000, given.rounds))
    for column, kind in enumerate(("time", "processor time")):
        one, two = (found[name][:, column] for name in ("vanilla", "pcgrad"))
        ratios = np.median(one[draws], 1) / np.median(two[draws], 1)
        low, high = np.quantile(ratios, [0.025, 0.975])
        ratio = np.median(one) / np.median(two)
        few = [np.sort(each)[: max(1, given.rounds // 5)].mean() for each in (one, two)]
        print(
            f"{kind}: vanilla {1e3 * np.median(one):.1f} ms, PCGrad {1e3 * np.median(two):.1f} ms, "
            f"ratio {ratio:.3f} [{low:.3f}, {high:.3f}]; in the quietest fifth of the steps "
            f"{1e3 * few[0]:.1f} and {1e3 * few[1]:.1f} ms, ratio {few[0] / few[1]:.3f}"
        )


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _step(given: argparse.Namespace, balancer: PCGrad | None) -> Callable[[], None]:
    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=given.size,
        num_layers=given.depth,
        attention_head_dim=64,
        num_attention_heads=given.width // 64,
        in_channels=16,
        out_channels=16,
        joint_attention_dim=given.width,
        caption_projection_dim=given.width,
        pooled_projection_dim=given.width,
        pos_embed_max_size=given.size,
    )
    backbone = DiffusersBackbone(network)
    insert(LoRA(r=16), backbone)
    backbone.to(given.device)
    trained = [p for p in backbone.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    process = FlowMatching(convention="diffusers")
    clusters = SNRClustering(K)(process.log_snr)
    step = MultiTaskStep(backbone, balancer, num_tasks=K)
    b = given.batch_size
    x = torch.randn(b, 16, given.size, given.size, device=given.device)
    told = {
        "encoder_hidden_states": torch.randn(b, TOKENS, given.width, device=given.device),
        "pooled_projections": torch.randn(b, given.width, device=given.device),
    }

    def run() -> None:
        cells, tasks = clusters.sample(b)
        t = process.times(cells).to(given.device)
        noise = torch.randn_like(x)
        x_t = process.noised(x, noise, t)

        def losses(rows: Tensor) -> Tensor:
            rows = rows.to(given.device)
            x_in, time_told = process.network_inputs(x_t[rows], t[rows])
            output: Tensor = backbone(
                x_in.float(), time_told, {n: e[rows] for n, e in told.items()}
            )
            return (output - (noise - x)[rows]).square().mean((1, 2, 3))

        step.backward(losses, tasks)
        optimizer.step()
        step.update()

    return run


if __name__ == "__main__":
    main()
