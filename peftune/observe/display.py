"""What a person sees: phases, progress and tables, on a terminal or in a log file."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.table import Table
from rich.text import Text

LOG_WIDTH = 100
BAR_WIDTH = 40
INDENT = " " * 10
LONG_S = 60.0
"""A log hears from a phase that takes longer, and again each time as much has gone by."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of text, marked or not, with a word about it."""

    text: str
    marked: bool
    note: str = ""


class Display:
    """One place that prints. A terminal gets a moving line; a file gets one plain line a log row.

    Where the stream is not UTF-8, bars and boxes are drawn in ASCII.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        target = stream or sys.stdout
        terminal = target.isatty()
        self._console = Console(file=target, quiet=quiet, width=None if terminal else LOG_WIDTH,
                                highlight=False, emoji=False)
        self._one_line = not terminal
        """A log keeps a message on one line; a terminal breaks it between words, indented as it began."""
        self._moving = terminal and not quiet
        self._plain = self._console.options.ascii_only
        self._status: Status | None = None
        self._phase = self._doing = ""
        """The phase that is going on, and what it is at."""
        self._progress: Progress | None = None
        self._training: TaskID | None = None
        self._evaluating: TaskID | None = None
        self._told: float | None = None
        """When a log was last told of the evaluation that is going on."""
        self._steps = 0
        self._warned: set[str] = set()

    def say(self, text: str) -> None:
        """One line."""
        self._print(text)

    def warn(self, text: str) -> None:
        """One line that should not be overlooked."""
        self._print(f"note: {text}", "yellow")

    def warn_once(self, text: str) -> None:
        """The same for what would be said again and again."""
        if text not in self._warned:
            self._warned.add(text)
            self.warn(text)

    def alarm(self, text: str) -> None:
        """Something that is wrong."""
        self._print(text, "red")

    def _print(self, text: str, style: str = "") -> None:
        if self._one_line:
            self._console.print(text, style=style, markup=False, soft_wrap=True)
            return
        for line in text.split("\n"):
            indent = len(line) - len(line.lstrip(" "))
            words = Text(line[indent:], style)
            self._console.print(Padding(words, (0, 0, 0, indent), expand=False) if indent else words)

    def pieces(self, pieces: Sequence[Piece]) -> None:
        """Text with its marked runs in colour; between « and » where there is none."""
        text = Text()
        for piece in pieces:
            if not piece.marked:
                text.append(piece.text, style="dim")
            elif self._console.is_terminal and not self._console.no_color:
                text.append(piece.text, style="bold green")
            else:
                text.append(f"<<{piece.text}>>" if self._plain else f"«{piece.text}»")
            text.append(f"[{piece.note}]" if piece.note else "", style="cyan")
        self._console.print(text, soft_wrap=True)

    def bars(self, title: str, labels: Sequence[str], counts: Sequence[int]) -> None:
        """A histogram lying on its side."""
        self._console.print(title, style="bold", markup=False)
        width = max(map(len, labels))
        for label, count in zip(labels, counts, strict=True):
            full, thin = "#|" if self._plain else "█▏"
            bar = full * round(BAR_WIDTH * count / max(1, *counts))
            self._console.print(f"  {label:<{width}} {bar or thin * bool(count)} {count:,}", markup=False)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[list[str]]:
        """Time a phase; what is put into the yielded list is said with it at its end."""
        notes: list[str] = []
        started = time.perf_counter()
        self._phase, self._doing = name, ""
        try:
            with self._spinning() if self._moving else self._telling(started):
                yield notes
        finally:
            self._phase = ""
        self._flow(f"{name:<10} {time.perf_counter() - started:6.1f} s  ", notes, "; ")

    @contextlib.contextmanager
    def _spinning(self) -> Iterator[None]:
        with self._console.status(self._phase, spinner="line" if self._plain else "dots") as self._status:
            try:
                yield
            finally:
                self._status = None

    @contextlib.contextmanager
    def _telling(self, started: float) -> Iterator[None]:
        ended, name = threading.Event(), self._phase

        def tell() -> None:
            while not ended.wait(LONG_S):
                self.say(f"{name}: {time.perf_counter() - started:.0f} s so far{self._doing}")

        teller = threading.Thread(target=tell, daemon=True, name="display")
        teller.start()
        try:
            yield
        finally:
            ended.set()
            teller.join()

    def _flow(self, head: str, parts: Sequence[str], gap: str) -> None:
        """A line of parts; a terminal breaks it between parts alone, and indents what follows."""
        lines = [head]
        for number, part in enumerate(parts):
            piece = part + (gap if number + 1 < len(parts) else "")
            if number and not self._one_line and len(lines[-1]) + len(piece.rstrip()) > self._console.width:
                lines.append(INDENT)
            lines[-1] += piece
        for line in lines:
            self.say(line.rstrip())

    @contextlib.contextmanager
    def training(self, steps: int, from_step: int) -> Iterator[None]:
        """Show progress through the steps."""
        self._steps = steps
        if not self._moving:
            yield
            return
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(),
                   TimeRemainingColumn(compact=True), TextColumn("{task.fields[said]}"))
        with Progress(*columns, console=self._console, transient=True) as progress:
            self._progress = progress
            self._training = progress.add_task("train", total=steps, completed=from_step, said="")
            yield
        self._progress = self._training = self._evaluating = None

    def training_step(self, step: int) -> None:
        """Move the bar."""
        if self._progress is not None and self._training is not None:
            self._progress.update(self._training, completed=step)

    def progress(self, name: str, done: int, total: int) -> None:
        """Show how far a part of a phase is, or an evaluation beside the bar of the training; of 0 if nobody knows."""
        self._doing = f", {name} {done:,}" + (f" of {total:,}" if total else "")
        status = self._status  # another thread may tell of its progress as the phase ends
        if status is not None:
            status.update(self._phase + self._doing)
        elif not self._moving and not self._phase:
            self._tell_now_and_then(done, total)
        if self._progress is None:
            return
        if self._evaluating is None:
            self._evaluating = self._progress.add_task(name, total=total, said="")
        self._progress.update(self._evaluating, description=name, completed=done, total=total)
        if done == total:
            self._progress.remove_task(self._evaluating)
            self._evaluating = None

    def _tell_now_and_then(self, done: int, total: int) -> None:
        now = time.perf_counter()
        self._told = now if self._told is None else self._told
        if done == total:
            self._told = None
        elif now - self._told >= LONG_S:
            self.say(self._doing.removeprefix(", "))
            self._told = now

    def row(self, row: Mapping[str, Any]) -> None:
        """Say a row of metrics.jsonl."""
        if row["split"] == "train":
            said = (f"loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tok/s  "
                    f"{row['peak_memory_bytes'] / 2**30:.1f} GiB")
            if self._progress is not None and self._training is not None:
                self._progress.update(self._training, said=said)
            else:
                self.say(f"step {row['step']:>6}/{self._steps}  epoch {row['epoch']:.2f}  {said}  "
                         f"lr {row['learning_rate']:.2e}  grad {row['grad_norm']:.2f}{self._eta(row)}")
        else:
            values = [f"{name} {value:.4f}" for name, value in row.items()
                      if isinstance(value, float) and name not in ("epoch", "seconds") and "/" not in name]
            self._flow(f"step {row['step']:>6}  {row['split']}: ", values, "  ")

    def _eta(self, row: Mapping[str, Any]) -> str:
        left = row["seconds"] / row["step"] * (self._steps - row["step"])
        return f"  {int(left // 60)}m{int(left % 60):02d}s left"

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A closing table."""
        table = Table(title=title, title_justify="left", title_style="bold")
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number else "left")
        for row in rows:
            table.add_row(*row)
        self._console.print(table)
