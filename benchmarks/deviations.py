"""How far two runs lie apart: steps, scores, saved weights, and what the saved folders compute."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from peftune.config.schema import EvaluationConfig, TrainConfig
from peftune.model.outputs import logits_of
from peftune.model.save import load_trained
from peftune.tasks import TASKS

UNSEEN = ("key.bias",)
UNSEEN_BY_ANSWERS = ("qa_outputs.bias", "encoder.layer.1.output.LayerNorm.bias")
"""Weights that a softmax cancels, over keys or over the tokens of a text: added to each of its terms, they change no
loss. Their gradient is rounding alone, which AdamW scales up to the learning rate; so they are not compared, and logits
of answers only up to a constant."""


def deviations_of(folder: Path, reference: Path, task: str, quantization: str = "none") -> dict[str, float]:
    """Largest deviation of a run from another one, by what is compared; both with the same `model.quantization`."""
    rows, others = (_training_rows(run) for run in (folder, reference))
    assert len(rows) == len(others), "the runs have not taken the same number of steps"
    scores, other_scores = (json.loads((run / "summary.json").read_text())["metrics"]["validation"]
                            for run in (folder, reference))
    weights, other_weights = (_weights(run / "final") for run in (folder, reference))
    assert weights.keys() == other_weights.keys(), "the saved folders hold different weights"
    return {
        "loss": _largest(_relative(a["loss"], b["loss"]) for a, b in zip(rows, others, strict=True)),
        "grad_norm": _largest(_relative(a["grad_norm"], b["grad_norm"]) for a, b in zip(rows, others, strict=True)),
        "metrics": _largest(_relative(a, b) for key in other_scores
                            for a, b in zip(_numbers(scores[key]), _numbers(other_scores[key]), strict=True)),
        "weights": _largest(_apart(weights[name], other_weights[name]) for name in weights
                            if not name.endswith(UNSEEN + UNSEEN_BY_ANSWERS * (task == "question_answering"))),
        "logits": _logit_deviation(folder / "final", reference / "final", task, quantization),
    }


def _training_rows(run: Path) -> list[dict[str, Any]]:
    rows = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["split"] == "train"]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _numbers(value: Any) -> Iterator[float]:
    for part in value if isinstance(value, list) else [value]:
        yield math.nan if part is None else float(part)


def _largest(deviations: Iterable[float]) -> float:
    """What is no number is the largest: Python's `max` passes over it, unless it stands first."""
    return max(math.inf if math.isnan(one) else one for one in deviations)


def _apart(mine: torch.Tensor, other: torch.Tensor) -> float:
    return (mine.float() - other.float()).abs().max().item()


def _relative(value: float, other: float) -> float:
    """|a - b| / |b|, over 0.1 where |b| is less: a small difference of large sums has their rounding."""
    if math.isnan(value) or math.isnan(other):
        return 0.0 if math.isnan(value) and math.isnan(other) else math.inf
    return abs(value - other) / max(abs(other), 0.1)


def _logit_deviation(folder: Path, reference: Path, task: str, quantization: str) -> float:
    """Of two saved folders, on the same ids."""
    mine, other = _logits(folder, task, quantization), _reference_logits(reference, task, quantization)
    if task == "question_answering":
        mine, other = (logits - logits.mean(dim=1, keepdim=True) for logits in (mine, other))
    return _largest([_apart(mine, other)])


@torch.no_grad()
def _logits(folder: Path, task: str, quantization: str) -> torch.Tensor:
    """Of a saved folder, loaded by plain peft or transformers."""
    auto_class = TASKS[task](TrainConfig(), EvaluationConfig()).auto_class
    model = load_trained(folder, auto_class, dtype=torch.float32, quantization=quantization).eval()
    ids = torch.arange(5, 5 + 24).reshape(2, 12)
    return logits_of(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


_reference_logits = functools.cache(_logits)
"""Many runs are compared with one; run folders are never written over."""
