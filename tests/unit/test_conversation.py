"""`peftune chat`: what streams is what generation writes, and a conversation goes on."""

import io
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from peftune.cli import main
from peftune.conversation import Talk
from peftune.errors import ConfigError, DataError, guarded
from peftune.loop.generate import _Spoken, generate_texts
from peftune.reopen import open_trained, opened


@pytest.fixture
def talk(converse, train):
    folder = train({**converse, "data": {**converse["data"], "validation": None}}, "train.max_steps=3")
    with opened(only_json=False) as (world, display):
        yield Talk(open_trained(str(folder), None, world, display), "Be brief.", 12, 0.0)


def test_an_answer_is_what_generation_writes_and_the_next_turn_knows_it(talk):
    pieces = []
    talk.turn("question 7 about the printer?", pieces.append)
    text, evaluator = talk.trained.text, talk.trained.evaluator
    begun = Talk(talk.trained, "Be brief.", 12, 0.0)
    whole = generate_texts(talk.trained.model, text.tokenizer, {0: begun._prompt("question 7 about the printer?")},
                           max_new_tokens=12, device=evaluator.world.device, autocast=evaluator.autocast)[0]
    assert "".join(pieces).strip() == whole and len(whole) > 3
    assert [message["role"] for message in talk.messages] == ["system", "user", "assistant"]
    assert whole in text.tokenizer.decode(talk._prompt("and now?"))
    talk.begin()
    assert len(talk.messages) == 1


def test_an_interrupted_answer_stays_as_far_as_it_was_said(talk):
    def interrupt(piece):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.turn("why?", interrupt)
    assert talk.messages[-1]["role"] == "assistant"


def test_what_does_not_fit_into_the_model_is_refused_before_it_is_read(talk, monkeypatch):
    monkeypatch.setattr("peftune.model.load.longest_input", lambda config, wanted: 40)
    with pytest.raises(DataError, match="/new"):
        replace(talk, max_new_tokens=39).turn("why?", print)


def test_letters_of_several_tokens_are_said_whole(decoder):
    tokenizer, pieces = AutoTokenizer.from_pretrained(decoder), []
    speaker = _Spoken(tokenizer, pieces.append)
    ids = tokenizer("die Tür ist schön 🙂 zu", return_tensors="pt")["input_ids"][0]
    speaker.put(ids[:1])  # the prompt
    for token in ids:
        speaker.put(token.reshape(1))
    speaker.end()
    assert "".join(pieces) == "die Tür ist schön 🙂 zu"
    assert not any("\ufffd" in piece for piece in pieces) and sum(map(bool, pieces)) > 3


def test_lines_of_a_pipe_are_turns(talk, monkeypatch, capsys):
    run = talk.trained.config.output_dir
    monkeypatch.setattr("sys.stdin", io.StringIO("first?\n\n/new\nsecond?\n/exit\nthird?\n"))
    assert main(["chat", run, "--max-new-tokens", "3", "--temperature", "0.7"]) == 0
    said = capsys.readouterr().out.partition("stops an answer\n")[2]
    assert said.count("\n") == 2


def test_a_model_that_writes_no_text_is_not_talked_to(classify, train):
    folder = train(classify, "train.max_steps=2")
    with pytest.raises(ConfigError, match="writes no text"):
        main(["chat", str(folder)])


def test_a_closed_input_ends_the_conversation_as_its_end_does(talk, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)  # what python makes of `<&-`
    assert main(["chat", talk.trained.config.output_dir]) == 0


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_line_that_is_not_utf_8_is_said_and_the_next_one_is_answered(errors, talk, monkeypatch, capsys):
    pipe = io.TextIOWrapper(io.BytesIO(b"\xff\xfe\nhi\n\xe4h\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr("sys.stdin", pipe)
    assert main(["chat", talk.trained.config.output_dir, "--max-new-tokens", "3"]) == 0
    said = capsys.readouterr().out.partition("stops an answer\n")[2]
    first, mend, answer, last, *_ = said.splitlines()
    assert first == last == "error: the line is not UTF-8: it was not said to the model" and "UTF-8" in mend
    assert "error" not in answer


@pytest.mark.parametrize(("option", "value", "mend"), [
    ("--max-new-tokens", "0", "1 or more"), ("--max-new-tokens", "-3", "1 or more"),
    *(("--temperature", value, "0, or 1e-06 and more") for value in ("-1", "nan", "inf", "1e-300")),
])
def test_lengths_and_temperatures_that_cannot_be_are_refused_before_anything_is_looked_for(option, value, mend, capsys):
    assert guarded(main, ["chat", "no/run", f"{option}={value}"]) == 2
    assert capsys.readouterr().err == f"error: {option} {value}\n  mend: use {mend}\n"
