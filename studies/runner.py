"""Runs the cells of a study that have no row yet; an interrupted study resumes."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from fnmatch import fnmatch
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

from ant_lightning.errors import ConfigError
from studies.process import prepare_processes, start_command
from studies.provenance import commit, machine
from studies.results import (
    append_row,
    collected,
    finished_rows,
    only_user,
    read_rows,
    restore_files,
)
from studies.study import CLI_COMMANDS, FOLDER, Cell, Study

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Callable
    from multiprocessing.process import BaseProcess
    from pathlib import Path

__all__ = ["add_run_options", "missing_cells", "run_options", "run_study"]


@dataclass
class _Running:
    """A running cell, its folder, and the seconds of each finished command."""

    cell: Cell
    folder: Path
    seconds: list[float]
    process: BaseProcess
    since: float = field(default_factory=time.monotonic)


def add_run_options(parser: ArgumentParser) -> None:
    """Add the options of `run_study` to a command."""
    parser.add_argument("--jobs", type=int, default=1, help="cells at the same time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each cell")
    parser.add_argument(
        "--only", default="*", help="patterns of names of cells, in quotes, with spaces between"
    )
    parser.add_argument("--rerun-changed", action="store_true", help="cells with new settings too")


def run_options(settings: Namespace) -> dict[str, Any]:
    """The arguments of `run_study` that these options stand for."""
    return {name: vars(settings)[name] for name in ("jobs", "threads", "only", "rerun_changed")}


def missing_cells(
    study: Study, folder: Path, *, only: str = "*", rerun_changed: bool = False
) -> list[Cell]:
    """Cells without a row of their settings, in order: those that match and all that they need.

    Raises:
        ConfigError: If nothing matches; or if cells have rows of other settings alone, unless
            `rerun_changed`.
    """
    found = {
        pattern: [n for n in study.cells if fnmatch(n, pattern)]
        for pattern in only.split() or [only]
    }
    if unmatched := [pattern for pattern, names in found.items() if not names]:
        raise ConfigError(f"only: must match a cell of the study, found {unmatched[0]!r}")
    wanted = [name for names in found.values() for name in names]
    needed: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name not in needed:
            needed.add(name)
            wanted += study.cells[name].needs
    rows = finished_rows(study, folder / "results.jsonl")
    missing = [c for c in study.cells.values() if c.name in needed and c.name not in rows]
    before = {row["cell"] for row in read_rows(folder / "results.jsonl")}
    changed = [cell.name for cell in missing if cell.name in before]
    if changed and not rerun_changed:
        raise ConfigError(
            f"study: the settings of {len(changed)} finished cells have changed since they ran: "
            f"{', '.join(changed)}; --rerun-changed runs them again (their old rows stay in the "
            "file and are not used), another --folder keeps them apart"
        )
    return missing


def run_study(
    study: Study,
    folder: Path,
    *,
    jobs: int = 1,
    threads: int = 1,
    only: str = "*",
    rerun_changed: bool = False,
    report: Callable[[str], object] = print,
) -> list[str]:
    """Run what is missing; returns the names of cells that failed or wait for one that did.

    A finished cell is a line of `results.jsonl` in `folder` (see `finished_rows`) and is not run
    again. An interrupted cell resumes after its last finished command, in the same folder; with
    `--ckpt_path=last` in the study a fit resumes from its checkpoint. If the folder of a finished
    cell is gone, for instance because only `results.jsonl` was copied, the files that its row
    keeps are restored; if another cell needs more of it, such as a checkpoint, it is run again. A
    failed cell is a line of `failures.jsonl` and runs again in the next call.

    Args:
        study: The cells.
        folder: Folder of the study; made if missing.
        jobs: Number of cells at the same time.
        threads: Threads of each cell.
        only: Patterns of names of cells, with spaces between; what they need is run too.
        rerun_changed: Whether to run cells again whose settings have changed.
        report: Called with a line for each cell that ends.

    Raises:
        ConfigError: As `missing_cells`; if a number is below 1, or another process runs the study.
    """
    if jobs < 1 or threads < 1:
        raise ConfigError(f"jobs, threads: must be at least 1, found {jobs} and {threads}")
    folder = folder.resolve()
    with only_user(folder):
        waiting = missing_cells(study, folder, only=only, rerun_changed=rerun_changed)
        waiting = _with_lost_files(study, folder, waiting)
        report(f"{len(waiting)} of {len(study.cells)} cells to run in {folder}")
        if not waiting:
            return []
        again = {cell.name for cell in waiting}
        for name, row in finished_rows(study, folder / "results.jsonl").items():
            if name not in again:
                restore_files(row, folder / study.cells[name].place)
        prepare_processes([c for cell in waiting for c in cell.commands], threads=threads)
        return _Runner(study, folder, waiting, threads, report).run(jobs)


def _with_lost_files(study: Study, folder: Path, waiting: list[Cell]) -> list[Cell]:
    """The waiting cells, and finished ones of which they name files that no row keeps.

    Checkpoints are such files: they are gone where only `results.jsonl` was copied. What is left of
    such a cell's folder is removed, so that its files are not continued.
    """
    names, unseen = {cell.name for cell in waiting}, list(waiting)
    while unseen:
        for other, rest in unseen.pop().files_of_others:
            cell = study.cells[other]
            place = folder / cell.place
            kept = rest in cell.collect or (place / rest).exists()
            if other not in names and not kept and not (place / "commands_done.jsonl").exists():
                shutil.rmtree(place, ignore_errors=True)
                names.add(other)
                unseen.append(cell)
    return [cell for cell in study.cells.values() if cell.name in names]


class _Runner:
    def __init__(
        self,
        study: Study,
        folder: Path,
        waiting: list[Cell],
        threads: int,
        report: Callable[[str], object],
    ) -> None:
        self._study, self._folder, self._report = study, folder, report
        self._waiting, self._total = waiting, len(waiting)
        self._threads = threads
        self._running: list[_Running] = []
        self._failed: list[str] = []
        self._ended = 0
        # The processes were forked from what is imported now, whatever is checked out later.
        self._origin = {"commit": commit(), "machine": machine(threads)}

    def run(self, jobs: int) -> list[str]:
        try:
            while True:
                while len(self._running) < jobs and (cell := self._next()):
                    self._waiting.remove(cell)
                    self._start(cell)
                if not self._running:
                    break
                wait([each.process.sentinel for each in self._running])
                for each in [e for e in self._running if not e.process.is_alive()]:
                    self._running.remove(each)
                    self._command_ended(each)
        finally:
            for each in self._running:
                each.process.kill()
                each.process.join()
        for cell in self._waiting:
            self._report(f"{cell.name}: not run, it needs a cell that failed")
        return [*self._failed, *(cell.name for cell in self._waiting)]

    def _next(self) -> Cell | None:
        """The first cell that waits for no other."""
        unfinished = {c.name for c in self._waiting} | {e.cell.name for e in self._running}
        unfinished |= set(self._failed)
        return next((c for c in self._waiting if not unfinished & set(c.needs)), None)

    def _start(self, cell: Cell) -> None:
        """Start the cell's first command that is not done."""
        folder = self._folder / cell.place
        folder.mkdir(parents=True, exist_ok=True)
        done = read_rows(folder / "commands_done.jsonl")
        seconds = [row["seconds"] for row in done]
        if len(seconds) >= len(cell.commands):
            self._finish(cell, folder, seconds)
            return
        command = [self._with_folders(arg, cell) for arg in cell.commands[len(seconds)]]
        if command[0] in CLI_COMMANDS and command[0] != "encode":
            command += self._log_place(cell)
        process = start_command(command, log=folder / "output.txt", threads=self._threads)
        self._running.append(_Running(cell, folder, seconds, process))

    def _command_ended(self, each: _Running) -> None:
        each.process.join()
        if each.process.exitcode:
            self._fail(each.cell, each.folder, f"exit code {each.process.exitcode}")
            return
        row = {"seconds": round(time.monotonic() - each.since, 2)}
        append_row(each.folder / "commands_done.jsonl", row)
        self._start(each.cell)

    def _finish(self, cell: Cell, folder: Path, seconds: list[float]) -> None:
        try:
            files = collected(cell, folder)
        except (ConfigError, ValueError) as error:
            (folder / "commands_done.jsonl").unlink()
            self._fail(cell, folder, str(error))
            return
        row: dict[str, Any] = {"cell": cell.name, "axes": dict(cell.axes), "hash": cell.hash}
        row |= {**self._origin, "finished": round(time.time()), "seconds": seconds, "files": files}
        append_row(self._folder / "results.jsonl", row)
        self._ended += 1
        self._report(f"[{self._ended}/{self._total}] {cell.name}: {sum(seconds):.0f} s")

    def _fail(self, cell: Cell, folder: Path, why: str) -> None:
        self._ended += 1
        self._failed.append(cell.name)
        output = folder / "output.txt"
        text = output.read_text(errors="replace") if output.exists() else ""
        last = " ".join(text.strip().splitlines()[-1:])
        row = {"cell": cell.name, "hash": cell.hash, "why": why, "output": last}
        append_row(self._folder / "failures.jsonl", row)
        self._report(
            f"[{self._ended}/{self._total}] {cell.name}: FAILED, {why}: {last} "
            f"(all of it in {output}); it is run again the next time"
        )

    def _with_folders(self, text: str, cell: Cell) -> str:
        def folder_of(match: Any) -> str:  # noqa: ANN401 - re's generic match
            other = self._study.cells[match[1]] if match[1] else cell
            return str(self._folder / other.place)

        return FOLDER.sub(folder_of, text)

    def _log_place(self, cell: Cell) -> list[str]:
        """Options that make the cell's folder the log folder of a run."""
        logger = "--trainer.logger.init_args"
        return [
            f"{logger}.save_dir={self._folder}",
            f"{logger}.name=cells",
            f"{logger}.version={cell.place.removeprefix('cells/')}",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
        ]
