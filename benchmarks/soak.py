"""Memory, open files and speed of a long run of the digits: `python -m benchmarks.soak`.

ANT-UW on the digits DiT with validation, sample grids, generation metrics, task affinity and
checkpoints, all every few hundred steps. After a warm-up nothing may grow.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median

import lightning as L
import numpy as np

from ant_lightning.cli.parser import run
from studies.provenance import commit, config_hash, machine

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


class Meter(L.Callback):
    """Samples this process every few seconds of training, without the time of evaluations."""

    def __init__(self, every: float) -> None:
        self.every = every
        self.samples: list[dict[str, float]] = []
        self.evaluations = 0
        self._start = self._last = self._pause_began = clocks()
        self._paused = np.zeros(2)
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = self._last = clocks()
        self._step = trainer.global_step

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pause_began = clocks()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._paused += clocks() - self._pause_began
        self.evaluations += 1

    def on_train_batch_start(self, trainer: L.Trainer, *args: object) -> None:
        now = clocks()
        trained, processed = now - self._last - self._paused
        if trained < self.every:
            return
        steps = trainer.global_step - self._step
        self.samples.append(
            {
                "seconds": float((now - self._start)[0]),
                "step": trainer.global_step,
                "evaluations": self.evaluations,
                **memory(),
                "open_files": len(os.listdir("/proc/self/fd")),
                "steps_per_second": steps / trained,
                "cpu_ms_per_step": 1000 * processed / steps,
            }
        )
        self._last, self._paused, self._step = now, np.zeros(2), trainer.global_step


def memory() -> dict[str, float]:
    """Resident memory, and the private part of it: pages of files come and go."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}
    names = {"resident_mb": "VmRSS", "anonymous_mb": "RssAnon"}
    return {name: int(kilobytes[key]) / 1024 for name, key in names.items()}


def clocks() -> np.ndarray:
    """Wall-clock seconds, and processor seconds of this process."""
    return np.array([time.monotonic(), time.process_time()])


def summary(samples: list[dict[str, float]], *, warm_up: float) -> dict[str, float]:
    """Medians of the first and of the last quarter after the warm-up."""
    end = samples[-1]["seconds"]
    warm = [each for each in samples if each["seconds"] > warm_up * end]
    quarter = max(1, len(warm) // 4)
    first, last = warm[:quarter], warm[-quarter:]

    def growth(name: str) -> float:
        before, after = (median(each[name] for each in part) for part in (first, last))
        return after / before - 1

    found = {
        "resident_growth": growth("resident_mb"),
        "anonymous_growth": growth("anonymous_mb"),
        "speed_change": growth("steps_per_second"),
        "cpu_change": growth("cpu_ms_per_step"),
    }
    for name in samples[0]:
        for when, part in (("first", first), ("last", last)):
            found[f"{name}_{when}"] = median(each[name] for each in part)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=2.0, help="seconds of training")
    parser.add_argument("--warm_up", type=float, default=0.25, help="share that is not looked at")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    options = parser.parse_args()
    files = ["digits/dit", "balancer/uw", "clustering/snr"]
    settings = [
        "fit",
        *(f"--config={CONFIGS / name}.yaml" for name in files),
        f"--seed_everything={options.seed}",
        "--trainer.max_steps=-1",
        "--trainer.val_check_interval=300",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--checkpoint.every_n_train_steps=100",
        "--trainer.callbacks+=TaskAffinity",
        "--trainer.callbacks.num_points=10",
        "--trainer.callbacks.num_images=128",
    ]
    hours, minutes = divmod(options.minutes, 60)
    limits = [
        "--trainer.callbacks+=benchmarks.soak.Meter",
        f"--trainer.callbacks.every={options.every}",
        f"--trainer.max_time=00:{int(hours):02}:{int(minutes):02}:{int(60 * (minutes % 1)):02}",
        f"--trainer.logger.init_args.save_dir={options.out}",
    ]
    trainer = run([*settings, *limits]).trainer
    # By name: run as a script, this module has another name than the one the parser imports.
    meter = next(c for c in trainer.callbacks if type(c).__name__ == "Meter")  # type: ignore[attr-defined]
    found = summary(meter.samples, warm_up=options.warm_up)
    record = {
        "commit": commit(),
        "config": config_hash(settings),
        "seed": options.seed,
        "machine": machine(),
        "minutes": options.minutes,
        "evaluations": meter.evaluations,
        "steps": trainer.global_step,
        "load": os.getloadavg(),
        "summary": found,
        "samples": meter.samples,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "soak.json"
    path.write_text(json.dumps(record, indent=1))
    print(json.dumps({**found, "evaluations": meter.evaluations}, indent=1), f"\n{path}")
    flat = (
        max(found["resident_growth"], found["anonymous_growth"]) < 0.02
        and found["open_files_last"] <= found["open_files_first"]
        and found["cpu_change"] < 0.1
    )
    raise SystemExit(0 if flat else 1)


if __name__ == "__main__":
    main()
