"""What the user can mend: one message that says what, where and the mend; exit 2; nothing written over."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from peftune.cli import main
from peftune.errors import PeftuneError, guarded
from peftune.loop.publish import write_text
from tests.conftest import ROOT, write_config


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def broken(settings, intents, fault):
    """Settings with one fault, and the words its message must hold."""
    train = Path(intents["train"])
    lines = train.read_text().splitlines(keepends=True)
    data = dict(settings["data"])
    if fault == "misspelt key":
        return {**settings, "trian": {}}, ("config.yaml:", "unknown key trian", "did you mean train?")
    if fault == "missing file":
        return {**settings, "data": {**data, "train": "no/such/file.jsonl"}}, ("no/such/file.jsonl", "no such file")
    if fault == "missing test file":
        return {**settings, "data": {**data, "test": str(train) + "x.jsonl"}}, ("no such file", train.name)
    if fault == "broken line":
        train.write_text("".join(lines[:4]) + '{"text": "x", \n' + "".join(lines[5:]))
        return settings, (f"{train}:5: ", "broken JSON")
    if fault == "empty file":
        train.write_text("")
        return settings, (str(train), "no rows")
    if fault == "label outside the set":
        validation = Path(intents["validation"])
        validation.write_text(validation.read_text() + '{"text": "x", "label": "prase"}\n')
        return settings, (f"{validation}:10: ", "'prase' is not one of the 2 classes")
    if fault == "unreachable model":
        return {**settings, "model": {"name_or_path": "no-such-org/no-such-model"}}, ("no-such-org/no-such-model",)
    if fault == "missing model folder":
        return {**settings, "model": {"name_or_path": "./no/model"}}, ("no such folder: ./no/model",)
    if fault == "adapter target":
        return {**settings, "adapter": {"target_modules": ["qeury"]}}, ("adapter.target_modules", "did you mean query?")
    if fault == "adapter field":
        return {**settings, "adapter": {"method": "ia3", "r": 3}}, ("adapter.r", "IA3Config")
    if fault == "adapter method":
        return {**settings, "adapter": {"method": "lorra"}}, ("adapter.method", "lora")
    if fault == "metric":
        return {**settings, "evaluation": {"metric": "pearson"}}, ("evaluation.metric", "accuracy")
    assert fault == "tracker"
    return {**settings, "log": {"trackers": ["wandbb"]}}, ("log.trackers", "wandb")


FAULTS = ("misspelt key", "missing file", "missing test file", "broken line", "empty file", "label outside the set",
          "unreachable model", "missing model folder", "adapter target", "adapter field", "adapter method", "metric",
          "tracker")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_exits_2_says_where_and_the_mend_and_leaves_the_folder_alone(
        fault, classify, intents, tmp_path, capsys, train):
    from peftune.errors import guarded
    from peftune.train import main

    folder = train(classify)
    before = snapshot(folder)
    capsys.readouterr()
    settings, words = broken(classify, intents, fault)
    config = str(write_config(settings, tmp_path / "faulty"))
    assert guarded(main, [config]) == 2, "in the folder of the earlier run"
    capsys.readouterr()
    assert guarded(main, [config, f"output_dir={tmp_path / 'new'}"]) == 2, "in a new folder"
    said = capsys.readouterr().err
    assert all(word in said for word in words) and "mend: " in said and "Traceback" not in said
    assert snapshot(folder) == before and not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["misspelt key", "broken line", "unreachable model", "adapter target"])
@pytest.mark.parametrize("door", ["train.py", "peftune train"])
def test_the_real_commands_exit_2_without_a_traceback(door, fault, classify, intents, tmp_path, command):
    settings, words = broken(classify, intents, fault)
    config = write_config(settings, tmp_path / "faulty")
    start = (ROOT / "peftune" / "train.py",) if door == "train.py" else ("-m", "peftune.cli", "train")
    done = command(*start, config)
    assert done.returncode == 2, done.stderr
    assert all(word in done.stderr for word in words) and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_check_says_every_fault_at_once_as_json(classify, intents, tmp_path, capsys):
    from peftune.cli import main

    settings, _ = broken(classify, intents, "broken line")
    settings, _ = broken(settings, intents, "label outside the set")
    code = main(["check", str(write_config(settings, tmp_path / "c")), "--json"])
    faults = json.loads(capsys.readouterr().out)["faults"]
    assert code == 2
    assert {"severity", "kind", "file", "line", "message", "mend"} <= faults[0].keys()
    assert (faults[0]["file"], faults[0]["line"]) == (intents["train"], 5)


def test_check_of_a_right_config_exits_0_with_counts(classify, tmp_path, capsys):
    from peftune.cli import main

    assert main(["check", str(write_config(classify, tmp_path / "c")), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["faults"] == [] and said["data"]["train"]["kept"] == 40


def test_another_config_in_the_folder_of_a_run_is_refused_with_the_differing_keys(classify, train, tmp_path, capsys):
    from peftune.errors import guarded
    from peftune.train import main

    folder = train(classify)
    before = snapshot(folder)
    config = write_config({**classify, "seed": 7, "adapter": {"method": "lora", "r": 5}}, tmp_path / "other")
    assert guarded(main, [str(config)]) == 2
    said = capsys.readouterr().err
    assert "seed: 0 -> 7" in said and "adapter.r: 4 -> 5" in said
    assert snapshot(folder) == before


@pytest.mark.parametrize("change", ["resume=never", "data"])
def test_a_run_is_never_written_over(change, classify, intents, train, tmp_path, capsys):
    from peftune.errors import guarded
    from peftune.train import main

    folder = train(classify)
    before = snapshot(folder)
    if change == "data":
        Path(intents["train"]).write_text(Path(intents["train"]).read_text() + '{"text": "x", "label": "praise"}\n')
    overrides = [change] if change != "data" else []
    assert guarded(main, [str(write_config(classify, tmp_path / "again")), *overrides]) == 2
    assert "choose another output_dir" in capsys.readouterr().err
    assert snapshot(folder) == before


def test_a_folder_of_other_files_is_refused(classify, tmp_path, capsys):
    from peftune.errors import guarded
    from peftune.train import main

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    assert guarded(main, [str(write_config(classify, tmp_path / "c"))]) == 2
    assert "thesis.txt" in capsys.readouterr().err and len(snapshot(tmp_path / "run")) == 1


def test_rows_over_the_limit_are_counted_dropped_or_refused_as_asked(classify, train, tmp_path, capsys):
    from peftune.errors import guarded
    from peftune.train import main

    counts = {}
    for policy in ("truncate", "drop"):
        folder = train(classify, "data.max_length=12", f"data.too_long={policy}", name=policy)
        counts[policy] = json.loads((folder / "manifest.json").read_text())["data"]["counts"]["train"]
    assert counts["truncate"]["truncated"] == counts["drop"]["dropped_too_long"] > 0
    assert counts["drop"]["kept"] == 40 - counts["drop"]["dropped_too_long"]
    config = write_config(classify, tmp_path / "c")
    assert guarded(main, [str(config), "data.max_length=12", "data.too_long=error"]) == 2
    said = capsys.readouterr().err
    assert "tokens are more than data.max_length = 12" in said and " or more, or data.too_long=truncate or drop" in said


@pytest.mark.parametrize(("override", "said"), [
    ("resume=/nowhere", "no such checkpoint folder"), ("output_dir={file}", "output_dir is a file"),
    ("model.attention=foo", "none that transformers has"), ("model.attention=flash_attention_2", "needs flash-attn "),
    ("model.attention=flash_attention_3", "needs flash-attn-3 "),
    ("model.attention=kernels-community/flash-attn2", "needs kernels ")])
def test_check_says_what_training_would_refuse_before_it_loads(override, said, classify, tmp_path, capsys):
    config = write_config(classify, tmp_path / "c")
    assert main(["check", str(config), override.format(file=config), "--json"]) == 2
    (fault,) = json.loads(capsys.readouterr().out)["faults"]
    assert said in fault["message"]


def test_a_reader_that_goes_away_and_a_full_disk_behind_standard_output_are_no_faults_of_ours():
    words = [sys.executable, "-m", "peftune", "schema"]
    many = ("import sys; from peftune.errors import guarded; "
            "sys.exit(guarded(lambda words: print('x' * 10**6) or 0, []))")
    left = subprocess.run(f"{sys.executable} -c {shlex.quote(many)} | head -c 1; exit ${{PIPESTATUS[0]}}", shell=True,
                          executable="/bin/bash", cwd=ROOT, capture_output=True, text=True, check=False)
    assert (left.returncode, left.stderr) == (141, "")
    with open("/dev/full", "w") as full:
        refused = subprocess.run(words, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert refused.returncode == 2 and "cannot be written: [Errno 28]" in refused.stderr
    assert "Traceback" not in refused.stderr and "Exception ignored" not in refused.stderr
    closed = subprocess.run(f"{shlex.join(words)} >&-", shell=True, cwd=ROOT, capture_output=True, text=True,
                            check=False)
    assert (closed.returncode, closed.stderr) == (0, "")


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_a_closed_standard_output_is_no_fault_of_a_command_that_fills_it(words, classify, tmp_path):
    config = write_config(classify, tmp_path / "c")
    line = shlex.join([sys.executable, "-m", "peftune", "check", str(config), *words])
    closed = subprocess.run(f"{line} >&-", shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert closed.returncode == 0 and "Traceback" not in closed.stderr


def test_what_was_written_through_a_link_goes_where_it_leads(tmp_path):
    (tmp_path / "real.jsonl").write_text("old")
    (tmp_path / "link.jsonl").symlink_to("real.jsonl")
    os.mkfifo(tmp_path / "pipe")
    write_text(tmp_path / "link.jsonl", "new")
    assert (tmp_path / "link.jsonl").is_symlink() and (tmp_path / "real.jsonl").read_text() == "new"
    reader = subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE, text=True)
    write_text(tmp_path / "pipe", "through")
    assert reader.communicate(timeout=10)[0] == "through" and (tmp_path / "pipe").is_fifo()


def test_predictions_never_take_the_place_of_their_input(tmp_path):
    rows = tmp_path / "new.jsonl"
    rows.write_text('{"text": "a"}\n')
    with pytest.raises(PeftuneError, match="--output is the --input"):
        main(["predict", "run", "--input", str(rows), "--output", f"{tmp_path}/../{tmp_path.name}/new.jsonl"])
    assert rows.read_text() == '{"text": "a"}\n'


def test_an_input_that_is_missing_is_said_before_the_model_is_opened(tmp_path, capsys):
    output = tmp_path / "old.jsonl"
    output.write_text("old")
    assert guarded(main, ["predict", "run", "--input", str(tmp_path / "no.jsonl"), "--output", str(output)]) == 2
    assert "no.jsonl: no such file" in capsys.readouterr().err and output.read_text() == "old"


@pytest.mark.parametrize("words", [["predict", "run", "--input", "rows.jsonl"], ["evaluate", "run"]])
def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_opened(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "folder").mkdir()
    for output, why in (("folder", "is a folder"), ("rows.jsonl/out.jsonl", "rows.jsonl is no folder")):
        assert guarded(main, [*words, "--output", output]) == 2
        said = capsys.readouterr().err
        assert f"{output}: cannot be written: " in said and f"{why}\n  mend: give another --output" in said


@pytest.mark.parametrize("words", [["--limit", "3"], ["--batch-size", "4"], ["--include-path", "."],
                                   ["--tasks", "t", "--split", "test"], ["--tasks", "t", "--output", "o.jsonl"]])
def test_options_of_evaluate_that_would_say_nothing_are_refused(words, tmp_path, capsys):
    assert guarded(main, ["evaluate", str(tmp_path), *words]) == 2
    how = "with" if "--tasks" in words else "without"
    assert f"{words[-2]}: not heeded {how} --tasks\n  mend: leave it out, or " in capsys.readouterr().err
