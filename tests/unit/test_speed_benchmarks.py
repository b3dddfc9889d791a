"""What the benchmarks of speed compute; no time is asserted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from packaging.requirements import Requirement
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks import throughput, turns, twins
from benchmarks.arithmetic import fallen, percentile, rates, spread, step_flops
from benchmarks.gpu import NEEDED, closure, parts, requirements
from benchmarks.launches import ROOT, ended
from benchmarks.peers import loss_parity, micro_batch_tokens, ratios_of
from benchmarks.speed_cells import SUITES, Cell
from benchmarks.subjects import SHAPES, instruction_rows, save_model

RECORD = {"step_seconds": [9.0, 9.0, 1.0, 3.0], "tokens": [10, 10, 100, 300], "total_tokens": [10, 10, 200, 300],
          "supervised_tokens": [1, 1, 40, 40], "examples": [4, 4, 4, 4]}


def test_rates_leave_the_first_two_steps_out_and_count_padding_apart():
    found = rates(RECORD)
    assert (found["tokens_per_second"], found["total_tokens_per_second"]) == (100, 125)
    assert found["tokens_per_second_of_middle_step"] == 100
    assert (found["supervised_tokens_per_second"], found["samples_per_second"]) == (20, 2)
    assert (found["step_p50_s"], found["step_p95_s"]) == (2, 3)
    assert found["padding_share"] == pytest.approx(0.2)


def test_a_percentile_is_a_value_that_was_measured():
    values = list(range(1, 21))
    assert [percentile(values, share) for share in (0.01, 0.5, 0.95, 1.0)] == [1, 10, 19, 20]
    assert percentile([7.0], 0.95) == 7.0


def test_repeats_are_told_by_their_middle_and_ends():
    assert spread([3.0, 1.0, 2.0]) == {"runs": 3, "min": 1.0, "median": 2.0, "max": 3.0}


def test_a_ratio_fell_when_it_is_less_than_the_share_of_the_earlier_one_that_was_asked_for():
    old = {"over a": 2.0, "over b": 2.0, "gone": 1.0}
    assert fallen({"over a": 1.79, "over b": 1.81, "new": 0.1}, old, 0.9) == ["over a: 1.79, and 2 before"]


def test_the_gate_ends_with_1_where_a_ratio_fell_and_with_0_where_none_did(tmp_path, capsys):
    (tmp_path / "old.json").write_text(json.dumps({"ratios": {"over a": 2.0}}))
    asked = throughput.argparse.Namespace(to=None, table=None, against=tmp_path / "old.json", at_least=0.9)
    assert [throughput.publish(asked, {"ratios": {"over a": value}}, "") for value in (1.7, 1.9)] == [1, 0]
    assert "fell: over a: 1.7, and 2 before" in capsys.readouterr().err


def test_the_work_of_a_step_is_what_torch_counts_of_its_matrix_products():
    shape, tokens, vocabulary = SHAPES["1m"], 48, 512
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=4, num_key_value_heads=4))
    ids = torch.arange(2 * tokens).reshape(2, tokens)
    sizes = {"body": shape.body, "vocabulary": vocabulary, "width": shape.width, "layers": shape.layers,
             "heads_width": shape.width}
    attention = 12 * 2 * tokens * (tokens + 1) / 2 * shape.width * shape.layers

    def counted() -> int:
        with FlopCounterMode(display=False) as counter:
            trained(input_ids=ids, use_cache=False).logits.sum().backward()
        found = counter.get_flop_counts()["Global"]
        return sum(count for packet, count in found.items() if packet in (torch.ops.aten.mm, torch.ops.aten.addmm))

    trained = model
    whole = step_flops([tokens, tokens], 2 * tokens, adapters=0, **sizes)
    assert whole - attention == counted()
    trained = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    adapters = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    lora = step_flops([tokens, tokens], 2 * tokens, adapters=adapters, **sizes)
    unneeded = 2 * 2 * tokens * 3 * shape.width**2  # queries, keys and values of the first layer pass no gradient on
    assert lora - attention - counted() == pytest.approx(unneeded, rel=0.1)


def test_what_the_loop_adds_is_its_middle_step_less_that_of_the_bare_loop():
    cells = {str(cell): cell for cell in (Cell(), Cell(bare=True), Cell(shape="1m"))}
    summaries = {name: {"tokens_per_second_of_middle_step": {"median": rate}, "step_p50_s": {"median": step}}
                 for name, rate, step in zip(cells, (99.0, 100.0, 5.0), (0.505, 0.5, 1.0), strict=True)}
    assert twins.overhead_of(cells, summaries) == (
        {f"{Cell()}: loop over bare loop": 0.99}, {str(Cell()): pytest.approx(5)})


def test_allocators_are_compared_by_speed_and_memory_of_the_same_cell():
    cells = {str(cell): cell for cell in (Cell(), Cell(tcmalloc=True), Cell(rank=64))}
    summaries = {name: {"tokens_per_second_of_middle_step": {"median": rate}, "steps_bytes": {"median": held}}
                 for name, rate, held in zip(cells, (100.0, 110.0, 5.0), (30, 20, 1), strict=True)}
    assert twins.allocators_of(cells, summaries) == pytest.approx({
        f"{Cell()}: speed under tcmalloc over glibc": 1.1,
        f"{Cell()}: memory in steps under glibc over tcmalloc": 1.5})


def test_known_layers_are_compared_by_steps_and_by_all_that_computing_them_once_takes():
    last = Cell(last_layers=1, epochs=3)
    cells = {str(cell): cell for cell in (last, Cell(last_layers=1, epochs=3, reuse=False), Cell())}
    summaries = {name: {"tokens_per_second_of_middle_step": {"median": rate}, "training_s": {"median": seconds}}
                 for name, rate, seconds in zip(cells, (200.0, 100.0, 5.0), (40, 60, 1), strict=True)}
    assert twins.reuse_of(cells, summaries) == pytest.approx({
        f"{last}: speed of a step": 2.0, f"{last}: speed from the launch to the last step": 1.5})


def test_rows_of_few_sizes_are_compared_by_speed_and_memory_with_rows_of_any():
    cells = {str(cell): cell for cell in (Cell(), Cell(any_size=True), Cell(rank=64))}
    summaries = {name: {"tokens_per_second_of_middle_step": {"median": rate}, "steps_bytes": {"median": held}}
                 for name, rate, held in zip(cells, (120.0, 100.0, 5.0), (33, 30, 1), strict=True)}
    assert twins.sizes_of(cells, summaries) == pytest.approx({
        f"{Cell()}: speed over rows of any size": 1.2, f"{Cell()}: memory in steps over rows of any size": 1.1})


def test_one_call_for_all_sequences_and_compiled_parts_are_compared_with_cells_without_them():
    cells = {str(cell): cell for cell in (Cell(), Cell(one_by_one=True), Cell(parts=True))}
    summaries = {name: {"tokens_per_second_of_middle_step": {"median": rate}, "peak_allocated_bytes": {"median": held}}
                 for name, rate, held in zip(cells, (120.0, 100.0, 150.0), (30, 33, 36), strict=True)}
    assert twins.devices_of(cells, summaries) == pytest.approx({
        f"{Cell()}: speed over attention one by one": 1.2,
        f"{Cell()}: memory in steps over attention one by one": 30 / 33,
        f"{Cell(parts=True)}: speed over plain parts": 1.25,
        f"{Cell(parts=True)}: memory in steps over plain parts": 1.2})


def test_our_micro_batches_hold_as_many_tokens_as_a_peer_s_do_with_their_padding():
    rows = [{"input_ids": [1] * length} for length in (3, 10, 6, 6, 2, 5, 9)]
    assert micro_batch_tokens(rows, 2, 4) == round((20 + 12 + 10) / 3)
    assert micro_batch_tokens(rows, 4, 4) == 10 + 9 + 6 + 6, "one micro-batch a step, whichever its examples are"


def test_peers_are_compared_by_medians_and_losses_with_ours():
    def records(seconds: list[float], loss: float, size: int) -> list[dict]:
        return [RECORD | {"step_seconds": [9, 9, one, one], "evaluation_loss": loss, "steps_bytes": size,
                          "first_step_s": 1.0, "ceiling_flops": 1e12} for one in seconds]

    found = {"ours": records([1.0, 1.0, 9.0], 2.0, 100), "hf_grouped": records([2.0, 2.0, 1.0], 2.002, 150)}
    ratios = ratios_of(found)
    assert ratios["tokens/s over hf_grouped"] == ratios["whole tokens/s over hf_grouped"] == 2
    assert ratios["memory of hf_grouped over ours"] == 1.5
    assert loss_parity(found) == {"ours": 0, "hf_grouped": pytest.approx(0.001)}


def test_a_contestant_that_fails_does_not_stop_the_others_and_a_later_start_measures_what_lacks(monkeypatch):
    monkeypatch.setattr(turns, "ceiling", lambda device, threads: 1e12)

    def measured(name):
        asked.append(name)
        time.sleep(0.05)  # processors' times are counted in hundredths of a second
        if name in broken:
            raise broken[name]
        return RECORD

    def start(repeats):
        asked.clear()
        turns.gather({name: partial(measured, name) for name in "abc"}, repeats, torch.device("cpu"), 1, kept,
                     lambda: written.append(json.dumps(asdict(kept))))
        return "".join(asked)

    kept, asked, written = turns.Kept(), [], []
    late = subprocess.TimeoutExpired(["x"], 600, stderr=b"step 3\n")
    broken = {"a": late, "b": RuntimeError("out of memory")}
    assert start(2) == "abcc"  # who has failed has no further turn
    assert kept.failures == {"a": "no end after 600 s\nstep 3", "b": "out of memory"}
    assert turns.CUT_OFF in written[0]  # a start that is killed leaves whom it has been measuring
    broken = {"a": AssertionError("exit 1")}
    assert start(2) == "abb" and kept.failures == {"a": "exit 1"}
    broken = {}
    assert start(2) == "aa" and start(2) == "" and kept.failures == {}
    assert start(3) == "abc" and {name: len(found) for name, found in kept.records.items()} == dict.fromkeys("abc", 3)


def test_a_start_begins_with_those_that_have_not_failed_before():
    assert list(turns.Kept(failures={"a": turns.CUT_OFF}).turns("abc", 1)) == ["b", "c", "a"]


def test_who_has_as_many_results_as_are_asked_for_has_not_failed():
    kept = turns.Kept({"a": [RECORD]}, {"a": turns.CUT_OFF})
    assert not list(kept.turns("a", 1)) and not kept.failures


def test_results_of_another_suite_are_not_gone_on_with(tmp_path, capsys):
    turns.write(tmp_path / "new" / "r.json", json.dumps({"suite": "gpu", "data": "x", "records": {"a": [RECORD]}}))
    assert turns.kept_in(tmp_path / "new" / "r.json", {"suite": "gpu", "data": "x"}, None).records == {"a": [RECORD]}
    with pytest.raises(SystemExit) as stopped:
        turns.kept_in(tmp_path / "new" / "r.json", {"suite": "quick", "data": "x"}, None)
    assert stopped.value.code == 2 and "holds results of another suite\n  mend:" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["1m", "qwen-1m"])
def test_a_shape_counts_the_weights_that_its_model_and_its_adapter_have(name, tmp_path):
    shape = SHAPES[name]
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path, shape, instruction_rows(None, 20), 64))
    matrices = [part for part in model.model.modules() if isinstance(part, torch.nn.Linear)]
    assert shape.body == sum(part.weight.numel() for part in matrices)
    assert shape.vocabulary is None or model.lm_head.weight.shape == (shape.vocabulary, shape.width)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    assert shape.adapters(4) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_what_a_machine_lacks_is_named_with_all_that_the_rest_requires():
    found = closure([Requirement("accelerate>=1"), Requirement("numpy<1"), Requirement("no-such-package-here"),
                     Requirement("torch")])
    assert found["no-such-package-here"].version is None and found["numpy"].version is None  # the one here is newer
    assert found["psutil"].version and found["safetensors"].version  # accelerate's
    assert not any(name.startswith(("torch", "nvidia")) for name in found)


def test_a_version_must_fit_all_that_is_asked_of_it_and_all_of_it_is_installed():
    for words in (("numpy>=2", "numpy<1"), ("numpy<1", "numpy>=2")):
        need = closure([Requirement(word) for word in words])["numpy"]
        assert need.version is None and need.asked == "numpy<1,>=2"


def test_what_is_needed_depends_on_the_python_where_it_is_to_run():
    wanted = [Requirement('psutil; python_version >= "3.30"'), Requirement('numpy; python_version < "3.30"')]
    assert "psutil" not in closure(wanted) and "numpy" in closure(wanted)
    assert list(closure(wanted, "3.30")) == ["psutil"]


def test_a_part_asks_for_what_it_uses():
    names = {part: {one.name for one in requirements([part])} for part in NEEDED}
    assert set(NEEDED) == set(parts(Path(), None, 1))
    assert "bitsandbytes" in names["throughput"] and "pytest" in names["tests"] and "accelerate" in names["peers"]
    assert not {"deepspeed", "datasets"} & set().union(*names.values()) and "bitsandbytes" not in names["peers"]


def test_all_that_runs_on_a_gpu_need_is_here():
    assert [name for name, need in closure(requirements(NEEDED)).items() if need.version is None] == []


@pytest.mark.slow
def test_the_suite_for_gpus_runs_each_kind_of_cell_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["throughput", "gpu-tiny", "--repeats", "1", "--to", str(tmp_path / "r.json"),
                                     "--only", "qwen-1m, LoRA r 16 on nf4", "recomputed", "all weights, rows of"])
    assert throughput.main() == 0
    found = {name: record for name, (record,) in json.loads((tmp_path / "r.json").read_text())["records"].items()}
    quantised, full, recomputed = found.values()
    assert quantised["trainable_parameters"] == SHAPES["qwen-1m"].adapters(16)
    assert full["trainable_parameters"] == full["total_parameters"]
    for record in (full, recomputed):  # rows that fill their 512 tokens
        assert record["tokens"] == [4 * 512] * 4 and min(record["supervised_tokens"]) > 0.9 * 4 * 512


@pytest.mark.slow
def test_a_cell_that_fails_is_written_down_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    fits = SUITES["tiny"][0]
    cells = (replace(fits, dtype="bfloat15"), fits)
    monkeypatch.setitem(SUITES, "tiny", cells)
    monkeypatch.setattr("sys.argv", ["throughput", "tiny", "--repeats", "1", "--to", str(tmp_path / "r.json")])
    assert throughput.main() == 1
    outcome = json.loads((tmp_path / "r.json").read_text())
    broken, fine = map(str, cells)
    assert list(outcome["records"]) == [fine] and "model.dtype" in outcome["failures"][broken]
    assert f"| {broken} | **failed** |" in capsys.readouterr().out


@pytest.mark.slow
def test_the_smallest_suite_measures_the_true_loop(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["throughput", "tiny", "--repeats", "1", "--to", str(tmp_path / "r.json")])
    assert throughput.main() == 0
    outcome = json.loads((tmp_path / "r.json").read_text())
    (record,), (summary,) = outcome["records"].values(), [*outcome["summaries"].values()]
    assert record[0]["examples"] == [4, 4, 4, 4] and record[0]["layout"] == "packed"
    assert all(0 < supervised < tokens <= total for supervised, tokens, total in zip(
        record[0]["supervised_tokens"], record[0]["tokens"], record[0]["total_tokens"]))
    assert {"tokens_per_second", "of_ceiling", "steps_bytes", "first_step_s", "checkpoint_s", "evaluation_loss",
            "evaluation_tokens_per_second"} <= set(summary)
    assert outcome["commit"] and outcome["packages"]["torch"]


def sleeper(folder, *, session: bool) -> list[str]:
    """A command that starts a process which ignores TERM, and waits for it; the process's number is written down."""
    inner = (f"import os, pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
             f"pathlib.Path({str(folder / 'pid')!r}).write_text(str(os.getpid())); time.sleep(600)")
    return [sys.executable, "-c", f"import subprocess, sys; print('begun', flush=True); "
            f"subprocess.run([sys.executable, '-c', {inner!r}], start_new_session={session})"]


@pytest.mark.parametrize("session", [False, True], ids=["of the same session", "of its own session"])
@pytest.mark.slow
def test_a_command_that_takes_too_long_ends_with_all_that_it_has_started(session, tmp_path):
    with pytest.raises(subprocess.TimeoutExpired) as late:
        ended(sleeper(tmp_path, session=session), timeout=2, grace_s=0.5, stdout=subprocess.PIPE)
    assert late.value.stdout == b"begun\n"
    assert gone(int((tmp_path / "pid").read_text()))


@pytest.mark.slow
def test_a_benchmark_that_is_told_to_end_takes_along_what_it_has_started(tmp_path):
    code = f"from benchmarks.launches import ended; ended({sleeper(tmp_path, session=True)!r}, timeout=600)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert gone(int((tmp_path / "pid").read_text()))


def gone(pid: int) -> bool:
    """Whether the process has ended, or does so in a second."""
    for _ in range(20):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False
