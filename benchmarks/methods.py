"""`make bench`: times of clusterings, balancers and training steps.

Step times are ratios to vanilla training in the same run: the methods take turns, step by step, so
that drifts of the machine hit all of them; the interval is a bootstrap of the median of the paired
ratios. `official` is the method of the authors' code: k retained backward passes over the batch.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ant_lightning.backbones import DiT
from ant_lightning.balancing import (
    Balancer,
    LinearScalarization,
    NashMTL,
    PCGrad,
    UncertaintyWeighting,
    multitask_backward,
    nash_weights,
)
from ant_lightning.balancing.gradients import DenseTaskGradients
from ant_lightning.balancing.reduction import Reduction
from ant_lightning.clustering import SNRClustering, TimestepClustering
from ant_lightning.diffusion import CosineSchedule, DiffusionProcess, denoising_loss
from ant_lightning.studies.provenance import commit, machine

K = 5
MODELS = {
    "0.3M": {"hidden_size": 64, "depth": 4, "num_heads": 4},
    "3M": {"hidden_size": 192, "depth": 6, "num_heads": 6},
    "33M": {"hidden_size": 384, "depth": 12, "num_heads": 6},
}
INPUT_SIZES = {16: 8, 64: 16, 256: 32}


def milliseconds(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median and 95th percentile of the time of a call."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return float(np.median(times)), float(np.percentile(times, 95))


def small_things() -> list[tuple[str, float, float]]:
    """Clusterings at T = 1000 and balancers at k = 5."""
    log_snr = DiffusionProcess(CosineSchedule()).log_snr
    rows = torch.randn(K, 1000, dtype=torch.float64)
    gramian = rows @ rows.T
    hard = gramian * torch.logspace(0, 4, K).outer(torch.logspace(0, 4, K))
    pcgrad, nash = PCGrad(K), NashMTL(K, update_every=1)
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "SNR clustering, T = 1000, k = 5": (lambda: SNRClustering(K)(log_snr), 20),
        "timestep clustering, T = 1000, k = 5": (lambda: TimestepClustering(K)(log_snr), 20),
        "PCGrad, k = 5": (lambda: pcgrad(gramian), 2000),
        "Nash, k = 5": (lambda: nash(gramian), 2000),
        "Nash, norms over 4 decades": (lambda: nash_weights(hard), 2000),
    }
    return [(name, *milliseconds(call, repeats)) for name, (call, repeats) in calls.items()]


class Trainer:
    """One method on one model, stepped by hand."""

    def __init__(self, method: str, size: str, tokens: int, batch_size: int, device: str) -> None:
        torch.manual_seed(0)
        side = INPUT_SIZES[tokens]
        self.model = DiT(
            input_size=side, patch_size=2, in_channels=4, num_classes=10, **MODELS[size]
        ).to(device)
        self.process = DiffusionProcess(CosineSchedule(), variance_type="learned_range")
        self.clusters = SNRClustering(K)(self.process.log_snr)
        self.method = method
        self.balancer: Balancer | None = {
            "vanilla": lambda: None,
            "official": lambda: None,
            "linear": lambda: LinearScalarization(K),
            "uw": lambda: UncertaintyWeighting(K),
            "pcgrad": lambda: PCGrad(K),
            "nash": lambda: NashMTL(K, update_every=25),
            "nash every step": lambda: NashMTL(K, update_every=1),
        }[method]()
        shared = [p for p in self.model.parameters() if p.requires_grad]
        own = list(self.balancer.parameters()) if self.balancer else []
        self.optimizer = torch.optim.AdamW([*shared, *own], lr=1e-4)
        self.shared = shared
        self.rows = (
            DenseTaskGradients(K, shared, reduction=Reduction())
            if (method in {"pcgrad", "nash", "nash every step"})
            else None
        )
        self.batch_size = batch_size
        self.x = torch.randn(batch_size, 4, side, side, device=device)
        self.labels = torch.randint(0, 10, (batch_size,), device=device)
        self.device = device

    def step(self) -> None:
        """One optimization step."""
        t, tasks = self.clusters.sample(self.batch_size)
        noise = torch.randn_like(self.x)
        t_device = t.to(self.device)
        x_t = self.process.q_sample(self.x, t_device, noise)

        def losses(rows: Tensor) -> Tensor:
            rows = rows.to(self.device)
            output = self.model(x_t[rows], t_device[rows], self.labels[rows])
            args = (self.x[rows], x_t[rows], t_device[rows], noise[rows])
            return denoising_loss(self.process, output, *args).loss

        if self.method == "official":
            self._official(losses, tasks)
        else:
            report = multitask_backward(
                losses, tasks, self.shared, self.balancer, num_tasks=K, gradients=self.rows
            )
            factor = (1.0 / (report.grad_norm + 1e-6)).clamp(max=1.0).float()
            torch._foreach_mul_([p.grad for p in self.shared], factor)
        self.optimizer.step()
        if self.device != "cpu":
            torch.cuda.synchronize()

    def _official(self, losses: Callable[[Tensor], Tensor], tasks: Tensor) -> None:
        """k backward passes over one retained graph."""
        values = losses(torch.arange(self.batch_size))
        rows = []
        for task in range(K):
            loss = values[(tasks == task).to(self.device)].mean()
            grads = torch.autograd.grad(loss, self.shared, retain_graph=task < K - 1)
            rows.append(torch.cat([g.flatten() for g in grads]))
        matrix = torch.stack(rows)
        weights = PCGrad(K)(matrix.double() @ matrix.double().T).to(matrix)
        flat, start = weights @ matrix, 0
        for p in self.shared:
            p.grad = flat[start : start + p.numel()].view_as(p)
            start += p.numel()


def ratios(
    methods: list[str], size: str, tokens: int, batch_size: int, rounds: int, device: str
) -> Iterator[dict[str, object]]:
    """Speed of each method relative to vanilla: above 1 is faster."""
    trainers = {m: Trainer(m, size, tokens, batch_size, device) for m in ["vanilla", *methods]}
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for trainer in trainers.values():
        trainer.step()
    for _ in range(rounds):
        for name, trainer in trainers.items():
            start = time.perf_counter()
            trainer.step()
            times[name].append(time.perf_counter() - start)
    generator = np.random.default_rng(0)
    vanilla = np.array(times["vanilla"])
    for name in methods:
        own = np.array(times[name])
        picks = generator.integers(0, rounds, (2000, rounds))
        # Nash between refreshes is cheap and at a refresh dear: its cost is the mean, not the
        # median, so all methods are compared by means of paired rounds.
        draws = vanilla[picks].mean(1) / own[picks].mean(1)
        low, high = np.percentile(draws, [2.5, 97.5])
        yield {
            "model": size,
            "tokens": tokens,
            "batch_size": batch_size,
            "method": name,
            "vanilla_ms": 1e3 * float(np.median(vanilla)),
            "ratio": float(vanilla.mean() / own.mean()),
            "interval": [float(low), float(high)],
        }


def main() -> None:
    """Print two tables and keep them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--cells", nargs="+", default=["0.3M:16", "3M:16", "3M:64", "33M:64"])
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[
            "linear",
            "uw",
            "pcgrad",
            "nash",
            "nash every step",
            "official",
        ],
    )
    parser.add_argument("--output", type=Path, default=Path("runs/bench/methods.json"))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{machine()}; commit {commit()}\n\n| | median ms | 95% ms |\n|---|---|---|")
    small = small_things()
    for name, median, high in small:
        print(f"| {name} | {median:.3f} | {high:.3f} |")
    print("\n| model | tokens | batch | method | speed relative to vanilla [95%] | vanilla ms |")
    print("|---|---|---|---|---|---|", flush=True)
    rows = []
    for cell in args.cells:
        size, tokens = cell.split(":")
        rounds = max(10, args.rounds // 4) if size == "33M" else args.rounds
        for row in ratios(args.methods, size, int(tokens), args.batch_size, rounds, device):
            rows.append(row)
            low, high = row["interval"]  # type: ignore[misc]
            print(
                f"| {size} | {tokens} | {args.batch_size} | {row['method']} | "
                f"{row['ratio']:.3f} [{low:.3f}, {high:.3f}] | {row['vanilla_ms']:.1f} |",
                flush=True,
            )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine(), "commit": commit(), "small": small, "steps": rows}
    args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
