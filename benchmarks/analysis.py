"""Metrics and task affinity at the sizes that papers use: time, memory, error.

Each part runs in a separate process, so that its peak memory is measured alone. `affinity` measures
all timesteps of a DiT-S/2 (33 million parameters, 16 tokens) with real, sketched gradients of one
image for each half; with `--state` an interrupted measurement resumes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ant_lightning import (
    CosineSchedule,
    DiscreteDiffusion,
    DiT,
    frechet_distance,
    plain_affinity,
    precision_recall,
    task_affinity,
)
from ant_lightning.affinity.sketch import HadamardSketch
from ant_lightning.generation.frechet import GaussianStatistics
from studies.provenance import commit, machine

GIB = 2**20  # of ru_maxrss, which is in KiB


def features(seed: int, *, count: int = 10_000, dimension: int = 2048) -> Tensor:
    """Correlated features with a spectrum over two decades, as for Inception."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -2, dimension)
    mixing = torch.linalg.qr(torch.randn(dimension, dimension, generator=generator)).Q
    drawn = torch.randn(count, dimension, generator=generator) * scale
    shifted: Tensor = drawn @ mixing + 0.01 * seed
    return shifted


def fid(_: argparse.Namespace) -> dict[str, Any]:
    """FID of 10,000 images at 2048 dimensions, and scipy's `sqrtm` on the same moments."""
    from scipy.linalg import sqrtm  # noqa: PLC0415 - the other parts do without

    real, generated = features(1), features(2)
    start = time.perf_counter()
    first = GaussianStatistics.from_features(real)
    reference = time.perf_counter()
    second = GaussianStatistics.from_features(generated)
    value = frechet_distance(second, first)
    done = time.perf_counter()
    root = sqrtm(first.covariance.numpy() @ second.covariance.numpy()).real
    mean = (first.mean - second.mean).square().sum()
    exact = float(mean + first.covariance.trace() + second.covariance.trace()) - 2 * np.trace(root)
    return {
        "seconds with a cached reference": done - reference,
        "seconds with both covariances": done - start,
        "relative difference from sqrtm": abs(value - exact) / exact,
    }


def neighbours(_: argparse.Namespace) -> dict[str, Any]:
    """Precision and recall of 10,000 against 10,000 at 2048 dimensions."""
    real, generated = features(1), features(2)
    start = time.perf_counter()
    precision_recall(real, generated)
    return {"seconds": time.perf_counter() - start}


def sketch(_: argparse.Namespace) -> dict[str, Any]:
    """Largest error of the cosines of 100 sketched rows, in units of 4 / sqrt(m)."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(200_000, generator=generator)
    weights = torch.linspace(0, 3, 100)
    rows = [w * common + torch.randn(200_000, generator=generator) for w in weights]
    unit = torch.stack(rows) / torch.stack(rows).norm(dim=1, keepdim=True)
    exact = unit @ unit.T
    found = {}
    for m in (256, 1024, 4096):
        project = HadamardSketch(200_000, sketch_dim=m, seed=0)
        kept = torch.stack([project(row) for row in rows]).bfloat16().float()
        kept = kept / kept.norm(dim=1, keepdim=True)
        error = (kept @ kept.T - exact).abs().max()
        found[f"largest error over 4 / sqrt(m), m = {m}"] = float(error) * m**0.5 / 4
    return found


def affinity(args: argparse.Namespace) -> dict[str, Any]:
    """All timesteps of a model of 33 million parameters, with sketches of real gradients."""
    torch.manual_seed(0)
    model = DiT(
        input_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=384,
        depth=12,
        num_heads=6,
        num_classes=1000,
    )
    with torch.no_grad():  # adaLN-Zero starts with most gradients at 0
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    process = DiscreteDiffusion(CosineSchedule())
    images = torch.randn(256, 4, 8, 8).tanh()

    def loss(timestep: int, half: int) -> Tensor:
        generator = torch.Generator().manual_seed(2 * timestep + half)
        index = 2 * torch.randint(128, (1,), generator=generator) + half
        noise = torch.randn(1, 4, 8, 8, generator=generator)
        t = torch.full((1,), timestep)
        output: Tensor = model(process.q_sample(images[index], t, noise), t, index)
        return (output[:, :4] - noise).square().mean()

    marks: dict[int, float] = {}
    start = time.perf_counter()

    def seen(done: int, total: int) -> None:
        marks[done] = time.perf_counter()
        if done % 50 == 0:
            print(f"{done} of {total} timesteps", flush=True)

    result = task_affinity(
        loss,
        parameters=model.parameters(),
        num_timesteps=1000,
        timesteps=range(0, 1000, 1000 // args.points),
        sketch_dim=args.sketch_dim,
        memory_budget_mb=4096,
        resume_dir=args.state,
        warn_below=-1,
        on_progress=seen,
    )
    end, rows_done = time.perf_counter(), max(marks.values())
    plain = plain_affinity(result.half_dots)
    return {
        "parameters": result.num_parameters,
        "timesteps, all of real gradients": len(result.timesteps),
        "sketch_dim": args.sketch_dim,
        "seconds of gradients and projections": rows_done - start,
        "share of what follows them": (end - rows_done) / (end - start),
        "MiB of kept rows": len(result.timesteps) * args.sketch_dim * 4 / 2**20,
        "largest |cosine| off the diagonal": float((plain[0] - torch.eye(len(plain[0]))).max()),
    }


PARTS = {"fid": fid, "neighbours": neighbours, "sketch": sketch, "affinity": affinity}


def measured(name: str, args: argparse.Namespace, queue: Any) -> None:  # noqa: ANN401
    """Run a part in this process and send its results and its peak memory."""
    torch.set_num_threads(args.threads)
    found = PARTS[name](args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    queue.put({**found, "peak GiB of the process": peak / GIB})


def main() -> None:
    """Print a table and keep it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--points", type=int, default=1000, help="timesteps of `affinity`")
    parser.add_argument("--sketch-dim", type=int, default=4096)
    parser.add_argument("--state", type=Path, help="folder that keeps its finished timesteps")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("runs/bench/analysis.json"))
    args = parser.parse_args()
    print(f"{machine(args.threads)}; commit {commit()}\n\n| part | what | figure |\n|---|---|---|")
    context = multiprocessing.get_context("spawn")
    results = {}
    for name in args.parts:
        queue = context.Queue()
        process = context.Process(target=measured, args=(name, args, queue))
        process.start()
        while process.is_alive() and queue.empty():
            process.join(0.2)
        if queue.empty():
            raise SystemExit(f"{name}: failed")
        results[name] = queue.get()
        process.join()
        for what, value in results[name].items():
            print(f"| {name} | {what} | {value:.4g} |", flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    facts = {"machine": machine(args.threads), "commit": commit(), "results": results}
    args.output.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
