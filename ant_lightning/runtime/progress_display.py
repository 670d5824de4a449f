"""How far a piece of work is: a bar in a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

LINE_INTERVAL = 10.0
LONGEST_SILENCE = 30.0
_SHORTEST_BAR, _WIDE = 8, 120  # columns: with its ends, and of a terminal that tells no width


class ProgressDisplay:
    """Shows what is done of what, such as `predict: 200 of 1,000 images, 0:01:20 left`.

    In a terminal it is this sentence and a bar. Elsewhere (a file, a pipe, CI) a line is printed at
    the start, and then for each tenth, but none sooner than `interval` seconds after the last; if a
    tenth takes longer than 30 seconds, for each 30 seconds. The last line says that all is done.

    Args:
        what: The command, or the measurement.
        unit: What is counted, in the plural.
        total: How many there are, if that is known at the start.
        done: How many of them were done before.
        interval: Least seconds between two lines.
        since: Time of the last line before, by `time.perf_counter`; by default now.
        first_line: Whether to print a line at the start.
        bar: Whether to draw a bar; false if something else draws one.
        hidden: Whether to show nothing, as on all ranks but one.

    Examples:
        >>> from ant_lightning.runtime.progress_display import ProgressDisplay
        >>> with ProgressDisplay("predict", "images", total=1000) as shown:
        ...     shown.update(100)  # within 10 seconds
        predict: 0 of 1,000 images
    """

    def __init__(
        self,
        what: str,
        unit: str,
        *,
        total: int | None = None,
        done: int = 0,
        interval: float | None = None,
        since: float | None = None,
        first_line: bool = True,
        bar: bool = True,
        hidden: bool = False,
    ) -> None:
        self._what, self._unit, self._total = what, unit, total
        self._first = self._printed = self.done = done
        self._interval = LINE_INTERVAL if interval is None else interval
        terminal = sys.stdout.isatty()
        self._prints = not terminal and not hidden
        self._begun = time.perf_counter()
        self._last = self._begun if since is None else since
        self._drawn = 0.0
        self._started = 0.0  # the share of a unit, or of several, that are begun
        self._note = ""
        self._lines = 0
        self._bar = tqdm(
            desc=self._sentence(self._begun),
            total=total,
            initial=done,
            bar_format="{desc} |{bar}|",
            leave=False,
            file=sys.stdout,
            dynamic_ncols=True,
            disable=hidden or not bar or not terminal,
        )
        if first_line and total is not None:
            self._line()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.end()
        self._bar.close()

    def end(self) -> None:
        """Print the final count, unless it is there or nothing was printed before."""
        if self._lines and self._printed != self.done == self._total:
            self._line()

    def step(self, count: int, step: int, num_steps: int) -> None:
        """Show that the next `count` are at `step` of `num_steps`."""
        self._started = count * step / num_steps if step < num_steps else 0.0
        self._note = f", step {step:,} of {num_steps:,} for the next {count:,}"
        if step < num_steps:
            self._draw()
            self._line_if_due()

    def update(self, count: int = 1) -> None:
        """Count more as done."""
        self.show(self.done + count, self._total)

    def show(self, done: int, total: int | None) -> None:
        """Show that `done` of `total` are done."""
        self.done, self._total = done, total
        self._bar.total = total
        self._started, self._note = 0.0, ""
        self._draw()
        self._line_if_due()

    def _draw(self) -> None:
        """Redraw the bar, but not for each step of a sampler that takes a millisecond."""
        now = time.perf_counter()
        if self._bar.disable or now - self._drawn < self._bar.mininterval:
            return
        self._drawn, self._bar.n = now, self.done + self._started
        room = (self._bar.ncols or _WIDE) - _SHORTEST_BAR
        whole, brief = self._sentence(now), self._sentence(now, note=False)
        texts = (whole, brief, brief.partition(", ")[0])
        self._bar.set_description_str(next((t for t in texts if len(t) <= room), texts[-1]))

    def _line_if_due(self) -> None:
        if self._total is None:
            return
        silent = time.perf_counter() - self._last
        tenth = 10 * (self.done - self._printed) >= self._total
        if silent >= (self._interval if tenth else max(self._interval, LONGEST_SILENCE)):
            self._line()

    def _line(self) -> None:
        if not self._prints or self._total is None:
            return
        self._printed, self._last = self.done, time.perf_counter()
        self._lines += 1
        print(self._sentence(self._last), flush=True)

    def _sentence(self, now: float, *, note: bool = True) -> str:
        """What is done of what, and the time left."""
        if self._total is None:
            return f"{self._what}: {self.done:,} {self._unit}"
        made = self.done - self._first + self._started
        left = self._total - self._first - made
        seconds = left * (now - self._begun) / made if made else 0.0
        end = self._note * note + (f", {clock(seconds)} left" if made and left else "")
        return f"{self._what}: {self.done:,} of {self._total:,} {self._unit}{end}"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))
