"""Finished runs and bare models become objects again, to be scored or used."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftune.config.load import load
from peftune.config.schema import ModelConfig, RunConfig
from peftune.data.prepare import open_prepared, prepare
from peftune.data.rows import RawRow
from peftune.data.sources import as_sources, fingerprint, read_records
from peftune.data.store import MemorySplit, Split
from peftune.data.targets import Targets
from peftune.errors import ConfigError, DataError, Fault, ModelError, RunFolderError
from peftune.loop.checkpoint import is_checkpoint, load_weights_of, run_of, what_has_weights
from peftune.loop.evaluate import Evaluator, Scored, evaluate, predict
from peftune.loop.layout import choose_layout
from peftune.loop.publish import read_json
from peftune.loop.road import road_notes
from peftune.model.adapters import has_adapter, virtual_tokens_of
from peftune.model.folder import ADAPTER, holds_weights
from peftune.model.load import PROBLEM_TYPES
from peftune.model.next_token import end_in_losses
from peftune.model.precision import DTYPES, autocast, weight_dtype
from peftune.model.quantize import require_bitsandbytes
from peftune.model.reference import Reference, reference_of
from peftune.model.resolve import load_model_config, resolve
from peftune.model.save import load_trained
from peftune.observe.display import Display
from peftune.parallel.names import refuse_divided_sequences
from peftune.parallel.world import World, opened_world
from peftune.tasks import TASKS
from peftune.tasks.prompts import prompts_of
from peftune.tasks.task import Record, Task
from peftune.tasks.text import Text, data_warnings, open_text, quiet_libraries
from peftune.tasks.token_classification import scheme_of


@dataclass(frozen=True, slots=True)
class Trained:
    """A model with everything that scoring and predicting need."""

    config: RunConfig
    model: nn.Module
    text: Text
    evaluator: Evaluator


@contextlib.contextmanager
def opened(*, only_json: bool) -> Iterator[tuple[World, Display]]:
    """The processes of a command, until it ends, and what it tells a person: on standard error beside a JSON object."""
    refuse_divided_sequences()
    with opened_world() as world:
        yield world, Display(quiet=not world.is_main, stream=sys.stderr if only_json else None)


def held_out(config: RunConfig) -> str:
    """The split that scores are of where nobody names one: test, or validation where the config has no test."""
    return "validation" if config.data.test is None else "test"


def open_trained(path: str, config_path: str | None, world: World, display: Display) -> Trained:
    """Open a run folder (its final/), a folder of weights inside one (best/, a checkpoint), or a bare model with a
    config.

    Raises:
        RunFolderError: a run that has no final/ yet, or a checkpoint that cannot be put into a published model.
        ConfigError: a bare model without a config.
        ModelError: weights that cannot be loaded, or a classifier without classes.
    """
    folder = Path(path)
    if not is_checkpoint(folder):
        return open_weights(*find_trained(path, config_path), world, display)
    run = run_of(folder)
    published = [run / name for name in ("final", "best") if holds_weights(run / name)]
    if not published:
        raise RunFolderError(Fault(
            kind="run_folder", file=path, message=f"a checkpoint is read into a published model, and {run} has neither "
            "final/ nor best/", mend="let the run finish: start it again and it continues"))
    trained = open_weights(*find_trained(str(published[0]), config_path), world, display)
    load_weights_of(folder, trained.model, published[0])
    display.say(f"with the weights of {folder}")
    return trained


def open_weights(folder: str, config: RunConfig, world: World, display: Display) -> Trained:
    """Open what `find_trained` has found. Raises ModelError, as `open_trained`."""
    quiet_libraries()
    task = TASKS[config.task](config.train, config.evaluation)
    with display.phase("model") as notes:
        chosen = _as_trained(config.model, folder)
        text = open_text(task, chosen, config.data, trained=True)
        adapted = (Path(text.source) / ADAPTER).is_file()
        model = load_trained(Path(text.source) if Path(text.source).is_dir() else text.source, task.auto_class,
                             dtype=weight_dtype(config.model, adapted=adapted), revision=chosen.revision,
                             **_loading(config, world)).to(world.device).eval()
        text = text.behind(virtual_tokens_of(model))
        notes.append(str(folder))
        if task.next_token:
            end_in_losses(model)
            notes += road_notes(config.model, model, text.config, world=world, divided=False)
    reference = _reference(config, model, task, world) if task.needs_reference else None
    precision, pad_id = autocast(config.model, world.device), text.tokenizer.pad_token_id
    layout, _ = choose_layout("padded", config.model, model, model.config, pooled=task.pooled, pad_id=pad_id,
                              longest=config.data.max_length, autocast=precision, world=world)
    evaluator = Evaluator(
        task, _targets(text, config.task, Path(folder)), text.tokenizer, world, precision,
        config.evaluation.max_new_tokens, reference, display.progress, layout=layout, warn=display.warn_once)
    return Trained(config, model, text, evaluator)


def _as_trained(model: ModelConfig, folder: str) -> ModelConfig:
    """The model section for a folder of trained weights, whose tokenizer has the added tokens already; or for the hub's
    model that the config names itself."""
    return model.model_copy(update={"name_or_path": folder, "added_tokens": (), "added_special_tokens": (),
                                    "revision": model.revision if folder == model.name_or_path else None})


def score(trained: Trained, split: str) -> Scored:
    """Metrics with intervals on a split that the config names.

    Raises:
        ConfigError: the config names no such split.
        DataError: faults in its rows, or rows among them that the run has learned from.
    """
    trained.evaluator.world.on_main(lambda: _refuse_learned(trained, split))
    return evaluate(trained.evaluator, trained.model, open_split(trained, split), name=split, intervals=True,
                    generate=True)


def _refuse_learned(trained: Trained, split: str) -> None:
    """Rows that are cut from the run's training files are those it held out only while nothing of that changes."""
    config, run = trained.config, Path(trained.text.source).parent
    if split != "validation" or not isinstance(config.data.validation, float) or not (run / "manifest.json").is_file():
        return
    known = read_json(run / "manifest.json").get("data", {}).get("fingerprints", {})
    before, own = known.get("train", []), load([str(run / "config.yaml")])
    now = [fingerprint(source) for source in as_sources(config.data.train)]
    shared = [file for source in now for file in source["content"] if any(file in old["content"] for old in before)]
    if not shared or (before == now and (own.seed, own.data.validation) == (config.seed, config.data.validation)):
        return
    why = "the seed or the fraction is another" if before == now else "these have changed since"
    raise DataError(Fault(
        kind="data", file=shared[0], message=f"data.validation = {config.data.validation} is cut from the training "
        f"data, and {why}: rows that the run has learned from would be scored",
        mend=f"what {run / 'config.yaml'} says with the files as they were, or --config CONFIG.yaml whose "
        "data.validation names a file of rows that the run has not seen"))


def open_split(trained: Trained, split: str) -> Split:
    """The tokenised examples of a split that the config names. Raises as `score`."""
    config = trained.config
    if config.data.model_dump()[split] is None:
        raise ConfigError(Fault(kind="config", message=f"the config has no data.{split}",
                                mend=f"--split validation, or --config with data.{split}"))
    path = trained.evaluator.world.on_main(lambda: prepare(
        config.data, trained.text.encoder, seed=config.seed, identity=trained.text.identity(),
        targets=trained.evaluator.targets, only=(split,)))
    prepared = open_prepared(path)
    for said in data_warnings(prepared):
        trained.evaluator.warn(said)
    return prepared.splits[split]


def predict_file(name: str, config_path: str | None, path: str, world: World, display: Display) -> list[Record]:
    """Predictions for the records of a file, in its order, with each record's own `id` or its row number. The file is
    read before the model.

    Raises:
        DataError: no such file, or records that cannot be predicted from, with their lines.
        RunFolderError, ConfigError: as `open_trained`.
    """
    rows = read_records(path)
    trained = open_trained(name, config_path, world, display)
    with display.phase("predict"):
        return predict_rows(trained, rows)


def predict_rows(trained: Trained, rows: Iterable[RawRow]) -> list[Record]:
    """The same for records that are read already."""
    text, evaluator = trained.text.encoder, trained.evaluator
    examples = prompts_of(rows, text, trained.config.data.columns)
    if cut := sum(example.full_length > text.max_length for example in examples):
        end = "beginning" if evaluator.task.generates else "end"
        evaluator.warn(f"{cut:,} of {len(examples):,} records lose their {end}, over {text.max_length:,} tokens")
    return predict(evaluator, trained.model, MemorySplit(examples), name="predict", generate=True, scored=False)


def find_trained(name: str, config_path: str | None, *, needs_data: bool = True) -> tuple[str, RunConfig]:
    """The folder of weights (or hub id) that a name stands for, and the config it goes with.

    Without `needs_data`, a bare folder needs no config: one is made from what its files say, which names no data.

    Raises:
        RunFolderError, ConfigError: as `open_trained`.
        ModelError: the files do not say for which task the model is.
    """
    path = Path(name)
    if is_checkpoint(path):
        raise RunFolderError(Fault(
            kind="run_folder", file=name, message="is a checkpoint, which only evaluate, without --tasks, and predict "
            "can read", mend=f"give {run_of(path)}"))
    for run, weights in ((path, path / "final"), (path.parent, path)):
        if (run / "config.yaml").is_file() and (run / "manifest.json").is_file():
            if not holds_weights(weights):
                raise RunFolderError(Fault(kind="run_folder", file=str(run), mend=what_has_weights(run),
                                           message=f"no trained weights in {weights.name}/"))
            return str(weights), load([config_path or str(run / "config.yaml")])
    if config_path is None and not needs_data:
        return name, _config_of_folder(name)
    if config_path is None:
        raise ConfigError(Fault(kind="config", message=f"{name} is no run folder; a bare model needs a config",
                                mend="--config CONFIG.yaml, with the task and the data"))
    return name, load([config_path])


HEADS = {"SequenceClassification": "sequence_classification", "TokenClassification": "token_classification",
         "QuestionAnswering": "question_answering", "CausalLM": "causal_lm", "LMHeadModel": "causal_lm"}
"""End of an architecture's name -> task."""


def _config_of_folder(name: str) -> RunConfig:
    """A config for a model of which only the files are known."""
    model = ModelConfig(name_or_path=name)
    known = load_model_config(model, resolve(model, trained=True))
    found = [task for end, task in HEADS.items() if str((known.architectures or [""])[0]).endswith(end)]
    if not found:
        raise ModelError(Fault(kind="model", file=name, message="config.json names no architecture of a task: "
                               f"{known.architectures}", mend="--config CONFIG.yaml, with the task"))
    dtype = "bfloat16" if known.dtype == torch.bfloat16 else "float32"
    return RunConfig.model_validate({"task": found[0], "model": {"name_or_path": name, "dtype": dtype},
                                     "data": {"train": name, "validation": None}})


def _loading(config: RunConfig, world: World) -> dict[str, Any]:
    """How the run that trained the weights loaded its own."""
    if config.model.quantization != "none":
        require_bitsandbytes(f"model.quantization = {config.model.quantization!r}")
    return {"trust_remote_code": config.model.trust_remote_code, "quantization": config.model.quantization,
            "device": world.device}


def _reference(config: RunConfig, model: nn.Module, task: Task, world: World) -> Reference:
    """What a preference run compares with: its adapter off, or the model it began from."""
    if has_adapter(model):
        return reference_of(model)
    base = load_trained(resolve(config.model), task.auto_class, revision=config.model.revision,
                        dtype=DTYPES[config.model.dtype], **_loading(config, world))
    end_in_losses(base)
    return reference_of(base.to(world.device).requires_grad_(False).eval())


def _targets(text: Text, task: str, folder: Path) -> Targets:
    """Classes and kind of label, from the trained model's own config; what that cannot say from the run's manifest."""
    if task == "causal_lm":
        return Targets("next_token")
    if task == "preference":
        return Targets("preference", kind="pair")
    head = {"sequence_classification": "SequenceClassification", "token_classification": "TokenClassification",
            "question_answering": "QuestionAnswering"}[task]
    architectures: list[Any] = text.config.architectures or []
    if not any(head in str(name) for name in architectures):
        raise ModelError(Fault(kind="model", file=text.source, message=f"has no trained output layer for {task}",
                               mend="train it first, or give a model that has one"))
    if task == "question_answering":
        manifest = folder.parent / "manifest.json"
        known = read_json(manifest) if manifest.is_file() else {}
        return Targets(known.get("data", {}).get("problem", "answer_or_none"))
    names = tuple(text.config.id2label[k] for k in sorted(text.config.id2label))
    if task == "token_classification":
        return Targets(scheme_of(names), names)
    problems = {theirs: ours for ours, theirs in PROBLEM_TYPES.items()}
    problem = problems.get(text.config.problem_type or "", "single_label" if len(names) > 1 else "regression")
    if problem == "regression":
        return Targets(problem, kind="values")
    return Targets(problem, names, "class" if problem == "single_label" else "values")
