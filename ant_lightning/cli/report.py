"""`ant-lightning report RUN_FOLDER`: what a run did and found, as `report.md` in its folder.

It reads what is there (the newest `config.yaml`, TensorBoard's events, `checkpoints/last.ckpt`,
`task_affinity.safetensors`, `negative_transfer_gap.jsonl`, `generation_metrics.jsonl`,
`1_samples_grid.png`) and leaves out what is not.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import yaml

from ant_lightning.affinity.figure import affinity_heat_maps
from ant_lightning.affinity.result import AffinityResult
from ant_lightning.backbones.checkpoints import read_checkpoint
from ant_lightning.cli.config_files import check_config_file
from ant_lightning.errors import ConfigError
from ant_lightning.runtime.run_record import newest_record
from ant_lightning.tasks.clusters import TimestepClusters
from ant_lightning.tasks.figure import clusterings_figure
from ant_lightning.transfer.figure import transfer_gap_bars
from ant_lightning.transfer.result import TransferGapResult
from studies.ntg import gap_table
from studies.run_curves import Curve, curves_figure, read_curves
from studies.text_table import TextTable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure

__all__ = ["run_report", "write_report"]


def run_report(args: Sequence[str]) -> None:
    """Write the report of each folder and print where it is.

    Raises:
        ConfigError: If a folder is not that of a run.
    """
    parser = _Parser(prog="ant-lightning report")
    parser.add_argument("folders", type=Path, nargs="+", help="log folders of runs")
    for folder in parser.parse_args(args).folders:
        try:
            print(write_report(folder))
        except ConfigError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"report: the files of {folder} must say what a run writes, found something else "
                f"({type(error).__name__}: {error})"
            ) from error


class _Parser(argparse.ArgumentParser):
    """Says what is wrong as all commands do."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"report: {message}; give the log folders of runs")


def write_report(folder: Path) -> Path:
    """Write `report.md` and its figures into a run's log folder; returns its path.

    Raises:
        ConfigError: If the folder has no settings of a run, or a file in it cannot be read.
    """
    record = newest_record(folder)
    if record is None:
        raise ConfigError(f"report: must be the log folder of a run, with config.yaml: {folder}")
    check_config_file(record)
    text = record.read_text(encoding="utf8")
    config = yaml.safe_load(text)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    if not checkpoint.is_file():  # an evaluation names the one that it read
        checkpoint = Path(config.get("ckpt_path") or checkpoint)
    state = read_checkpoint(checkpoint) if checkpoint.is_file() else {}
    curves = read_curves(folder)
    parts = [
        f"# Run {'/'.join(folder.resolve().parts[-2:])}\n\n{_summary(config, state).markdown()}",
        _scores(folder),
        _samples(folder),
        _curves(folder, curves),
        _clusters(folder, config, state, curves),
        _affinity(folder),
        _transfer(folder),
        f"## Configuration\n\n```yaml\n{text.strip()}\n```\n",
    ]
    path = folder / "report.md"
    path.write_text("\n".join(part for part in parts if part))
    return path


def _summary(config: dict[str, Any], state: Any) -> TextTable:  # noqa: ANN401 - a checkpoint
    model, data = config["model"], config["data"]
    init = model.get("init_args") or {}
    weights = {n: t for n, t in (state.get("state_dict") or {}).items() if n.startswith("backbone")}
    count = f"{sum(w.numel() for w in weights.values()):,}" if weights else ""
    rows = [
        ["model", _name(model)],
        ["backbone", _name(init.get("backbone"))],
        ["parameters", count],
        ["data", _name(data)],
        ["batch size", str((data.get("init_args") or {}).get("batch_size", ""))],
    ]
    groups = [init.get(name) or {} for name in ("tasks", "timesteps", "optimization", "sampling")]
    tasks, timesteps, optimization, sampling = groups
    process = (init.get("process") or {}).get("init_args") or {}
    if init.get("tasks"):  # which an autoencoder has not
        rows += [
            ["balancer", _name(tasks.get("balancer")) or "none (vanilla)"],
            ["clustering", _name(tasks.get("clustering"))],
            ["draws of timesteps", _draws(tasks, timesteps)],
            ["schedule", _name(process.get("schedule"))],
            ["prediction", str(process.get("prediction_type", ""))],
            ["train interval", str(timesteps.get("interval") or "all timesteps")],
            ["sampler", _with_settings(sampling.get("sampler"))],
            ["guidance scale", str(sampling.get("guidance_scale", ""))],
        ]
    rows += [
        ["optimizer", _with_settings(optimization.get("optimizer") or init.get("optimizer"))],
        ["moving average", _settings(config.get("ema"))],
        ["seed", str(config.get("seed_everything"))],
        ["optimizer steps", str(state["global_step"]) if weights else ""],
    ]
    return TextTable("Run", ["", ""], [row for row in rows if row[1]])


def _name(setting: Any) -> str:  # noqa: ANN401 - a part of a config
    if isinstance(setting, dict):
        return str(setting.get("class_path", "")).rpartition(".")[2]
    return str(setting or "")


def _with_settings(setting: dict[str, Any] | None) -> str:
    inside = _settings((setting or {}).get("init_args"))
    return f"{_name(setting)}({inside})" if inside else _name(setting)


def _settings(values: dict[str, Any] | None) -> str:
    """Numbers alone; the rest is in the configuration below."""
    numbers = {n: v for n, v in (values or {}).items() if type(v) in {int, float}}
    return ", ".join(f"{name} {value:g}" for name, value in numbers.items())


def _draws(tasks: dict[str, Any], timesteps: dict[str, Any]) -> str:
    """Which share of a batch each cluster gets."""
    by_default = "stratified" if tasks.get("balancer") else "uniform"
    if (timesteps.get("method") or by_default) == "uniform":
        return "uniform"
    return f"{timesteps.get('allocation') or 'equal'} shares of the clusters"


def _scores(folder: Path) -> str:
    path = folder / "generation_metrics.jsonl"
    if not path.is_file():
        return ""
    last = json.loads(path.read_text().splitlines()[-1])
    rows = [[name, f"{value:.4g}"] for name, value in last["scores"].items()]
    table = TextTable("Scores", ["score", "value"], rows)
    about = ", ".join(
        f"{name} {last[name]}"
        for name in ("step", "extractor", "reference", "sampler", "guidance_scale", "seed")
        if name in last
    )
    return f"## Quality\n\n{about}.\n\n{table.markdown()}"


def _samples(folder: Path) -> str:
    if not (folder / "1_samples_grid.png").is_file():
        return ""
    return "## Samples\n\n![Generated images beside real ones](1_samples_grid.png)\n"


def _curves(folder: Path, curves: Mapping[str, Curve]) -> str:
    figure = curves_figure(curves)
    if figure is None:
        return ""
    ends = [
        [name, str(len(points)), str(points[-1][0]), f"{points[-1][1]:.4g}"]
        for name, points in sorted(curves.items())
        # the others have tables above and below
        if (name.startswith("train/") or name.endswith("loss")) and "/task_" not in name
    ]
    table = TextTable("Curves", ["curve", "points", "last step", "last value"], ends)
    return f"## Curves\n\n{_saved(figure, folder, 'report_curves')}\n{table.markdown()}"


def _clusters(
    folder: Path,
    config: dict[str, Any],
    state: Any,  # noqa: ANN401 - a checkpoint
    curves: Mapping[str, Curve],
) -> str:
    boundaries = (state.get("ant_lightning") or {}).get("boundaries")
    init = config["model"].get("init_args") or {}
    log_snr = _log_snr(((init.get("process") or {}).get("init_args") or {}).get("schedule"))
    if boundaries is None or log_snr is None:
        return ""
    clusters = TimestepClusters(boundaries)
    rows = [
        [str(task), f"{a}-{b - 1}", f"{float(log_snr[b - 1]):.2f} to {float(log_snr[a]):.2f}"]
        for task, (a, b) in enumerate(pairwise(boundaries))
    ]
    heads = ["task", "timesteps", "log-SNR"]
    for head, curve in {
        "held-out loss": "val/task_{}/loss",
        "weight": "train/task_{}/weight",
        "gradient norm": "train/task_{}/grad_norm",
    }.items():
        found = [curves.get(curve.format(task)) for task in range(len(rows))]
        if any(found):
            heads.append(head)
            for row, points in zip(rows, found, strict=True):
                row.append(f"{points[-1][1]:.4g}" if points else "")
    table = TextTable("Clusters", heads, rows)
    figure = clusterings_figure({"clusters": clusters}, log_snr)
    return (
        f"## Clusters\n\n{_saved(figure, folder, 'report_clusters')}\n"
        "The lower panels are for batches in which every cluster has the same share; "
        f"this run: {_draws(init.get('tasks') or {}, init.get('timesteps') or {})}. "
        f"Losses, weights and norms are the last ones.\n\n{table.markdown()}"
    )


def _log_snr(setting: dict[str, Any] | None) -> torch.Tensor | None:
    """Of one of our own schedules; another's class is not imported from a file."""
    from ant_lightning import diffusion  # noqa: PLC0415 - beside its only use

    name = _name(setting)
    kind = getattr(diffusion, name, None)
    if (
        setting is None
        or setting["class_path"] not in {f"ant_lightning.{name}", f"ant_lightning.diffusion.{name}"}
        or kind is None
    ):
        return None
    return diffusion.DiscreteDiffusion(kind(**(setting.get("init_args") or {}))).log_snr


def _affinity(folder: Path) -> str:
    files = [folder / f"task_affinity.{kind}" for kind in ("safetensors", "npz")]  # npz: of 0.1
    found = [path for path in files if path.is_file()]
    if not found:
        return ""
    result = AffinityResult.load(found[0])
    axis = "timestep" if result.log_snr is None else "log_snr"
    figure = affinity_heat_maps(result, axis=axis)  # type: ignore[arg-type]
    return (
        f"## Task affinity\n\n{_saved(figure, folder, 'report_affinity')}\n"
        f"Lowest split-half reliability {float(result.reliability.min()):.2f}; where it is far "
        "below 0.8, a cosine says more about noise than about the tasks.\n"
    )


def _transfer(folder: Path) -> str:
    if not (folder / "negative_transfer_gap.jsonl").is_file():
        return ""
    result = TransferGapResult.load(folder / "negative_transfer_gap.jsonl")
    figure = transfer_gap_bars({"this run": result})
    table = gap_table({"this run": result})
    return (
        f"## Negative-transfer gap\n\n{_saved(figure, folder, 'report_negative_transfer')}\n"
        f"Below 0 is negative transfer: a model of the interval alone is better there.\n\n"
        f"{table.markdown()}"
    )


def _saved(figure: Figure, folder: Path, name: str) -> str:
    figure.savefig(folder / f"{name}.png")
    return f"![{name.removeprefix('report_').replace('_', ' ')}]({name}.png)\n"
