"""How far off is `peftune plan`? Predicted beside measured memory, over models, methods, lengths, layouts, strategies.

    peftune bench plan [--cells FIRST:LAST] [--to results.json] [--table table.md]
    peftune bench plan --models [NAME ...] [--table plans.md]

Each cell is a run of `measured_plan.py`, in processes of its own, which says what is measured. `tensors` compares live
tensors; `resident` the process's growth with the plan's tensors and what a run adds beside them (`BESIDE_TENSORS`, set
by the cells of one process that are not held back), where glibc maps each large block by itself. Cells whose number
divides by five are held back: nothing in the plan was set by them. Results that `--to` names are added to.

With --models: the plans of Llama-3.1-8B, 70B and Qwen2.5-7B, from their shapes alone, beside the arithmetic floor.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.launches import Run, launched_together
from benchmarks.memory import ALLOCATOR
from peftune.observe.manifest import environment
from peftune.plan.planning import answered
from peftune.plan.show import rendered
from tests import tiny

HERE = Path(__file__).resolve().parent
MEASURED = HERE / "measured_plan.py"
MIB, GIB = 2**20, 2**30
BESIDE_TENSORS = {("float32", False): 32 * MIB, ("float32", True): 48 * MIB, ("bfloat16", False): 64 * MIB,
                  ("bfloat16", True): 64 * MIB}
"""What five steps add to a process beside tensors, by `model.dtype` and whether weights are quantised: code that oneDNN
makes for shapes, pages of libraries. Set by the cells that were not held back. `auto` leaves more
(`peftune/plan/choose.py`), since a run has many more shapes, and its own trace takes some."""
STEPS, BATCH, SCORED = 5, 4, 2
HELD_BACK = 5
FAMILIES: dict[str, dict[str, Any]] = {
    "llama-5m": {"model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6,
                 "num_attention_heads": 8, "num_key_value_heads": 4},
    "llama-30m": {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
                  "num_attention_heads": 8, "num_key_value_heads": 8},
    "qwen-60m": {"model_type": "qwen2", "hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 12,
                 "num_attention_heads": 10, "num_key_value_heads": 2},
    "llama-300m": {"model_type": "llama", "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 20,
                   "num_attention_heads": 16, "num_key_value_heads": 8},
    "bert-30m": {"model_type": "bert", "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8,
                 "num_attention_heads": 8, "vocab_size": 8000},
    "modernbert-40m": {"model_type": "modernbert", "hidden_size": 512, "intermediate_size": 1024,
                       "num_hidden_layers": 10, "num_attention_heads": 8, "vocab_size": 8000},
}
DECODERS = ("llama", "qwen")
LARGE = ("llama-3.1-8b", "qwen2.5-7b", "llama-3.1-70b")
INTRODUCTION = """# Plans of large models

Made by `peftune bench plan --models`, from the models' shapes alone: LoRA of rank 16 on all linear layers, examples of
2,048 tokens, all of them supervised, 32 a step; `train.tokens_per_micro_batch` and `model.gradient_checkpointing` are
`auto`. The floor is arithmetic: 2 bytes a frozen weight (bfloat16) and 16 bytes a trained one (float32: the weight, its
gradient, two of AdamW). No run on a GPU has been compared with these; what is assumed of GPUs stands in
`peftune/plan/devices.py`, what of divided states in `peftune/plan/divide.py`. `fsdp2` and `zero3` take the logits of
all supervised tokens of a micro-batch at once, the others some at a time.
"""
DEVICES = (("rtx-4090-24gb", 1, "single"), ("h100-80gb", 1, "single"), ("h100-80gb", 8, "fsdp2"))
QUANTISED = ("nf4", "int8")
FULL, LORA = None, {"method": "lora", "r": 16}


@dataclass(frozen=True, slots=True)
class Cell:
    """One launch."""

    model: str
    method: str
    dtype: str = "float32"
    recompute: bool = False
    length: int = 128
    layout: str = "packed"
    strategy: str = "single"

    @property
    def is_decoder(self) -> bool:
        """Whether it learns the next token; else classes."""
        return self.model.startswith(DECODERS)


def cells() -> list[Cell]:
    """The grid: every model with every method it can have, the other choices taken in turn; then strategies."""
    found = []
    turns = itertools.cycle(itertools.product((False, True), (128, 320), ("packed", "padded"), ("float32", "bfloat16")))
    for model, method in itertools.product(FAMILIES, ("lora", "full", "nf4", "int8")):
        if method in QUANTISED and not model.startswith(DECODERS):
            continue
        if (model, method) == ("llama-300m", "full"):
            continue
        for _ in range(1 if model == "llama-300m" else 3):
            recompute, length, layout, dtype = next(turns)
            if (model, method) == ("llama-300m", "int8"):
                dtype = "bfloat16"  # float32 products with 8-bit weights take minutes a step on CPUs
            found.append(Cell(model, method, dtype, recompute, length, layout))
    shared = itertools.product(("ddp", "zero2", "fsdp2"), ("llama-30m", "qwen-60m"), ("lora", "full"))
    return found + [Cell(model, method, strategy=strategy) for strategy, model, method in shared]


class Bench:
    """A folder with models and rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def model(self, name: str) -> str:
        """The folder of a model, drawn when it is asked for first."""
        folder = self.folder / name
        if not folder.exists():
            sizes = dict(FAMILIES[name])
            tokenizer = AutoTokenizer.from_pretrained(self._text(name))
            vocabulary = max(len(tokenizer), sizes.pop("vocab_size", 8000))
            config = AutoConfig.for_model(sizes.pop("model_type"), **sizes, vocab_size=vocabulary, pad_token_id=1,
                                          bos_token_id=0, eos_token_id=1, max_position_embeddings=1024)
            made = AutoModelForCausalLM if name.startswith(DECODERS) else AutoModelForSequenceClassification
            torch.manual_seed(0)
            made.from_config(config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return str(folder)

    def _text(self, name: str) -> str:
        decoder = name.startswith(DECODERS)
        folder = self.folder / ("decoder" if decoder else "encoder")
        if not folder.exists():
            (tiny.save_decoder if decoder else tiny.save_encoder)(folder)
        return str(folder)

    def rows(self, cell: Cell, split: str) -> str:
        """Rows longer than `cell.length`, which are cut to it, half of each supervised."""
        path = self.folder / f"{split}-{cell.is_decoder}-{cell.length}.jsonl"
        words = " ".join([tiny.NOUNS[0]] * cell.length)
        half = " ".join([tiny.NOUNS[0]] * (cell.length // 2 - 8))
        rows = [{"prompt": f"{split} {i} {half}", "completion": f" {words}"} if cell.is_decoder else
                {"text": f"{split} {i} {words}", "label": str(i % 2)}
                for i in range(BATCH * STEPS if split == "train" else SCORED)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def config(self, cell: Cell, number: int) -> Path:
        """The cell's config file."""
        path = self.folder / f"{number}.yaml"
        path.write_text(yaml.safe_dump({
            "task": "causal_lm" if cell.is_decoder else "sequence_classification",
            "adapter": FULL if cell.method == "full" else LORA,
            "model": {"name_or_path": self.model(cell.model), "dtype": cell.dtype,
                      "gradient_checkpointing": cell.recompute,
                      "quantization": cell.method if cell.method in QUANTISED else "none"},
            "data": {"train": self.rows(cell, "train"), "validation": self.rows(cell, "validation"),
                     "max_length": cell.length, "layout": cell.layout},
            "train": {"batch_size": BATCH, "max_steps": STEPS, "tokens_per_micro_batch": 2 * cell.length},
            "evaluation": {"max_new_tokens": 0}, "log": {"trackers": []}}))
        return path

    def measure(self, strategy: str, cells: Mapping[int, Cell]) -> dict[int, dict[str, Any]]:
        """Launch cells of one strategy by number, and read what their ranks wrote: the first one, which plans."""
        processes, found = 1 if strategy == "single" else 2, {}
        folders = {number: self.folder / f"run-{number}" for number in cells}
        runs = [Run([str(self.config(cell, number)), f"output_dir={folders[number]}"], script=MEASURED)
                for number, cell in cells.items()]
        done = launched_together(strategy, processes, runs, self.folder / f"logs-{next(iter(cells))}", limit_s=300)
        for (number, folder), ended in zip(folders.items(), done, strict=True):
            if ended.returncode != 0:
                found[number] = {"why": ended.stderr[-2000:]}
                continue
            ranks = [json.loads((folder / f"plan-{rank}.json").read_text()) for rank in range(processes)]
            assert all(rank["strategy"] == strategy for rank in ranks), "another strategy ran than was asked for"
            found[number] = ranks[0]
            shutil.rmtree(folder)
        return found


def errors(result: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """What was predicted and what was measured: of live tensors in a step, and of resident memory in a step."""
    found = result["found"]
    step = found["predicted"]["instants"]["step"]
    beside = BESIDE_TENSORS[result["cell"]["dtype"], result["cell"]["method"] in QUANTISED]
    pairs = {"resident": (step + beside, found["resident_bytes"]["step"])}
    return {"tensors": (step, found["tensor_bytes"]), **pairs} if found["tensor_bytes"] else pairs


def spread_of(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: how far off cells of each kind are."""
    groups = {"one process": [result for result in results if result["cell"]["strategy"] == "single"],
              "two processes": [result for result in results if result["cell"]["strategy"] != "single"]}
    lines = ["| cells | what | cells measured | median error | 95th percentile | most below | most above "
             "| median of MiB off | most MiB off |", "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for (name, group), held, kind in itertools.product(groups.items(), (False, True), ("tensors", "resident")):
        pairs = [errors(result)[kind] for result in group
                 if (result["number"] % HELD_BACK == 0) is held and kind in errors(result)]
        if not pairs:
            continue
        shares = [predicted / measured - 1 for predicted, measured in pairs]
        off, sizes = sorted(map(abs, shares)), [abs(one - other) / MIB for one, other in pairs]
        lines.append(f"| {name}{', held back' if held else ''} | {kind} | {len(pairs)} | {median(off):.2%} | "
                     f"{off[round(0.95 * (len(off) - 1))]:.2%} | {min(shares):+.2%} | {max(shares):+.2%} | "
                     f"{median(sizes):.1f} | {max(sizes):.1f} |")
    return lines


def table_of(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: the spread of errors, then a row a cell."""
    lines = spread_of([result for result in results if "why" not in result["found"]])
    lines += ["", "| model | method | dtype | recomputed | length | layout | strategy | held back | predicted (MiB) | "
              "tensors (MiB) | error | resident (MiB) | error |",
              "| --- | --- | --- | --- | ---: | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    for result in results:
        words = " | ".join(str(value) for value in [*result["cell"].values(), result["number"] % HELD_BACK == 0])
        found = result["found"]
        if "why" in found:
            lines.append(f"| {words} | **failed** | | | | |")
            continue
        off = errors(result)
        shown = [f"{measured / MIB:,.1f} | {predicted / measured - 1:+.2%}" if predicted else " | "
                 for predicted, measured in (off.get("tensors", (0, 0)), off["resident"])]
        lines.append(f"| {words} | {found['predicted']['instants']['step'] / MIB:,.1f} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def plans(names: Sequence[str]) -> str:
    """Markdown: large models on few and many GPUs, and the least that their states must take."""
    text = [INTRODUCTION]
    for name, (device, count, strategy) in itertools.product(names, DEVICES):
        models = os.path.relpath(HERE / "models")  # a short name: lines are broken before it is taken off
        words = [f"{models}/plan.yaml", f"model.name_or_path={models}/{name}.json"]
        found, ways, note = answered(words, device, count, strategy)
        total, trained = found.found.parameters.total, found.found.parameters.trainable
        least = (2 * (total - trained) + 16 * trained) / count
        shown = f"{name}: {rendered(found, ways, note).split(': ', 1)[1]}"
        text += [f"## {name}, {count} x {device}", "", "```text", shown, "```", "",
                 f"Floor: (2 x {total - trained:,} + 16 x {trained:,}) / {count} bytes = {least / GIB:.2f} GiB.", ""]
    return "\n".join(text)


def main() -> int:
    """Run the cells that are asked for, write what was found after each, and say whether any failed."""
    parser = argparse.ArgumentParser(prog="peftune bench plan", description=__doc__.splitlines()[0])
    parser.add_argument("--cells", default="0:", metavar="FIRST:LAST", help="numbers of cells, the last one excluded")
    parser.add_argument("--to", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--models", nargs="*", choices=LARGE, help="plans of large models instead; default: all three")
    asked = parser.parse_args()
    if asked.models is not None:
        write(asked.table, plans(asked.models or LARGE))
        return 0
    first, _, last = asked.cells.partition(":")
    known = json.loads(asked.to.read_text())["cells"] if asked.to and asked.to.exists() else []
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("PEFTUNE_CACHE", f"{scratch}/cache")
        os.environ.update(ALLOCATOR)
        bench = Bench(Path(scratch))
        wanted = list(enumerate(cells()))[int(first or 0):int(last) if last else None]
        for strategy, group in itertools.groupby(wanted, key=lambda numbered: numbered[1].strategy):
            of_strategy = dict(group)
            fresh = [{"number": number, "cell": asdict(of_strategy[number]),
                      "found": found} for number, found in bench.measure(strategy, of_strategy).items()]
            known = sorted([result for result in known if result["number"] not in of_strategy] + fresh,
                           key=lambda result: result["number"])
            print("\n".join(table_of(fresh).splitlines()[-len(fresh):]), flush=True)
            if asked.to:
                write(asked.to, json.dumps({**environment(torch.device("cpu")), "steps": STEPS, "batch_size": BATCH,
                                             "families": FAMILIES, "allocator": ALLOCATOR, "runs": 1, "cells": known},
                                            indent=1) + "\n")
            if asked.table:
                write(asked.table, table_of(known))
    return 1 if any("why" in result["found"] for result in known) else 0


def write(path: Path | None, text: str) -> None:
    """Into a file, or on standard output."""
    if path is None:
        print(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
