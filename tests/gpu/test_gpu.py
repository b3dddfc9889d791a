"""What a GPU computes is what a CPU computes; what needs a GPU is tried on it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config

from peftune.build import build
from peftune.config.load import load
from peftune.model.device_attention import kernel_fault
from tests import tiny
from tests.conftest import metric_rows, summary, write_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TRAIN = Path(__file__).resolve().parents[2] / "peftune" / "train.py"


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A causal language model and its rows, in float32."""
    folder = tmp_path_factory.mktemp("chats")
    rows = folder / "train.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tiny.chat_rows(48)))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    return {"task": "causal_lm", "model": {"name_or_path": tiny.save_decoder(folder / "decoder"), "dtype": "float32"},
            "adapter": {"r": 4}, "data": {"train": str(rows), "validation": 0.2, "chat_template": template},
            "train": {"batch_size": 8, "num_epochs": 1, "learning_rate": 1e-2}, "log": {"every_steps": 1},
            "evaluation": {"max_new_tokens": 4}}


def trained(settings, folder, **environment):
    """The run folder of a run in a process of its own."""
    config = write_config({**settings, "output_dir": str(folder / "run")}, folder / "config")
    done = subprocess.run([sys.executable, str(TRAIN), str(config)], check=False, capture_output=True, text=True,
                          env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


def losses(folder):
    """Of each step."""
    return [row["loss"] for row in metric_rows(folder) if row["split"] == "train"]


@pytest.mark.parametrize("adapter", [{"r": 4}, None], ids=["lora", "full"])
def test_each_step_has_the_loss_that_it_has_on_a_cpu(adapter, chats, tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "gpu").mkdir()
    settings = {**chats, "adapter": adapter}
    if adapter is None:
        settings["train"] = {**chats["train"], "learning_rate": 1e-3}
    here = losses(trained(settings, tmp_path / "gpu"))
    assert here == pytest.approx(losses(trained(settings, tmp_path / "cpu", CUDA_VISIBLE_DEVICES="")), rel=1e-4)
    assert len(here) > 2


def test_packed_rows_and_padded_ones_have_equal_losses(chats, tmp_path):
    found = []
    for layout in ("packed", "padded"):
        (tmp_path / layout).mkdir()
        settings = {**chats, "data": {**chats["data"], "layout": layout}}
        found.append(losses(trained(settings, tmp_path / layout)))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
                    reason="flash kernels need compute capability 8.0")
@pytest.mark.parametrize("windows", [None, 5])
@pytest.mark.parametrize("size", [64, 80, 128, 256])
def test_one_call_of_the_flash_kernel_attends_to_each_packed_sequence_alone(size, windows):
    config = Qwen2Config(hidden_size=8 * size, num_attention_heads=8, num_key_value_heads=2, sliding_window=windows)
    assert kernel_fault(config, torch.device("cuda"), torch.bfloat16) is None


def test_a_run_in_bfloat16_attends_to_all_sequences_in_one_call_as_to_one_after_another(chats, tmp_path):
    settings = {**chats, "output_dir": str(tmp_path / "run"), "model": {**chats["model"], "dtype": "bfloat16"},
                "data": {**chats["data"], "layout": "packed"}}
    config = load([str(write_config(settings, tmp_path / "config"))])
    with build(config) as built:
        run = built.run
        batch = next(iter(run.work(0).micro_batches))
        assert run.layout.at_once == (torch.cuda.get_device_capability() >= (8, 0))
        with run.autocast(), torch.no_grad():
            together = run.losses(run.model, batch)
            batch.inputs.pop("segment_ends", None)
            alone = run.losses(run.model, batch)
    torch.testing.assert_close(together, alone, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_base_trains_and_its_folder_gives_the_same_logits(kind, chats, tmp_path):
    settings = {**chats, "model": {**chats["model"], "dtype": "bfloat16", "quantization": kind}}
    folder = trained(settings, tmp_path)
    assert losses(folder)[-1] < losses(folder)[0]
    assert summary(folder)["exit"] == "done"


def test_the_memory_that_a_run_reports_is_the_device_s(chats, tmp_path):
    folder = trained({**chats, "model": {**chats["model"], "dtype": "bfloat16"}}, tmp_path)
    assert 0 < summary(folder)["peak_memory_bytes"] < torch.cuda.get_device_properties(0).total_memory
