"""What a run says while it trains: metrics.jsonl, trackers, and the display."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.tracking import GeneralTracker

from peftune.observe.display import Display
from peftune.observe.meter import peak_memory_bytes


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
        self._path, self._device, self._display, self._is_main = path, device, display, is_main
        self._trackers = list(trackers) if is_main else []
        self.rows = _keep_rows(path, keep_rows) if is_main else 0
        """Rows written so far."""

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

    def progress(self, step: int) -> None:
        """Move the progress bar."""
        self._display.training_step(step)

    def peak_memory_bytes(self) -> int:
        """Peak of this process so far."""
        return peak_memory_bytes(self._device)

    def close(self) -> None:
        """End the trackers."""
        for tracker in self._trackers:
            tracker.finish()
        self._trackers = []

    def _write(self, row: Mapping[str, Any]) -> None:
        if not self._is_main:
            return
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self.rows += 1
        self._display.row(row)
        numbers = {f"{row['split']}/{key}": value for key, value in row.items()
                   if isinstance(value, int | float) and key != "step"}
        for tracker in self._trackers:
            tracker.log(numbers, step=row["step"])


def _keep_rows(path: Path, rows: int) -> int:
    """Drop the rows that a resumed run writes again, and a row that a stop cut in half; return how many stay."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:rows] if path.exists() else []
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)
