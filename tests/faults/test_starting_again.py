"""The same command given again goes on, wherever the run was stopped and whatever has happened to its folder since."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from peftune import build
from peftune.data.chat import PLAIN
from peftune.errors import guarded
from peftune.loop.checkpoint import folder_of, is_whole
from peftune.train import main
from tests.conftest import summary, write_config
from tests.faults.test_preemption import AfterLooks, same_run
from tests.faults.test_saving import refused_at


@pytest.mark.parametrize("file", ["config.yaml", "manifest.json"])
def test_a_disk_that_was_full_as_the_run_began_leaves_a_folder_in_which_it_can_begin(
        file, classify, tmp_path, monkeypatch, capsys):
    config = str(write_config(classify, tmp_path / "c"))
    with monkeypatch.context() as patched:
        for name in ("write_text", "write_json"):
            refused_at(patched, build, name, file)
        assert guarded(main, [config]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert guarded(main, [config]) == 0 and summary(Path(classify["output_dir"]))["steps"] == 6


def test_a_kill_before_the_config_is_whole_leaves_a_folder_in_which_the_run_can_begin(classify, train):
    folder = Path(classify["output_dir"])
    folder.mkdir()
    for left in (".lock", ".config.yaml.draft"):
        (folder / left).write_text("")
    train(classify)
    assert summary(folder)["steps"] == 6 and not (folder / ".config.yaml.draft").exists()


def stopped_after(looks: int, config: Path | str, *overrides: str) -> int:
    """Train until the run has looked so many times whether to stop; its exit code."""
    return guarded(lambda words: main(words, AfterLooks(looks=looks)), [str(config), *overrides])


@pytest.fixture
def from_step_2(classify, train, tmp_path):
    """A config that goes on from a checkpoint of another run, and the folder of a run that did so unbroken."""
    first = train({**classify, "checkpoint": {"every_steps": 2, "keep": 9}}, name="first")
    settings = {**classify, "resume": str(first / "checkpoints" / "step-000002")}
    unbroken = train(settings, name="unbroken")
    return write_config({**settings, "output_dir": str(tmp_path / "second")}, tmp_path / "c"), unbroken


@pytest.mark.parametrize("words", ["command", "line"])
def test_a_run_from_a_named_checkpoint_that_was_stopped_goes_on_by_the_same_words(
        words, from_step_2, tmp_path, capsys):
    config, unbroken = from_step_2
    folder = tmp_path / "second"
    assert stopped_after(1, config) == 75 and is_whole(folder_of(folder, 3))
    line = json.loads((folder / "stopped.json").read_text())["go_on"].split()[2:]
    again = [str(config)] if words == "command" else line
    capsys.readouterr()
    assert guarded(main, again) == 0
    assert "continuing after step 3" in capsys.readouterr().out
    same_run(folder, unbroken)
    assert guarded(main, again) == 0 and "done before" in capsys.readouterr().out


def test_a_run_from_a_named_checkpoint_that_was_killed_before_one_of_its_own_never_begins_at_step_0(
        from_step_2, tmp_path, capsys):
    config, unbroken = from_step_2
    folder = tmp_path / "second"
    assert stopped_after(1, config) == 75
    shutil.rmtree(folder / "checkpoints")
    capsys.readouterr()
    assert guarded(main, [str(config), "resume=auto"]) == 2
    said = capsys.readouterr().err
    assert "holds a run that went on from" in said and f"mend: resume={tmp_path}/first/checkpoints/step-000002" in said
    assert guarded(main, [str(config)]) == 0
    same_run(folder, unbroken)


def test_the_line_that_goes_on_says_what_resume_never_needs(classify, tmp_path, capsys):
    config = write_config({**classify, "resume": "never"}, tmp_path / "c")
    assert stopped_after(1, config) == 75
    go_on = json.loads((Path(classify["output_dir"]) / "stopped.json").read_text())["go_on"]
    assert go_on.endswith(" resume=auto") and "or the command that you used" not in capsys.readouterr().err
    assert guarded(main, go_on.split()[2:]) == 0


def test_a_damaged_newest_checkpoint_never_takes_the_place_of_the_only_one_that_is_kept(classify, train, tmp_path):
    folder = train({**classify, "checkpoint": {"every_steps": 2, "keep": 9}})
    (folder / "summary.json").unlink()
    (folder_of(folder, 6) / "state.json").write_text("")
    settings = {**classify, "checkpoint": {"every_steps": 1, "keep": 1}}
    assert stopped_after(0, write_config(settings, tmp_path / "c")) == 75
    assert is_whole(folder_of(folder, 5)) and not folder_of(folder, 4).exists()
    train(settings)
    assert summary(folder)["steps"] == 6 and is_whole(folder_of(folder, 6))


def test_best_weights_of_steps_that_are_done_again_are_not_taken_for_those_that_were_best_before(
        classify, train, capsys):
    """A kill after best/ was replaced, and before the next checkpoint."""
    settings = {**classify, "evaluation": {"every_steps": 3, "metric": "accuracy"},
                "checkpoint": {"every_steps": 1, "keep": 9}}
    folder = train(settings)
    assert summary(folder)["best_step"] == 3
    (folder / "summary.json").unlink()
    shutil.rmtree(folder_of(folder, 6))
    (folder / "best" / "step.txt").write_text("6\n")
    capsys.readouterr()
    train(settings)
    assert "the best weights so far, of step 3, are not in" in capsys.readouterr().out
    assert summary(folder)["best_step"] == 6 and (folder / "best" / "step.txt").read_text() == "6\n"


def edit_template(folder: Path) -> None:
    (folder / "chat.jinja").write_text((folder / "chat.jinja").read_text().replace("### ", "## "))


def edit_weights(folder: Path) -> None:
    path = folder / "decoder" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])


def edit_tokenizer(folder: Path) -> None:
    path = folder / "decoder" / "tokenizer.json"
    path.write_text(path.read_text() + "\n")


@pytest.mark.parametrize(("edit", "name"), [
    (edit_template, "chat template"), (edit_weights, "model.safetensors"), (edit_tokenizer, "tokenizer.json")])
def test_a_run_does_not_go_on_with_another_template_tokenizer_or_base_model(
        edit, name, converse, decoder, tmp_path, capsys):
    shutil.copytree(decoder, tmp_path / "decoder")
    (tmp_path / "chat.jinja").write_text(PLAIN)
    converse["model"] = {**converse["model"], "name_or_path": str(tmp_path / "decoder")}
    converse["data"] = {**converse["data"], "chat_template": str(tmp_path / "chat.jinja")}
    config = write_config(converse, tmp_path / "c")
    assert stopped_after(0, config) == 75
    kept = {path: path.read_bytes() for path in (tmp_path / "chat.jinja", *(tmp_path / "decoder").iterdir())}
    edit(tmp_path)
    capsys.readouterr()
    assert guarded(main, [str(config)]) == 2
    said = capsys.readouterr().err
    assert f"holds a run of another model. Changed since: {name}\n  mend: choose another output_dir" in said
    for path, content in kept.items():
        path.write_bytes(content)
    assert stopped_after(0, config) == 75


def test_a_run_that_began_and_ended_while_another_loaded_its_model_is_not_written_over(
        classify, train, tmp_path, monkeypatch, capsys):
    plain, folder = build.model_for_training, Path(classify["output_dir"])

    def meanwhile(*given):
        monkeypatch.setattr(build, "model_for_training", plain)
        train(classify)
        return plain(*given)

    monkeypatch.setattr(build, "model_for_training", meanwhile)
    assert guarded(main, [str(write_config({**classify, "seed": 1}, tmp_path / "c"))]) == 2
    assert f"{folder}: another run has begun there meanwhile" in capsys.readouterr().err
    assert summary(folder)["steps"] == 6 and yaml.safe_load((folder / "config.yaml").read_text())["seed"] == 0


def test_rows_that_the_log_has_lost_are_missed(classify, train, capsys):
    folder = train(classify)
    (folder / "summary.json").unlink()
    path = folder / "metrics.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join(rows[:2]))
    capsys.readouterr()
    train(classify)
    said = " ".join(capsys.readouterr().out.split())
    assert f"has lost {len(rows) - 3} of the {len(rows) - 1} rows so far" in said  # the last one is written again
