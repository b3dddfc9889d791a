"""Hostile folders: checkpoints, adapters, models and runs, spoilt, and opened as commands do."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.fuzz_spoil import Spoil, spoil
from peftune.config.load import dump, load
from peftune.config.schema import AdapterConfig, DataConfig, EvaluationConfig, ModelConfig, TrainConfig
from peftune.loop.checkpoint import load_checkpoint
from peftune.loop.optimizer import build_optimizer
from peftune.loop.resume import find_start
from peftune.model.assemble import assemble
from peftune.observe.display import Display
from peftune.parallel.single import Single
from peftune.parallel.world import World
from peftune.reopen import open_trained
from peftune.tasks import TASKS
from peftune.tasks.text import open_text
from tests import tiny

WORLD = World(0, 1, 0, torch.device("cpu"), None)


@dataclass(frozen=True, slots=True)
class Places:
    """Where the unspoilt folders lie."""

    models: Path
    run: Path


def make_places(folder: Path) -> Places:
    """Tiny models and a finished run with checkpoints."""
    from peftune.train import main

    models = folder / "models"
    tiny.save_decoder(models / "decoder")
    tiny.save_encoder(models / "encoder")
    rows = folder / "train.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tiny.chat_rows(16)))
    run = folder / "run"
    settings = {
        "task": "causal_lm",
        "output_dir": str(run),
        "model": {"name_or_path": str(models / "decoder"), "dtype": "float32"},
        "adapter": {"r": 2, "target_modules": ["q_proj"]},
        "data": {"train": str(rows), "max_length": 64},
        "train": {"batch_size": 4, "max_steps": 4, "learning_rate": 0.001},
        "checkpoint": {"every_steps": 2},
        "evaluation": {"max_new_tokens": 0},
        "log": {"every_steps": 1, "trackers": []},
    }
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    assert main([str(config)]) == 0
    return Places(models, run)


@functools.cache
def _model(decoder: str) -> tuple[Any, Any]:
    text = _text(decoder)
    model = _assembled(decoder, AdapterConfig.model_validate({"r": 2, "target_modules": ["q_proj"]}), text)
    return model, text


def _text(name: str) -> Any:
    return open_text(
        TASKS["causal_lm"](TrainConfig(), EvaluationConfig()),
        ModelConfig(name_or_path=name, dtype="float32"),
        DataConfig(train="x", max_length=64),
    )


def _assembled(name: str, adapter: AdapterConfig | None, text: Any) -> Any:
    config = ModelConfig(name_or_path=name, dtype="float32")
    return assemble(
        config,
        adapter,
        text.source,
        text.config,
        text.encoder.task.auto_class,
        task="causal_lm",
        new_head=False,
        seed=0,
    )[0]


def act_on_checkpoint(spoilt: tuple[list[Spoil], bool], folder: Path, places: Places) -> None:
    """Find where the run stands, and load the checkpoint."""
    run = folder / "run"
    shutil.copytree(places.run, run)
    (run / "summary.json").unlink()
    own = dump(load([str(places.run / "config.yaml"), f"output_dir={run}"]))
    fingerprints = json.loads((places.run / "manifest.json").read_text())["data"]["fingerprints"]
    for checkpoint in sorted((run / "checkpoints").iterdir())[-1:] if spoilt[1] else [run]:
        spoil(checkpoint, spoilt)
    start = find_start(run, own, "auto", fingerprints)
    if start.checkpoint is not None:
        model, _ = _model(str(places.models / "decoder"))
        optimizer = build_optimizer(model, TrainConfig())
        load_checkpoint(start.checkpoint, model, optimizer, Single(WORLD))


def act_on_adapter(spoilt: tuple[list[Spoil], bool], folder: Path, places: Places) -> None:
    """Train it on, or lay it beneath another."""
    final = folder / "final"
    shutil.copytree(places.run / "final", final)
    spoil(final, spoilt)
    key = "init_from" if spoilt[1] else "stack_on"
    decoder = str(places.models / "decoder")
    fields = {"target_modules": ["v_proj"], "r": 2} if key == "stack_on" else {}
    _assembled(decoder, AdapterConfig.model_validate({key: str(final), **fields}), _text(decoder))


def act_on_trained(spoilt: tuple[list[Spoil], bool], folder: Path, places: Places) -> None:
    """Open it as `peftune evaluate` and `peftune predict` do."""
    run = folder / "run"
    shutil.copytree(places.run, run, ignore=shutil.ignore_patterns("checkpoints", "best"))
    spoil(run if spoilt[1] else run / "final", spoilt)
    open_trained(str(run), None, WORLD, Display(quiet=True))


def act_on_model(spoilt: tuple[list[Spoil], bool], folder: Path, places: Places) -> None:
    """Begin a run from it."""
    model = folder / "model"
    shutil.copytree(places.models / "decoder", model)
    spoil(model, spoilt)
    _assembled(str(model), None, _text(str(model)))
