"""What each lean path of the training step gains alone: tokens a second, bytes alive at the step's peak, losses.

    peftune bench step [--rows instructions.jsonl] [--repeats 4] [--to results.json] [--table table.md]

One run of the true loop's steps (`build`, then `train_step`) in one process. Before each stretch of steps the weights
and the optimizer are set back, and the layers are made plain or lean; so all stretches do the same work, in turns:
every repeat runs each of them once. The peak counts weights and all tensors that the last step makes (`plan/live.py`).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peftune.build_model as building
from benchmarks.arithmetic import spread
from benchmarks.speed_cells import Cell
from benchmarks.throughput import Bench, options, publish
from peftune.build import build
from peftune.config.load import load
from peftune.config.schema import RunConfig
from peftune.loop.optimizer import build_optimizer
from peftune.loop.run import Run
from peftune.loop.step import train_step
from peftune.model import packing
from peftune.model.fusion import fused_passes
from peftune.model.lean import make_lean
from peftune.model.lean_gated import LeanGatedMLP
from peftune.model.lean_lora import LeanLoraLinear
from peftune.model.lean_norm import LeanRMSNorm
from peftune.model.lean_rotary import LeanRotation
from peftune.model.precision import DTYPES
from peftune.numerics.passes import PLAIN
from peftune.observe.manifest import environment
from peftune.plan.live import LiveBytes

ATTENTION, COMPILED = "attention", "compiled"
ATTENDS = packing.attends
VARIANTS: Mapping[str, tuple[type[nn.Module] | str, ...]] = {
    "plain": (), "norms": (LeanRMSNorm,), "LoRA layers": (LeanLoraLinear,),
    "LoRA layers, gated blocks": (LeanLoraLinear, LeanGatedMLP), "rotations": (LeanRotation,),
    "attention": (ATTENTION,), "all": (LeanRMSNorm, LeanLoraLinear, LeanGatedMLP, LeanRotation, ATTENTION),
    "all, compiled": (LeanRMSNorm, LeanLoraLinear, LeanGatedMLP, LeanRotation, ATTENTION, COMPILED)}
"""What is lean. A gated block needs a lean LoRA layer. `compiled` is model.compile=parts."""
WARM_UP, STEPS = 1, 4
MIB = 2**20


class Subject:
    """A run whose layers can be plain or lean."""

    def __init__(self, run: Run, config: RunConfig) -> None:
        self.run, self.config = run, config
        self.plain = {module: type(module) for module in run.model.modules()}
        self.start = [parameter.detach().clone() for parameter in self._trained()]
        run.model.train()

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.run.model.parameters() if parameter.requires_grad]

    def measure(self, variant: str) -> dict[str, Any]:
        """Take the stretch of steps; the last one is followed byte by byte and not timed."""
        self._dress(VARIANTS[variant])
        packing.attends = ATTENDS if ATTENTION in VARIANTS[variant] else lambda *_, **__: False
        with torch.no_grad():
            for parameter, value in zip(self._trained(), self.start, strict=True):
                parameter.copy_(value)
        optimizer = build_optimizer(self.run.model, self.config.train)
        losses, tokens, seconds, cpu_s = [], 0, 0.0, 0.0
        for step in range(WARM_UP + STEPS):
            started, cpu = time.perf_counter(), time.process_time()
            stats = self._step(step, optimizer)
            losses.append(stats.loss_sum / stats.targets)
            if step >= WARM_UP:
                tokens += stats.tokens
                seconds, cpu_s = seconds + time.perf_counter() - started, cpu_s + time.process_time() - cpu
        live = LiveBytes()
        live.hold(self.run.model.parameters(), "weights")
        with live:
            self._step(WARM_UP + STEPS, optimizer)
        return {"tokens_per_second": tokens / seconds, "tokens_per_core_second": tokens / cpu_s, "losses": losses,
                "peak_bytes": max(peak.live_bytes for peak in live.peaks.values())}

    def _dress(self, lean: tuple[type[nn.Module] | str, ...]) -> None:
        for module, plain in self.plain.items():
            module.__class__ = plain
        device, dtype = torch.device("cpu"), DTYPES[self.config.model.dtype]
        make_lean(self.run.model, by_module=False, passes=fused_passes(device, dtype) if COMPILED in lean else PLAIN)
        kinds = tuple(kind for kind in lean if isinstance(kind, type))
        for module, plain in self.plain.items():
            if not isinstance(module, kinds):
                module.__class__ = plain

    def _step(self, step: int, optimizer: torch.optim.Optimizer) -> Any:
        run = self.run
        return train_step(run.model, run.work(step), optimizer, run.strategy, losses=run.losses,
                          autocast=run.autocast, max_grad_norm=run.max_grad_norm)


def measured(config_path: Path, repeats: int) -> dict[str, list[dict[str, Any]]]:
    """The records of each variant."""
    config = load([str(config_path), "data.validation=null"])
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    building.make_lean = lambda model, **_: None  # the run begins plain
    with build(config) as built:
        assert built.run is not None, "a measured run starts in an empty folder"
        subject = Subject(built.run, config)
        for _ in range(repeats):
            for name in VARIANTS:
                records[name].append(subject.measure(name))
                print(f"{name}: {records[name][-1]['tokens_per_second']:,.0f} tokens/s", flush=True)
    return records


def summary_of(records: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    """Spreads over the repeats; the gain over the plain stretch of the same repeat; the largest deviation of a loss."""
    found = {name: spread([record[name] for record in records])
             for name in ("tokens_per_second", "tokens_per_core_second", "peak_bytes")}
    pairs = list(zip(records, plain, strict=True))
    found["gain"] = spread([one["tokens_per_second"] / other["tokens_per_second"] for one, other in pairs])
    deviation = max(abs(mine - theirs) / theirs for one, other in pairs
                    for mine, theirs in zip(one["losses"], other["losses"], strict=True))
    return {**found, "loss_deviation": deviation}


def table_of(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a row a variant."""
    lines = ["| lean | tokens/s (range) | gain (range) | peak of a step (MiB) | largest loss deviation |",
             "| --- |" + " ---: |" * 4]
    for name, found in summaries.items():
        rate, gain = found["tokens_per_second"], found["gain"]
        lines.append(f"| {name} | {rate['median']:,.0f} ({rate['min']:,.0f} to {rate['max']:,.0f}) | "
                     f"{gain['median']:.3f} ({gain['min']:.3f} to {gain['max']:.3f}) | "
                     f"{found['peak_bytes']['median'] / MIB:,.0f} | {found['loss_deviation']:.1e} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(prog="peftune bench step", description=__doc__.splitlines()[0])
    options(parser, repeats=4)
    asked = parser.parse_args()
    cell = Cell()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("PEFTUNE_CACHE", f"{scratch}/cache")
        bench = Bench(Path(scratch), asked.rows and asked.rows.resolve())
        torch.set_num_threads(bench.threads)
        records = measured(bench.config(cell), asked.repeats)
    summaries = {name: summary_of(found, records["plain"]) for name, found in records.items()}
    ratios = {f"{name}: tokens/s over plain": found["gain"]["median"] for name, found in summaries.items()}
    outcome = {**environment(torch.device("cpu")), "threads": bench.threads, "cell": str(cell),
               "data": asked.rows.name if asked.rows else "made up", "steps": STEPS, "ratios": ratios,
               "summaries": summaries, "records": records}
    return publish(asked, outcome, table_of(summaries))


if __name__ == "__main__":
    sys.exit(main())
