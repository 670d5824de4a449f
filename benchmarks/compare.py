"""`make compare`: every method on the digits at the same budget, paired with vanilla.

Each run is two calls of the command line, fit and validate, in a process of its own. A row of
`results.jsonl` is written when a run is done; rows that are there are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ant_lightning.studies.provenance import commit, config_hash, machine

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
METRICS = ["fid", "fid_train", "fid_real", "precision", "recall", "class_agreement"]
# 97.5% points of Student's t by degrees of freedom: intervals of a few paired seeds.
T_QUANTILE = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}


def arguments_of(method: str, seed: int, steps: int) -> list[str]:
    """What both commands of a run have in common."""
    files = ["digits/dit.yaml", f"balancer/{method}.yaml", "clustering/snr.yaml"]
    args = [arg for name in files for arg in ("--config", str(CONFIGS / name))]
    return [*args, f"--seed_everything={seed}", f"--trainer.max_steps={steps}"]


def one_run(method: str, seed: int, steps: int, folder: Path) -> dict[str, object]:
    """Train and measure one method; returns its row."""
    common = arguments_of(method, seed, steps)
    name = f"{method}_seed{seed}"
    logger = "--trainer.logger.init_args"
    place = [f"{logger}.save_dir={folder.parent}", f"{logger}.name={folder.name}"]
    place += [f"{logger}.version={name}", "--trainer.enable_progress_bar=false"]
    last = folder / name / "checkpoints" / "last.ckpt"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    commands = [
        ["fit", *common, *place, "--trainer.limit_val_batches=0"],
        ["validate", *common, *place, f"--ckpt_path={last}"],
    ]
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "ant_lightning", *command],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{name}: {' '.join(command[:1])} failed\n{done.stderr[-2000:]}")
    lines = (folder / name / "generation_metrics.jsonl").read_text().splitlines()
    measured = json.loads(lines[-1])
    return {
        "method": method,
        "seed": seed,
        "steps": steps,
        "commit": commit(),
        "config": config_hash([Path(a).read_text() if a.endswith("yaml") else a for a in common]),
        "machine": machine(),
        **measured,
    }


def table(rows: list[dict[str, object]], methods: list[str]) -> str:
    """Mean and standard deviation over seeds, and the paired difference of FID to vanilla."""
    scores: dict[str, dict[int, dict[str, float]]] = {}
    for row in rows:
        scores.setdefault(str(row["method"]), {})[int(row["seed"])] = row["scores"]  # type: ignore[call-overload,assignment]
    lines = [
        "| method | " + " | ".join(METRICS) + " | FID - vanilla, paired [95% interval] |",
        "|---" * (len(METRICS) + 2) + "|",
    ]
    for method in methods:
        seeds = scores.get(method, {})
        cells = []
        for metric in METRICS:
            values = [s[metric] for s in seeds.values() if metric in s]
            spread = statistics.stdev(values) if len(values) > 1 else math.nan
            cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}" if values else "")
        pairs = [
            s["fid"] - scores["vanilla"][i]["fid"]
            for i, s in seeds.items()
            if i in scores["vanilla"]
        ]
        difference = ""
        if method != "vanilla" and len(pairs) > 1:
            half = T_QUANTILE[len(pairs) - 1] * statistics.stdev(pairs) / math.sqrt(len(pairs))
            mean = statistics.mean(pairs)
            difference = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
            if abs(mean) <= half:
                difference += ", no detectable difference"
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {difference} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--folder", type=Path, default=Path("runs/compare"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, a core each")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    results = args.folder / "results.jsonl"
    rows = (
        [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    )
    done = {(row["method"], row["seed"]) for row in rows if row["steps"] == args.steps}
    cells = [(m, s) for s in args.seeds for m in args.methods if (m, s) not in done]
    with ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(lambda cell: one_run(*cell, args.steps, args.folder), cells):
            rows.append(row)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"{row['method']:8s} seed {row['seed']}: FID {row['scores']['fid']:.2f}", flush=True
            )
    rows = [row for row in rows if row["steps"] == args.steps]
    print(f"\n{args.steps} steps each; {machine()}\n\n{table(rows, args.methods)}")


if __name__ == "__main__":
    main()
