"""Runs of `parity.py`'s cells that recorded_train.py watches, and perhaps kills."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from subprocess import CompletedProcess
from typing import Any

from benchmarks.launches import ROOT
from benchmarks.parity import Asked, Bench, Cell
from benchmarks.recorded_train import Order

RECORDED = ROOT / "benchmarks" / "recorded_train.py"
STEPS = 8
RUN = (f"train.max_steps={STEPS}", "evaluation.every_steps=4", "checkpoint.every_steps=1")


def recorded(bench: Bench, cell: Cell, name: str, overrides: Sequence[str], **order: Any) -> Asked:
    """A run of a cell by recorded_train.py; `order` has fields of its Order."""
    made = Order(record=str(bench.folder / "records" / name), folder=str(bench.folder / "runs" / name), **order)
    return Asked(cell, (*RUN, *overrides), name, RECORDED, (("RECORDED", json.dumps(asdict(made))),))


def order_of(asked: Asked) -> dict[str, Any]:
    """What such a run was told to do."""
    order: dict[str, Any] = json.loads(dict(asked.environment)["RECORDED"])
    return order


def said_at_end(ended: CompletedProcess[str]) -> str:
    """Exit code and last words."""
    return f"ended with {ended.returncode}: {ended.stderr[-1500:]}"
