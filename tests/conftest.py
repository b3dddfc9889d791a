"""Fixtures: tiny real models, small data files, and runs of the real commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftune.parallel.launcher import free_port
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
PUBLIC_DATA = Path(os.environ.get("PEFTUNE_PUBLIC_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["PEFTUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # DeepSpeed's kernels are compiled once a session: what a killed build elsewhere left behind stays elsewhere
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a two-layer Llama with its tokenizer."""
    return tiny.save_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a two-layer BERT with its tokenizer and no head."""
    return tiny.save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[[str, Iterable[Any]], str]:
    """Write records as JSON Lines and return the path."""

    def write(name: str, rows: Iterable[Any]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def intents(write_rows: Callable[..., str]) -> dict[str, str]:
    """40 training rows of two classes and 9 validation rows."""
    rows = tiny.intent_rows(49)
    return {"train": write_rows("train.jsonl", rows[:40]), "validation": write_rows("validation.jsonl", rows[40:])}


@pytest.fixture
def chats(write_rows: Callable[..., str]) -> dict[str, str]:
    """24 training conversations with very unequal answers, and 5 to validate."""
    rows = tiny.chat_rows(29)
    return {"train": write_rows("train.jsonl", rows[:24]), "validation": write_rows("validation.jsonl", rows[24:])}


@pytest.fixture
def classify(encoder: str, intents: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    """Settings of a short float32 classification run."""
    return {
        "task": "sequence_classification", "output_dir": str(tmp_path / "run"),
        "model": {"name_or_path": encoder, "dtype": "float32"}, "adapter": {"method": "lora", "r": 4},
        "data": {**intents, "max_length": 64},
        "train": {"batch_size": 8, "max_steps": 6, "learning_rate": 0.003},
        "evaluation": {"every_steps": 3}, "checkpoint": {"every_steps": 2}, "log": {"every_steps": 1, "trackers": []},
    }


@pytest.fixture
def converse(classify: dict[str, Any], decoder: str, chats: dict[str, str]) -> dict[str, Any]:
    """Settings of a short float32 supervised causal_lm run."""
    return {**classify, "task": "causal_lm", "model": {"name_or_path": decoder, "dtype": "float32"},
            "data": {**chats, "max_length": 128}, "evaluation": {"every_steps": 3, "max_new_tokens": 4}}


def _settings_of(base: dict[str, Any], task: str, model: str, rows: list[Any], train: int,
                 write_rows: Callable[..., str], max_length: int) -> dict[str, Any]:
    data = {"train": write_rows(f"{task}-train.jsonl", rows[:train]), "max_length": max_length,
            "validation": write_rows(f"{task}-validation.jsonl", rows[train:])}
    return {**base, "task": task, "model": {"name_or_path": model, "dtype": "float32"}, "data": data}


@pytest.fixture
def tag(classify: dict[str, Any], encoder: str, write_rows: Callable[..., str]) -> dict[str, Any]:
    """Settings of a short float32 token_classification run."""
    return _settings_of(classify, "token_classification", encoder, tiny.tagged_rows(49), 40, write_rows, 64)


@pytest.fixture
def answer(classify: dict[str, Any], encoder: str, write_rows: Callable[..., str]) -> dict[str, Any]:
    """Settings of a short float32 question_answering run with contexts of several windows, some without an answer."""
    settings = _settings_of(classify, "question_answering", encoder, tiny.question_rows(49, unanswerable=True), 40,
                            write_rows, 48)
    return {**settings, "data": {**settings["data"], "doc_stride": 16}}


@pytest.fixture
def prefer(classify: dict[str, Any], decoder: str, write_rows: Callable[..., str]) -> dict[str, Any]:
    """Settings of a short float32 preference run."""
    return _settings_of(classify, "preference", decoder, tiny.preference_rows(31), 24, write_rows, 128)


EVERY_TASK = ("classify", "tag", "answer", "converse", "prefer")


def mostly_slow(cases: Iterable[Any], *fast: Any) -> list[Any]:
    """All of the cases for `parametrize`; those that are not named run with the slow tests."""
    return [case if case in fast else
            pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases]


def write_config(settings: dict[str, Any], folder: Path) -> Path:
    path = folder / "config.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Path]:
    """Train in this process; return the run folder."""
    from peftune.train import main

    def run(settings: dict[str, Any], *overrides: str, name: str | None = None) -> Path:
        folder = tmp_path / name if name else Path(settings["output_dir"])
        config = write_config({**settings, "output_dir": str(folder)}, tmp_path / "configs" / (name or "run"))
        assert main([str(config), *overrides]) == 0
        return folder

    return run


@pytest.fixture
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command of ours in a new process, from the root of the checkout."""

    def run(*words: object, env: dict[str, str] | None = None, timeout: float = 240,
            cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=timeout,
                              cwd=cwd, env={**os.environ, **(env or {})})

    return run


@pytest.fixture
def launch(command: Callable[..., Any]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Train through the real `accelerate launch`."""

    def run(config: Path, *overrides: str, processes: int = 1, **others: Any) -> subprocess.CompletedProcess[str]:
        preset = "single" if processes == 1 else "ddp-cpu"
        return command("-m", "accelerate.commands.accelerate_cli", "launch", "--config_file",
                       ROOT / "launch" / "accelerate" / f"{preset}.yaml", "--num_processes", processes,
                       "--main_process_port", free_port(), ROOT / "peftune" / "train.py", config, *overrides,
                       env={"ACCELERATE_USE_CPU": "true"} if processes > 1 else None, **others)

    return run


def training_processes(folder: Path) -> list[int]:
    """Process ids, lowest first, of those that run train.py with something below a folder among their words."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = line.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(ROOT / "peftune" / "train.py").encode() in words[1:3] and any(str(folder).encode() in w for w in words):
            found.append(int(line.parent.name))
    return sorted(found)


def metric_rows(folder: Path, split: str | None = None) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if split is None or row["split"] == split]


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def public_data(name: str) -> Path:
    """A folder of the public data sets, or skip."""
    folder = PUBLIC_DATA / name
    if not folder.is_dir():
        pytest.skip(f"needs the public data set {name}: set PEFTUNE_PUBLIC_DATA")
    return folder
