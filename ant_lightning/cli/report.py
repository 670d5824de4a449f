"""`ant-lightning report RUN [RUN ...]`: settings and results of a run, on a page in its folder.

The page is `report.md`, and `report.html` with the pictures inside.

It reads the newest `config.yaml`, TensorBoard's events, `checkpoints/last.ckpt`,
`task_affinity.safetensors`, `negative_transfer_gap.jsonl`, `interval_experts.jsonl`,
`generation_metrics.jsonl`, `sweep.jsonl`, `diagnosis.json` and `1_samples_grid.png`. Sections whose
file is missing are left out; without scores the page says why.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ant_lightning.cli.curves import Curve, curves_figure, read_curves
from ant_lightning.cli.records import record_file, record_of
from ant_lightning.cli.report_scores import diagnosis_section, scores_section, sweep_section, table
from ant_lightning.errors import ConfigError
from ant_lightning.files.atomic import write_figure, write_text
from ant_lightning.files.torch_outline import read_outline
from ant_lightning.files.web_page import web_page_of
from ant_lightning.runtime.changed_settings import flat_settings
from ant_lightning.tasks.figure import clusterings_figure
from ant_lightning.tasks.time_axis import NoiseCells, TimeAxis

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure

_SUMMARY = {
    "model": "model",
    "backbone": "model.backbone",
    "data": "data",
    "batch size": "data.batch_size",
    "balancer": "model.tasks.balancer",
    "clustering": "model.tasks.clustering",
    "draws of timesteps": "model.timesteps.method",
    "process": "model.process",
    "density of times": "model.process.density",
    "schedule": "model.process.schedule",
    "prediction": "model.process.prediction_type",
    "train interval": "model.timesteps.interval",
    "sampler": "model.sampling.sampler",
    "guidance scale": "model.sampling.guidance_scale",
    "optimizer": "model.optimization.optimizer",
    "moving average": "ema",
    "seed": "seed_everything",
}
_WEIGHTS = "share of the weights, %"
_OF_TASKS = {
    "held-out loss": "val/task_{}/loss",
    _WEIGHTS: "train/task_{}/weight",
    "gradient norm": "train/task_{}/grad_norm",
}
_MEASURED = (
    "Weights are means over the last logging interval, of which a task has this share; losses and "
    "norms are the last ones."
)
Point = tuple[int, float]


def run_report(args: Sequence[str]) -> None:
    """Write the report of each folder and print where it is.

    Raises:
        ConfigError: If a folder is not that of a run.
    """
    if not args:
        raise ConfigError("report: needs the log folders of runs, found none")
    for folder in args:
        try:
            path = write_report(Path(folder))
            print(f"{path} and {path.with_suffix('.html')}")
        except ConfigError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{folder}: must hold what a run writes, found something else "
                f"({type(error).__name__}: {error})"
            ) from error


def write_report(folder: Path) -> Path:
    """Write `report.md`, `report.html` and figures into a run's log folder; returns the first.

    Raises:
        ConfigError: If the folder has no settings of a run, or a file in it cannot be read.
    """
    text = record_file(folder).read_text(encoding="utf8")
    config = record_of(folder)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    if not checkpoint.is_file():  # the settings of an evaluation name the one that it read
        checkpoint = Path(config.get("ckpt_path") or checkpoint)
    state = _state(checkpoint) if checkpoint.is_file() else {}
    curves = read_curves(folder)
    cells = _cells(config, state)
    time = None if cells is None else cells.time
    parts = [
        f"# Run {'/'.join(folder.resolve().parts[-2:])}\n\n{_summary(config, state)}",
        "" if cells is None else scores_section(folder, config, state),
        "## Samples\n\n![Generated images beside real ones](1_samples_grid.png)\n"
        if (folder / "1_samples_grid.png").is_file()
        else "",
        sweep_section(folder),
        diagnosis_section(folder),
        _curves(folder, curves),
        _clusters(folder, cells, state, curves),
        _affinity(folder, time),
        _transfer(folder, time),
        _experts(folder),
        # Folded, as it may be longer than the rest; the empty lines let it be Markdown inside.
        "## Configuration\n\n<details><summary>all settings</summary>\n\n"
        f"```yaml\n{text.strip()}\n```\n\n</details>\n",
    ]
    path = folder / "report.md"
    page = "\n".join(part for part in parts if part)
    write_text(path, page)
    write_text(folder / "report.html", web_page_of(page, folder))
    return path


def _summary(config: dict[str, Any], state: Any) -> str:  # noqa: ANN401 - a checkpoint
    flat = flat_settings(config)
    if flat.get("model.tasks.clustering"):  # an autoencoder has no tasks
        balancer = flat.get("model.tasks.balancer")
        stratified = f"{flat.get('model.timesteps.allocation', 'equal')} shares of the clusters"
        method = flat.get("model.timesteps.method") or ("stratified" if balancer else "uniform")
        flat["model.timesteps.method"] = "uniform" if method == "uniform" else stratified
        flat["model.tasks.balancer"] = balancer or "none (vanilla)"
    flat["ema"] = _moving_average(flat)
    rows = [[name, str(flat.get(path) or "")] for name, path in _SUMMARY.items()]
    for row in rows:
        if row[0] in {"sampler", "optimizer"}:
            path = _SUMMARY[row[0]]
            # Append the numbers among the arguments of the class.
            inside = [(n, v) for n, v in flat.items() if n.rpartition(".")[0] == path]
            numbers = [
                f"{n.rpartition('.')[2]} {v:g}" for n, v in inside if type(v) in (int, float)
            ]
            row[1] += f"({', '.join(numbers)})" if numbers else ""
    weights = [w for n, w in (state.get("state_dict") or {}).items() if n.startswith("backbone")]
    if weights:
        rows.append(["parameters", f"{sum(math.prod(w.shape) for w in weights):,}"])
        rows.append(["optimizer steps", state["global_step"]])
    return table(["", ""], *(row for row in rows if row[1]))


def _moving_average(flat: Mapping[str, Any]) -> str:
    """Which averages of the weights a run keeps, and which one an evaluation takes."""
    if flat.get("ema.decay") is None:
        return ""
    lengths, length = flat.get("ema.lengths") or [], flat.get("ema.length")
    powers = f"power-function EMA of lengths {', '.join(f'{each:g}' for each in lengths)}"
    parts = [f"EMA with decay {flat['ema.decay']:g}", *([powers] if lengths else [])]
    return "; ".join([*parts, *([] if length is None else [f"evaluated: length {length:g}"])])


def _curves(folder: Path, curves: Mapping[str, Curve]) -> str:
    figure = curves_figure(curves)
    if figure is None:
        return "## Curves\n\nNone: only TensorBoard's event files are read, and none has numbers.\n"
    ends = [
        [name, len(points), points[-1][0], f"{points[-1][1]:.4g}"]
        for name, points in sorted(curves.items())
        # scores and numbers of single tasks are in the tables of other sections
        if (name.startswith("train/") or name.endswith("loss")) and "/task_" not in name
    ]
    found = table(["curve", "points", "last step", "last value"], *ends)
    return f"## Curves\n\n{_saved(figure, folder, 'curves')}\n{found}"


def _state(checkpoint: Path) -> Any:  # noqa: ANN401 - a checkpoint
    """What the checkpoint holds besides values of tensors, if possible without PyTorch."""
    state = read_outline(checkpoint)
    if isinstance(state, dict) and "shards" not in state:
        return state
    # Other files, and errors that say what is wrong; PyTorch's import takes a second or two.
    from ant_lightning.backbones.official_checkpoints import read_checkpoint  # noqa: PLC0415

    return read_checkpoint(checkpoint)


def _cells(config: dict[str, Any], state: Any) -> NoiseCells | None:  # noqa: ANN401 - a checkpoint
    """The noise axis of a run; `None` of an autoencoder."""
    stored = (state.get("ant_lightning") or {}).get("noise_cells")
    if stored is not None:
        return NoiseCells.of_state(stored)
    settings = (config["model"].get("init_args") or {}).get("process")
    if settings is None:
        return None
    # A run without a checkpoint, or of an earlier version. `make_part` refuses settings that name
    # classes of packages that are not trusted.
    from ant_lightning.cli.parts import make_part  # noqa: PLC0415
    from ant_lightning.diffusion.process import NoiseProcess  # noqa: PLC0415

    process: NoiseProcess = make_part(settings, NoiseProcess, name="process")
    size = flat_settings(config).get("model.backbone.input_size")
    return NoiseCells.of(process.for_size(size, size) if isinstance(size, int) else process)


class _Clusters(NamedTuple):
    """`TimestepClusters` without PyTorch."""

    boundaries: tuple[int, ...]


def _clusters(
    folder: Path,
    cells: NoiseCells | None,
    state: Any,  # noqa: ANN401 - a checkpoint
    curves: Mapping[str, Curve],
) -> str:
    boundaries = (state.get("ant_lightning") or {}).get("boundaries")
    if boundaries is None or cells is None:
        return ""
    time, log_snr = cells.time, cells.log_snr
    by_step = time.label == "timestep"
    ends = {name: curve[-1] for name, curve in curves.items()}
    columns = {
        head: [ends.get(curve.format(task)) for task in range(len(boundaries) - 1)]
        for head, curve in _OF_TASKS.items()
    }
    columns = {head: points for head, points in columns.items() if any(points)}
    if _WEIGHTS in columns:
        columns[_WEIGHTS] = _shares(columns[_WEIGHTS])
    rows = [
        [
            task,
            f"{a}-{b - 1}",
            *([] if by_step else [time.words(a, b)]),
            f"{log_snr[b - 1]:.2f} to {log_snr[a]:.2f}",
            *(_value(points[task]) for points in columns.values()),
        ]
        for task, (a, b) in enumerate(pairwise(boundaries))
    ]
    figure = clusterings_figure(
        {"clusters": _Clusters(tuple(boundaries))}, log_snr, time=time, density=cells.density
    )
    heads = ["timesteps"] if by_step else ["cells", time.label]
    measured = [f"{h} (step {_last_step(points)})" for h, points in columns.items()]
    found = table(["task", *heads, "log-SNR", *measured], *rows)
    return (
        f"## Clusters\n\n{_saved(figure, folder, 'clusters')}\n"
        "The lower panels are for batches in which every cluster has the same share; the dashed "
        f"line is the process' own density. {_MEASURED if columns else ''}\n\n{found}"
    )


def _last_step(points: Sequence[Point | None]) -> int:
    return max(point[0] for point in points if point)


def _value(point: Point | None) -> str:
    return f"{point[1]:.4g}" if point else ""


def _shares(points: Sequence[Point | None]) -> list[Point | None]:
    """The weights in tenths of a percent of their sum, which together are 100."""
    tenths = [1000 * point[1] if point else 0.0 for point in points]
    exact = [each / sum(tenths) * 1000 for each in tenths]
    whole = [math.floor(each) for each in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])
    for i in by_rest[: 1000 - sum(whole)]:  # the largest remainders
        whole[i] += 1
    return [(p[0], each / 10) if p else None for p, each in zip(points, whole, strict=True)]


def _affinity(folder: Path, time: TimeAxis | None) -> str:
    files = [folder / f"task_affinity.{kind}" for kind in ("safetensors", "npz")]  # npz: of 0.1
    found = [path for path in files if path.is_file()]
    if not found:
        return ""
    # Imported here, as few runs have one: it imports the balancers, whose import costs 0.3 s.
    from ant_lightning.affinity.figure import affinity_heat_maps  # noqa: PLC0415
    from ant_lightning.affinity.result import AffinityResult  # noqa: PLC0415

    result = AffinityResult.load(found[0])
    pages = [_saved(affinity_heat_maps(result, time=time), folder, "affinity_by_time")]
    if result.log_snr is not None:
        pages.append(_saved(affinity_heat_maps(result, axis="log_snr"), folder, "affinity"))
    return (
        f"## Task affinity\n\n{''.join(pages)}\n"
        f"Lowest split-half reliability {float(result.reliability.min()):.2f}; where it is far "
        "below 0.8, a cosine says more about noise than about the tasks.\n"
    )


def _transfer(folder: Path, time: TimeAxis | None) -> str:
    if not (folder / "negative_transfer_gap.jsonl").is_file():
        return ""
    from ant_lightning.transfer.figure import transfer_gap_bars  # noqa: PLC0415
    from ant_lightning.transfer.result import TransferGapResult  # noqa: PLC0415

    result = TransferGapResult.load(folder / "negative_transfer_gap.jsonl")
    time = TimeAxis.timesteps(result.gaps[-1].stop) if time is None else time
    heads = [time.unit, "budget", "specialist's steps", "loss gap (%)", "FID gap"]
    rows = [
        [
            time.words(gap.start, gap.stop),
            gap.budget,
            f"{gap.specialist_steps} of {result.multitask_steps}",
            "{:+.2f} [{:+.2f}, {:+.2f}]".format(*(100 * each for each in gap.relative_loss_gap)),
            "{:+.3f} [{:+.3f}, {:+.3f}]".format(*gap.fid_gap),
        ]
        for gap in result.gaps
    ]
    figure = transfer_gap_bars({"this run": result}, time=time)
    return (
        f"## Negative-transfer gap\n\n{_saved(figure, folder, 'negative_transfer')}\n"
        f"Below 0 is negative transfer: a model of the interval alone is better there.\n\n"
        f"{table(heads, *rows)}"
    )


def _experts(folder: Path) -> str:
    """The base beside what specialists made of it, from `interval_experts.jsonl`."""
    path = folder / "interval_experts.jsonl"
    if not path.is_file():
        return ""
    row = json.loads(path.read_text().splitlines()[-1])
    names = list(row["models"]["base"])
    values = [
        [model, *(f"{found[name]:.4g}" for name in names)] for model, found in row["models"].items()
    ]
    about = (
        "`switched` uses each specialist inside its interval and the base elsewhere; `merged` adds "
        f"their differences from the base to its weights, times {row['merge_weights']}."
    )
    return f"## Interval experts\n\n{about}\n\n{table(['model', *names], *values)}"


def _saved(figure: Figure, folder: Path, name: str) -> str:
    write_figure(folder / f"report_{name}.png", figure)
    return f"![{name.replace('_', ' ')}](report_{name}.png)\n"
