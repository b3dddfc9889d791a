"""The house itself: rooms, names, budgets, public surface, configs."""

import ast
import re
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from benchmarks.launches import Run, launched_together
from peftune.config.load import dump, load
from peftune.config.names import key_paths
from peftune.suites import BENCHMARKS
from tests.conftest import ROOT

PACKAGE = ROOT / "peftune"
FILES = sorted(PACKAGE.rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))

PUBLIC_KEYS = """
task output_dir seed resume model model.name_or_path model.revision model.dtype model.pure_bf16 model.quantization
model.attention model.added_tokens model.added_special_tokens model.dropout model.gradient_checkpointing model.compile
model.reuse_frozen_layers model.trust_remote_code adapter adapter.method adapter.init_from adapter.stack_on data
data.train data.validation data.test data.format data.columns data.labels data.problem_type data.max_length
data.on_bad_row data.doc_stride
data.subtokens data.too_long data.layout data.train_on data.chat_template train train.batch_size
train.tokens_per_micro_batch train.num_epochs train.max_steps train.learning_rate train.lora_plus_ratio
train.lr_scheduler train.warmup_ratio train.optimizer train.weight_decay train.max_grad_norm train.max_skipped_steps
train.dpo_beta evaluation evaluation.every_steps evaluation.metric evaluation.patience evaluation.max_new_tokens
evaluation.n_best evaluation.max_answer_tokens evaluation.no_answer_threshold checkpoint checkpoint.every_steps
checkpoint.keep log log.every_steps log.trackers deadline hang_timeout
checkpoint.asynchronous
"""

COMMANDS = ["init", "train", "check", "plan", "evaluate", "predict", "export", "chat", "report", "bench", "launch",
            "schema"]


def test_imports_point_one_way_and_each_library_has_its_room():
    done = subprocess.run([Path(sys.executable).parent / "lint-imports"], cwd=ROOT, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stdout


def test_nothing_directly_under_the_package_bears_the_name_of_an_importable_module():
    ours = {path.stem for path in PACKAGE.iterdir() if path.name != "py.typed"} - {"__init__", "__pycache__"}
    installed = set(metadata.packages_distributions()) - {"peftune"}
    famous = {"evaluate", "datasets", "tokenizers", "types", "logging", "profile", "trl", "optimum", "torch", "wandb"}
    assert not ours & (sys.stdlib_module_names | installed | famous)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_and_its_functions_keep_their_budgets(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 300
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, f"{path.name}:{node.lineno} {node.name}"
        assert not isinstance(node, ast.Global)
    assert "utils" not in path.stem
    assert ast.get_docstring(tree), "a file says its reason to exist"


def test_the_loop_and_the_step_fit_on_a_screen():
    for name, function in (("fit", "fit"), ("step", "train_step")):
        tree = ast.parse((PACKAGE / "loop" / f"{name}.py").read_text())
        node = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function)
        body = node.body[1:]  # without the docstring
        assert body[-1].end_lineno - body[0].lineno < 40


def test_dynamic_attribute_tests_are_few_and_each_says_why():
    uses = [line for path in FILES for line in path.read_text(encoding="utf-8").splitlines()
            if re.search(r"\b(getattr|hasattr)\(", line)]
    assert len(uses) <= 10
    assert all("#" in line for line in uses), [line for line in uses if "#" not in line]


def test_public_functions_have_docstrings():
    missing = []
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if (isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
                    and not ast.get_docstring(node)):
                missing.append(f"{path.name}:{node.name}")
    assert not missing


def test_the_keys_of_the_config_are_these():
    assert set(key_paths()) == set(PUBLIC_KEYS.split())


def test_the_commands_are_these():
    done = subprocess.run([sys.executable, "-m", "peftune", "--help"], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    assert re.findall(r"^    (\w+) ", done.stdout, flags=re.M) == COMMANDS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_loads_and_its_dump_is_the_same_config(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load([str(path)])
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load([str(tmp_path / "again.yaml")]) == config


@pytest.fixture(scope="module")
def configs_ran(tmp_path_factory, encoder, decoder):
    """How each config ends, all in one launch: the quickstart with its own model, others with a tiny one for the
    hub's."""
    folder, runs = tmp_path_factory.mktemp("configs"), []
    for path in CONFIGS:
        words, config = [str(path), f"output_dir={folder / path.stem}", "train.max_steps=3"], load([str(path)])
        if not config.model.name_or_path.startswith("package:"):
            tiny = decoder if config.task in ("causal_lm", "preference") else encoder
            words += [f"model.name_or_path={tiny}", "data.max_length=128", "evaluation.max_new_tokens=4"]
        runs.append(Run(words))
    ended = launched_together("single", 1, runs, folder / "logs", limit_s=300)
    return {path: (folder / path.stem, done) for path, done in zip(CONFIGS, ended, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_runs(path, configs_ran):
    folder, done = configs_ran[path]
    assert done.returncode == 0, done.stderr
    assert (folder / "summary.json").is_file()


def test_the_readme_names_every_config_and_every_command():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(path.name in readme for path in CONFIGS)
    assert all(f"peftune {word}" in readme for word in COMMANDS)


@pytest.mark.parametrize("suite", BENCHMARKS)
def test_every_suite_of_bench_is_there_and_says_its_options(suite, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{suite}.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(f"benchmarks.{suite}", run_name="__main__")
    assert not stopped.value.code and "usage" in capsys.readouterr().out
