"""What quantised loading costs and saves: bytes of the base by kind, and losses beside the dequantised weights.

    peftune bench quantization [--kinds int8 nf4 fp4] [--to results.json] [--table table.md]

Two runs a kind, of one process, in float32, with LoRA over all linear layers: over the quantised weights, and over
plain layers that hold their dequantised values. What differs between them is the kernels alone. The bytes are counted
tensor by tensor in the loaded model, and expected from the kind's bits a value and its scales.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.launches import launched
from peftune.config.schema import ModelConfig
from peftune.model.load import load_weights
from peftune.model.quantize import dequantise, dequantised_weight
from peftune.observe.manifest import environment
from tests import tiny

KINDS = ("int8", "nf4", "fp4")
STEPS = 10
TOLERANCE = 1e-5
"""Largest relative deviation of a step's loss: both runs multiply equal float32 values."""
SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8,
         "num_key_value_heads": 4, "initializer_range": 0.02}
BLOCK, BLOCKS_OF_A_SCALE = 64, 256
TABLE_BYTES = 4 * (16 + 256 + 1)
"""Of a 4-bit layer beside its blocks: the codes of values and of scales, and the scales' mean."""
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Outcome:
    """A kind: values and bytes of what is quantised, bytes of the rest of the base, and how far losses lie apart."""

    kind: str
    quantised_values: int
    expected_bytes: int
    measured_bytes: int
    other_bytes: int
    float32_bytes: int
    loss_deviation: float
    """Largest relative deviation of a step's loss from the same run over the dequantised weights."""
    rounding: float
    """Largest relative deviation of a step's loss from the weights before they were quantised."""


def measured(model: PreTrainedModel) -> tuple[int, int, int, int]:
    """Quantised values; bytes expected and found for them; bytes of all other weights."""
    layers = {name: module for name, module in model.named_modules()
              if isinstance(module, nn.Linear) and dequantised_weight(module) is not None}
    values = sum(layer.in_features * layer.out_features for layer in layers.values())
    expected = sum(_expected(layer) for layer in layers.values())
    found = sum(_bytes(tensor) for layer in layers.values() for tensor in _kept(layer))
    inside = {id(layer.weight) for layer in layers.values()}
    return values, expected, found, sum(_bytes(p) for p in model.parameters() if id(p) not in inside)


def _expected(layer: Any) -> int:
    """int8: a byte a value, a float32 scale a row. 4 bits: half a byte, a byte of scale a block, a float32 for 256."""
    values = layer.in_features * layer.out_features
    if layer.weight.dtype == torch.int8:
        return values + 4 * layer.out_features
    blocks = -(-values // BLOCK)
    return -(-values // 2) + blocks + 4 * -(-blocks // BLOCKS_OF_A_SCALE) + TABLE_BYTES


def _kept(layer: Any) -> Iterator[Tensor]:
    """Every tensor that a quantised layer holds, each once."""
    yield layer.weight.data
    if layer.weight.dtype == torch.int8:
        yield layer.state.SCB
        return
    state = layer.weight.quant_state
    yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Bench:
    """A folder with a model, its rows, and the runs made with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny.save_decoder(folder / "decoder", **SIZES)
        self.rows = folder / "train.jsonl"
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in tiny.chat_rows(64)))
        self._plain = self._losses("unquantised", self.model, "none")

    def outcome(self, kind: str) -> Outcome:
        """Count, run both ways, compare."""
        model = self._loaded(kind)
        values, expected, found, other = measured(model)
        dequantise(model, torch.float32)
        folder = self.folder / f"dequantised-{kind}"
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(self.model).save_pretrained(folder)
        del model
        mine = self._losses(kind, self.model, kind)
        reference = self._losses(f"{kind}-dequantised", str(folder), "none")
        return Outcome(kind, values, expected, found, other, 4 * values, _apart(mine, reference),
                       _apart(mine, self._plain))

    def _loaded(self, kind: str) -> PreTrainedModel:
        return load_weights(
            ModelConfig(name_or_path=self.model, quantization=kind, dtype="float32"), self.model,
            AutoConfig.from_pretrained(self.model), AutoModelForCausalLM, dtype=torch.float32, new_head=False,
            device=torch.device("cpu")).model

    def _losses(self, name: str, model: str, kind: str) -> list[float]:
        run, path = self.folder / "runs" / name, self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({
            "task": "causal_lm", "output_dir": str(run), "adapter": {"method": "lora", "r": 8},
            "model": {"name_or_path": model, "dtype": "float32", "quantization": kind},
            "data": {"train": str(self.rows), "validation": None, "max_length": 128},
            "train": {"batch_size": 8, "max_steps": STEPS, "learning_rate": 0.001},
            "log": {"every_steps": 1, "trackers": []}}))
        done = launched("single", 1, [str(path)])
        assert done.returncode == 0, done.stderr[-3000:]
        rows = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
        return [row["loss"] for row in rows if row["split"] == "train"]


def _apart(mine: list[float], other: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(mine, other, strict=True))


def table_of(outcomes: list[Outcome]) -> str:
    """Markdown: a row a kind."""
    lines = ["| kind | quantised layers, expected (MiB) | measured (MiB) | of float32 | bits a value | rest of the "
             "base (MiB) | loss, from the dequantised weights | from the weights before |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for o in outcomes:
        lines.append(
            f"| {o.kind} | {o.expected_bytes / MIB:.3f} | {o.measured_bytes / MIB:.3f} | "
            f"1 / {o.float32_bytes / o.measured_bytes:.2f} | {8 * o.measured_bytes / o.quantised_values:.3f} | "
            f"{o.other_bytes / MIB:.3f} | {o.loss_deviation:.0e} | {o.rounding:.0e} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure the kinds that are asked for; 1 if bytes or losses are not as expected."""
    parser = argparse.ArgumentParser(prog="peftune bench quantization", description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--to", type=Path)
    parser.add_argument("--table", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("PEFTUNE_CACHE", f"{scratch}/cache")
        bench = Bench(Path(scratch))
        outcomes = [bench.outcome(kind) for kind in asked.kinds]
    print(table_of(outcomes), end="")
    for path, text in ((asked.to, _json(outcomes)), (asked.table, table_of(outcomes))):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return int(any(o.expected_bytes != o.measured_bytes or not o.loss_deviation <= TOLERANCE for o in outcomes))


def _json(outcomes: list[Outcome]) -> str:
    return json.dumps({**environment(torch.device("cpu")), "sizes": SIZES, "steps": STEPS, "dtype": "float32",
                       "runs": 1, "tolerance": TOLERANCE, "kinds": [asdict(o) for o in outcomes]}, indent=1) + "\n"


if __name__ == "__main__":
    sys.exit(main())
