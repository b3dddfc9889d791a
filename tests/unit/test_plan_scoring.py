"""What the plan says of evaluations and generations, beside what their tensors take."""

import json

import pytest
from torch import Tensor

import peftune.loop.evaluate as scoring
import peftune.loop.fit as loop
from peftune.plan.live import LiveBytes
from tests.conftest import mostly_slow


@pytest.fixture
def watched(monkeypatch):
    """The highest sum of live tensors while a run is scored, and while it generates, by name."""
    found, optimizers = {}, []
    plain_step = loop.train_step

    def step(model, work, optimizer, strategy, **named):
        optimizers[:] = [optimizer]
        return plain_step(model, work, optimizer, strategy, **named)

    def within(name, plain):
        def work(evaluator, model, *given):
            live = LiveBytes()
            live.hold([*model.parameters(), *model.buffers()], "weights")
            live.hold((value for optimizer in optimizers for state in optimizer.state.values()
                       for value in state.values() if isinstance(value, Tensor)), "optimizer")
            with live:
                result = plain(evaluator, model, *given)
            found[name] = max(found.get(name, 0), *(peak.live_bytes for peak in live.peaks.values()))
            return result

        return work

    monkeypatch.setattr(loop, "train_step", step)
    monkeypatch.setattr(scoring, "_forward_records", within("evaluation", scoring._forward_records))
    monkeypatch.setattr(scoring, "_add_generations", within("generation", scoring._add_generations))
    return found


@pytest.mark.parametrize(("settings", "changes"), mostly_slow([
    ("converse", []), ("converse", ["adapter=null"]), ("converse", ["data.train_on=all"]),
    ("converse", ["model.dtype=bfloat16"]), ("tag", ["adapter=null"]), ("classify", []), ("answer", []),
], ("converse", ["adapter=null"]), ("tag", ["adapter=null"])), ids=str)
def test_the_planned_peak_of_scoring_is_what_its_tensors_take(settings, changes, request, train, watched):
    folder = train(request.getfixturevalue(settings), *changes)
    planned = json.loads((folder / "manifest.json").read_text())["memory"]["predicted"]["instants"]
    assert set(watched) == {"evaluation", "generation"} & planned.keys()
    for name, most in watched.items():
        assert planned[name] >= 0.95 * most, name
    assert planned["evaluation"] <= 1.1 * watched["evaluation"]
