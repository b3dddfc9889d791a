"""A first config for somebody's data: what it is taken for, and what is refused."""

import json
import re
import shlex
from pathlib import Path

import pytest

from peftune.cli import main
from peftune.config.load import load
from peftune.config.names import key_paths
from peftune.config.rules import FORMATS
from peftune.errors import PeftuneError
from peftune.starter.foreign import DIALECTS
from tests import tiny
from tests.conftest import ROOT

TICKETS = "Message,Team\n" + "".join(
    f'"{row["text"]}, please",{row["label"]}\n' for row in tiny.intent_rows(40))
DATA = {"helpdesk": "sequence_classification", "tickets": "token_classification", "policies": "question_answering",
        "assistant": "causal_lm", "answers": "preference"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def init(*words):
    assert main(["init", *map(str, words)]) == 0


def faults_of(*words):
    with pytest.raises(PeftuneError) as caught:
        main(["init", *map(str, words)])
    return str(caught.value)


def test_columns_of_any_name_are_taken_for_texts_and_classes(here, capsys):
    (here / "tickets.csv").write_text(TICKETS)
    init("tickets.csv")
    config = load(["tickets.yaml"])
    assert config.task == "sequence_classification" and config.output_dir == "runs/tickets"
    assert config.data.columns == {"text": "Message", "label": "Team"}
    assert "label from the column Team, 2 classes" in capsys.readouterr().out


@pytest.mark.parametrize("name", DATA)
def test_each_task_is_found_from_the_columns_of_its_data(name, here):
    init(ROOT / "configs" / "data" / name / "train.jsonl", "--to", "c.yaml")
    config = load(["c.yaml"])
    assert (config.task, config.data.columns) == (DATA[name], {})


@pytest.mark.parametrize(("row", "task", "columns"), [
    ({"Question": "Why?", "Answer": "So.", "topic": "a"}, "causal_lm", {"prompt": "Question", "completion": "Answer"}),
    ({"dialogue": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "causal_lm",
     {"messages": "dialogue"}),
    ({"words": ["Ada", "sleeps"], "tags": ["B-person", "O"]}, "token_classification",
     {"tokens": "words", "ner_tags": "tags"}),
    ({"question": "Who?", "context": "Ada sleeps", "answer": [{"text": "Ada", "answer_start": 0}]},
     "question_answering", {"answers": "answer"}),
    ({"content": "no class in sight", "id": "7"}, "causal_lm", {"text": "content"}),
    ({"system": "", "question": "Why?", "chosen": "So.", "rejected": "No."}, "preference", {"prompt": "question"}),
    ({"instruction": "Why?", "input": "", "chosen": "So.", "rejected": "No."}, "preference",
     {"prompt": "instruction"}),
    ({"system_prompt": "Be kind.", "question": "Why?", "response": "So."}, "causal_lm",
     {"prompt": "question", "completion": "response", "system": "system_prompt"}),
    ({"instruction": "Who?", "context": "Ada came.", "response": "Ada"}, "causal_lm",
     {"output": "response", "input": "context"}),
    ({"prompt": "Why?", "messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}],
      **{side: [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": said}]
         for side, said in (("chosen", "So."), ("rejected", "No."))}}, "preference", {}),
])
def test_other_usual_names_are_renamed(row, task, columns, here):
    (here / "rows.jsonl").write_text(json.dumps(row) + "\n")
    init("rows.jsonl")
    assert (load(["rows.yaml"]).task, load(["rows.yaml"]).data.columns) == (task, columns)


@pytest.mark.parametrize(("first", "second"), [("sentence1", "sentence2"), ("premise", "hypothesis"), ("Q_a", "Q_b")])
def test_both_texts_of_a_pair_are_taken(first, second, here, capsys):
    rows = "".join(f"a text {n}\tits counterpart {n} which is longer\t{n / 7}\n" for n in range(20))
    (here / "pairs.tsv").write_text(f"{first}\t{second}\tscore\n{rows}")
    init("pairs.tsv")
    assert load(["pairs.yaml"]).data.columns == {"text": first, "text_pair": second, "label": "score"}
    assert "not read" not in capsys.readouterr().out


def test_a_second_column_of_texts_that_is_not_read_is_said(here, capsys):
    rows = "".join(f"about {n},the whole message {n},{'xy'[n % 2]},id{n}\n" for n in range(20))
    (here / "mails.csv").write_text(f"subject,body,team,key\n{rows}")
    init("mails.csv")
    assert load(["mails.yaml"]).data.columns == {"text": "body", "label": "team"}
    assert "\nnot read: subject, key (--columns text_pair=subject" in capsys.readouterr().out


def test_fractions_in_a_csv_file_are_scores_to_predict(here):
    (here / "stars.csv").write_text("review,stars\nvery good,4.5\nbad it was,1.0\n")
    init("stars.csv")
    assert load(["stars.yaml"]).data.problem_type == "regression"


def test_a_column_of_dates_is_not_taken_for_the_classes(here):
    rows = "".join(f"2026-10-{day:02d},some long text {day},{'ab'[day % 2]}\n" for day in (*range(1, 9), *range(1, 9)))
    (here / "t.csv").write_text(f"Day,Message,Team\n{rows}")
    init("t.csv")
    assert load(["t.yaml"]).data.columns == {"text": "Message", "label": "Team"}


def test_given_columns_model_and_files_are_taken_over(here):
    (here / "t.csv").write_text("a,b,c\n" + "some long text,x,y\nanother long text,z,w\n" * 5)
    assert "could be the classes: b, c" in faults_of("t.csv")
    init("t.csv", "--columns", "label=c", "--model", "mine: yes", "--validation", "t.csv", "--test", "t.csv")
    config = load(["t.yaml"])
    assert config.data.columns == {"text": "a", "label": "c"}
    assert (config.model.name_or_path, config.data.validation, config.data.test) == ("mine: yes", "t.csv", "t.csv")


def test_columns_that_suit_no_task_are_taken_as_the_message_says(here):
    (here / "news.jsonl").write_text('{"article": "A long story.", "highlights": "Short."}\n')
    assert "--columns text=COLUMN_1 label=COLUMN_2 or prompt=COLUMN_1 completion=COLUMN_2" in faults_of("news.jsonl")
    said = faults_of("news.jsonl", "--task", "preference")
    assert said.endswith("--columns chosen=COLUMN_1 rejected=COLUMN_2")
    init("news.jsonl", "--columns", "prompt=article", "completion=highlights")
    assert load(["news.yaml"]).task == "causal_lm"


def test_what_cannot_be_known_is_asked_for_and_nothing_is_written(here):
    (here / "ab.csv").write_text("a,b\n1,2\n3,4\n")
    assert "columns a, b suit no task" in faults_of("ab.csv")
    assert "no column d for label" in faults_of("ab.csv", "--columns", "text=a", "label=d")
    assert "not EXPECTED=GIVEN" in faults_of("ab.csv", "--columns", "text")
    assert "use sequence_classification" in faults_of("ab.csv", "--task", "sorting")
    assert "no such file" in faults_of("nothing.csv")
    assert "--task" in faults_of("org/name")
    assert "data.validation" in faults_of("org/name", "--task", "preference", "--validation", "1.5")
    assert list(here.iterdir()) == [here / "ab.csv"]


@pytest.mark.parametrize(("data", "name"), [("rows/*.jsonl", "rows"), ("rows", "rows"), ("rows/a.b.jsonl", "a.b"),
                                            ("*.jsonl", "config")])
def test_a_config_is_named_after_its_data(data, name, here):
    (here / "rows").mkdir()
    for folder in (here, here / "rows"):
        (folder / "a.b.jsonl").write_text('{"text": "x", "label": "y"}\n')
    init(data)
    assert load([f"{name}.yaml"]).output_dir == f"runs/{name}"


def test_a_hub_id_with_a_task_needs_no_look_at_its_rows(here):
    init("org/name", "--task", "preference", "--columns", "chosen=good")
    assert load(["name.yaml"]).data.columns == {"chosen": "good"}


@pytest.mark.parametrize("task", FORMATS)
def test_the_name_of_a_task_gives_a_config_to_fill_in(task, here):
    init(task)
    config = load([f"{task}.yaml"])
    assert (config.task, config.data.train) == (task, "train.jsonl")


def test_an_existing_config_is_not_written_over(here):
    (here / "tickets.csv").write_text(TICKETS)
    (here / "tickets.yaml").write_text("mine")
    assert "is there already" in faults_of("tickets.csv")
    assert (here / "tickets.yaml").read_text() == "mine"


def test_the_five_commands_of_the_readme_lead_from_a_csv_file_to_a_model(here, encoder):
    """As they stand there, but for a tiny model, three steps, and no launcher."""
    from peftune.train import main as train

    (here / "tickets.csv").write_text(TICKETS)
    (here / "new.csv").write_text('id,Message\n7,"the screen, again"\n8,the badge works\n')
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Your own data in five commands")[2]
    lines = [shlex.split(line, comments=True) for line in section.split("```")[1].splitlines()[1:]]
    assert [line[1] for line in lines] == ["init", "train", "evaluate", "predict", "export"]
    for _, name, *words in lines:
        extra = {"init": ["--model", encoder], "train": ["train.max_steps=3", "data.max_length=64"]}.get(name, [])
        assert (train([*words, *extra]) if name == "train" else main([name, *words, *extra])) == 0
    predicted = Path("predicted.csv").read_text().splitlines()
    assert predicted[0].startswith("id,prediction,") and [row.partition(",")[0] for row in predicted[1:]] == ["7", "8"]
    exported = json.loads(Path("tickets-model/config.json").read_text())
    assert exported["architectures"] == ["BertForSequenceClassification"]


LLAMAFACTORY = """
{model_name_or_path: m, stage: sft, do_train: true, finetuning_type: lora, lora_rank: 4, lora_target: "q_proj,v_proj",
 dataset: "ours,elsewhere,unknown", template: qwen, max_samples: 9, output_dir: o, report_to: wandb,
 quantization_bit: 4, per_device_train_batch_size: 2, gradient_accumulation_steps: 8, learning_rate: 1.0e-4,
 lr_scheduler_type: polynomial, bf16: true, flash_attn: fa2, packing: true, neat_packing: true,
 deepspeed: ds.json,
 resume_from_checkpoint: null}
"""
AXOLOTL = """
{base_model: m, model_type: LlamaForCausalLM, load_in_8bit: true, adapter: lora, lora_r: 32, lora_alpha: 16,
 lora_target_linear: true, lora_modules_to_save: [lm_head], val_set_size: 0.05, sequence_len: 4096,
 sample_packing: true, datasets: [{path: org/name, name: part, type: alpaca, field_messages: conv},
  {path: json, data_files: [a.json]}],
 micro_batch_size: 2, gradient_accumulation_steps: 4, optimizer: adamw_bnb_8bit, learning_rate: 0.0002, bf16: auto,
 chat_template: chatml, wandb_project: w, evals_per_epoch: 4, rl: dpo, rl_beta: 0.2, tokens: ["<x>"]}
"""


def test_a_config_of_llamafactory_becomes_one_of_ours_and_names_what_does_not(here, capsys):
    (here / "lf.yaml").write_text(LLAMAFACTORY)
    (here / "data").mkdir()
    (here / "data" / "dataset_info.json").write_text(json.dumps(
        {"ours": {"file_name": "a.json", "columns": {"prompt": "q"}, "num_samples": 5},
         "elsewhere": {"hf_hub_url": "org/name", "ms_hub_url": "other/name"}}))
    init("--from-llamafactory", "lf.yaml", "--devices", "4")
    config, left = load(["lf-peftune.yaml"]), capsys.readouterr().out
    assert config.train.batch_size == 2 * 8 * 4 and config.train.learning_rate == 1e-4
    assert (config.train.lr_scheduler, config.train.warmup_ratio) == ("linear", 0.0)
    assert config.adapter.fields == {
        "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
    assert (config.model.quantization, config.model.attention) == ("nf4", "flash_attention_2")
    assert [source.path for source in config.data.train] == ["data/a.json", "org/name", "unknown"]
    assert config.data.train[0].max_rows == 9 and config.data.validation is None and config.data.layout == "packed"
    assert config.log.trackers == ("wandb",)
    for key in ("template: qwen", "dataset: unknown", "lr_scheduler_type: polynomial", "deepspeed: ds.json", "do_train",
                "dataset_info: ours.columns: {'prompt': 'q'}", "dataset_info: ours.num_samples: 5"):
        assert f"not taken over: {key}" in left and f"# not taken over: {key}" in Path("lf-peftune.yaml").read_text()
    assert not any(key in left for key in ("resume_from_checkpoint", "packing", "ms_hub_url"))


def test_a_config_of_axolotl_becomes_one_of_ours_and_names_what_does_not(here, capsys):
    (here / "ax.yml").write_text(AXOLOTL)
    init("--from-axolotl", "ax.yml", "--to", "c.yaml")
    config, left = load(["c.yaml"]), capsys.readouterr().out
    assert (config.task, config.train.batch_size, config.train.dpo_beta) == ("preference", 8, 0.2)
    assert config.adapter.fields["modules_to_save"] == ["lm_head"] and config.adapter.fields["lora_alpha"] == 16
    assert [source.path for source in config.data.train] == ["org/name:part", "a.json"]
    assert (config.data.validation, config.data.max_length, config.data.chat_template) == (0.05, 4096, "chatml")
    assert (config.model.quantization, config.train.optimizer, config.train.num_epochs) == ("int8", "adamw_8bit", 1.0)
    assert all(f"not taken over: {key}" in left for key in (
        "model_type", "evals_per_epoch: 4", "datasets[0].field_messages: conv", "tokens: ['<x>']"))
    (here / "full.yml").write_text("{base_model: m, datasets: [{path: a.jsonl}], lora_r: 8, learning_rate: 1e-5}")
    init("--from-axolotl", "full.yml")
    assert load(["full-peftune.yaml"]).adapter is None
    assert "lora_r: 8  (all weights train, without an adapter)" in capsys.readouterr().out
    (here / "odd.yml").write_text('{base_model: m, lr_scheduler: [a], chat_template_jinja: "{%\\n %}"}')
    init("--from-axolotl", "odd.yml")
    assert "chat_template_jinja: {% %}" in capsys.readouterr().out


def test_what_other_frameworks_learn_and_we_do_not_is_refused(here):
    (here / "kto.yaml").write_text("{model_name_or_path: m, stage: kto}")
    (here / "odd.yaml").write_text("{base_model: m, datasets: [{path: a.jsonl}], learning_rate: quick}")
    (here / "list.yaml").write_text("{base_model: m, datasets: [a.jsonl]}")
    assert "not a config of axolotl" in faults_of("--from-axolotl", "list.yaml")
    (here / "text.yaml").write_text("{model_name_or_path: m, per_device_train_batch_size: many}")
    (here / "data").mkdir()
    (here / "data" / "dataset_info.json").write_text("{")
    assert "not a config of llamafactory" in faults_of("--from-llamafactory", "text.yaml")
    assert "stage: kto is not learned here" in faults_of("--from-llamafactory", "kto.yaml")
    (here / "freeze.yaml").write_text("{model_name_or_path: m, finetuning_type: freeze}")
    assert "finetuning_type: freeze is not learned here" in faults_of("--from-llamafactory", "freeze.yaml")
    assert "train.learning_rate" in faults_of("--from-axolotl", "odd.yaml")
    assert "one thing to begin with" in faults_of("a.csv", "--from-axolotl", "odd.yaml")
    assert "one thing to begin with" in faults_of()
    assert not list(here.glob("*-peftune.yaml"))


def test_the_commands_of_a_name_with_blanks_can_be_copied(here, capsys):
    (here / "my data.csv").write_text(TICKETS)
    init("my data.csv")
    assert "next: peftune check 'my data.yaml', then peftune train 'my data.yaml'" in capsys.readouterr().out
    assert "\n#   peftune train 'my data.yaml'\n" in Path("my data.yaml").read_text()


def test_a_config_of_another_framework_and_no_devices_are_refused_by_their_own_names(here):
    (here / "lf.yaml").write_text("{model_name_or_path: m, dataset: d}")
    assert "not a config of axolotl: base_model is missing" in faults_of("--from-axolotl", "lf.yaml")
    assert "--devices 0" in faults_of("--from-llamafactory", "lf.yaml", "--devices", "0")


@pytest.mark.parametrize("words", ["finetuning_type: freeze", "stage: dpo, pref_loss: orpo"])
def test_no_other_training_is_put_in_the_place_of_one_that_is_not_learned_here(words, here):
    (here / "lf.yaml").write_text(f"{{model_name_or_path: m, dataset: d, {words}}}")
    assert f"{words.rpartition(', ')[2]} is not learned here" in faults_of("--from-llamafactory", "lf.yaml")


def test_numbers_that_suit_no_key_of_ours_are_named_and_the_rest_is_taken_over(here, capsys):
    (here / "ax.yml").write_text("{base_model: m, datasets: [{path: a.jsonl}], max_steps: -1, eval_steps: 0.05, "
                                 "save_total_limit: 0, gradient_checkpointing: unsloth, bf16: false, seed: 3}")
    init("--from-axolotl", "ax.yml", "--to", "c.yaml")
    config, left = load(["c.yaml"]), capsys.readouterr().out
    assert (config.seed, config.model.gradient_checkpointing, config.model.dtype) == (3, True, "float32")
    for said in ("max_steps: -1  (train.max_steps: use more than 0)", "eval_steps: 0.05  (evaluation.every_steps",
                 "save_total_limit: 0  (checkpoint.keep"):
        assert f"not taken over: {said}" in left


def test_columns_that_do_not_suit_a_chosen_task_are_answered_with_another_choice(here):
    (here / "t.csv").write_text("Message,Team\nhello there,a\nbye now,b\nhow are you,a\nso long,b\n")
    said = faults_of("t.csv", "--task", "question_answering")
    assert "Message, Team do not suit the task (question_answering: question, context)" in said
    assert "choose another --task" in said


@pytest.mark.parametrize(("stage", "beta"), [("sft", 0.1), ("dpo", 0.3)])
def test_a_key_of_preferences_is_taken_over_with_preferences_alone(stage, beta, here, capsys):
    (here / "lf.yaml").write_text(f"{{model_name_or_path: m, stage: {stage}, finetuning_type: lora, dataset: d, "
                                  "pref_beta: 0.3}")
    init("--from-llamafactory", "lf.yaml", "--to", "c.yaml")
    assert load(["c.yaml"]).train.dpo_beta == beta
    assert ("not taken over: pref_beta: 0.3" in capsys.readouterr().out) == (stage == "sft")


def test_every_file_and_type_of_axolotls_data_sets_is_taken_over_or_named(here, capsys):
    (here / "ax.yml").write_text(
        "{base_model: m, datasets: [{path: json, data_files: [a.jsonl, b.jsonl], type: completion}, "
        "{path: c.jsonl, type: alpaca}, {path: d.jsonl, type: {field_instruction: q}}], "
        "test_datasets: [{path: e.jsonl, type: alpaca}], wandb_project: mine}")
    init("--from-axolotl", "ax.yml", "--to", "c.yaml")
    config, left = load(["c.yaml"]), capsys.readouterr().out
    assert [source.path for source in config.data.train] == ["a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl"]
    assert [source.path for source in config.data.validation] == ["e.jsonl"]
    assert (config.data.format, config.data.too_long) == ("auto", "truncate")
    for said in ("datasets[0].type: completion", "datasets[2].type: {'field_instruction': 'q'}", "wandb_project: mine"):
        assert f"not taken over: {said}" in left
    assert "datasets[1]" not in left and "test_datasets" not in left


def test_a_fault_of_a_config_that_was_not_written_names_no_line_of_it(here):
    assert faults_of("org/name", "--task", "causal_lm", "--validation", "1.5").startswith("data.validation = 1.5: ")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_tables_of_the_documentation_are_those_of_the_command(dialect):
    page = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8").lower().replace("-", "")
    section = page.partition(f"\n## {dialect}\n")[2].partition("\n## ")[0]
    keys = DIALECTS[dialect].keys
    written = dict(re.findall(r"^\| `(\w+)` \| `([\w.]+)` \|$", section, flags=re.M))
    assert written == {theirs: ours for theirs, ours in keys.items() if theirs != ours}
    assert {ours for ours in keys.values() if not ours.startswith("adapter.")} <= set(key_paths())
