"""What a person sees: phases, progress and tables, on a terminal or in a log file."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

LOG_WIDTH = 100
BAR_WIDTH = 40


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of text, marked or not, with a word about it."""

    text: str
    marked: bool
    note: str = ""


class Display:
    """One place that prints. A terminal gets a moving line; a file gets one plain line a log row."""

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        target = stream or sys.stdout
        terminal = target.isatty()
        self._console = Console(file=target, quiet=quiet, width=None if terminal else LOG_WIDTH,
                                highlight=False, emoji=False)
        self._one_line = not terminal
        """A log keeps a message on one line; a terminal breaks it between words."""
        self._moving = terminal and not quiet
        self._progress: Progress | None = None
        self._training: TaskID | None = None
        self._evaluating: TaskID | None = None
        self._steps = 0

    def say(self, text: str) -> None:
        """One line."""
        self._console.print(text, markup=False, soft_wrap=self._one_line)

    def warn(self, text: str) -> None:
        """One line that should not be overlooked."""
        self._console.print(f"note: {text}", style="yellow", markup=False, soft_wrap=self._one_line)

    def alarm(self, text: str) -> None:
        """Something that is wrong."""
        self._console.print(text, style="red", markup=False, soft_wrap=self._one_line)

    def pieces(self, pieces: Sequence[Piece]) -> None:
        """Text with its marked runs in colour; between « and » where there is none."""
        text = Text()
        for piece in pieces:
            if not piece.marked:
                text.append(piece.text, style="dim")
            elif self._console.is_terminal and not self._console.no_color:
                text.append(piece.text, style="bold green")
            else:
                text.append(f"«{piece.text}»")
            text.append(f"[{piece.note}]" if piece.note else "", style="cyan")
        self._console.print(text, soft_wrap=True)

    def bars(self, title: str, labels: Sequence[str], counts: Sequence[int]) -> None:
        """A histogram lying on its side."""
        self._console.print(title, style="bold", markup=False)
        width = max(map(len, labels))
        for label, count in zip(labels, counts, strict=True):
            bar = "█" * round(BAR_WIDTH * count / max(1, *counts))
            self._console.print(f"  {label:<{width}} {bar or '▏' * bool(count)} {count:,}", markup=False)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[list[str]]:
        """Time a phase; what is put into the yielded list is said with it at its end."""
        notes: list[str] = []
        started = time.perf_counter()
        with self._console.status(name) if self._moving else contextlib.nullcontext():
            yield notes
        self.say(f"{name:<10} {time.perf_counter() - started:6.1f} s  {'; '.join(notes)}")

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

    def evaluation(self, name: str, done: int, total: int) -> None:
        """Move the bar of an evaluation; it goes away when it is done."""
        if self._progress is None:
            return
        if self._evaluating is None:
            self._evaluating = self._progress.add_task(name, total=total, said="")
        self._progress.update(self._evaluating, description=name, completed=done, total=total)
        if done == total:
            self._progress.remove_task(self._evaluating)
            self._evaluating = None

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
            values = "  ".join(f"{name} {value:.4f}" for name, value in row.items()
                               if isinstance(value, float) and name not in ("epoch", "seconds") and "/" not in name)
            self.say(f"step {row['step']:>6}  {row['split']}: {values}")

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
