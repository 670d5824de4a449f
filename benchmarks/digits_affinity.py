"""Does affinity fall with the distance of timesteps? ADM, LDM and DiT trained on the digits.

Each run is a plain training (no balancer) on the command line and a `validate` with `TaskAffinity`
on the averaged weights; for LDM the autoencoder is trained first. A training that runs out of time
resumes in the next call. A finished measurement is a row of `results.jsonl`, and the table shows
all rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ant_lightning import AffinityResult, distance_correlation
from studies.provenance import commit, config_hash, machine

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
CALLBACK = "ant_lightning.TaskAffinity"


def command_line(*args: str) -> None:
    """One call of `ant-lightning` on one thread.

    Raises:
        RuntimeError: If it fails; the message has the end of its output.
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


def train(
    model: str, seed: int, *, steps: int, minutes: float, folder: Path
) -> tuple[list[str], Path, dict[str, int]]:
    """Train for at most `minutes` more; returns options, checkpoint, steps and seconds so far."""
    name = f"{model}_seed{seed}"
    checkpoint = folder / name / "checkpoints" / "last.ckpt"
    common = [arg for file in files_of(model) for arg in ("--config", str(CONFIGS / file))]
    common += [f"--seed_everything={seed}", "--trainer.enable_progress_bar=false"]
    common += [f"--trainer.max_steps={steps}", *place(folder, name)]
    if model == "ldm":
        stage = folder / f"{name}_first_stage"
        if not stage.exists():
            options = [*place(folder, f"{stage.name}_run"), "--trainer.enable_progress_bar=false"]
            options += [f"--model.init_args.export={stage}", f"--seed_everything={seed}"]
            command_line("fit", "--config", str(CONFIGS / "digits/autoencoder.yaml"), *options)
        common += [f"--model.init_args.first_stage.init_args.source={stage}"]
    progress = progress_of(checkpoint)
    if progress["steps"] < steps:
        seconds = int(60 * minutes) + progress["seconds"]
        options = [f"--trainer.max_time=00:00:{seconds // 60:02d}:{seconds % 60:02d}"]
        if progress["steps"]:
            options.append(f"--ckpt_path={checkpoint}")
        command_line("fit", *common, *options, "--trainer.limit_val_batches=0")
        progress = progress_of(checkpoint)
    return common, checkpoint, progress


def files_of(model: str) -> list[str]:
    """The configuration of a run."""
    return [f"digits/{model}.yaml", "balancer/vanilla.yaml", "clustering/snr.yaml"]


def place(folder: Path, name: str) -> list[str]:
    """Options that say where a run writes."""
    logger = "--trainer.logger.init_args"
    return [
        f"{logger}.save_dir={folder.parent}",
        f"{logger}.name={folder.name}",
        f"{logger}.version={name}",
    ]


def progress_of(checkpoint: Path) -> dict[str, int]:
    """Steps and seconds of training of a checkpoint, 0 if there is none."""
    if not checkpoint.exists():
        return {"steps": 0, "seconds": 0}
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    timer: dict[str, Any] = next(
        (v for k, v in state["callbacks"].items() if k.startswith("Timer")), {}
    )
    seconds = timer.get("time_elapsed", {}).get("train", 0)
    return {"steps": int(state["global_step"]), "seconds": int(seconds)}


def measure(
    model: str,
    seed: int,
    common: list[str],
    checkpoint: Path,
    *,
    points: int,
    images: int,
    folder: Path,
) -> dict[str, object]:
    """Affinity and quality of a checkpoint; returns the row of a run."""
    where = folder / f"{model}_seed{seed}"
    callback = {
        "class_path": CALLBACK,
        "init_args": {
            "num_points": points,
            "num_images": images,
            "resume_dir": f"{where}/kept",
        },
    }
    command_line(
        "validate", *common, f"--ckpt_path={checkpoint}", f"--trainer.callbacks+={callback}"
    )
    lines = (where / "generation_metrics.jsonl").read_text().splitlines()
    scores = json.loads(lines[-1])["scores"]
    return {
        "model": model,
        "seed": seed,
        "points": points,
        "images": images,
        "fid": scores["fid"],
        "class_agreement": scores["class_agreement"],
        "commit": commit(),
        "config": config_hash([(CONFIGS / file).read_text() for file in files_of(model)]),
        "machine": machine(1),
        **correlations(AffinityResult.load(where / "task_affinity.safetensors")),
    }


def correlations(result: AffinityResult) -> dict[str, object]:
    """Spearman's correlation of both estimates with both distances, and the main results."""
    n = len(result.timesteps)
    pairs = result.plain[~torch.eye(n, dtype=torch.bool)]
    row: dict[str, object] = {
        "lowest_reliability": float(result.reliability.min()),
        "lowest_affinity": float(pairs.min()),
        "negative_pairs": float((pairs < 0).double().mean()),
    }
    steps = torch.tensor(result.timesteps, dtype=torch.float64)
    assert result.grid_log_snr is not None, "a run's affinity has the log-SNR of its schedule"
    for axis, positions in (("log_snr", result.grid_log_snr), ("timestep", steps)):
        for estimate in ("plain", "corrected"):
            rank = distance_correlation(getattr(result, estimate), positions)
            row[f"{estimate}_{axis}"] = [rank.estimate, rank.low, rank.high]
    return row


def table(rows: list[dict[str, Any]]) -> str:
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
            estimate, low, high = row[name]
            cells.append(f"{estimate:+.2f} [{low:+.2f}, {high:+.2f}]")
        cells.append(f"{row['negative_pairs']:.1%}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["adm", "ldm", "dit"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--minutes", type=float, default=4, help="of training in this call, each")
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
            common, checkpoint, progress = train(
                model, seed, steps=args.steps, minutes=args.minutes, folder=args.folder
            )
            if progress["steps"] < args.steps:
                print(f"{model} seed {seed}: {progress['steps']} of {args.steps} steps; call again")
                continue
            sizes = {"points": args.points, "images": args.images, "folder": args.folder}
            row = {**progress, **measure(model, seed, common, checkpoint, **sizes)}
            rows.append(row)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
    rows.sort(key=lambda row: (row["model"], row["seed"]))
    print(f"{machine()}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
