"""Contestants take turns; results are kept as they come.

One that fails does not stop the others, and a later start goes on with what an earlier one has left.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.arithmetic import rates
from peftune.model.precision import choose_products

CEILING_SIZES = (1024, 2048)
FAILURES = (AssertionError, OSError, RuntimeError, ValueError, LookupError, subprocess.SubprocessError)
"""What ends one contestant and not the suite: a process that failed or took too long, memory or disk that is full."""
CUT_OFF = "the command was ended while this was measured"


@dataclass(frozen=True, slots=True)
class Kept:
    """What has been found by this start and by earlier ones, by the contestants' names."""

    records: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    """Why the last attempt failed, of those whose last attempt did."""
    commit: str | None = None
    """Of the code that this start measures."""

    def turns(self, names: Sequence[str], repeats: int) -> Iterator[str]:
        """Whose turn it is, until each has that many records: A B A B. Those that failed in an earlier start come last,
        and who fails in this one has no further turn."""
        for name in names:
            if len(self.records.get(name, [])) >= repeats:
                self.failures.pop(name, None)  # it failed where more were asked for
        earlier = set(self.failures)
        ordered = sorted(names, key=earlier.__contains__)
        given_up: set[str] = set()
        for done in range(repeats):
            for name in ordered:
                if name not in given_up and len(self.records.get(name, [])) <= done:
                    yield name
                    if name in self.failures:
                        given_up.add(name)


def kept_in(path: Path | None, setting: Mapping[str, Any], commit: str | None) -> Kept:
    """What a results file holds, or nothing where there is none.

    Args:
        path: the file.
        setting: what must be in it as it is here, so that what is found now may be put beside what it holds.
        commit: of the code that is measured from here on.
    """
    if path is None or not path.is_file():
        return Kept(commit=commit)
    found = json.loads(path.read_text(encoding="utf-8"))
    if other := [name for name, value in setting.items() if found.get(name) != value]:
        print(f"{path} holds results of another {' and '.join(other)}\n  mend: another --to, or remove the file",
              file=sys.stderr)
        raise SystemExit(2)
    return Kept(dict(found["records"]), dict(found.get("failures", {})), commit)


def why(failure: BaseException) -> str:
    """The last lines of what a failure says."""
    text = str(failure)
    if isinstance(failure, subprocess.TimeoutExpired):
        said = failure.stderr or b""
        text = f"no end after {failure.timeout:.0f} s\n{said.decode(errors='replace')}"
    return text.strip()[-3000:] or type(failure).__name__


def write(path: Path | None, text: str) -> None:
    """The file, if one is wanted, whole at every instant."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)


def ceiling(device: torch.device, threads: int) -> float:
    """Operations a second of products of square bfloat16 matrices, as runs compute them: the best of several sizes and
    repeats."""
    torch.set_num_threads(threads)
    choose_products("bfloat16", device)
    found = []
    for size in CEILING_SIZES if device.type == "cpu" else (4096, 8192):
        left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
        for _ in range(6):
            started = time.perf_counter()
            torch.mm(left, right)
            if device.type == "cuda":
                torch.cuda.synchronize()
            found.append(2 * size**3 / (time.perf_counter() - started))
        del left, right
    torch.cuda.empty_cache()  # what this process keeps, the measured one lacks
    return max(found)


def gather(
    measure: Mapping[str, Callable[[], dict[str, Any]]], repeats: int, device: torch.device, threads: int, kept: Kept,
    keep: Callable[[], object],
) -> None:
    """Measure every contestant once, then again: A B A B, as far as `kept` lacks records of them. Each record holds the
    ceiling that was measured before it, and the share of processor time that a virtual machine's host took meanwhile
    (Linux).

    Args:
        measure: the contestants.
        repeats: records of each.
        device, threads: of the ceiling.
        kept: what is known; what is found comes to it.
        keep: called where that has changed.
    """
    for name in kept.turns(list(measure), repeats):
        kept.failures[name] = CUT_OFF
        keep()
        try:
            top, before = ceiling(device, threads), psutil.cpu_times()
            record = measure[name]() | {"ceiling_flops": top, "commit": kept.commit}
        except FAILURES as failure:
            kept.failures[name] = why(failure)
            print(f"{name}: failed: {kept.failures[name]}", flush=True)
        else:
            del kept.failures[name]
            spent = [late - early for late, early in zip(psutil.cpu_times(), before)]
            record["stolen_share"] = spent[before._fields.index("steal")] / sum(spent)
            kept.records.setdefault(name, []).append(record)
            print(f"{name}: {rates(record)['tokens_per_second']:,.0f} tokens/s", flush=True)
        keep()
