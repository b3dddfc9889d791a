"""The changes that `peftune plan` names where a config does not fit."""

import json

import pytest

from peftune.cli import main
from peftune.errors import guarded
from peftune.plan.planning import answered
from tests.conftest import ROOT

MODELS = ROOT / "benchmarks" / "models"
LLAMA = (str(MODELS / "plan.yaml"), f"model.name_or_path={MODELS / 'llama-3.1-8b.json'}")
LARGE = ("train.tokens_per_micro_batch=16384", "model.gradient_checkpointing=false")


def words_and_strategy(words: tuple[str, ...], strategy: str | None) -> tuple[list[str], str | None]:
    chosen = [word.split()[1] for word in words if word.startswith("--strategy")]
    return [word for word in words if not word.startswith("--")], chosen[0] if chosen else strategy


@pytest.mark.slow
@pytest.mark.parametrize(("device", "devices", "words"), [
    ("l4-24gb", 1, LARGE), ("rtx-4090-24gb", 1, ("model.gradient_checkpointing=false",)),
    ("h100-80gb", 8, ("adapter=null",)), ("h100-80gb", 8, ("adapter=null", *LARGE)),
], ids=str)
def test_a_config_with_the_named_changes_is_planned_as_they_were_promised(device, devices, words):
    found, ways, _ = answered([*LLAMA, *words], device, devices, None)
    assert not found.fits and ways and ways[0].same_result
    for way in ways:
        more, strategy = words_and_strategy(way.words, None)
        changed, none, _ = answered([*LLAMA, *words, *more], device, devices, strategy)
        assert changed.fits and not none
        assert changed.found.peak_bytes == way.answer.found.peak_bytes
        assert changed.tokens_per_second == pytest.approx(way.answer.tokens_per_second)


def test_settings_that_keep_the_result_are_named_together_where_it_takes_both():
    _, ways, _ = answered([*LLAMA, *LARGE], "l4-24gb", 1, None)
    assert ways[0].words == ("train.tokens_per_micro_batch=auto", "model.gradient_checkpointing=true")


@pytest.mark.slow
def test_a_strategy_that_offloads_comes_last_of_those_that_keep_the_result():
    _, ways, _ = answered([*LLAMA, "adapter=null"], "h100-80gb", 8, None)
    keeping = [way.words for way in ways if way.same_result]
    assert len(keeping) > 2 and keeping[-1] == ("--strategy zero3-offload",)


@pytest.mark.slow
def test_lengths_are_halved_until_they_fit():
    words = "data.max_length=65536", "model.gradient_checkpointing=false", "train.batch_size=1"
    found, ways, _ = answered([*LLAMA, *words], "h100-80gb", 1, None)
    assert not found.fits
    assert [way.words for way in ways if way.words[0].startswith("data.")] == [("data.max_length=16384",)]


@pytest.mark.parametrize("count", ["0", "-1"])
def test_no_devices_are_no_devices(count, capsys):
    assert guarded(main, ["plan", *LLAMA, "--device", "h100-80gb", "--devices", count]) == 2
    assert f"--devices {count}: a run takes one or more" in capsys.readouterr().err


def quantised(folder, **settings) -> list[str]:
    shape = json.loads((MODELS / "llama-3.1-8b.json").read_text())
    (folder / "config.json").write_text(json.dumps({**shape, "quantization_config": settings}))
    return ["plan", LLAMA[0], f"model.name_or_path={folder}", "data.max_length=256", "train.batch_size=1", "--device",
            "l4-24gb", "--json"]


def test_a_checkpoint_that_is_quantised_already_is_planned_as_it_lies_in_memory(tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    words = quantised(tmp_path, quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4")
    assert main(words) == 0
    already = json.loads(capsys.readouterr().out)["by_cause"]["weights"]
    assert main(["plan", *LLAMA, "model.quantization=nf4", *words[3:]]) == 0
    assert already == json.loads(capsys.readouterr().out)["by_cause"]["weights"] < 6 * 2**30


def test_a_checkpoint_that_no_run_would_train_is_not_planned(tmp_path, capsys):
    assert guarded(main, quantised(tmp_path, quant_method="gptq", bits=4)) == 2
    assert "quantised by gptq" in capsys.readouterr().err
