"""Layers that never change are computed once for each example: the training is the one that computes them each time."""

import numpy as np
import pytest
import torch

import peftune.loop.layout as choosing
import peftune.loop.remember as remembering
from peftune.errors import guarded
from peftune.loop.known_states import StateFile
from peftune.model.frozen_layers import FrozenLayers
from peftune.train import main
from tests.conftest import EVERY_TASK, mostly_slow, summary, write_config
from tests.equivalence.test_roads import losses, scores
from tests.faults.test_preemption import AfterLooks, same_run

DECODERS = ("converse", "prefer")
LOSSES_RELATIVE = 1e-5
"""Float32: the states were computed among other examples, so matrices of other shapes are multiplied."""
KNOWN = "1 of 2 layers are frozen, and computed once for each example, "
ANEW = "1 of 2 layers are frozen, and computed in each step: "


@pytest.fixture
def last_layer(request):
    """Settings of a run of two epochs or more that trains the second of two layers."""
    def of(task: str):
        names = ["q_proj", "up_proj"] if task in DECODERS else ["query", "dense"]
        adapter = {"method": "lora", "r": 4, "layers_to_transform": [1], "target_modules": names}
        settings = {**request.getfixturevalue(task), "adapter": adapter}
        return {**settings, "train": {**settings["train"], "max_steps": 20 if task == "answer" else 12}}

    return of


@pytest.mark.parametrize("task", mostly_slow(EVERY_TASK, "classify"))
def test_a_run_that_knows_its_frozen_layers_is_the_run_that_does_not(task, last_layer, train, capsys, monkeypatch):
    settings = last_layer(task)
    anew = train(settings, "model.reuse_frozen_layers=false", name="anew")
    assert "layers are frozen" not in capsys.readouterr().out
    for layout, filled_up in (("packed", False), ("packed", True), ("padded", False)):
        monkeypatch.setattr(choosing, "takes_few_sizes", lambda *_, filled_up=filled_up, **__: filled_up)
        known = train(settings, f"data.layout={layout}", name=f"{layout}-{filled_up}")
        assert KNOWN in capsys.readouterr().out
        assert losses(known) == pytest.approx(losses(anew), rel=LOSSES_RELATIVE)
        assert scores(known) == pytest.approx(scores(anew), rel=1e-4)
        assert summary(known)["baseline"] == summary(anew)["baseline"], "evaluations meet the same states, bit for bit"


def test_recomputed_activations_pass_no_gradient_down_to_frozen_layers(last_layer, train, capsys):
    settings = last_layer("converse")
    plain = train(settings, name="plain")
    recomputed = train(settings, "model.gradient_checkpointing=true", name="recomputed")
    assert capsys.readouterr().out.count(KNOWN) == 2
    assert losses(recomputed) == pytest.approx(losses(plain), rel=1e-6)


def test_stopped_and_started_again_it_is_the_unbroken_run_bit_for_bit(last_layer, train, tmp_path):
    settings = last_layer("converse")
    unbroken = train(settings, name="unbroken")
    config = str(write_config({**settings, "output_dir": str(tmp_path / "stopped")}, tmp_path / "c"))
    assert guarded(lambda words: main(words, AfterLooks(looks=7)), [config]) == 75
    assert guarded(main, [config]) == 0
    same_run(tmp_path / "stopped", unbroken)


@pytest.mark.parametrize(("override", "why"), [
    ("model.dropout=null", "model.dropout is not 0"),
    ("model.added_tokens=[grmpf]", "they give more than hidden states, or weights that train come before them")])
def test_layers_whose_results_change_are_computed_in_each_step_and_that_is_said(override, why, last_layer, train,
                                                                                 capsys):
    train(last_layer("converse"), override)
    assert f"{ANEW}{why}" in capsys.readouterr().out


def test_a_disk_with_too_little_room_is_left_alone(last_layer, train, capsys, monkeypatch):
    monkeypatch.setattr(remembering, "SHARE_OF_DISK", 0.0)
    train(last_layer("classify"))
    said = capsys.readouterr().out
    assert ANEW in said and "MiB are free" in said


def test_a_model_that_needs_more_than_the_layers_results_is_found_out(last_layer, train, capsys, monkeypatch):
    class Half(FrozenLayers):
        def taken(self, forward, lengths):
            return 0.5 * super().taken(forward, lengths)

    settings = last_layer("classify")
    anew = train(settings, "model.reuse_frozen_layers=false", name="anew")
    monkeypatch.setattr(remembering, "FrozenLayers", Half)
    found_out = train(settings, name="found out")
    assert f"{ANEW}losses from their results alone differ by" in capsys.readouterr().out
    assert losses(found_out) == losses(anew)


@pytest.mark.parametrize("override", ["train.max_steps=6", "adapter.layers_to_transform=null", "adapter=null"])
def test_nothing_is_kept_where_nothing_is_saved_by_it(override, last_layer, train, capsys):
    train(last_layer("classify"), override)
    assert "layers are frozen" not in capsys.readouterr().out


def test_the_layers_do_not_run_where_their_results_are_given(decoder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(decoder).eval()
    frozen, ran = FrozenLayers(model.model.layers[:1]), []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: ran.append(1))
    ids, lengths = torch.tensor([[5, 6, 7, 8], [9, 8, 1, 1]]), (4, 2)
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}
    model.requires_grad_(False)
    hidden = frozen.taken(lambda: model(**inputs), lengths)
    assert hidden.shape == (6, model.config.hidden_size) and len(ran) == 1
    with torch.no_grad(), frozen.given(hidden, lengths):
        given = model(**inputs).logits
    assert len(ran) == 1
    plain = model(**inputs).logits
    assert len(ran) == 2 and torch.equal(given[0], plain[0]) and torch.equal(given[1, :2], plain[1, :2])
    model.model.embed_tokens.requires_grad_(True)
    assert frozen.taken(lambda: model(**inputs), lengths) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_states_are_read_as_they_were_written_and_leave_no_file(dtype, tmp_path):
    lengths = np.array([3, 1, 4, 2], dtype=np.int32)
    hidden = [torch.randn(int(length), 8).to(dtype) for length in lengths]
    file = StateFile(tmp_path, lengths, hidden[0])
    file.write([2, 0], torch.cat([hidden[2], hidden[0]]))
    file.write([1, 3], torch.cat([hidden[1], hidden[3]]))
    assert torch.equal(file.read([3, 0, 1], torch.device("cpu")), torch.cat([hidden[3], hidden[0], hidden[1]]))
    assert file.bytes == 10 * 8 * dtype.itemsize and not list(tmp_path.iterdir())
