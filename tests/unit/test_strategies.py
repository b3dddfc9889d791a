"""Pieces of tensors, the DeepSpeed JSON, launch lines, and what a strategy refuses."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftune.config.load import load
from peftune.config.rules import STRATEGY_RULES, strategy_faults
from peftune.errors import MachineError, PeftuneError
from peftune.parallel import zero_config
from peftune.parallel.extensions import refuse_abandoned_builds
from peftune.parallel.fsdp2 import open_fsdp2
from peftune.parallel.launcher import choose_launch, presets
from peftune.parallel.names import ASKED_STRATEGY, STRATEGIES, check_launched
from peftune.parallel.pieces import Piece, PieceReader, whole, write_pieces
from peftune.parallel.world import World, opened_world
from peftune.parallel.zero import step_count

WRITE_64_MIB = """
import sys
from pathlib import Path
import torch
from peftune.parallel.pieces import Piece, write_pieces

def peak():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

write_pieces([Piece("small", torch.ones(10), 0, (10,))], Path(sys.argv[1]))
flat = torch.ones(2**24)
before = peak()
write_pieces([Piece(f"w{i}", part, 0, (len(part),)) for i, part in enumerate(flat.chunk(4))], Path(sys.argv[1]))
print(peak() - before)
"""

WORLD = World(0, 1, 0, torch.device("cpu"), None)


@settings(max_examples=60, deadline=None)
@given(shape=st.lists(st.integers(1, 7), max_size=3), cuts=st.lists(st.integers(0, 343), max_size=4), data=st.data())
def test_a_tensor_cut_anywhere_among_any_ranks_is_read_whole(tmp_path_factory, shape, cuts, data):
    folder = tmp_path_factory.mktemp("pieces")
    tensor = torch.arange(float(torch.tensor(shape).prod())).reshape(shape) if shape else torch.tensor(5.0)
    flat = tensor.flatten()
    borders = sorted({0, flat.numel(), *(min(cut, flat.numel()) for cut in cuts)})
    parts = [Piece("w", flat[a:b], a, tuple(shape)) for a, b in itertools.pairwise(borders)]
    for rank, piece in enumerate(data.draw(st.permutations(parts))):
        write_pieces([piece, whole("w|step", torch.tensor(3.0))], folder / f"{rank}.safetensors")
    reader = PieceReader(sorted(folder.iterdir()))
    assert torch.equal(reader("w"), tensor) and reader("w|step") == 3 and reader("other") is None
    assert sorted(reader.names()) == ["w", "w|step"]


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_missing_piece_is_noticed(tmp_path, lost):
    flat = torch.arange(9.0)
    for rank in range(3):
        if rank != lost:
            row = Piece("w", flat[3 * rank : 3 * rank + 3], 3 * rank, (3, 3))
            write_pieces([row], tmp_path / f"{rank}.safetensors")
    with pytest.raises(KeyError, match="parts of w are missing"):
        PieceReader(sorted(tmp_path.iterdir()))("w")


def test_a_rank_that_holds_nothing_writes_no_file(tmp_path):
    write_pieces([], tmp_path / "0.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_restored_step_count_lies_where_the_fused_kernel_reads_it():
    on_device = torch.empty(2, device="meta")  # another device than the file's
    assert step_count(torch.tensor(3.0), on_device, fused=True).device == on_device.device
    assert step_count(torch.tensor(3.0), on_device, fused=False).device.type == "cpu"


def test_weights_that_share_one_step_count_are_saved(tmp_path):
    step = torch.tensor(3.0)
    write_pieces([whole("a|step", step), whole("b|step", step)], tmp_path / "0.safetensors")
    reader = PieceReader([tmp_path / "0.safetensors"])
    assert reader("a|step") == reader("b|step") == 3


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own record of memory")
def test_pieces_are_written_without_a_second_copy_in_memory(tmp_path):
    grown = subprocess.run([sys.executable, "-c", WRITE_64_MIB, str(tmp_path / "0.safetensors")], check=True,
                           capture_output=True, text=True).stdout
    assert (tmp_path / "0.safetensors").stat().st_size > 64 * 2**20
    assert int(grown) < 32 * 2**20


def test_auto_values_are_filled_in_and_given_ones_stay():
    given_json = {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "stage3_max_live_parameters": 77,
                                        "offload_optimizer": {"device": "cpu", "nvme_path": None},
                                        "offload_param": {"device": "none"}}, "comms_logger": {"enabled": False}}
    filled = zero_config.filled(given_json, ranks=4, weights=32_000_000, on_cpu=True, bfloat16=True)
    zero = filled["zero_optimization"]
    assert zero["reduce_bucket_size"] == 2_000_000 and zero["stage3_max_live_parameters"] == 77
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": False} and "offload_param" not in zero
    assert filled["train_batch_size"] == filled["gradient_accumulation_steps"] * 4
    assert filled["torch_autocast"]["enabled"] and filled["comms_logger"] == {"enabled": False}
    assert not [value for value in [*filled.values(), *zero.values()] if value == "auto"]


@pytest.mark.parametrize("text", ["not json", "[]", json.dumps({"bf16": {"enabled": True}})])
def test_a_file_that_is_no_deepspeed_json_is_said(tmp_path, monkeypatch, text):
    file = tmp_path / "own.json"
    file.write_text(text)
    monkeypatch.setenv(zero_config.FILE, str(file))
    with pytest.raises(PeftuneError, match=r"own\.json: "):
        zero_config.read_zero_config()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_has_a_preset_and_a_launch_line(strategy, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    assert (presets("accelerate") / f"{strategy}.yaml").is_file()
    launch = choose_launch(strategy, 1 if strategy == "single" else 2, ["c.yaml"])
    assert launch.strategy == strategy and str(launch).endswith("peftune/train.py c.yaml")


@pytest.mark.parametrize("processes", [0, -1])
def test_less_than_one_process_is_refused(processes):
    with pytest.raises(MachineError, match=f"--processes {processes}\n.*mend: --processes 1, or more"):
        choose_launch("auto", processes, ["c.yaml"])


def test_the_cpu_computes_where_the_only_gpu_is_apples(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("accelerate.state.is_mps_available", lambda *_: True)
    with opened_world() as world:
        assert world.device.type == "cpu"


def test_another_strategy_than_the_one_asked_for_is_refused(monkeypatch):
    monkeypatch.setenv(ASKED_STRATEGY, "zero2")
    with pytest.raises(MachineError, match="zero2 was asked for, and single was started"):
        check_launched("single")


@pytest.mark.parametrize("key", ["cp_size", "tp_size", "dp_replicate_size"])
def test_accelerates_other_divisions_are_refused(monkeypatch, key):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{key.upper()}", "1")
    check_launched("ddp")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{key.upper()}", "2")
    with pytest.raises(MachineError, match=f"parallelism_config_{key}: 2"):
        check_launched("ddp")


@pytest.mark.parametrize(("key", "value", "stage"), [("round_robin_gradients", True, 2), ("mics_shard_size", 2, 3)])
def test_a_deepspeed_json_that_divides_in_a_way_we_do_not_know_is_refused(tmp_path, monkeypatch, key, value, stage):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage, key: value}}))
    monkeypatch.setenv(zero_config.FILE, str(file))
    with pytest.raises(PeftuneError, match=rf"ds\.json: zero_optimization\.{key}: "):
        zero_config.read_zero_config()


def test_a_deepspeed_json_that_divides_sequences_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "sequence_parallel_size": 2}))
    monkeypatch.setenv(zero_config.FILE, str(file))
    with pytest.raises(PeftuneError, match="sequence_parallel_size: 2"):
        zero_config.read_zero_config()


@pytest.mark.parametrize("folder", ["deepspeed_shm_comm", "py311_cpu/deepspeed_shm_comm"])
def test_the_lock_of_a_killed_build_is_named_and_that_of_a_live_one_is_waited_for(tmp_path, monkeypatch, folder):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    build = tmp_path / folder
    build.mkdir(parents=True)
    refuse_abandoned_builds()
    lock, source = build / "lock", build / "build.ninja"
    for path in (lock, source):
        path.touch()
        os.utime(path, (time.time() - 3600,) * 2)
    with pytest.raises(MachineError) as caught:
        refuse_abandoned_builds()
    assert caught.value.faults[0].mend == f"rm {lock}"
    source.touch()
    refuse_abandoned_builds()


def test_fsdp_1_is_refused(monkeypatch):
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(MachineError, match="fsdp_version: 2"):
        open_fsdp2(WORLD)


@pytest.mark.parametrize(("strategy", "override"), [
    ("zero3", "adapter={method: prompt_tuning, num_virtual_tokens: 4}"),
    ("fsdp2", "adapter={method: prefix_tuning, num_virtual_tokens: 4}"),
    ("zero2", "adapter={method: adalora}"), ("fsdp2", "adapter={method: adalora}"),
    ("zero1", "model.compile=true"), ("fsdp2", "model.compile=true"), ("zero2", "model.pure_bf16=true"),
    ("zero1", "train.optimizer=adamw_8bit"), ("fsdp2", "train.optimizer=adamw_8bit"),
])
def test_what_a_strategy_cannot_do_is_refused_with_the_nearest_that_can(tmp_path, strategy, override):
    path = tmp_path / "c.yaml"
    path.write_text("task: causal_lm\nmodel: {name_or_path: m}\ndata: {train: t.jsonl}\n")
    (fault,) = strategy_faults(load([str(path), override]), strategy)
    assert f"not with {strategy}" in fault.message and fault.mend
    assert not strategy_faults(load([str(path), override]), "ddp")
    assert len(STRATEGY_RULES) == 5
