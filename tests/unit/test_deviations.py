"""The yardstick of `peftune bench parity`: what is no number is far off, wherever it stands."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.deviations import deviations_of


def _run(folder: Path, decoder: str) -> Path:
    """A run folder as far as it is compared."""
    AutoModelForCausalLM.from_pretrained(decoder).save_pretrained(folder / "final")
    (folder / "metrics.jsonl").write_text(json.dumps({"split": "train", "loss": 1.0, "grad_norm": 1.0}) + "\n")
    (folder / "summary.json").write_text(json.dumps({"metrics": {"validation": {"loss": 1.0}}}))
    return folder


@pytest.mark.parametrize("end", [0, -1])
def test_a_weight_that_is_no_number_is_no_small_deviation(decoder, tmp_path, end):
    mine, other = (_run(tmp_path / name, decoder) for name in ("mine", "other"))
    assert not any(deviations_of(mine, other, "causal_lm").values())
    file = next((mine / "final").glob("*.safetensors"))
    weights = load_file(file)
    weights[sorted(weights)[end]].view(-1)[0] = math.nan
    save_file(weights, file, metadata={"format": "pt"})
    assert deviations_of(mine, other, "causal_lm")["weights"] == math.inf
