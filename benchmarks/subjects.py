"""What the benchmarks of speed train: models of a given size drawn from their config, and instructions to learn."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

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
    """A decoder with gated feed-forward layers and untied embeddings."""

    width: int
    inner: int
    layers: int
    head: int = 64
    grouped: int | None = None
    """Heads of keys and values, where they are fewer than those of queries."""
    family: str = "llama"
    vocabulary: int | None = None
    """Rows of the embeddings; None: as many as the tokenizer has learned."""

    @property
    def outer(self) -> Sequence[tuple[int, int]]:
        """Inputs and outputs of a layer's matrices."""
        keys = self.head * (self.grouped or self.width // self.head)
        return [(self.width, self.width)] * 2 + [(self.width, keys)] * 2 + [(self.width, self.inner)] * 3

    @property
    def body(self) -> int:
        """Weights of the layers' matrices."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.outer)

    def adapters(self, rank: int) -> int:
        """Weights of LoRA on all of them."""
        return rank * self.layers * sum(inputs + outputs for inputs, outputs in self.outer)


SHAPES: Mapping[str, Shape] = {
    "1m": Shape(128, 344, 2, head=32), "60m": Shape(640, 1728, 10), "150m": Shape(1024, 2736, 11),
    "500m": Shape(1536, 4096, 17),
    "qwen-1m": Shape(128, 344, 2, head=32, grouped=2, family="qwen2", vocabulary=1024),
    "qwen-0.5b": Shape(896, 4864, 24, grouped=2, family="qwen2", vocabulary=151936),
    "qwen-1.5b": Shape(1536, 8960, 28, head=128, grouped=2, family="qwen2", vocabulary=151936),
    "llama-8b": Shape(4096, 14336, 32, head=128, grouped=8, vocabulary=128256)}
"""By the number of weights, embeddings included; those of 1 million are for tests, those with a vocabulary have the
sizes of Qwen2.5 and of Llama 3.1."""


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
    """The model, in bfloat16 if it has a vocabulary of its own, and a tokenizer that has learned these rows."""
    texts = [row["prompt"] + row["completion"] for row in rows]
    if shape.vocabulary is None:
        return tiny.save_decoder(
            folder, texts=texts, vocab_size=VOCABULARY, hidden_size=shape.width, intermediate_size=shape.inner,
            num_hidden_layers=shape.layers, num_attention_heads=shape.width // shape.head,
            num_key_value_heads=shape.width // shape.head, max_position_embeddings=longest, initializer_range=0.02)
    tiny.save_decoder(folder, texts=texts, vocab_size=min(VOCABULARY, shape.vocabulary))  # for its tokenizer
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
            shape.family, vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.inner,
            num_hidden_layers=shape.layers, num_attention_heads=shape.width // shape.head,
            num_key_value_heads=shape.grouped, head_dim=shape.head, max_position_embeddings=longest,
            tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=1), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    del model
    gc.collect()  # a model refers to itself
    torch.cuda.empty_cache()  # what this process keeps, those that train lack
    return str(folder)


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
