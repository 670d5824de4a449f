"""Our networks against the same ones elsewhere: `python -m benchmarks.backbones`.

Forward + backward of one process, the two of a pair in turns, the first one alternating. `speed` is
the ratio of the median times (above 1: ours is faster) with the 95% bootstrap interval over rounds.
`memory` is the ratio of peak memory: each network in a process of its own, the high-water mark of
resident memory of three steps less what the process held before the network was made (weights,
gradients, activations, work space of the kernels). Multiplications are counted twice: of the layers
as written (on the meta device), and as run.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import added_memory
from benchmarks.networks import PAIRS, Network, build, check_same_unet
from studies.provenance import commit, machine


def prepare(name: str, settings: dict[str, Any]) -> None:
    """What both sides of a pair start from: the same imports, and autograd in use."""
    import diffusers  # noqa: F401, PLC0415 - slow to import

    build(name.replace("diffusers", "ours"), **settings, device="meta")
    torch.ones(8, 8, requires_grad=True).square().sum().backward()


def three_steps(name: str, settings: dict[str, Any]) -> None:
    """Build a network and use it."""
    network = build(name, **settings)
    for _ in range(3):
        network.model.zero_grad()
        network.step()


def flops(network: Network) -> int:
    """Operations of a forward and a backward pass."""
    with FlopCounterMode(display=False) as counter:
        network.step()
    return int(counter.get_total_flops())


def seconds(network: Network) -> float:
    """Time of a forward and a backward pass."""
    network.model.zero_grad()
    start = time.perf_counter()
    network.step()
    return time.perf_counter() - start


def compare(pair: tuple[str, str], rounds: int, settings: dict[str, Any]) -> dict[str, object]:
    """Time, multiplications and memory of a pair."""
    torch.manual_seed(0)
    networks = [build(name, **settings) for name in pair]
    counted = [
        [flops(build(name, **settings, device="meta")) for name in pair],
        [flops(network) for network in networks],
    ]
    times = np.empty((rounds, 2))
    for i in range(rounds):
        for side in (0, 1) if i % 2 else (1, 0):
            times[i, side] = seconds(networks[side])
    picks = np.random.default_rng(0).integers(0, rounds, (5000, rounds))
    medians = np.median(times[picks], axis=1)
    low, high = np.percentile(medians[:, 1] / medians[:, 0], [2.5, 97.5])
    ours, theirs = np.median(times, axis=0)
    parameters = [sum(p.numel() for p in n.model.parameters()) for n in networks]
    del networks
    memory = [added_memory(prepare, three_steps, name, settings) for name in pair]
    return {
        "pair": f"{pair[0]} against {pair[1].split(', ')[1]}",
        "speed": float(theirs / ours),
        "interval": [float(low), float(high)],
        "ms": [1e3 * float(ours), 1e3 * float(theirs)],
        "memory": memory[0] / memory[1],
        "memory_mib": memory,
        "parameters": parameters,
        "flops_written": counted[0],
        "flops_run": counted[1],
    }


def main() -> None:
    """Print a table and keep it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=4, help="of DiT")
    parser.add_argument("--pixels", type=int, default=128, help="of the ADM, batch of 1")
    parser.add_argument("--pairs", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/bench/backbones.json"))
    args = parser.parse_args()
    settings = {"batch_size": args.batch_size, "pixels": args.pixels}
    difference = check_same_unet()
    print(f"{machine()}; commit {commit()}; UNets with equal weights differ by {difference:.0e}\n")
    print(
        "| pair | speed [95%] | ours / theirs, ms | peak memory | ours / theirs, MiB | parameters "
        "| multiplications, written | run |\n|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    rows = []
    for number in args.pairs:
        row: Any = compare(PAIRS[number], args.rounds, settings)
        rows.append(row)
        ratios = [row[k][0] / row[k][1] for k in ("parameters", "flops_written", "flops_run")]
        print(
            f"| {row['pair']} | {row['speed']:.3f} [{row['interval'][0]:.3f}, "
            f"{row['interval'][1]:.3f}] | {row['ms'][0]:.0f} / {row['ms'][1]:.0f} | "
            f"{row['memory']:.3f} | {row['memory_mib'][0]:.0f} / {row['memory_mib'][1]:.0f} | "
            + " | ".join(f"{ratio:.3f}" for ratio in ratios)
            + " |",
            flush=True,
        )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": machine(),
        "commit": commit(),
        "settings": {**settings, "rounds": args.rounds},
        "rows": rows,
    }
    args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
