"""Does affinity fall with the distance of timesteps? ADM, LDM and DiT trained on the digits.

Each run is two calls of the command line: a plain training (no balancer) and a `validate` with
`TaskAffinity` on the averaged weights; for LDM the autoencoder is trained first. A row of
`results.jsonl` is written when a run is done; the table is of all rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from ant_lightning.analysis import AffinityResult, distance_correlation
from benchmarks.provenance import commit, config_hash, machine

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
CALLBACK = "ant_lightning.callbacks.TaskAffinity"


def command_line(*args: str) -> None:
    """One call of `ant-lightning` on one thread.

    Raises:
        RuntimeError: With the end of its output if it fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", "ant_lightning", *args],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{args[0]} failed\n{done.stdout[-1000:]}{done.stderr[-2000:]}")


def one_run(
    model: str, seed: int, *, minutes: float, points: int, images: int, folder: Path
) -> dict[str, object]:
    """Train and measure one model; returns its row."""
    name = f"{model}_seed{seed}"
    logger = "--trainer.logger.init_args"
    seconds = int(60 * minutes)
    limit = f"--trainer.max_time=00:00:{seconds // 60:02d}:{seconds % 60:02d}"
    files = [f"digits/{model}.yaml", "balancer/vanilla.yaml", "clustering/snr.yaml"]
    common = [arg for file in files for arg in ("--config", str(CONFIGS / file))]
    common += [f"--seed_everything={seed}", "--trainer.enable_progress_bar=false"]
    common += [f"{logger}.save_dir={folder.parent}", f"{logger}.name={folder.name}"]
    common += [f"{logger}.version={name}"]
    if model == "ldm":
        stage = folder / f"{name}_first_stage"
        options = [f"{logger}.save_dir={folder.parent}", f"{logger}.name={stage.name}_run"]
        options += [f"--model.init_args.export={stage}", "--trainer.max_time=00:00:01:00"]
        command_line("fit", "--config", str(CONFIGS / "digits/autoencoder.yaml"), *options)
        common += [f"--model.init_args.first_stage.init_args.source={stage}"]
    start = time.monotonic()
    command_line("fit", *common, limit, "--trainer.limit_val_batches=0")
    trained = time.monotonic()
    checkpoint = folder / name / "checkpoints" / "last.ckpt"
    measure = {"class_path": CALLBACK, "init_args": {"num_points": points, "num_images": images}}
    command_line(
        "validate", *common, f"--ckpt_path={checkpoint}", f"--trainer.callbacks+={measure}"
    )
    lines = (folder / name / "generation_metrics.jsonl").read_text().splitlines()
    scores = json.loads(lines[-1])["scores"]
    return {
        "model": model,
        "seed": seed,
        "steps": torch.load(checkpoint, weights_only=True, map_location="cpu")["global_step"],
        "train_seconds": round(trained - start),
        "measure_seconds": round(time.monotonic() - trained),
        "points": points,
        "images": images,
        "fid": scores["fid"],
        "class_agreement": scores["class_agreement"],
        "commit": commit(),
        "config": config_hash([(CONFIGS / file).read_text() for file in files]),
        "machine": machine(),
        **correlations(AffinityResult.load(folder / name / "task_affinity.npz")),
    }


def correlations(result: AffinityResult) -> dict[str, object]:
    """Spearman's rank correlation of both estimates with both distances, and what to read first."""
    n = len(result.timesteps)
    pairs = result.plain[~torch.eye(n, dtype=torch.bool)]
    row: dict[str, object] = {
        "lowest_reliability": float(result.reliability.min()),
        "lowest_affinity": float(pairs.min()),
        "negative_pairs": float((pairs < 0).double().mean()),
    }
    steps = torch.tensor(result.timesteps, dtype=torch.float64)
    for axis, positions in (("log_snr", result.grid_log_snr), ("timestep", steps)):
        for estimate in ("plain", "corrected"):
            rank = distance_correlation(getattr(result, estimate), positions)
            row[f"{estimate}_{axis}"] = [rank.estimate, rank.low, rank.high]
    return row


def table(rows: list[dict[str, object]]) -> str:
    """One line for each run."""
    lines = [
        "| model | seed | steps | class agreement | lowest reliability | log-SNR, plain "
        "| log-SNR, corrected | timestep, plain | pairs in conflict |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        cells = [row["model"], row["seed"], row["steps"]]
        cells += [f"{row['class_agreement']:.1%}", f"{row['lowest_reliability']:.2f}"]
        for name in ("plain_log_snr", "corrected_log_snr", "plain_timestep"):
            estimate, low, high = row[name]  # type: ignore[misc]
            cells.append(f"{estimate:+.2f} [{low:+.2f}, {high:+.2f}]")
        cells.append(f"{row['negative_pairs']:.1%}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["adm", "ldm", "dit"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--minutes", type=float, default=3.5, help="of training, each")
    parser.add_argument("--points", type=int, default=40)
    parser.add_argument("--images", type=int, default=1024, help="for each timestep")
    parser.add_argument("--folder", type=Path, default=Path("runs/digits_affinity"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    results = args.folder / "results.jsonl"
    text = results.read_text() if results.exists() else ""
    rows = [json.loads(line) for line in text.splitlines()]
    done = {(row["model"], row["seed"]) for row in rows}
    for model in args.models:
        for seed in args.seeds:
            if (model, seed) in done:
                continue
            sizes = {"minutes": args.minutes, "points": args.points, "images": args.images}
            row = one_run(model, seed, folder=args.folder, **sizes)
            rows.append(row)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
    rows.sort(key=lambda row: (row["model"], row["seed"]))
    print(f"{machine()}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
