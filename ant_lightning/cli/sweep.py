"""`ant-lightning sweep RUN`: scores of a run's images over guidance scales and EMA lengths.

For each value it draws the same images (same seed, noise and classes) and scores them as the run's
`GenerationMetrics` does. Rows are appended to `sweep.jsonl` in the run's folder, and `sweep.png`
there shows those of this call.
"""

from __future__ import annotations

import json
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import lightning as L
from matplotlib.figure import Figure

from ant_lightning.callbacks.progress import showing_steps
from ant_lightning.cli.load_run import load_run
from ant_lightning.cli.parts import make_part
from ant_lightning.cli.records import record_file, record_of
from ant_lightning.cli.run_arguments import run_arguments
from ant_lightning.data.batch import to_uint8
from ant_lightning.errors import ConfigError
from ant_lightning.files.atomic import write_figure
from ant_lightning.generation.callback import GenerationMetrics
from ant_lightning.runtime.progress_display import ProgressDisplay
from ant_lightning.runtime.quiet import keep_quiet

if TYPE_CHECKING:
    from collections.abc import Sequence

_PANELS = {
    "Fréchet distance (lower is better)": {"fid": "generated", "fid_real": "real against real"},
    "share of images (higher is better)": {
        "precision": "precision",
        "recall": "recall",
        "class_agreement": "class is the one asked for",
    },
}


def run_sweep(args: Sequence[str]) -> list[dict[str, Any]]:
    """Draw and score images for each value; prints a line for each and returns the rows.

    Raises:
        ConfigError: If an argument is wrong, or the folder is not that of a run that has
            `GenerationMetrics`.
    """
    keep_quiet("sweep")
    chosen = SimpleNamespace(**run_arguments("sweep", args))
    folder = Path(chosen.run)
    data, metrics = _of_run(folder, chosen.trust, chosen.extractor)
    metrics.need_extractor("--extractor")
    device = L.Fabric(accelerator=chosen.accelerator, devices=1).device
    data.setup("test")
    num_images = chosen.num_images or metrics.num_images or len(data.held_out_images)
    scores, rows = None, list[dict[str, Any]]()
    for length, scale in product(chosen.ema or [None], chosen.guidance or [None]):
        module: Any = load_run(folder, ema_length=length, trust=chosen.trust).to(device)
        if scores is None:
            cache = folder / "reference_cache"
            progress = partial(ProgressDisplay, "sweep")
            scores = metrics.new_scores(
                data, seed=module.seed, device=device, cache_dir=cache, progress=progress
            )
        drawn = ProgressDisplay("sweep", "images drawn and scored", total=num_images)
        with showing_steps(module, drawn):
            for start in range(0, num_images, metrics.batch_size):
                batch = range(start, min(start + metrics.batch_size, num_images))
                scores.update(to_uint8(module.sample(batch, guidance_scale=scale)))
                drawn.show(batch.stop, num_images)
        row = {
            "guidance_scale": module.guidance_scale if scale is None else scale,
            "ema_length": length,
            "step": module.trained_steps,
            "sampler": str(module.sampler),
            "seed": module.seed,
            "extractor": metrics.extractor.name,
            "scores": scores.compute(),
        }
        scores.reset()
        if not rows:
            print(f"sweep: {metrics.about(row['scores'])}", flush=True)
        rows.append(row)
        shown = [f"{name} {row['scores'][name]:.4g}" for name in _shown(row)]
        print(f"{_place(row)}: {', '.join(shown)}", flush=True)
        with (folder / "sweep.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    write_figure(folder / "sweep.png", sweep_figure(rows))
    if len(rows) > 1:
        best = min(rows, key=lambda row: row["scores"]["fid"])
        print(f"sweep: the lowest fid is {best['scores']['fid']:.4g}, at {_place(best)}")
    print(f"sweep: all scores are in {folder / 'sweep.jsonl'}, a plot in {folder / 'sweep.png'}")
    return rows


def sweep_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Scores against the guidance scale, a colour for each EMA length; or against the length."""
    over = "guidance_scale" if len({row["guidance_scale"] for row in rows}) > 1 else "ema_length"
    other = "ema_length" if over == "guidance_scale" else "guidance_scale"
    groups = list(dict.fromkeys(row[other] for row in rows))
    figure = Figure(figsize=(8.4, 3.6), dpi=150, layout="constrained")
    for axis, (title, names) in zip(figure.subplots(1, 2), _PANELS.items(), strict=True):
        for color, group in enumerate(groups):
            mine = sorted((row for row in rows if row[other] == group), key=lambda row: row[over])
            for (name, shown), style in zip(names.items(), ("o-", "s--", "^:"), strict=False):
                if not any(name in row["scores"] for row in mine):  # no network that tells classes
                    continue
                values = [row["scores"].get(name, float("nan")) for row in mine]
                what = "EMA length" if other == "ema_length" else "guidance"
                label = f"{shown}, {what} {group:g}" if len(groups) > 1 else shown
                axis.plot(
                    [row[over] for row in mine], values, style, color=f"C{color}", label=label
                )
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("guidance scale" if over == "guidance_scale" else "EMA length")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    count = rows[0]["scores"].get("num_images", 0)
    scored_by = f"features of {rows[0]['extractor']}, n = {count:.0f} generated images"
    figure.suptitle(f"{scored_by}, step {rows[0]['step']}", fontsize=9)
    return figure


def _place(row: dict[str, Any]) -> str:
    length = row["ema_length"]
    at = "" if length is None else f", EMA length {length:g}"
    return f"guidance {row['guidance_scale']:g}{at}"


def _shown(row: dict[str, Any]) -> list[str]:
    return [name for names in _PANELS.values() for name in names if name in row["scores"]]


def _of_run(
    folder: Path, trust: str | list[str], extractor: str | None
) -> tuple[Any, GenerationMetrics]:
    """The data and the metrics of a run, from its record."""
    config = record_of(folder)
    callbacks = (config.get("trainer") or {}).get("callbacks") or []
    kind = GenerationMetrics.__name__
    for each in callbacks if isinstance(callbacks, list) else [callbacks]:
        if isinstance(each, dict) and str(each.get("class_path")).rpartition(".")[2] == kind:
            data = make_part(config["data"], L.LightningDataModule, trust, name="data")
            settings = dict(each.get("init_args") or {})
            if extractor is not None:
                settings["extractor"] = {"class_path": extractor}
            chosen = {**each, "init_args": settings}
            return data, make_part(chosen, L.Callback, trust, name="metrics")
    raise ConfigError(
        f"trainer.callbacks: must have {kind} to score images, found none in {record_file(folder)}"
    )
