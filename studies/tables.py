"""`python -m studies.tables --dataset digits`: the poster's tables, run and written.

Tables 1 and 2, the panel over guidance scales and table 3 go to `tables.md` and to CSV files in
the study's folder. Cells that are not finished, or failed, are empty. Published values are shown
beside ours for the same data set.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ant_lightning.errors import ConfigError
from ant_lightning.files.atomic import write_text
from studies.results import finished_rows
from studies.runner import add_run_options, run_options, run_study
from studies.study import Study
from studies.text_table import TextTable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["TableRows", "main", "poster_tables", "tables_study"]

_STUDY = Path("studies/tables.yaml")
_CLUSTERINGS = ("timestep", "snr", "gradient")
_METHODS = ("linear", "pcgrad", "nash", "uw")
_HEADS = {"fid": "FID", "inception_score": "IS", "precision": "precision", "recall": "recall"}


def main(args: Sequence[str] | None = None) -> int:
    """Run what is missing and write the tables; returns 0, 1 if cells failed, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m studies.tables")
    parser.add_argument("--dataset", default="digits", help="one of the study file's datasets")
    parser.add_argument("--root", help="folder of the images, for all but the digits")
    parser.add_argument("--reference", help="file of reference statistics for FID")
    parser.add_argument("--study", type=Path, default=_STUDY)
    parser.add_argument("--folder", type=Path, help="by default runs/tables_DATASET")
    parser.add_argument("--seed", type=int, default=0)
    add_run_options(parser)
    parser.add_argument("--no-run", action="store_true", help="write the tables of what is there")
    settings = parser.parse_args(args)
    folder: Path = settings.folder or Path("runs") / f"tables_{settings.dataset}"
    try:
        study = tables_study(
            settings.study,
            dataset=settings.dataset,
            root=settings.root,
            reference=settings.reference,
            seed=settings.seed,
        )
        failed: list[str] = []
        if not settings.no_run:
            failed = run_study(study, folder, **run_options(settings))
    except ConfigError as error:
        print(f"tables: error: {error}", file=sys.stderr)
        return 2
    rows = TableRows(finished_rows(study, folder / "results.jsonl"), settings.seed)
    tables = poster_tables(rows, dataset=settings.dataset)
    for table in tables:
        table.write(folder)
    text = "\n".join(f"### {table.title}\n\n{table.markdown()}" for table in tables)
    write_text(folder / "tables.md", text)
    print(text)
    return 1 if failed else 0


def tables_study(
    path: Path,
    *,
    dataset: str,
    root: str | None = None,
    reference: str | None = None,
    seed: int = 0,
) -> Study:
    """The study of one data set.

    Args:
        path: The study file, with `parts`, `groups` by name, and `datasets`.
        dataset: One of its data sets.
        root: Folder of the images; not for the digits.
        reference: File of reference statistics, in place of the study file's reference.
        seed: Of every run.

    Raises:
        ConfigError: If there is no such data set or file, or `root` is missing or must not be
            given.
    """
    if not path.is_file():
        raise ConfigError(f"study: must be a YAML file that exists, found {path}")
    content = yaml.safe_load(path.read_text())
    chosen = content["datasets"].get(dataset)
    if chosen is None:
        raise ConfigError(
            f"dataset: must be one of {', '.join(content['datasets'])}, found {dataset}"
        )
    needs_root = "{root}" in json.dumps(chosen)
    if needs_root != (root is not None):
        rule = "must name the folder of the images" if needs_root else "must not be given"
        raise ConfigError(f"root: {rule} for {dataset}, found {root}")
    if root and not Path(root).is_dir():
        raise ConfigError(f"root: must be a folder that exists, found {root}")
    parts = {**content["parts"], **chosen["parts"]}
    if reference is not None:
        if not Path(reference).is_file():
            raise ConfigError(f"reference: must be a file that exists, found {reference}")
        parts["reference"] = [f"--trainer.callbacks.init_args.reference={reference}"]
    groups = []
    for name in chosen["groups"]:
        group = content["groups"][name]
        axes = {**group["axes"], "seed": [seed], "dataset": [dataset]}
        groups.append({**group, "axes": axes | ({"root": [root]} if root else {})})
    return Study.of({"parts": parts, "groups": groups})


class TableRows:
    """Scores and costs of the finished cells of one seed, by the name of the cell without it."""

    def __init__(self, rows: Mapping[str, Mapping[str, Any]], seed: int) -> None:
        end = f"/seed{seed}"
        self._rows = {n.removesuffix(end): row for n, row in rows.items() if n.endswith(end)}

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def names(self) -> list[str]:
        """Of all cells."""
        return list(self._rows)

    def score(self, name: str, metric: str) -> str:
        """A score of a cell, with three digits; empty if it is not there."""
        value = self._measured(name).get("scores", {}).get(metric)
        return "" if value is None else f"{value:.3f}"

    def guidance(self, name: str) -> float:
        """The guidance scale that a cell was measured with."""
        return float(self._measured(name)["guidance_scale"])

    def cost(self, name: str, metric: str) -> str:
        """An entry of `step_cost.json`, numbers with three digits; empty if it is not there."""
        files = self._rows.get(name, {}).get("files", {})
        value = files.get("step_cost.json", {}).get(metric)
        return f"{value:.3f}" if isinstance(value, float) else str(value or "")

    def _measured(self, name: str) -> dict[str, Any]:
        files = self._rows.get(name, {}).get("files", {})
        lines = files.get("generation_metrics.jsonl") or [{}]
        last: dict[str, Any] = lines[-1]
        return last


def poster_tables(rows: TableRows, *, dataset: str) -> list[TextTable]:
    """Those of the poster's tables of which the study has cells.

    Args:
        rows: What was measured.
        dataset: Decides which published values stand beside.
    """
    published = json.loads(files("studies").joinpath("published.json").read_text())
    theirs = published.get(dataset, {})
    cost = published["cost"].get(dataset, {})
    names = rows.names()
    tables = []
    if any(name.startswith(("adm/", "ldm/")) for name in names):
        tables += [_table_1(rows, theirs), _table_3(rows, cost)]
    if any(name.startswith("dit/") for name in names):
        tables += [_table_2(rows, theirs), _panel(rows)]
    return sorted(tables, key=lambda table: table.title)


def _heads(metrics: Sequence[str], published: Mapping[str, Any]) -> list[str]:
    beside = [f"{_HEADS[m]}, published" for m in metrics] if published else []
    return [*(_HEADS[m] for m in metrics), *beside]


def _cells(
    rows: TableRows, name: str, metrics: Sequence[str], published: Mapping[str, Any]
) -> list[str]:
    beside = [published.get(name, {}).get(m, "") for m in metrics] if published else []
    return [*(rows.score(name, m) for m in metrics), *beside]


def _table_1(rows: TableRows, published: Mapping[str, Any]) -> TextTable:
    metrics = ("fid", "precision", "recall")
    lines = []
    for model in ("adm", "ldm"):
        name = f"{model}/vanilla"
        lines.append([model.upper(), "", "vanilla", *_cells(rows, name, metrics, published)])
        for clustering in _CLUSTERINGS:
            for method in _METHODS:
                name = f"{model}/{clustering}/{method}"
                found = _cells(rows, name, metrics, published)
                lines.append([model.upper(), clustering, method, *found])
    heads = ["model", "clustering", "method", *_heads(metrics, published)]
    return TextTable("Table 1, FID, precision and recall", heads, lines)


def _table_2(rows: TableRows, published: Mapping[str, Any]) -> TextTable:
    metrics = ("fid", "inception_score", "precision", "recall")
    lines = [
        [label, *_cells(rows, f"dit/{method}", metrics, published)]
        for method, label in {"vanilla": "vanilla", "minsnr": "MinSNR", "uw": "ANT-UW"}.items()
    ]
    return TextTable(
        "Table 2, class-conditional DiT", ["method", *_heads(metrics, published)], lines
    )


def _table_3(rows: TableRows, published: Mapping[str, Any]) -> TextTable:
    heads = ["method", "memory (GB)", "memory of", "iterations / s"]
    if published:
        heads += ["memory (GB), published", "iterations / s, published"]
    lines = []
    for method in ("vanilla", "pcgrad", "nash", "uw"):
        name = "ldm/vanilla" if method == "vanilla" else f"ldm/snr/{method}"
        cells = [
            rows.cost(name, what)
            for what in ("peak_memory_gb", "memory_of", "iterations_per_second")
        ]
        if published:
            cells += published.get(method, {}).values() or ["", ""]
        lines.append([method, *cells])
    return TextTable("Table 3, memory and speed of LDM", heads, lines)


def _panel(rows: TableRows) -> TextTable:
    """The poster has this as a figure, without numbers."""
    metrics = ("fid", "inception_score", "precision", "recall")
    lines = []
    for method in ("vanilla", "pcgrad", "nash", "uw"):
        start = f"dit/{method}"
        names = [n for n in rows.names() if n == start or n.startswith(f"{start}/guidance_")]
        for name in sorted(names, key=rows.guidance):
            lines.append([method, f"{rows.guidance(name):g}", *_cells(rows, name, metrics, {})])
    heads = ["method", "guidance", *_heads(metrics, {})]
    return TextTable("Panel, class-conditional DiT over guidance scales", heads, lines)


if __name__ == "__main__":
    sys.exit(main())
