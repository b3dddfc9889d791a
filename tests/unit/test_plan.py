"""What is planned beside what real tensors take, by one watch; auto settings; the command."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from shutil import copyfile

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoConfig

import peftune.loop.fit as loop
from peftune.cli import main
from peftune.config.schema import RunConfig
from peftune.data.batches import BatchPlan
from peftune.errors import guarded
from peftune.model.load import adjust_config
from peftune.model.quantize import quantised_tensors
from peftune.parallel.host_memory import LIMIT
from peftune.plan.answer import WITHOUT_DATA, known_of
from peftune.plan.choose import choose_memory, footprint_at, largest_that_fits, step_bytes
from peftune.plan.devices import GPUS, Device, device_named
from peftune.plan.divide import Division
from peftune.plan.footprint import CAUSES, Tracer
from peftune.plan.layers import traced_layers
from peftune.plan.live import LiveBytes
from peftune.plan.models import Models, Road, Subject
from peftune.plan.trace import Rows, trace_step
from peftune.plan.work import Candidate, Lengths, Work, lengths_without_data
from peftune.tasks import TASKS
from peftune.train import main as training
from tests.conftest import ROOT, mostly_slow, summary, write_config

TENSORS = Device("cpu", 0, {}, 0, 0.0, 1.0)
MODELS = ROOT / "benchmarks" / "models"
SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "vocab_size": 500}


@contextmanager
def watched_steps(monkeypatch) -> Iterator[list[int]]:
    """The highest sum of live tensors of each step but the first, whose optimizer has no state yet."""
    found: list[int] = []
    plain, steps = loop.train_step, []

    def step(model, work, optimizer, strategy, **named):
        steps.append(1)
        if len(steps) == 1:
            return plain(model, work, optimizer, strategy, **named)
        live = LiveBytes()
        live.hold([*model.parameters(), *model.buffers()], "weights")
        live.hold((tensor for module in model.modules() for _, _, tensor in quantised_tensors(module)), "weights")
        live.hold((value for state in optimizer.state.values() for value in state.values()
                   if isinstance(value, Tensor)), "optimizer")
        with live:
            stats = plain(model, work, optimizer, strategy, **named)
        found.append(max(peak.live_bytes for peak in live.peaks.values()))
        return stats

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        yield found


@pytest.mark.parametrize(("settings", "changes"), mostly_slow([
    ("converse", ["data.layout=padded"]), ("converse", ["data.layout=packed", "train.tokens_per_micro_batch=5000"]),
    ("converse", ["adapter=null"]), ("converse", ["model.gradient_checkpointing=true", "model.dtype=bfloat16"]),
    ("converse", ["model.pure_bf16=true", "model.dtype=bfloat16"]),
    ("converse", ["model.quantization=nf4"]), ("converse", ["model.quantization=int8"]),
    ("converse", ["train.optimizer=adamw_8bit", "adapter=null"]), ("converse", ["adapter.init_lora_weights=pissa"]),
    ("converse", ["model.quantization=nf4", "adapter.use_dora=true", "data.layout=padded"]),
    ("converse", ["model.quantization=int8", "adapter.use_dora=true", "data.layout=padded"]),
    ("converse", ["adapter={method: prompt_tuning, num_virtual_tokens: 4}", "data.layout=padded"]),
    ("converse", ["adapter={method: prefix_tuning, num_virtual_tokens: 4}", "data.layout=padded"]),
    ("converse", ["adapter={method: p_tuning, num_virtual_tokens: 4}", "data.layout=padded"]),
    ("converse", ["adapter={method: fourierft, n_frequency: 10}", "data.layout=padded"]),
    ("converse", ["model.attention=eager"]), ("prefer", ["model.attention=eager"]),
    ("classify", ["data.layout=padded"]), ("classify", ["data.layout=packed", "adapter=null"]),
    ("tag", []), ("answer", ["data.layout=padded"]), ("prefer", ["data.layout=padded"]), ("prefer", ["adapter=null"]),
], ("converse", ["data.layout=padded"]), ("converse", ["adapter=null"]), ("tag", [])), ids=str)
def test_the_planned_peak_of_a_step_is_what_its_tensors_take(settings, changes, request, train, monkeypatch):
    if any("quantization" in word or "8bit" in word for word in changes):
        pytest.importorskip("bitsandbytes")
    given = request.getfixturevalue(settings)
    given = {**given, "evaluation": {"max_new_tokens": 0} if settings == "converse" else {},
             "train": {"batch_size": 1000, "max_steps": 6, "tokens_per_micro_batch": 400}}  # each step sees all rows
    with watched_steps(monkeypatch) as found:
        folder = train(given, *changes)
    planned = json.loads((folder / "manifest.json").read_text())["memory"]
    assert planned["predicted"], planned["why_not"]
    assert planned["predicted"]["instants"]["step"] == pytest.approx(max(found), rel=0.02)
    assert summary(folder)["memory"]["predicted_bytes"] == planned["predicted"]["peak_bytes"]


def subject_of(model_config, task="causal_lm", **sections) -> Subject:
    config = RunConfig.model_validate({"task": task, "model": {"name_or_path": "none", "dtype": "float32"},
                          "data": {"train": "none.jsonl"}, **sections})
    targets = WITHOUT_DATA[task]
    adjusted = adjust_config(model_config, dropout=0.0, problem=targets.problem, names=targets.names, pad_id=0)
    return Subject(config=config, source="none", model_config=adjusted, targets=targets,
                   task=TASKS[task](config.train, config.evaluation))


@pytest.mark.parametrize(("family", "layers", "task"), [
    ("llama", 5, "causal_lm"), ("bert", 5, "sequence_classification"), ("modernbert", 9, "token_classification")])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_of_many_layers_lies_on_the_line_through_two_small_ones(family, layers, task, recompute):
    sizes = {**SMALL, "num_hidden_layers": layers}
    subject = subject_of(AutoConfig.for_model(family, **sizes), task)
    counts = traced_layers(subject.model_config)
    rows = Rows((200, 90), (200, 20) if task != "sequence_classification" else (1, 1), later=True)
    road = Road(recompute, packed=False, loss_rows=50)
    whole = trace_step(Models(subject), layers, rows, road)
    line = Tracer(subject).line(Work((Candidate(rows, 400),), (), None), road)
    assert max(counts) < layers
    assert max(sum(part.values()) for part in line.step.values()) == max(
        sum(part.values()) for name, part in whole.peaks.items())
    assert (line.flops, line.parameters) == (whole.flops, whole.parameters)


@pytest.mark.parametrize("chosen", [
    {"target_modules": ["q_proj"], "layers_to_transform": [4, 5]}, {"target_modules": ["layers.5.self_attn.q_proj"]},
    {"target_modules": ["q_proj"], "rank_pattern": {"layers.5.self_attn.q_proj": 8}},
], ids=lambda chosen: [*chosen][-1])
def test_an_adapter_of_single_layers_is_traced_on_all_of_them(chosen):
    subject = subject_of(AutoConfig.for_model("llama", **SMALL, num_hidden_layers=6), adapter={"r": 2, **chosen})
    rows, road = Rows((200, 90), (200, 20), later=True), Road(False, packed=False, loss_rows=50)
    whole = trace_step(Models(subject), 6, rows, road)
    line = Tracer(subject).line(Work((Candidate(rows, 400),), (), None), road)
    assert max(sum(part.values()) for part in line.step.values()) == max(
        sum(part.values()) for part in whole.peaks.values())
    assert line.parameters == whole.parameters
    of_a_layer = 64 * 2 * 2
    assert whole.parameters.trainable == of_a_layer * {"layers_to_transform": 2, "target_modules": 1,
                                                       "rank_pattern": 6 + 3}[[*chosen][-1]]


@pytest.mark.parametrize(("name", "weights"), [
    ("llama-3.1-8b", 8_030_261_248), ("llama-3.1-70b", 70_553_706_496), ("qwen2.5-7b", 7_615_616_512)])
def test_weights_are_counted_as_their_publishers_count_them(name, weights):
    subject = subject_of(AutoConfig.from_pretrained(MODELS / f"{name}.json"), adapter=None)
    lengths = lengths_without_data(64, 1, 1, scored=False)
    found = footprint_at(Tracer(subject), lengths, 64, recompute=True, division=Division(), device=TENSORS)
    assert found.parameters.total == found.parameters.trainable == weights
    assert found.instants["step"]["optimizer"] == pytest.approx(8 * weights, rel=1e-6)


@pytest.mark.parametrize("strategy", ["single", "zero2", "fsdp2"])
def test_the_optimizer_keeps_its_state_while_the_model_is_scored(strategy):
    subject = subject_of(AutoConfig.for_model("llama", **SMALL, num_hidden_layers=4), adapter=None)
    lengths = lengths_without_data(64, 1, 1, scored=True)
    division = Division(strategy, 1 if strategy == "single" else 2)
    found = footprint_at(Tracer(subject), lengths, 64, recompute=False, division=division, device=TENSORS).instants
    assert found["evaluation"]["optimizer"] == found["generation"]["optimizer"] == found["step"]["optimizer"] > 0


@pytest.mark.parametrize(("family", "sizes", "packed"), [
    ("llama", {}, True), ("falcon", {"alibi": False}, False), ("nemotron", {"num_key_value_heads": 4}, False),
    ("qwen3_5_text", {"num_hidden_layers": 4, "linear_num_value_heads": 4, "linear_num_key_heads": 4,
                      "linear_key_head_dim": 16, "linear_value_head_dim": 16}, False), ("phi3", {
        "pad_token_id": 0, "original_max_position_embeddings": 90, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}}, False)])
def test_a_model_that_trains_padded_is_planned_so(family, sizes, packed):
    lengths = np.array([100, 20, 40, 60] * 4)
    order = BatchPlan(lengths, np.zeros(16, int), (1.0,), 16, 0)

    def planned(layout):
        config = AutoConfig.for_model(family, **{**SMALL, "num_hidden_layers": 2, **sizes})
        tracer = Tracer(subject_of(config, data={"train": "none.jsonl", "layout": layout}))
        known = Lengths(tokens=lengths.tolist(), supervised=lengths.tolist(), steps=1, order=order, evaluated=())
        return footprint_at(tracer, known, 250, recompute=False, division=Division(), device=TENSORS)

    assert (planned("auto") != planned("padded")) == packed


@pytest.mark.parametrize("share", [0.35, 0.6, 0.9])
def test_auto_takes_the_largest_micro_batch_that_fits(share):
    subject = subject_of(AutoConfig.for_model("llama", **SMALL, num_hidden_layers=4), train={"batch_size": 32},
                         model={"name_or_path": "none", "dtype": "float32", "gradient_checkpointing": False})
    tracer, lengths = Tracer(subject), lengths_without_data(100, 32, 1, scored=False)

    def size(tokens):
        return step_bytes(footprint_at(tracer, lengths, tokens, recompute=False, division=Division(), device=TENSORS))

    room = int(size(100) + share * (size(3200) - size(100)))
    choice = choose_memory(tracer, lengths, room_bytes=room, division=Division(), device=TENSORS)
    assert size(choice.micro_batch_tokens) <= room
    assert size(choice.micro_batch_tokens + 200) > room


@pytest.mark.parametrize("size_of", [
    lambda tokens: 60_000 + 125 * tokens + 50 * min(tokens, 1000),  # as many logits as there ever are
    lambda tokens: 60_000 + max(125 * tokens, 200 * tokens - 100_000),  # another instant becomes the peak
    lambda tokens: 60_000 + 7 * tokens ** 2 // 100], ids=["bent down", "bent up", "square"])
def test_the_room_is_filled_and_not_exceeded_where_sizes_are_no_straight_line(size_of):
    for room in range(size_of(128), size_of(4096), 10_000):
        found = largest_that_fits(size_of, 128, 4096, room)
        assert size_of(found) <= room
        assert found == 128 or size_of(found) >= 0.95 * room, (room, found)


def test_ranks_that_share_each_row_have_room_for_more_tokens():
    subject = subject_of(AutoConfig.for_model("llama", **SMALL, num_hidden_layers=4), train={"batch_size": 64},
                         model={"name_or_path": "none", "dtype": "float32", "gradient_checkpointing": False})
    tracer, lengths = Tracer(subject), lengths_without_data(100, 64, 1, scored=False)
    alone = Division("ddp", 2)
    room = step_bytes(footprint_at(tracer, lengths, 1600, recompute=False, division=alone, device=TENSORS))
    one, two = (choose_memory(tracer, lengths, room_bytes=room, division=division, device=TENSORS)
                for division in (alone, Division("ddp", 2, sharing=2)))
    assert 1500 < one.micro_batch_tokens <= 1700
    assert 1.5 * one.micro_batch_tokens < two.micro_batch_tokens <= 2 * one.micro_batch_tokens + 100


def test_auto_recomputes_only_where_one_example_would_not_fit():
    subject = subject_of(AutoConfig.for_model("llama", **SMALL, num_hidden_layers=8), train={"batch_size": 1})
    tracer, lengths = Tracer(subject), lengths_without_data(400, 1, 1, scored=False)
    plain, frugal = (footprint_at(tracer, lengths, 400, recompute=recompute, division=Division(), device=TENSORS)
                     for recompute in (False, True))
    assert step_bytes(frugal) < 0.6 * step_bytes(plain)
    for room, recompute in ((step_bytes(plain), False), (step_bytes(plain) - 1, True)):
        choice = choose_memory(tracer, lengths, room_bytes=room, division=Division(), device=TENSORS)
        assert choice.gradient_checkpointing is recompute


def test_a_limit_on_memory_changes_the_micro_batches_and_not_the_losses(converse, train, monkeypatch):
    free = train({**converse, "evaluation": {"max_new_tokens": 0}}, name="free")
    monkeypatch.setenv(LIMIT, "1")
    tight = train({**converse, "evaluation": {"max_new_tokens": 0}}, name="tight")
    first, second = (json.loads((folder / "manifest.json").read_text())["model"] for folder in (free, tight))
    assert second["micro_batch_tokens"] < first["micro_batch_tokens"] and second["gradient_checkpointing"]
    losses = [[json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
              for folder in (free, tight)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("limit", ["8GiB", "", "-1"])
def test_a_limit_on_memory_that_is_no_number_of_bytes_is_refused(limit, monkeypatch, classify, tmp_path, capsys):
    monkeypatch.setenv(LIMIT, limit)
    assert guarded(training, [str(write_config(classify, tmp_path / "c"))]) == 2
    assert f"{LIMIT}={limit}: no number of bytes\n  mend: write it out, as {LIMIT}=" in capsys.readouterr().err


@pytest.fixture
def big(tmp_path):
    """A config of a large model of which there is nothing but its shape."""
    path = tmp_path / "big.yaml"
    path.write_text(yaml.safe_dump({
        "task": "causal_lm", "model": {"name_or_path": str(MODELS / "llama-3.1-8b.json")},
        "data": {"train": "nowhere.jsonl", "max_length": 512}, "train": {"batch_size": 4}}))
    return str(path)


def test_a_plan_that_does_not_fit_exits_3_and_names_what_does(big, capsys):
    assert main(["plan", big, "--device", "rtx-4090-24gb", "--json", "train.tokens_per_micro_batch=2048",
                 "model.gradient_checkpointing=false"]) == 3
    plan = json.loads(capsys.readouterr().out)
    assert {"fits", "peak_bytes", "peak_instant", "by_cause", "parameters"} <= plan.keys()
    assert list(plan["by_cause"]) == [cause for cause in CAUSES if cause in plan["by_cause"]]
    assert not plan["fits"] and plan["peak_bytes"] == pytest.approx(sum(plan["by_cause"].values()), abs=20)
    assert plan["by_cause"]["weights"] == pytest.approx(2 * 8_030_261_248, rel=1e-4)
    assert plan["mends"] and all(way["peak_bytes"] < 23.5 * 2**30 for way in plan["mends"])
    order = [(not way["same_result"], -way["tokens_per_second"]) for way in plan["mends"]]
    assert order == sorted(order)


def test_a_plan_that_fits_exits_0_and_stays_within_80_columns(big, capsys):
    assert main(["plan", big, "--device", "h100-80gb", "--devices", "8", "--strategy", "zero2"]) == 0
    text = capsys.readouterr().out
    assert "fits" in text and "optimizer" in text
    assert max(map(len, text.splitlines())) <= 80


def test_quantised_weights_take_what_bitsandbytes_stores():
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import quantize_4bit

    sections = {"model": {"name_or_path": "none", "dtype": "float32", "quantization": "nf4"}}
    subject = subject_of(AutoConfig.for_model("llama", **SMALL, num_hidden_layers=2), **sections)
    lengths = lengths_without_data(8, 1, 1, scored=False)
    found = footprint_at(Tracer(subject), lengths, 8, recompute=False, division=Division(), device=TENSORS)
    wide, inner, words = SMALL["hidden_size"], SMALL["intermediate_size"], SMALL["vocab_size"]
    stored = 0
    for shape in 4 * [(wide, wide)] + 2 * [(inner, wide)] + [(wide, inner)]:
        data, state = quantize_4bit(torch.ones(shape), compress_statistics=True, quant_type="nf4")
        parts = [data, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        stored += sum(part.numel() * part.element_size() for part in parts)
    head = wide // SMALL["num_attention_heads"]
    plain = 4 * (2 * words * wide + 5 * wide + head // 2 * 2)  # embeddings, output, norms, rotary frequencies twice
    assert found.instants["load"]["weights"] == pytest.approx(2 * stored + plain, rel=0.001)


def test_every_gpu_of_the_table_holds_less_than_its_name_says():
    for name, device in GPUS.items():
        assert 0.9 < device.memory_bytes / 2**30 / int(name.split("-")[-1].removesuffix("gb")) < 1.0


def test_a_plan_for_this_machine_heeds_its_limit_and_shares_its_memory(monkeypatch):
    monkeypatch.delenv(LIMIT, raising=False)
    one, two = (device_named("cpu", "float32", count).memory_bytes for count in (1, 2))
    assert two == pytest.approx(one / 2, rel=0.1)
    monkeypatch.setenv(LIMIT, "700000000")
    assert device_named("cpu", "float32", 1).memory_bytes == 700_000_000


@pytest.mark.parametrize("written", ["train.jsonl", "*.jsonl", ""])
def test_lengths_are_those_of_the_data_however_its_absolute_path_is_written(written, converse, tmp_path):
    (folder := tmp_path / "rows").mkdir()
    copyfile(converse["data"]["train"], folder / "train.jsonl")
    data = {"train": str(folder / written), "max_length": 128}
    known = known_of(RunConfig.model_validate({**converse, "data": data}))
    assert known.lengths.order is not None and "examples" in known.note


@pytest.mark.parametrize("words", [("--devices", "2", "--strategy", "single"), ("--strategy", "ddp")])
def test_a_strategy_that_no_launch_would_take_on_these_devices_is_not_planned(words, big, capsys):
    assert guarded(main, ["plan", big, "--device", "h100-80gb", *words]) == 2
    assert words[-1] in capsys.readouterr().err
