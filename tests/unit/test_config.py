"""The config: what is said of a wrong one, and that a right one is frozen and complete."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from pydantic import ValidationError

from peftune.config.data_rules import EXPECTED_COLUMNS
from peftune.config.document import Document, parse_value
from peftune.config.load import dump, load, validate
from peftune.config.names import FAMILIAR, key_paths, right_spelling
from peftune.config.rules import FORMATS, METRICS, RULES
from peftune.config.schema import RunConfig
from peftune.data.formats import COLUMNS
from peftune.errors import ConfigError

MINIMAL = "task: causal_lm\nmodel: {name_or_path: m}\ndata: {train: t.jsonl}\n"


def config(tmp_path, text=MINIMAL, name="c.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def faults_of(*arguments):
    with pytest.raises(ConfigError) as caught:
        load(list(arguments))
    return caught.value.faults


def test_a_minimal_config_gets_every_default(tmp_path):
    loaded = load([config(tmp_path)])
    assert loaded.train.batch_size == 32
    assert loaded.adapter.fields == {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
    assert loaded.data.validation == 0.1


def test_a_loaded_config_is_frozen(tmp_path):
    with pytest.raises(ValidationError):
        load([config(tmp_path)]).train.batch_size = 1


def test_the_dumped_config_loads_to_an_equal_one(tmp_path):
    first = load([config(tmp_path), "adapter.method=ia3", "data.validation=v.jsonl", "train.learning_rate=3e-5"])
    again = load([config(tmp_path, dump(first), "again.yaml")])
    assert again == first


@example("123e4567")  # a short hash of git
@given(st.text())
def test_any_text_comes_back_from_a_dumped_config(text):
    values = {"task": "causal_lm", "model": {"name_or_path": "m", "revision": text}, "data": {"train": "t"}}
    first = validate(Document(values))
    assert validate(Document(parse_value(dump(first)))) == first


def test_all_faults_are_said_at_once_with_their_lines(tmp_path):
    text = "task: causal_lm\nmodel:\n  name_or_path: m\n  dtype: float16\ndata: {train: t}\ntrain:\n  lerning_rate: 1\n"
    faults = faults_of(config(tmp_path, text), "seed=-1")
    assert {(fault.line, fault.message.split(" ")[0]) for fault in faults} == {
        (4, "model.dtype"), (7, "unknown"), (None, "seed")}
    assert all(fault.mend for fault in faults)


@pytest.mark.parametrize(("key", "right"), [
    ("train.lerning_rate=1", "train.learning_rate"),
    ("trian.learning_rate=1", "did you mean train?"),
    ("learning_rate=1", "train.learning_rate"),
    ("per_device_train_batch_size=1", "train.batch_size"),
    ("train.gradient_accumulation_steps=1", "train.batch_size"),
    ("lora_r=8", "adapter.r"),
    ("adapter.lora_r=8", "adapter.r"),
    ("lora_dropout=0.1", "adapter.lora_dropout"),
    ("train.lora_alpha=8", "adapter.lora_alpha"),
    ("train.num_processes=8", "peftune train --processes N"),
    ("model.load_in_4bit=true", "model.quantization=nf4"),
    ("data.max_seq_length=8", "data.max_length"),
    ("train.sequence_parallel_size=2", "--sequence-parallel N"),
])
def test_a_wrong_key_gets_the_right_spelling(tmp_path, key, right):
    assert any(right in fault.mend for fault in faults_of(config(tmp_path), key))


@pytest.mark.parametrize(("override", "said"), [
    ("data.train=[]", "empty"), ("data.validation=[]", "empty"), ("data.test=''", "empty"), ("output_dir=''", "empty"),
    ("train.batch_size=true", "use another value than true or false"), ("log=null", "a section of"),
    ("seed=true", "use another value than true or false"), ("log.trackers=tensorboard", "use a list"),
    ("data.labels=[yes]", "labels[0] = True: wrong type use a text: YAML takes this for one in quotes alone"),
    ("output_dir=2024-01-01", "in quotes alone"), ("data.columns=[a]", "a section of"),
    ("train=null", "train = None: nothing leave it out, or use a section of"),
    ("train.batch_size=abc", "use a whole number"), ("data.train=null", "use a text or a list")])
def test_a_value_of_another_kind_is_refused_in_plain_words(tmp_path, override, said):
    (fault,) = faults_of(config(tmp_path), override)
    assert said in f"{fault.message} {fault.mend}" and override.partition("=")[0] in fault.message


@pytest.mark.parametrize(("source", "said"), [
    ("{path: a.jsonl, weight: 0}", "data.train[0].weight = 0: out of range"),
    ("{path: a.jsonl, wieght: 2}", "unknown key data.train[0].wieght"),
    ("{weight: 2}", "data.train[0].path is missing")])
def test_a_fault_inside_a_list_of_sources_is_said_once_and_where_it_is(source, said, tmp_path):
    assert [fault.message for fault in faults_of(config(tmp_path), f"data.train=[{source}]")] == [said]


def test_a_broken_rule_says_the_value_as_a_config_has_it(tmp_path):
    (fault,) = faults_of(config(tmp_path), "data.train=[{path: a.jsonl, shuffle_buffer: 5}]")
    assert fault.message.startswith("data.train = [{'path': 'a.jsonl', 'shuffle_buffer': 5}]: shuffle_buffer is for")
    (fault,) = faults_of(config(tmp_path), "adapter.init_lora_weights=loftq")
    assert fault.message.startswith("model.quantization = 'none': LoftQ")


def test_an_override_that_yaml_cannot_read_is_read_when_it_is_quoted_as_the_mend_says(tmp_path):
    (fault,) = faults_of(config(tmp_path), "data.train=*.jsonl")
    assert fault.mend.endswith("data.train='...'\"")
    assert load([config(tmp_path), "data.train='*.jsonl'"]).data.train == "*.jsonl"


def test_numbers_with_a_leading_zero_are_decimal_and_times_of_day_are_texts(tmp_path):
    assert load([config(tmp_path), "seed=010", "train.batch_size=0x10", "output_dir=1:30"]).model_dump(
        include={"seed": True, "output_dir": True, "train": {"batch_size"}}) == {
            "seed": 10, "output_dir": "1:30", "train": {"batch_size": 16}}
    assert "use 3h55m" in faults_of(config(tmp_path, MINIMAL + "deadline: 1:30:00\n"))[0].mend


def test_a_base_on_the_command_line_is_told_its_place(tmp_path):
    assert "write base: b.yaml into the config" in faults_of(config(tmp_path), "base=b.yaml")[0].mend


def test_switches_stay_switches(tmp_path):
    loaded = load([config(tmp_path), "model.gradient_checkpointing=true", "checkpoint.asynchronous=false"])
    assert loaded.model.gradient_checkpointing is True and loaded.checkpoint.asynchronous is False


def test_every_familiar_name_points_to_a_key_that_exists():
    known = {*key_paths(), *(f"adapter.{name}" for name in LoraConfig.__dataclass_fields__)}
    for name, text in FAMILIAR.items():
        assert text.startswith("nothing") or any(key in text for key in known), name
        assert right_spelling(name).startswith("write"), name


def test_a_base_is_inherited_and_overridden_and_an_override_wins(tmp_path):
    config(tmp_path, MINIMAL + "seed: 1\ntrain: {batch_size: 4, num_epochs: 9}\n", "base.yaml")
    child = config(tmp_path, "base: base.yaml\ntrain: {batch_size: 8}\n", "child.yaml")
    loaded = load([child, "seed=5"])
    assert (loaded.train.batch_size, loaded.train.num_epochs, loaded.seed) == (8, 9.0, 5)


def test_a_base_that_leads_back_to_itself_is_a_fault(tmp_path):
    config(tmp_path, "base: b.yaml\n", "a.yaml")
    config(tmp_path, "base: a.yaml\n", "b.yaml")
    assert "leads back" in faults_of(str(tmp_path / "a.yaml"))[0].message


def test_another_adapter_method_does_not_inherit_the_fields_of_lora(tmp_path):
    config(tmp_path, MINIMAL + "adapter: {r: 4, lora_alpha: 8}\n", "base.yaml")
    loaded = load([config(tmp_path, "base: base.yaml\n", "child.yaml"), "adapter.method=ia3"])
    assert loaded.adapter.fields == {}


def test_a_method_is_the_same_in_capitals(tmp_path):
    config(tmp_path, MINIMAL + "adapter: {method: lora, use_dora: true}\n", "base.yaml")
    loaded = load([config(tmp_path, "base: base.yaml\nadapter: {method: LoRA}\n", "child.yaml")])
    assert loaded.adapter == load([str(tmp_path / "base.yaml")]).adapter and loaded.adapter.fields["r"] == 16
    assert "write adapter.r" in faults_of(config(tmp_path), "adapter={method: LORA, lora_r: 4}")[0].mend


@pytest.mark.parametrize("words", [("adapter.method=ia3", "adapter.target_modules=[q_proj]"),
                                   ("adapter.target_modules=[q_proj]", "adapter.method=ia3")])
def test_the_order_of_overrides_drops_no_field_of_an_adapter(words, tmp_path):
    assert load([config(tmp_path), *words]).adapter.fields == {"target_modules": ["q_proj"]}


def test_a_base_that_comes_by_a_merge_of_yaml_is_followed(tmp_path):
    config(tmp_path, MINIMAL + "seed: 1\n", "base.yaml")
    assert load([config(tmp_path, "<<: {base: base.yaml}\noutput_dir: x\n", "child.yaml")]).seed == 1


@pytest.mark.parametrize(("text", "said"), [
    ("task: [", "YAML"), ("", "empty"), ("# nothing\n", "empty"),
    ("- 1\n", "mapping"), ("task: a\ntask: b\n", "twice"), ("a: &x [*x]\n", "YAML"),
    ("x: !!python/object/apply:os.system ['true']\n", "YAML"),
])
def test_a_broken_file_is_one_clear_fault(tmp_path, text, said):
    assert said in faults_of(config(tmp_path, text))[0].message


def test_a_missing_file_names_those_that_are_there(tmp_path):
    config(tmp_path)
    assert "c.yaml" in faults_of(str(tmp_path / "d.yaml"))[0].mend


def test_a_number_with_an_exponent_is_a_number(tmp_path):
    assert load([config(tmp_path), "train.learning_rate=2e-4"]).train.learning_rate == 2e-4


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.key}: {rule.why[:30]}")
def test_every_rule_can_be_broken_and_says_the_mend(rule, tmp_path):
    breaking = [
        ["model.quantization=nf4", "adapter=null"], ["adapter.init_lora_weights=loftq"],
        ["model.quantization=int8", "model.compile=true"],
        ["data.layout=packed", "model.compile=true"], ["data.layout=packed", "model.attention=eager"],
        ["task=sequence_classification", "data.format=text"], ["task=preference", "data.too_long=split"],
        ["task=sequence_classification", "data.train_on=all"], ["task=question_answering", "data.doc_stride=512"],
        ["data.train=[{path: a/b, shuffle_buffer: 9}]"], ["model.pure_bf16=true", "model.dtype=float32"],
        ["data.validation=1.5"], ["data.validation=null", "evaluation.patience=1"], ["evaluation.metric=foo"],
        ["evaluation.metric=rouge_l", "evaluation.max_new_tokens=0"],
        ["train.lora_plus_ratio=4", "adapter.method=ia3"], ["train.optimizer=sgd", "adapter.method=adalora"],
        ["model.gradient_checkpointing=true", "adapter.method=prefix_tuning"],
        ["model.gradient_checkpointing=true", "adapter.alora_invocation_tokens=[5]"],
        ["data.columns={txt: text}"], ["data.validation=[{path: v.jsonl, weight: 5}]"],
        ["data.test=[{path: v.jsonl, weight: 5}]"], ["task=causal_lm", "data.labels=[a, b]"],
        ["task=sequence_classification", "data.labels=[a, a]"],
        ["task=causal_lm", "data.problem_type=regression"],
        ["task=sequence_classification", "data.chat_template=none.jinja"],
        ["task=causal_lm", "data.subtokens=all", "data.doc_stride=64", "train.dpo_beta=0.5", "evaluation.n_best=5",
         "evaluation.max_answer_tokens=5", "evaluation.no_answer_threshold=1"],
    ]
    said = [fault for overrides in breaking for fault in faults_of(config(tmp_path), *overrides)]
    assert any(rule.why in fault.message and fault.mend == rule.mend for fault in said)


@pytest.mark.parametrize("labels", ["[]", "[a, '']", "[a, ' ']", "[a, b, a]"])
def test_classes_without_a_name_of_their_own_are_refused_where_they_stand(labels, tmp_path):
    (fault,) = faults_of(config(tmp_path), "task=sequence_classification", f"data.labels={labels}")
    assert fault.message.startswith("data.labels = ") and "a name of its own" in fault.message


@pytest.mark.parametrize(("key", "mend"), [
    ("paht", r"did you mean data\.train\[0\]\.path\?"),
    ("name", r"the keys here are data\.train\[0\]\.path, .*\.max_rows$"),
])
def test_a_wrong_key_of_a_source_is_answered_with_those_of_sources(key, mend, tmp_path):
    faults = faults_of(config(tmp_path), f"data.train=[{{path: a.jsonl, {key}: 1}}]")
    assert len(faults) == 1 and re.match(mend, faults[0].mend), faults[0].mend


def test_every_column_that_a_format_needs_may_be_renamed():
    for task, formats in FORMATS.items():
        assert {column for name in formats for column in COLUMNS[name]} <= set(EXPECTED_COLUMNS[task])


def test_a_column_that_no_format_reads_is_refused_among_the_renames(tmp_path):
    (fault,) = faults_of(config(tmp_path), "task=token_classification", "data.columns={tags: x}")
    assert fault.message.startswith("data.columns") and "ner_tags" in fault.mend


def test_the_metrics_named_in_the_rules_are_those_the_tasks_give():
    from peftune.config.schema import EvaluationConfig, TrainConfig
    from peftune.data.targets import Targets
    from peftune.tasks import TASKS

    problems = {"sequence_classification": ("single_label", "multi_label", "regression"),
                "question_answering": ("answer", "answer_or_none")}
    for name, make in TASKS.items():
        task = make(TrainConfig(), EvaluationConfig())
        given = {metric for problem in problems.get(name, ("",)) for metric in task.metric_names(Targets(problem))}
        assert given == set(METRICS[name]) and task.formats == FORMATS[name]


def test_the_schema_describes_every_key():
    schema = RunConfig.model_json_schema()
    for section in [schema, *schema["$defs"].values()]:
        assert all("description" in value or "$ref" in str(value) for value in section["properties"].values())


def test_reading_a_config_imports_no_torch():
    code = "import sys, peftune.config.load, peftune.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


keys = st.sampled_from([*key_paths(), "foo", "lr", "", "0"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=5)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(keys, values, max_size=6))
def test_no_config_whatever_makes_a_traceback(entries):
    tree = yaml.safe_load(MINIMAL)
    for path, value in entries.items():
        node = tree
        *parents, leaf = path.split(".")
        for part in parents:
            if not isinstance(node.get(part), dict):
                node[part] = {}
            node = node[part]
        node[leaf] = value
    try:
        validate(Document(tree))
    except ConfigError as error:
        assert str(error)
