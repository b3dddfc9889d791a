"""A lack of memory is one message, with settings that take less and are allowed."""

import re

import pytest
import torch

from peftune.config.load import load
from peftune.errors import OutOfMemory, guarded, out_of_memory
from peftune.loop import run
from peftune.out_of_memory import lighter, saying_what_takes_less
from peftune.parallel.world import World
from peftune.train import main
from tests.conftest import write_config

WORLD = World(0, 1, 0, torch.device("cpu"), None)


@pytest.fixture
def config_of(classify, tmp_path):
    return lambda *words: load([str(write_config(classify, tmp_path / "c")), *words])


def test_what_costs_least_comes_first(config_of):
    said = lighter(config_of(), "in step 3", "single", 1, 4096, False)
    assert [line.split(" (")[0] for line in said] == [
        "train.tokens_per_micro_batch=2048", "model.gradient_checkpointing=true", "model.dtype=bfloat16",
        "train.optimizer=adamw_8bit", "model.quantization=nf4", "data.max_length=32",
        "--strategy fsdp2 --processes 2"]


def test_what_is_on_already_or_would_be_refused_is_not_named(config_of):
    full = config_of("adapter=null", "model.dtype=bfloat16", "train.optimizer=sgd")
    said = lighter(full, "in step 3", "fsdp2", 2, 512, True)
    assert [line.split(" (")[0] for line in said] == [
        "train.tokens_per_micro_batch=256", "adapter.method=lora", "data.max_length=32"]
    prompts = config_of("adapter={method: prefix_tuning, num_virtual_tokens: 4}", "data.layout=padded")
    said = " ".join(lighter(prompts, "in step 3", "single", 1, 512, False))
    assert "gradient_checkpointing" not in said and "fsdp2" not in said


def test_before_there_is_a_model_fewer_rows_are_the_mend(config_of):
    assert "max_rows" in lighter(config_of(), "preparing the data", "single", 1, None, None)[0]


@pytest.mark.parametrize("lack", [
    MemoryError("no room"), OSError(12, "Cannot allocate memory"), torch.OutOfMemoryError("CUDA out of memory. Tried"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can't allocate memory: you")])
def test_every_library_s_way_to_say_it_is_known_and_other_errors_pass(lack, config_of):
    assert out_of_memory(lack)
    with pytest.raises(OutOfMemory, match="in step 3: ") as caught, \
            saying_what_takes_less(config_of(), WORLD, "single"):
        WORLD.progress.at("in step 3")
        raise lack
    assert caught.value.exit_code == 3
    with pytest.raises(RuntimeError, match="another"), saying_what_takes_less(config_of(), WORLD, "single"):
        raise RuntimeError("another")


def test_a_run_that_lacks_memory_in_a_step_ends_with_3_and_no_traceback(classify, tmp_path, monkeypatch, capsys):
    def want_too_much(*parts, **settings):
        torch.empty(2**62, dtype=torch.uint8)

    monkeypatch.setattr(run, "lay_out", want_too_much)
    assert guarded(main, [str(write_config(classify, tmp_path / "c"))]) == 3
    said = capsys.readouterr().err
    assert said.startswith("out of memory: in step 1: ") and "can't allocate memory" in said
    assert re.search(r"what costs least first.*\n    train\.tokens_per_micro_batch=\d+ \(smaller pieces", said)
