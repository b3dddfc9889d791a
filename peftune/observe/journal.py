"""What a run says while it trains: metrics.jsonl, trackers, and the display."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.tracking import GeneralTracker

from peftune.observe.display import Display
from peftune.observe.meter import forget_peak, peak_memory_bytes


class Progressed(Protocol):
    """What a row tells of the run's progress."""

    @property
    def step(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def supervised_tokens(self) -> int: ...
    @property
    def seconds(self) -> float: ...


class Journal:
    """Writes rows on the main process; on the others it only keeps count."""

    def __init__(
        self, path: Path, *, device: torch.device, is_main: bool, display: Display, trackers: Sequence[GeneralTracker],
        keep_rows: int,
    ) -> None:
        forget_peak(device)  # what it took to get here was no part of the run
        self._path, self._device, self._display, self._is_main = path, device, display, is_main
        self._trackers = list(trackers) if is_main else []
        self.rows, self._bytes = _keep_rows(path, keep_rows) if is_main else (0, 0)
        """Rows so far; length of those that are on disk."""
        self._unwritten: list[str] = []

    def training_row(
        self, state: Progressed, *, epoch: float, loss: float, learning_rate: float, grad_norm: float
    ) -> None:
        """Write the row of the steps since the last one. `loss` is that of all their targets together."""
        rate = state.tokens / state.seconds if state.seconds else 0.0
        self._write({
            "step": state.step, "epoch": epoch, "split": "train",
            "loss": loss, "learning_rate": learning_rate,
            "grad_norm": grad_norm, "tokens": state.tokens, "supervised_tokens": state.supervised_tokens,
            "tokens_per_second": rate, "peak_memory_bytes": self.peak_memory_bytes(), "seconds": state.seconds,
        })

    def evaluation_row(self, state: Progressed, split: str, metrics: Mapping[str, Any], *, epoch: float) -> None:
        """Write the metrics of a split."""
        self._write({"step": state.step, "epoch": epoch, "split": split, "tokens": state.tokens,
                     "supervised_tokens": state.supervised_tokens, "peak_memory_bytes": self.peak_memory_bytes(),
                     "seconds": state.seconds, **metrics})

    def flush(self) -> None:
        """Write rows that are not on disk. Raises OSError where it cannot; they are kept then."""
        if self._unwritten:
            text = "".join(self._unwritten).encode("utf-8")
            with self._path.open("r+b") as stream:
                stream.seek(self._bytes)  # over what a full disk took of a row
                stream.write(text)
                stream.truncate()
            self._bytes += len(text)
            self._unwritten = []

    def warn(self, message: str) -> None:
        """Say what should not be overlooked."""
        self._display.warn(message)

    def phase(self, name: str) -> AbstractContextManager[list[str]]:
        """A part of the run besides its steps, for a person: see Display.phase."""
        return self._display.phase(name)

    def progress(self, step: int) -> None:
        """Move the progress bar."""
        self._display.training_step(step)

    def peak_memory_bytes(self) -> int:
        """Peak of this process so far."""
        return peak_memory_bytes(self._device)

    def close(self) -> None:
        """End the trackers."""
        for tracker in list(self._trackers):
            try:
                tracker.finish()
            except OSError as error:
                self._drop(tracker, error)
        self._trackers = []

    def _write(self, row: Mapping[str, Any]) -> None:
        if not self._is_main:
            return
        self._unwritten.append(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self.rows += 1
        try:
            self.flush()
        except OSError as error:
            self.warn(f"{self._path}: cannot be written: {error.strerror}; its rows are kept in memory until it can")
        self._display.row(row)
        numbers = {f"{row['split']}/{key}": value for key, value in row.items()
                   if isinstance(value, int | float) and key != "step"}
        for tracker in list(self._trackers):
            try:
                tracker.log(numbers, step=row["step"])
            except OSError as error:
                self._drop(tracker, error)

    def _drop(self, tracker: GeneralTracker, error: OSError) -> None:
        self._trackers.remove(tracker)
        self.warn(f"{tracker.name} gets no more rows: {error.strerror}; metrics.jsonl has them all")


def _keep_rows(path: Path, rows: int) -> tuple[int, int]:
    """Drop the rows that a resumed run writes again, and a row that a stop cut in half; how many stay, and bytes."""
    lines = path.read_bytes().splitlines(keepends=True)[:rows] if path.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    length = sum(map(len, lines))
    with path.open("ab") as stream:
        stream.truncate(length)
    return len(lines), length
