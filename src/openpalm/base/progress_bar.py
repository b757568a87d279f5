"""A progress bar on standard error: drawn in a terminal, elsewhere a line every 30 seconds."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 30.0
LONG_JOB_S = 2.0
"""`delay_s` of jobs that are often so short that a bar would only flicker."""


class ProgressBar:
    """Shows how much of a job is done, from entering it as a context to leaving it.

    total: None if it is not known yet. in_bytes: counts are bytes. delay_s: the bar is drawn only
    after this time. kept: the bar stays on the screen at the end.
    """

    def __init__(
        self,
        label: str,
        total: int | None = None,
        *,
        in_bytes: bool = False,
        delay_s: float = 0.0,
        kept: bool = False,
        console: Console | None = None,
    ):
        self.label, self.total, self.done = label, total, 0
        self.console = console or Console(stderr=True)
        self._in_bytes, self._delay_s = in_bytes, delay_s
        self._began = self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            DownloadColumn() if in_bytes else MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=self.console,
            transient=not kept,
        )
        self._task = self._bar.add_task(label, total=total, note="")

    def __enter__(self) -> Self:
        self._draw_if_due()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def start_at(self, done: int) -> None:
        """Counts from `done` on, which an earlier process did: it took no time of this one."""
        self.done = done
        self._bar.reset(self._task, completed=done, note="")

    def advance(self, more: int) -> None:
        self.move_to(self.done + more)

    def move_to(self, done: int, total: int | None = None, note: str = "") -> None:
        """Shows that `done` of `total` is done; `note` stands behind it."""
        self.done, self.total = done, total or self.total
        if self.console.is_terminal:
            self._bar.update(self._task, completed=done, total=self.total, note=note)
            self._draw_if_due()
        elif self.line_is_due():
            self._last_line = time.monotonic()
            print(self.line(note), file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def line_is_due(self) -> bool:
        return time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES

    def line(self, note: str) -> str:
        """The line that is printed where there is no terminal."""
        scale, unit = (1e6, " MB") if self._in_bytes else (1, "")
        share = f" of {self.total / scale:,.0f}" if self.total else ""
        return f"{self.label}: {self.done / scale:,.0f}{share}{unit}{note and '  ' + note}"

    def _draw_if_due(self) -> None:
        waited = time.monotonic() - self._began
        if self.console.is_terminal and not self._bar.live.is_started and waited >= self._delay_s:
            self._bar.start()


@contextmanager
def long_job(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of a job that is counted in bytes, drawn if the job is long; gives its `move_to`."""
    with ProgressBar(label, in_bytes=True, delay_s=LONG_JOB_S) as bar:
        yield bar.move_to
