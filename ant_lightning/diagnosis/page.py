"""The page of a diagnosis, as Markdown and as one HTML file."""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING

import torch

from ant_lightning.diagnosis.advice import advice
from ant_lightning.files.atomic import write_text
from ant_lightning.files.documentation import documentation
from ant_lightning.files.web_page import picture, web_page

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ant_lightning.diagnosis.findings import Findings

_TELLING = 1.25  # largest ratio of the ends of an interval that tells a cost
_TIMED = "--timed_steps 25"


class _Page:
    """Builds the same content twice."""

    def __init__(self, title: str, folder: Path) -> None:
        self.folder = folder
        self.markdown = [f"# {title}"]
        self.html = [f"<h1>{escape(title)}</h1>"]
        self.title = title

    def heading(self, text: str) -> None:
        self.markdown.append(f"## {text}")
        self.html.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str, *, bold: str = "", after: str = "") -> None:
        lead = f"**{bold}.** " if bold else ""
        strong = f"<strong>{escape(bold)}.</strong> " if bold else ""
        page = documentation(after)
        link = page.startswith("http")  # a path would lead nowhere from a run's folder
        tail = after and (f" ([evidence]({page}))" if link else f" (evidence: {page})")
        anchor = f' (<a href="{escape(page)}">evidence</a>)' if link else escape(tail)
        self.markdown.append(f"{lead}{text}{tail}")
        words = re.sub(r"--\w+( \d+)?", r"<code>\g<0></code>", escape(text))  # not cut at a hyphen
        self.html.append(f"<p>{strong}{words}{anchor if after else ''}</p>")

    def table(self, *rows: Sequence[object]) -> None:
        lines = [rows[0], ["---:"] * len(rows[0]), *rows[1:]]
        self.markdown.append("\n".join(f"| {' | '.join(map(str, each))} |" for each in lines))
        cells = [
            "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in row)
            for tag, row in zip(["th", *["td"] * (len(rows) - 1)], rows, strict=True)
        ]
        self.html.append(f"<table>{''.join(f'<tr>{each}</tr>' for each in cells)}</table>")

    def picture(self, name: str, text: str) -> None:
        self.markdown.append(f"![{text}]({name})")
        self.html.append(picture(self.folder / name, text))

    def write(self) -> Path:
        """Write both files; returns the HTML."""
        text = "\n\n".join(self.markdown) + "\n"
        write_text(self.folder / "diagnosis.md", text)
        path = self.folder / "diagnosis.html"
        write_text(path, web_page(self.title, "\n".join(self.html)))
        return path


def write_page(findings: Findings, folder: Path, pictures: dict[str, str], *, about: str) -> Path:
    """Write `diagnosis.md` and `diagnosis.html`; returns the latter.

    Args:
        findings: What was measured.
        folder: Where the pictures lie and the page goes.
        pictures: Files in the folder, each with a sentence on how to read it.
        about: What was measured, in a line.
    """
    page = _Page("Would balancing help?", folder)
    page.text(about)
    page.heading("What to try first")
    for each in advice(findings):
        page.text(each.text, bold=each.title, after=each.evidence)
    page.heading("Tasks")
    page.text(
        "Weights are those that each balancer would give to these gradients and losses, relative "
        "to equal ones. Task 0 has the least noise. Losses are those that a balancer sees, with "
        "loss weights and the term of a learned variance, as in train/task_i/objective; "
        "train/task_i/loss and val/task_i/loss have neither."
    )
    page.table(*_tasks(findings))
    page.heading("Conflicts")
    page.text(
        "Cosines of the tasks' gradients, corrected for noise, with their standard errors. A "
        "corrected cosine may lie above 1 by about its error."
    )
    page.table(*_cosines(findings))
    if findings.transfer is not None:
        page.heading("Transfer")
        page.text(
            "Share of task j's loss (column) that a gradient step on task i (row) removes. A "
            "negative entry beside a positive diagonal is harm."
        )
        page.table(*_matrix(findings.transfer, lambda i, j, x: f"{x:.2%}"))
    page.heading("Clusters")
    page.text("The first timestep of each task, by clustering.")
    page.table(
        ["clustering", *(f"task {i}" for i in range(findings.num_tasks))],
        ["this model", *findings.clusters.boundaries[:-1]],
        *([name, *each.boundaries[:-1]] for name, each in findings.clusterings.items()),
    )
    if findings.times:
        page.heading("Cost on this machine")
        count = len(findings.times["vanilla"])
        page.text(
            f"Time of a forward and backward pass over one batch, without the optimizer: median, "
            f"lowest and highest of {count} timed step{'s' * (count > 1)}"
            + ("." if findings.relative_times else f", too few to compare the methods ({_TIMED}).")
        )
        page.table(*_cost(findings))
        if findings.relative_times:
            page.text(_about_ratios(findings))
    page.heading("Pictures")
    for name, text in pictures.items():
        page.picture(name, text)
        page.text(text)
    return page.write()


def _tasks(findings: Findings) -> list[list[str]]:
    """The table of tasks."""
    bounds = findings.clusters.boundaries
    log_snr = findings.affinity.log_snr
    losses, weights = findings.task_losses, findings.weights
    rows = [
        ["task", "timesteps", "log-SNR", "loss", "share of squared gradient", "reliability"]
        + [f"weight by {name}" for name in weights]
    ]
    for i in range(findings.num_tasks):
        start, stop = bounds[i : i + 2]
        ends = "" if log_snr is None else f"{log_snr[start]:.1f} to {log_snr[stop - 1]:.1f}"
        row = [str(i), f"{start}-{stop - 1}", ends, f"{losses[i]:.4g}"]
        row += [f"{findings.gradient_shares[i]:.1%}", f"{findings.reliability[i]:.2f}"]
        rows.append(row + [f"{each[i]:.2f}" for each in weights.values()])
    return rows


def _cost(findings: Findings) -> list[list[str]]:
    """The table of times, with ratios if there are enough of them."""
    relative = findings.relative_times
    rows = [["method", "ms", "lowest to highest"]]
    if relative:
        rows[0] += ["relative to vanilla", "95% interval"]
    for name, times in findings.times.items():
        row = [name, _ms(findings.seconds[name]), f"{_ms(min(times))} to {_ms(max(times))}"]
        if name in relative:
            middle, low, high = relative[name]
            shown = "too wide to tell" if high > _TELLING * low else f"{middle:.2f}"
            row += [shown, f"{low:.2f} to {high:.2f}"]
        elif relative:
            row += ["1", ""]
        rows.append(row)
    return rows


def _about_ratios(findings: Findings) -> str:
    """How to read the ratios, and which of them say nothing."""
    wide = [n for n, (_, low, high) in findings.relative_times.items() if high > _TELLING * low]
    said = (
        "The methods took turns, and a ratio is the median over the turns, so that a busy machine "
        "slows both of its times. Where its interval has 1, the method may cost nothing."
    )
    if wide:
        said += (
            f" The cost of {' and '.join(wide)} cannot be told: the ends of the interval are more "
            f"than a factor of {_TELLING:g} apart. Other work slowed this machine, or a step is "
            f"too short: repeat when it is idle, or with more steps ({_TIMED})."
        )
    return said


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds > 0.1 else f"{1e3 * seconds:.3g}"


def _cosines(findings: Findings) -> list[list[str]]:
    errors = findings.cosine_errors

    def cell(i: int, j: int, x: float) -> str:
        return "1" if i == j else "noise" if x != x else f"{x:.2f} ± {errors[i, j]:.2f}"  # noqa: PLR0124

    return _matrix(findings.cosines, cell)


def _matrix(matrix: torch.Tensor, cell) -> list[list[str]]:  # type: ignore[no-untyped-def]  # noqa: ANN001
    k = len(matrix)
    rows = [["task", *map(str, range(k))]]
    for i in range(k):
        rows.append([str(i), *(cell(i, j, float(matrix[i, j])) for j in range(k))])
    return rows
