"""What fuzzing has found, a test each: files that once ended in a traceback or never ended."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from peftune import cli
from peftune.config.load import load
from peftune.config.schema import AdapterConfig, DataConfig, EvaluationConfig, ModelConfig, TrainConfig
from peftune.data import chat
from peftune.data.examples import Example
from peftune.data.sources import read_records
from peftune.errors import ConfigError, DataError, Fault, ModelError, PeftuneError, RunFolderError, guarded
from peftune.model.assemble import assemble
from peftune.parallel.pieces import PieceReader
from peftune.tasks import TASKS
from peftune.tasks.prompts import prompts_of
from peftune.tasks.text import Text, open_text
from peftune.train import main
from tests.conftest import write_config


def text_side(task: str, model: str, **data) -> Text:
    return open_text(TASKS[task](TrainConfig(), EvaluationConfig()), ModelConfig(name_or_path=model, dtype="float32"),
                     DataConfig(train="x", **data))


@pytest.mark.parametrize("content", [b"task: \x00", b"\xc2\x95", b"task: !!timestamp x", b"task: !!bool 3"],
                         ids=["nul", "control", "timestamp", "bool"])
def test_a_config_that_yaml_forbids_is_refused_with_its_file(content, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        load([str(path)])


def test_an_override_whose_tag_does_not_suit_its_value_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("task: causal_lm")
    with pytest.raises(ConfigError, match="not a YAML value"):
        load([str(path), "seed=!!timestamp x"])


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_what_never_ends_is_not_read(make, tmp_path):
    config, rows = tmp_path / "c.yaml", tmp_path / "rows.jsonl"
    make(config)
    make(rows)
    with pytest.raises(ConfigError, match="a device or a pipe"):
        load([str(config)])
    for read in (lambda: read_records(str(rows)), lambda: text_fingerprint(rows)):
        with pytest.raises(DataError, match=r"rows\.jsonl"):
            read()


def text_fingerprint(path: Path) -> None:
    from peftune.config.schema import Source
    from peftune.data.sources import fingerprint

    fingerprint(Source(path=str(path)))


def windows(encoder: str, words: int, **data) -> list[Example]:
    """Windows over a context behind a question of so many words."""
    text = text_side("question_answering", encoder, max_length=64, **data)
    return list(text.encoder.task.encode_prompt(
        {"question": "printer " * words, "context": "the badge is fine now " * 40}, text.encoder.text))


@pytest.mark.parametrize("words", [1, 20, 40, 55])
def test_a_stride_longer_than_the_room_beside_a_question_makes_windows_all_the_same(words, encoder):
    """A question's own length was counted without the mark that ends a pair: the tokenizer panicked."""
    found = windows(encoder, words, doc_stride=63)
    assert len(found) > 1 and all(len(example.input_ids) <= 64 for example in found)


@pytest.mark.parametrize("template", [
    "{% break %}", "{{ range(10**9) }}", "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "\ud800",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__ }}", "{{ messages.append(1) }}",
], ids=["syntax", "range", "recursion", "surrogate", "classes", "globals", "changes"])
def test_a_hostile_template_reaches_nothing_and_is_refused(template, decoder):
    text = text_side("causal_lm", decoder, chat_template="{{ '' }}" + template)
    with pytest.raises(chat.TemplateMismatch):
        chat.render(text.tokenizer, [{"role": "user", "content": "hi"}], None)


def test_a_template_that_never_ends_is_stopped(decoder, monkeypatch):
    monkeypatch.setattr(chat, "RENDER_LIMIT_S", 0.2)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    text = text_side("causal_lm", decoder, chat_template=loop)
    with pytest.raises(ConfigError, match="processor time"):
        chat.render(text.tokenizer, [{"role": "user", "content": "hi"}], None)


def test_a_file_whose_name_is_no_utf_8_is_refused_and_told_to_be_renamed(classify, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    odd = tmp_path / "rows" / os.fsdecode(b"na\xefve.jsonl")
    odd.parent.mkdir()
    odd.write_text('{"text": "a", "label": "b"}\n')
    config = str(write_config({**classify, "data": {"train": "rows/*.jsonl"}}, tmp_path / "c"))
    for words in (["check", config], ["init", str(odd)]):
        assert guarded(cli.main, words) == 2
        said = capsys.readouterr()
        assert "ve.jsonl: the name of the file is not UTF-8\n  mend: rename it" in said.out + said.err
    with pytest.raises(DataError, match="is not UTF-8"):
        read_records(str(odd))


def test_half_a_surrogate_pair_in_a_prompt_is_refused_with_its_line(decoder, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "right"}\n{"prompt": "a \\ud800 b"}\n')
    with pytest.raises(DataError, match=r"prompts\.jsonl:2: .*surrogate"):
        prompts_of(read_records(str(path)), text_side("causal_lm", decoder).encoder, {})


@pytest.mark.parametrize(("file", "spoil"), [
    ("config.json", lambda values: {**values, "hidden_act": {}}),
    ("config.json", lambda values: {**values, "tie_word_embeddings": "x"}),
    ("tokenizer_config.json", lambda values: {**values, "eos_token": {}}),
    ("tokenizer.json", lambda values: {**values, "model": {**values["model"], "merges": [{"a": 1}]}}),
], ids=["activation", "tied", "special", "merges"])
def test_a_model_folder_with_a_wrong_value_is_refused(file, spoil, decoder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(decoder, folder)
    (folder / file).write_text(json.dumps(spoil(json.loads((folder / file).read_text()))))
    with pytest.raises(ModelError, match=r"model\.name_or_path: the "):
        text_side("causal_lm", str(folder))


@pytest.mark.parametrize("key", ["init_from", "stack_on"])
@pytest.mark.parametrize("damage", ["shape", "bytes"])
def test_an_earlier_adapter_whose_weights_are_damaged_is_refused(key, damage, decoder, converse, train, tmp_path):
    earlier = train({**converse, "train": {**converse["train"], "max_steps": 1}}) / "final"
    path = earlier / "adapter_model.safetensors"
    if damage == "bytes":
        path.write_bytes(path.read_bytes()[:200])
    else:
        save_file({name: tensor.flatten() for name, tensor in load_file(path).items()}, path)
    text = text_side("causal_lm", decoder)
    with pytest.raises(PeftuneError, match=f"adapter.{key}"):
        assemble(ModelConfig(name_or_path=decoder, dtype="float32"), AdapterConfig.model_validate({key: str(earlier)}),
                 text.source, text.config, text.encoder.task.auto_class, task="causal_lm", new_head=False, seed=0)


@pytest.mark.parametrize("name", ["state.json", "random.safetensors"])
@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_a_checkpoint_whose_manifest_suits_a_broken_file_is_refused_all_the_same(
        name, how, classify, train, tmp_path, capsys):
    import hashlib

    folder = train(classify)
    (folder / "summary.json").unlink()
    for checkpoint in (folder / "checkpoints").iterdir():
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        (checkpoint / name).unlink()
        if how == "damaged":
            (checkpoint / name).write_bytes(b"[1")
            manifest["sha256"][name] = hashlib.sha256(b"[1").hexdigest()
        else:
            del manifest["sha256"][name]
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert guarded(main, [str(write_config(classify, tmp_path / "again"))]) == 2
    assert "damaged checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("place", [[0, [10**6, 10**6]], [-5, [4]], [0, [-1]], [3, [4]]],
                         ids=["huge", "before", "negative", "beyond"])
def test_pieces_that_do_not_lie_where_their_header_says_are_refused_before_memory_is_asked_for(place, tmp_path):
    import torch

    path = tmp_path / "t.safetensors"
    save_file({"w": torch.ones(4)}, path, metadata={"places": json.dumps({"w": place})})
    with pytest.raises((KeyError, ValueError)):
        PieceReader([path])("w")


def test_faults_reach_other_processes_whole():
    """Ranks and tokenising processes hand them on pickled: a fault came back as the letters of its message."""
    error = RunFolderError([Fault(kind="data", message="m", file="f", line=3), Fault(kind="data", message="n")])
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 our own bytes
    assert type(again) is RunFolderError and again.faults == error.faults and str(again) == str(error)


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_beside_or_instead_of_weights_is_never_executed(classify, encoder, train, tmp_path, capsys):
    """As a model's weights, an adapter's, and an optimizer's."""
    touched = tmp_path / "executed"
    content = pickle.dumps(Payload(touched))
    model = tmp_path / "model"
    shutil.copytree(encoder, model)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(content)
    settings = {**classify, "model": {"name_or_path": str(model), "dtype": "float32"}}
    assert guarded(main, [str(write_config(settings, tmp_path / "c"))]) == 2
    assert "safetensors" in capsys.readouterr().err
    folder = train(classify)
    (folder / "summary.json").unlink()
    newest = max((folder / "checkpoints").iterdir())
    for name in ("optimizer.pt", "random.pt", "training_args.bin"):
        (newest / name).write_bytes(content)
    train(classify)
    adapter = tmp_path / "adapter"
    shutil.copytree(folder / "final", adapter)
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(content)
    other = {**classify, "adapter": {"init_from": str(adapter)}, "output_dir": str(tmp_path / "other")}
    assert guarded(main, [str(write_config(other, tmp_path / "c2"))]) == 2
    assert "no adapter lies there" in capsys.readouterr().err
    assert not touched.exists()


def test_code_that_comes_with_a_model_is_refused_with_the_mend_and_not_run(decoder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(decoder, folder)
    values = json.loads((folder / "config.json").read_text())
    values |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError, match=r"mend: model\.trust_remote_code=true"):
        text_side("causal_lm", str(folder))
    assert not (tmp_path / "ran").exists()


def test_no_file_of_the_package_loads_pickles():
    from tests.house.test_house import FILES

    words = ("pickle", "torch.load(", "torch.save(", "joblib", "dill", "marshal", "eval(", "exec(")
    found = [f"{path.name}: {line.strip()}" for path in FILES for line in path.read_text().splitlines()
             for word in words if word in line.replace(".eval(", "")]
    assert not found


SECRETS = {"HF_TOKEN": "hf_planted_secret", "WANDB_API_KEY": "wandb_planted_secret",
           "AWS_SECRET_ACCESS_KEY": "aws_planted_secret", "OPENAI_API_KEY": "sk-planted_secret"}


def test_secrets_of_the_environment_are_in_no_file_and_no_output_of_a_run(classify, train, monkeypatch, capsys):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    folder = train(classify)
    said = capsys.readouterr()
    assert "planted_secret" not in said.out + said.err
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10 and not [path for path in files if b"planted_secret" in path.read_bytes()]


def test_no_one_else_may_write_what_a_run_has_written(classify, train):
    before = os.umask(0o022)
    try:
        folder = train(classify)
    finally:
        os.umask(before)
    assert not [path for path in folder.rglob("*") if path.stat().st_mode & 0o022]
