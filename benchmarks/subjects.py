"""What the benchmarks of speed train: Llamas of a given size drawn from their config, and instructions to learn."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.arithmetic import step_flops
from peftune.config.load import load
from peftune.data.prepare import open_prepared, prepare
from peftune.tasks import TASKS
from peftune.tasks.text import open_text
from tests import tiny

VOCABULARY = 8192
"""Tokens at most."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama without grouped heads and without tied embeddings."""

    width: int
    inner: int
    layers: int
    head: int = 64

    @property
    def body(self) -> int:
        """Weights of the layers' matrices."""
        return self.layers * (4 * self.width**2 + 3 * self.width * self.inner)


SHAPES: Mapping[str, Shape] = {
    "1m": Shape(128, 344, 2, head=32), "60m": Shape(640, 1728, 10), "150m": Shape(1024, 2736, 11),
    "500m": Shape(1536, 4096, 17)}
"""By the number of weights, embeddings included; 1m is for tests."""


def instruction_rows(path: Path | None, count: int) -> list[dict[str, str]]:
    """Prompts and completions: of a file of {"instruction", "input", "output"}, or made-up ones of as unequal lengths.

    Args:
        path: JSON lines, of which the first `count` are taken; None makes rows up.
        count: how many.
    """
    if path is not None:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]
        asked = ["\n".join(filter(None, (row["instruction"], row["input"]))) for row in rows]
        return [{"prompt": f"Question: {text}\nAnswer:", "completion": f" {row['output']}"}
                for text, row in zip(asked, rows)]
    rng = random.Random(0)
    words = ["".join(rng.choice("bcdfglmnprst") + rng.choice("aeiou") for _ in range(rng.randint(1, 4)))
             for _ in range(3000)]

    def text(mean: float) -> str:
        return " ".join(rng.choices(words, k=min(300, 3 + int(rng.lognormvariate(0, 0.8) * mean))))

    return [{"prompt": f"Question: {text(20)}\nAnswer:", "completion": f" {text(50)}"} for _ in range(count)]


def save_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """As JSON lines; the file's name."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def save_model(folder: Path, shape: Shape, rows: Sequence[Mapping[str, str]], longest: int) -> str:
    """The Llama, and a tokenizer that has learned these rows."""
    return tiny.save_decoder(
        folder, texts=[row["prompt"] + row["completion"] for row in rows], vocab_size=VOCABULARY,
        hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // shape.head, num_key_value_heads=shape.width // shape.head,
        max_position_embeddings=longest, initializer_range=0.02)


def token_rows(config: Path, split: str) -> list[dict[str, Any]]:
    """The examples of a run as its own data path makes them, for others to train on: input_ids, and labels or label."""
    run = load([str(config)])
    text = open_text(TASKS[run.task](run.train, run.evaluation), run.model, run.data)
    data = open_prepared(prepare(run.data, text.encoder, seed=run.seed, identity=text.identity()))
    examples = [data.splits[split][i] for i in range(len(data.splits[split]))]
    if data.targets.kind == "token":
        return [{"input_ids": list(map(int, one.input_ids)), "labels": list(map(int, one.targets))}
                for one in examples]
    return [{"input_ids": list(map(int, one.input_ids)), "label": int(one.targets[0])} for one in examples]


def work_flops(rows: Sequence[Mapping[str, Any]], shape: Shape, adapters: int, config: Path) -> float:
    """Operations that one pass over these token rows needs to learn from them; see `step_flops`.

    Args:
        rows: of `token_rows`.
        shape: of the model.
        adapters: trained weights beside a frozen base; 0 where all weights train.
        config: of the run. Its model's tokenizer may have found fewer tokens than it was allowed.
    """
    targets = sum(label != -100 for row in rows for label in row["labels"][1:])
    model = Path(load([str(config)]).model.name_or_path)
    vocabulary = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    return step_flops([len(row["input_ids"]) for row in rows], targets, body=shape.body, adapters=adapters,
                      vocabulary=vocabulary, width=shape.width, layers=shape.layers, heads_width=shape.width)


def save_config(path: Path, values: Mapping[str, Any]) -> Path:
    """A config file."""
    path.write_text(yaml.safe_dump(dict(values)), encoding="utf-8")
    return path
