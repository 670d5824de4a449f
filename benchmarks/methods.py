"""Times and memory of training steps, against vanilla: `python -m benchmarks.methods`.

Speed is relative to vanilla training in the same run, on the same global batch, with one thread.
The methods take turns, step by step, in forward and reverse order, so that drifts of the machine
affect all of them. It is the ratio of the median times, with a 95% bootstrap interval over rounds;
the same ratio of processor time is disturbed less by other processes. Nash with a refresh every 25
steps counts as 24 steps between refreshes and one step of `nash every step`. Memory is measured in
a separate process for each method: the peak that the network and three steps add. On a GPU the
methods of a cell share one network, and memory is what three steps of each add.

`--quick` (the default) runs the cells that have targets, `--all` the whole grid, which takes hours
on a CPU. On a GPU there are other cells, the most informative first, and both options are the same;
`--minutes` starts no further cell after that time.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ant_lightning import (
    CosineSchedule,
    DiscreteDiffusion,
    NashMTL,
    PCGrad,
    SNRClustering,
    TimestepClustering,
    nash_weights,
)
from benchmarks.memory import added_memory
from benchmarks.steps import ENGINES, METHODS, TORCHJD, Cell, K, Stepper
from studies.provenance import commit, machine

Row = dict[str, Any]
NASH_EVERY = 25


def small_things() -> list[Row]:
    """Clusterings at T = 1000 and balancers at k = 5: median and 95th percentile, in ms."""
    log_snr = DiscreteDiffusion(CosineSchedule()).log_snr
    rows = torch.randn(K, 1000, dtype=torch.float64)
    gramian = rows @ rows.T
    hard = gramian * torch.logspace(0, 4, K).outer(torch.logspace(0, 4, K))
    pcgrad, nash = PCGrad(K), NashMTL(K, update_every=1)
    calls: dict[str, tuple[Callable[[], object], int, float]] = {
        "SNR clustering, T = 1000, k = 5": (lambda: SNRClustering(K)(log_snr), 20, 50),
        "timestep clustering, T = 1000, k = 5": (lambda: TimestepClustering(K)(log_snr), 20, 50),
        "PCGrad, k = 5": (lambda: pcgrad(gramian), 2000, 0.3),
        "Nash, k = 5": (lambda: nash(gramian), 2000, 1.5),
        "Nash, norms over 4 decades": (lambda: nash_weights(hard), 2000, 1.5),
    }
    if torch.cuda.is_available():
        there = gramian.cuda()
        calls |= {
            "PCGrad, k = 5, on a GPU": (lambda: pcgrad(there), 2000, 0.3),
            "Nash, k = 5, on a GPU": (lambda: nash(there), 2000, 1.5),
        }
    found = []
    for name, (call, repeats, asked) in calls.items():
        call()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            if name.endswith("GPU"):
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        low, high = np.percentile(times, [50, 95])
        found.append({"name": name, "median": low, "high": high, "asked": asked})
    return found


def asked_speed(cell: Cell, name: str) -> float | None:
    """The target for the speed relative to vanilla, if there is one."""
    if name in {"uw", "nash"}:
        return 1.0
    if name not in {"pcgrad", "nash every step"}:
        return None
    if cell.device != "cpu" and cell.batch_size < 256:
        return None
    if cell.device != "cpu":
        return 0.97
    if cell.network.endswith("/16"):
        return 0.85  # bound by call overhead
    return 0.96 if cell.compiled else 0.93


def speeds(cell: Cell, names: Sequence[str], rounds: int) -> Iterator[Row]:
    """Each method's speed relative to vanilla: above 1 is faster."""
    warm_ups = 3 if rounds >= 10 or cell.device != "cpu" else 1
    steppers, failed, memory = _steppers(cell, ["vanilla", *names], warm_ups)
    if "vanilla" in failed:
        names = ["vanilla"]
    order = [] if "vanilla" in failed else list(steppers)
    times = {name: np.empty((rounds, 2)) for name in order}
    for i in range(rounds):
        for name in order if i % 2 else reversed(order):
            start = time.perf_counter(), time.process_time()
            steppers[name].step()
            times[name][i] = time.perf_counter() - start[0], time.process_time() - start[1]
    picks = np.random.default_rng(0).integers(0, rounds, (5000, rounds))
    identity = np.arange(rounds)[None]
    for name in names:
        row: Row = {"cell": str(cell), "batch": cell.batch_size, "name": name, "memory": memory}
        if name in failed:
            yield {**row, "error": failed[name]}
            continue
        draws = _medians(times, "vanilla", picks) / _medians(times, name, picks)
        ratio = _medians(times, "vanilla", identity) / _medians(times, name, identity)
        yield {
            **row,
            "engine": steppers[name].engine_name,
            "vanilla_ms": 1e3 * float(np.median(times["vanilla"][:, 0])),
            "speed": float(ratio[0, 0]),
            "interval": np.percentile(draws[:, 0], [2.5, 97.5]).tolist(),
            "processor": float(ratio[0, 1]),
            "processor_interval": np.percentile(draws[:, 1], [2.5, 97.5]).tolist(),
            "asked": asked_speed(cell, name),
            "parameters": steppers[name].num_parameters,
        }


def _steppers(
    cell: Cell, names: Sequence[str], warm_ups: int
) -> tuple[dict[str, Stepper], dict[str, str], dict[str, float]]:
    """Each method after some steps, the reasons of those that cannot run, and MiB on a GPU."""
    on_gpu = cell.device != "cpu"
    steppers: dict[str, Stepper] = {}
    failed: dict[str, str] = {}
    memory: dict[str, float] = {}
    shared = cell.build() if on_gpu or cell.compiled else None  # compiled once for all
    weights = sum(p.numel() * p.element_size() for p in shared.parameters()) if shared else 0
    for name in names:
        if on_gpu:
            for stepper in steppers.values():
                stepper.model.zero_grad()
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() if on_gpu else 0
        try:
            # The hooks of autogram stay on its network, so it gets one of its own.
            stepper = Stepper(name, cell, None if name == TORCHJD[0] else shared)
            for _ in range(warm_ups):
                stepper.step()
            steppers[name] = stepper
        except RuntimeError as error:
            failed[name] = str(error).splitlines()[0]  # no memory on a GPU, or not to be compiled
            continue
        if on_gpu:
            own = weights if stepper.model is shared else 0
            memory[name] = (torch.cuda.max_memory_allocated() - held + own) / 2**20
    return steppers, failed, memory


def _medians(times: dict[str, np.ndarray[Any, Any]], name: str, picks: Any) -> Any:  # noqa: ANN401
    """Median wall and processor time of a step in each draw of rounds, `[draws, 2]`."""
    own = np.median(times[name][picks], axis=1)
    if name != "nash" or "nash every step" not in times:
        return own
    refresh = np.median(times["nash every step"][picks], axis=1)
    return ((NASH_EVERY - 1) * own + refresh) / NASH_EVERY


def warm_up(name: str, cell: Cell) -> None:
    """Imports, threads and workspace of the kernels."""
    Stepper("vanilla", Cell("0.3M/16", K, cell.device)).step()


def three_steps(name: str, cell: Cell) -> None:
    """What is measured."""
    stepper = Stepper(name, cell)
    for _ in range(3):
        stepper.step()


def memories(cell: Cell, names: Sequence[str]) -> dict[str, float]:
    """Peak memory of each method, in MiB."""
    found = {}
    for name in ["vanilla", *names]:
        try:
            found[name] = added_memory(warm_up, three_steps, name, cell)
        except RuntimeError:  # `speeds` has said why
            found[name] = float("nan")
    return found


def cells(every: bool) -> list[tuple[Cell, int, bool]]:
    """The cells, with the number of rounds and whether memory is measured."""
    if torch.cuda.is_available():
        networks = [("DiT-S/2", 256), ("DiT-B/2", 256), ("DiT-S/2", 50), ("LDM FFHQ", 50)]
        networks += [("DiT-B/2", 50), ("ADM light, 256 px", 50), ("LDM FFHQ", 256)]
        modes = ("", "default", "reduce-overhead")
        return [
            (Cell(n, b, "cuda", bf16=True, compiled=mode), 20, True)
            for n, b in networks
            for mode in modes
        ]
    quick = [("3M/16", 30, False), ("3M/64", 16, True), ("33M/64", 6, False)]
    if not every:
        found = [(Cell(name, 40), rounds, memory) for name, rounds, memory in quick]
        return [*found, (Cell("3M/64", 40, compiled="default"), 16, False)]
    rounds = {"0.3M": 60, "3M": 20, "33M": 6}
    grid = [(f"{size}/{tokens}", rounds[size]) for size in rounds for tokens in (16, 64, 256)]
    eager = [(Cell(name, 40), n, True) for name, n in [*grid, ("ADM light, 32 px", 4)]]
    eager.append((Cell("LDM digits", 64), 60, True))
    return [*eager, (Cell("3M/64", 40, compiled="default"), 16, False)]


def speed_line(row: Row) -> str:
    """A line of the table of times."""
    start = f"| {row['cell']} | {row['batch']} | {row['name']} | "
    if "error" in row:
        return f"{start} | failed: {row['error'][:80]} | | | |"
    shown = [
        f"{row[key]:.3f} [{row[interval][0]:.3f}, {row[interval][1]:.3f}]"
        for key, interval in (("speed", "interval"), ("processor", "processor_interval"))
    ]
    asked, verdict = row["asked"], ""
    if asked is not None:
        reached = row["interval"][1] >= asked
        verdict = "met" if row["speed"] >= asked else "in the interval" if reached else "missed"
        verdict = f"{asked} {verdict}"
    line = " | ".join([row["engine"], *shown, verdict, f"{row['vanilla_ms']:.1f}"])
    return f"{start}{line} |"


def memory_lines(cell: Cell, found: dict[str, float], parameters: int) -> Iterator[tuple[Row, str]]:
    """Rows and lines of the table of memory."""
    rows_mib = K * parameters * 4 / 2**20
    vanilla = found.get("vanilla", float("nan"))  # `speeds` has said why
    for name, mib in found.items():
        above = (mib - vanilla) / rows_mib
        row = {"cell": str(cell), "batch": cell.batch_size, "name": name, "mib": mib}
        row |= {"ratio": mib / vanilla, "above_vanilla_in_rows": above}
        asked = ""
        if name in {"pcgrad", "nash", "nash every step"}:
            asked = "1 met" if above <= 1 else "1 missed"
        line = f"| {cell} | {cell.batch_size} | {name} | {mib:.0f} | {row['ratio']:.3f} "
        yield row, f"{line}| {above:+.2f} | {asked} |"


def main() -> None:
    """Print the tables of docs/benchmarks.md and keep them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="cells with thresholds (the default)")
    which.add_argument("--all", action="store_true", help="the whole grid: hours on a CPU")
    parser.add_argument("--cells", nargs="+", help="only these, for instance 3M/64")
    parser.add_argument("--names", nargs="+", help="only these methods and engines")
    parser.add_argument("--rounds", type=int, help="of every cell")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/methods.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = args.names or [*(m for m in METHODS if m != "vanilla"), *ENGINES, *TORCHJD]
    chosen = cells(args.all or bool(args.cells))
    if args.cells:
        chosen = [each for each in chosen if {each[0].network, str(each[0])} & set(args.cells)]
    print(f"{machine()}; commit {commit()}\n\n| | median ms | 95% ms | target |\n|---|---|---|---|")
    small = small_things()
    for row in small:
        print(f"| {row['name']} | {row['median']:.3f} | {row['high']:.3f} | {row['asked']} |")
    print(
        "\n| network | batch | method | engine | speed relative to vanilla [95%] | by processor "
        "time [95%] | target | vanilla ms |\n|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    steps: list[Row] = []
    memory: list[Row] = []
    lines: list[str] = []
    origin = {"machine": machine(), "commit": commit(), "threads": args.threads}
    result = {**origin, "small": small, "steps": steps, "memory": memory}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    for cell, rounds, with_memory in chosen:
        if time.monotonic() - start > 60 * args.minutes:
            break
        found: dict[str, float] = {}
        few = not args.names and (cell.compiled or cell.network.startswith("33M"))
        methods = [name for name in names if not few or (name in METHODS and name != "official")]
        for row in speeds(cell, methods, args.rounds or rounds):
            found = row.pop("memory")
            steps.append(row)
            print(speed_line(row), flush=True)
        if with_memory and not args.no_memory:
            found = found if cell.device != "cpu" else memories(cell, methods)
            parameters = sum(p.numel() for p in cell.build().parameters() if p.requires_grad)
            for row, line in memory_lines(cell, found, parameters):
                memory.append(row)
                lines.append(line)
        args.output.write_text(json.dumps(result, indent=1))
    print(
        "\n| network | batch | method | peak MiB | relative to vanilla | above vanilla, in "
        "k p 4 bytes | target, at most |\n|---|---|---|---|---|---|---|"
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
