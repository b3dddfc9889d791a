"""Hostile input of every kind: nothing but success or a message for the user may come of it.

    peftune bench fuzz [--cases 10000] [--seed 0] [--kinds config,data,...] [--to benchmarks/results/<device>/fuzz.json]

A case is a bug if it raises anything but a PeftuneError that names its place, runs longer than a limit, writes
outside the folder of the whole fuzzing, or unpickles, starts or connects anything. An audit hook sees that: it knows
what Python does, and not what a library's compiled code does. Cases are drawn by hypothesis from the seed; each kind
takes a fixed share of them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import resource
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st

from benchmarks import fuzz_config, fuzz_data, fuzz_template
from benchmarks import fuzz_folders as folders
from benchmarks.fuzz_spoil import spoils
from benchmarks.fuzz_watch import LIMIT_S, watched
from peftune.observe.manifest import environment
from peftune.tasks.text import quiet_libraries

LIMIT_BYTES = 12 << 30
"""Address space of the process: what asks for more is a bug, and not the end of the machine."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What is drawn, what is done with it, and the share of all cases."""

    draws: st.SearchStrategy[Any]
    act: Callable[[Any, Path, folders.Places], None]
    share: float


@dataclass(slots=True)
class Found:
    """Outcomes of a kind."""

    counts: Counter[str] = field(default_factory=Counter)
    bugs: dict[str, str] = field(default_factory=dict)
    """What went wrong -> the shortest case that shows it."""
    slowest_s: float = 0.0


KINDS: Mapping[str, Kind] = {
    "config": Kind(fuzz_config.configs(), lambda draw, folder, _: fuzz_config.act_on_config(draw, folder), 0.35),
    "data": Kind(
        fuzz_data.data_files(), lambda draw, folder, places: fuzz_data.act_on_data(draw, folder, places.models), 0.25
    ),
    "input": Kind(
        fuzz_data.inputs_to_predict(),
        lambda draw, folder, places: fuzz_data.act_on_input(draw, folder, places.models),
        0.1,
    ),
    "template": Kind(
        fuzz_template.templates(),
        lambda draw, folder, places: fuzz_template.act_on_template(draw, folder, places.models),
        0.05,
    ),
    "checkpoint": Kind(spoils(), folders.act_on_checkpoint, 0.1),
    "adapter": Kind(spoils(), folders.act_on_adapter, 0.05),
    "trained": Kind(spoils(), folders.act_on_trained, 0.05),
    "model": Kind(spoils(), folders.act_on_model, 0.05),
}


def fuzz(kind: str, cases: int, seed: int, scratch: Path, places: folders.Places) -> Found:
    """Draw and try cases of a kind. Bugs are gathered, not raised, so that one does not hide the others."""
    found, chosen = Found(), KINDS[kind]
    numbers = iter(range(10**9))

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(chosen.draws)
    def one(draw: Any) -> None:
        folder = scratch / f"{kind}-{next(numbers)}"
        folder.mkdir(parents=True)
        started = time.perf_counter()
        with (
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            outcome = watched(functools.partial(chosen.act, draw, folder, places), scratch.parent, str(folder))
        found.slowest_s = max(found.slowest_s, time.perf_counter() - started)
        found.counts[outcome.kind] += 1
        if outcome.kind == "bug":
            name, _, said = outcome.text.replace(str(folder), "FOLDER").partition(": ")
            shown = f"{said}; {draw!r}"
            if name not in found.bugs or len(shown) < len(found.bugs[name]):
                found.bugs[name] = shown
        shutil.rmtree(folder, ignore_errors=True)

    one()
    return found


@contextlib.contextmanager
def scratch_folder() -> Any:
    """A folder that all temporary files and prepared data go to, which hostile cases may write to."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        before = {key: os.environ.get(key) for key in ("PEFTUNE_CACHE", "TMPDIR")}
        os.environ |= {"PEFTUNE_CACHE": f"{name}/cache", "TMPDIR": name}
        temporary, tempfile.tempdir = tempfile.tempdir, name
        try:
            yield Path(name)
        finally:
            tempfile.tempdir = temporary
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})


def main() -> None:
    """Fuzz and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS), help="default: all")
    parser.add_argument("--to", type=Path)
    arguments = parser.parse_args()
    quiet_libraries()
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    results: dict[str, Any] = {}
    with scratch_folder() as scratch:
        places = folders.make_places(scratch / "right")
        for kind in arguments.kinds.split(","):
            started = time.perf_counter()
            found = fuzz(kind, round(arguments.cases * KINDS[kind].share), arguments.seed, scratch / "cases", places)
            results[kind] = {
                "cases": found.counts.total(),
                **found.counts,
                "seconds": round(time.perf_counter() - started, 1),
                "slowest_s": round(found.slowest_s, 3),
                "bugs": found.bugs,
            }
            print(kind, json.dumps(results[kind] | {"bugs": len(found.bugs)}), flush=True)
            for name, case in found.bugs.items():
                print(f"  BUG {name}\n      {case[:600]}", flush=True)
    total = sum(result["cases"] for result in results.values())
    outcome = {
        **environment(torch.device("cpu")),
        "seed": arguments.seed,
        "limit_s": LIMIT_S,
        "cases": total,
        "bugs": sum(len(result["bugs"]) for result in results.values()),
        "results": results,
    }
    if arguments.to:
        arguments.to.parent.mkdir(parents=True, exist_ok=True)
        arguments.to.write_text(json.dumps(outcome, indent=2) + "\n")
    print(f"{total:,} cases, {outcome['bugs']} bugs")


if __name__ == "__main__":
    main()
