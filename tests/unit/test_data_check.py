"""What `peftune check` says of data, and what a run does with bad rows."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from peftune.cli import main
from peftune.config.schema import DataConfig
from peftune.data import spool, tokenise
from peftune.data.prepare import open_prepared, prepare
from peftune.errors import DataError, Fault
from tests import tiny
from tests.conftest import public_data, summary, write_config

CAUSES = {"exact duplicate": "exact_duplicate", "near duplicate": "near_duplicate", "conflicting label":
          "conflicting_label", "also in train": "leak", "extremely long": "too_long"}


def checked(settings, tmp_path, capsys, *words):
    capsys.readouterr()
    code = main(["check", str(write_config(settings, tmp_path / "c")), "--json", *words])
    return code, json.loads(capsys.readouterr().out)


def planted(folder: Path) -> dict[str, dict[int, str]]:
    """File -> line -> what is wrong there, from the set's own README."""
    found: dict[str, dict[int, str]] = {}
    for name, listed in re.findall(r"^- `(\w+\.jsonl)`: (.*)$", (folder.parent / "README.md").read_text(), flags=re.M):
        found[name] = {int(line): what for line, what in re.findall(r"(\d+): ([^;]+)", listed)}
    return found


@pytest.mark.parametrize("name", ["classification", "sft"])
def test_every_planted_fault_of_the_dirty_sets_is_found_at_its_line(name, tmp_path, capsys, encoder, decoder):
    folder = public_data("dirty")
    data = {"train": str(folder / f"{name}_train.jsonl"), "max_length": 2048}
    if name == "classification":
        data["validation"] = str(folder / "classification_validation.jsonl")
    settings = {"task": "sequence_classification" if name == "classification" else "causal_lm", "data": data,
                "model": {"name_or_path": encoder if name == "classification" else decoder}}
    code, report = checked(settings, tmp_path, capsys)
    assert code == 2
    faults = {(Path(fault["file"]).name, fault["line"]): fault for fault in report["faults"]}
    wanted = {(file, line): what for file, lines in planted(folder).items() if file.startswith(name)
              for line, what in lines.items()}
    assert len(wanted) == (11 if name == "classification" else 10)
    for place, what in wanted.items():
        kind = next((kind for said, kind in CAUSES.items() if said in what), "data")
        assert faults[place]["kind"] == kind and faults[place]["mend"], (place, what)
        assert faults[place]["severity"] == ("error" if kind == "data" else "warning")
    errors = {place for place, fault in faults.items() if fault["severity"] == "error"}
    assert errors <= wanted.keys()


def dirty_rows(intents):
    path = Path(intents["train"])
    lines = path.read_text().splitlines(keepends=True)
    lines[3] = '{"text": "x"\n'
    lines[5] = '{"text": "", "label": "praise"}\n'
    path.write_text("".join(lines))
    return path


def test_bad_rows_stop_a_run_or_are_left_out_and_counted(classify, intents, train, tmp_path, capsys):
    path = dirty_rows(intents)
    code, report = checked(classify, tmp_path, capsys)
    assert code == 2 and [fault["line"] for fault in report["faults"] if fault["severity"] == "error"] == [4, 6]
    with pytest.raises(DataError, match="broken JSON"):
        train(classify)
    skipping = {**classify, "data": {**classify["data"], "on_bad_row": "skip"}}
    code, report = checked(skipping, tmp_path, capsys)
    assert code == 0 and {fault["severity"] for fault in report["faults"]} == {"warning"}
    assert report["data"]["train"]["rows"] == 40 and report["data"]["train"]["bad"] == 2
    assert checked(skipping, tmp_path, capsys, "--strict")[0] == 2
    folder = train(skipping)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["data"]["counts"]["train"]["kept"] == 38
    assert f"{path}:4: " in manifest["data"]["bad_rows"][0] and summary(folder)["steps"] == 6
    assert "2 of 40 rows of train are bad and were left out" in capsys.readouterr().out


def test_all_bad_rows_are_counted_where_more_are_left_out_than_are_named(classify, write_rows, tmp_path, capsys):
    rows = [*tiny.intent_rows(40), *({"text": "", "label": "praise"} for _ in range(1200))]
    settings = {**classify, "data": {"train": write_rows("t.jsonl", rows), "max_length": 64, "on_bad_row": "skip"}}
    assert main(["check", str(write_config(settings, tmp_path / "c"))]) == 0
    assert "1,200 bad rows are left out" in capsys.readouterr().out


def test_it_is_not_said_that_all_bad_rows_are_there_where_they_are_not(classify, write_rows, tmp_path, capsys):
    rows = [*tiny.intent_rows(40), *[{"text": "", "label": "praise"}] * 1200]
    settings = {**classify, "data": {"train": write_rows("bad.jsonl", rows), "validation": None}}
    assert main(["check", str(write_config(settings, tmp_path / "c"))]) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "... and at least 980 more errors; --json has the first 1,000 of rows" in said
    assert "at least 1,000 errors" in said
    assert str(DataError([Fault(kind="data", message="x")] * 1000)).endswith("... and at least 980 more faults")
    assert str(DataError([Fault(kind="data", message="x")] * 999)).endswith("... and 979 more faults")


def test_findings_are_said_at_the_start_of_a_run_and_stored(classify, intents, train, capsys):
    path = Path(intents["train"])
    path.write_text(path.read_text() + path.read_text().splitlines(keepends=True)[0])
    folder = train(classify)
    assert "repeats an earlier row exactly" in capsys.readouterr().out
    (finding,) = [f for f in json.loads((folder / "manifest.json").read_text())["data"]["findings"]
                  if f["kind"] == "exact_duplicate"]
    assert finding["count"] == 1 and finding["places"][0].startswith(f"{path}:41: ")


@pytest.mark.parametrize(("task", "marked"), [
    ("classify", "[complaint]"), ("tag", "«printer»[B-thing]"), ("converse", "</s>»"), ("prefer", "</s>»"),
    ("answer", "«"),
])
def test_examples_are_shown_with_what_is_learned_marked(task, marked, request, tmp_path, capsys):
    settings = request.getfixturevalue(task)
    assert main(["check", str(write_config(settings, tmp_path / "c")), "--show", "9"]) == 0
    said = capsys.readouterr().out
    assert marked in said and "no errors" in said and "tokens an example" in said


def test_a_place_at_line_100_is_not_an_emoji(classify, write_rows, tmp_path, capsys):
    rows = tiny.intent_rows(120)
    rows[99] = rows[0]
    settings = {**classify, "data": {"train": write_rows("many.jsonl", rows), "max_length": 64}}
    assert main(["check", str(write_config(settings, tmp_path / "c"))]) == 0
    assert "many.jsonl:100: " in capsys.readouterr().out


def test_the_longest_of_many_rows_that_are_cut_is_named_first(converse, write_rows, tmp_path, capsys):
    rows = [{"prompt": "why", "completion": "word " * (40 + 5 * (n == 17))} for n in range(30)]
    data = {"train": write_rows("long.jsonl", rows), "max_length": 16}
    _, report = checked({**converse, "data": data}, tmp_path, capsys)
    assert [fault["line"] for fault in report["faults"] if fault["kind"] == "too_long"][:3] == [18, 1, 2]


def test_rows_cut_or_without_a_target_are_named(converse, write_rows, tmp_path, capsys):
    rows = [{"prompt": "the printer " * 30, "completion": "x"}, *({"prompt": f"q {i}", "completion": "y"}
                                                                  for i in range(12))]
    settings = {**converse, "data": {"train": write_rows("long.jsonl", rows), "validation": None, "max_length": 20}}
    code, report = checked(settings, tmp_path, capsys)
    assert code == 0
    places = {fault["kind"]: (fault["line"], fault["message"]) for fault in report["faults"]}
    assert places["no_target"][0] == 1 and report["data"]["train"]["dropped_no_target"] == 1
    assert report["lengths"]["train"]["longest"] <= 20


@pytest.mark.parametrize("mark", [{"label": False}, {"label": "False"}, {"kto_tag": False}], ids=str)
def test_answers_that_are_marked_as_unwanted_are_said(mark, converse, write_rows, tmp_path, capsys):
    name, _ = next(iter(mark.items()))
    rows = [{"prompt": f"Which {number}?", "completion": f"the {number} one", name: True} for number in range(9)]
    path = write_rows("kto.jsonl", [*rows, {"prompt": "Which?", "completion": "none of your business", **mark}])
    code, report = checked({**converse, "data": {"train": path}}, tmp_path, capsys)
    [found] = [fault for fault in report["faults"] if fault["kind"] == "unwanted_answer"]
    assert (code, found["severity"], found["line"]) == (0, "warning", 10) and "task: preference" in found["mend"]


def test_answers_that_do_not_come_back_from_their_tokens_are_said(write_rows, tmp_path, capsys, encoder, decoder):
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    tiny.save_decoder(folder)
    lossy = AutoTokenizer.from_pretrained(encoder)  # knows few letters; all others become [UNK]
    lossy.eos_token = "[SEP]"
    lossy.save_pretrained(folder)
    rows = [{"prompt": "q", "completion": "a"}] * 2 + [{"messages": [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": f"Ωmega {i}"}]} for i in range(5)]
    settings = {"task": "causal_lm", "model": {"name_or_path": str(folder)},
                "data": {"train": write_rows("m.jsonl", rows[2:]), "validation": None}}
    _, report = checked(settings, tmp_path, capsys)
    assert {fault["line"] for fault in report["faults"] if fault["kind"] == "round_trip"} == {1, 2, 3, 4, 5}


def test_completions_that_begin_inside_a_token_of_the_prompt_are_said(converse, write_rows, tmp_path, capsys):
    rows = [{"prompt": f"q {i}{end}", "completion": begin + "the printer"}
            for i, (end, begin) in enumerate([(":", " "), (": ", ""), (":\n", ""), (" pr", "inter "), ("</s>", " ")])]
    settings = {**converse, "data": {"train": write_rows("p.jsonl", rows), "validation": None}}
    code, report = checked(settings, tmp_path, capsys)
    found = {fault["line"]: fault["message"] for fault in report["faults"] if fault["kind"] == "joined_tokens"}
    assert code == 0 and set(found) == {2, 4}
    assert found[2].endswith("inside the token ' the'")


@pytest.mark.slow
def test_several_processes_tokenise_as_one(encoder, write_rows, monkeypatch):
    from peftune.config.schema import ModelConfig
    from peftune.tasks.sequence_classification import SEQUENCE_CLASSIFICATION
    from peftune.tasks.text import open_text

    config = DataConfig(train=write_rows("t.jsonl", [*tiny.intent_rows(300), {"text": "a", "label": "unheard"}]),
                        validation=0.2, labels=("praise", "complaint"), on_bad_row="skip")
    text = open_text(SEQUENCE_CLASSIFICATION, ModelConfig(name_or_path=encoder), config)

    told = []

    def prepared(name):
        return open_prepared(prepare(config, text.encoder, seed=0, identity={"name": name},
                                     progress=lambda *said: told.append(said)))

    one = prepared("one")
    assert not told
    monkeypatch.setattr(tokenise, "PARALLEL_FROM_ROWS", 1)
    monkeypatch.setattr(tokenise, "cores", lambda: 2)
    several = prepared("several")
    parts = told[0][2]
    assert len(told) == parts > 2 and ("tokenised", parts, parts) in told
    assert several.counts == one.counts and several.findings == one.findings
    assert [asdict(fault) for fault in several.faults] == [asdict(fault) for fault in one.faults] != []
    for name, split in one.splits.items():
        assert list(several.splits[name].records()) == list(split.records())
        for position in range(0, len(split), 17):
            assert list(several.splits[name][position].input_ids) == list(split[position].input_ids)


def test_it_is_told_how_many_rows_are_read_while_they_are(write_rows, tmp_path, monkeypatch):
    monkeypatch.setattr(spool, "TOLD_ROWS", 4)
    config, told = DataConfig(train=write_rows("t.jsonl", tiny.intent_rows(10)), validation=None), []
    spool.spool_rows(config, ("classification",), 0, ("train",), tmp_path, lambda *said: told.append(said))
    assert told == [("train rows read", 4, 0), ("train rows read", 8, 0)]


def test_a_fraction_that_holds_out_all_rows_since_they_are_equal_says_so(classify, write_rows, tmp_path, capsys):
    data = {"train": write_rows("same.jsonl", [{"text": "hello", "label": "a"}] * 20), "validation": 0.1}
    assert main(["check", str(write_config({**classify, "data": data}, tmp_path / "c"))]) == 2
    assert "holds out all 20 rows: equal ones stay together" in capsys.readouterr().out
