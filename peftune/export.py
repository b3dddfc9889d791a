"""Trained weights -> a folder for others to load, published only if its logits are those of the training."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftune.config.schema import GENERATIVE, ModelConfig, RunConfig
from peftune.data.layouts import lay_out
from peftune.errors import (
    ConfigError,
    ExportError,
    Fault,
    MachineError,
    PeftuneError,
    RunFolderError,
    refuse_odd_name,
)
from peftune.loop.publish import published, read_json, write_json, write_text
from peftune.model.adapters import base_of, has_adapter
from peftune.model.compare import Rows, deviation, largest_logit, made_rows, rounding_tolerance
from peftune.model.export_card import Story, export_card
from peftune.model.folder import own_config
from peftune.model.heads import head_for
from peftune.model.llama_cpp import Converter, convert, find_converter
from peftune.model.merge import Adapter, adapter_of, merge, refuse_unmergeable
from peftune.model.precision import weight_dtype
from peftune.model.quantize import is_quantised, quantised_by
from peftune.model.save import load_trained
from peftune.model.whole import TYPES, copy_adapter, own_dtype, save_tokenizer, save_whole
from peftune.numerics.counted import counted
from peftune.observe.display import Display
from peftune.observe.manifest import environment
from peftune.parallel.world import World
from peftune.reopen import Trained, find_trained, open_split, open_weights

RECORD = "export.json"
EXACT = 1e-4
"""Largest difference of logits between equal weights in float32, for each unit of the largest logit and for one unit at
least: room for sums in another order."""
ROW_TOKENS, ROWS = 2048, 16
"""Bounds on what is compared: enough to see a wrong scale anywhere, little enough for a CPU."""
SPLITS = ("test", "validation")
SIZE = re.compile(r"(?=.*[1-9])[0-9]+(\.[0-9]+)?\s*[KMGT]B", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What `peftune export` was asked for."""

    source: str
    to: str
    config: str | None = None
    merge: bool = False
    into: str = "trained"
    """trained (the base weights as the training held them) | original (as the checkpoint has them)."""
    dtype: str | None = None
    shard_size: str = "5GB"
    tolerance: float | None = None
    """In place of our own for logits of the folder."""
    gguf: bool = False
    llama_cpp: str | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """Two models that must agree, and how far they do."""

    what: str
    deviation: float
    tolerance: float


def export(wanted: Wanted, world: World, display: Display) -> dict[str, Any]:
    """Write the folder and return what its export.json says.

    Raises:
        RunFolderError: the folder is there already, or the run has no weights.
        ConfigError, ModelError, MachineError: what was asked for cannot be done.
        ExportError: the logits differ; nothing is published.
    """
    if world.ranks > 1:
        raise MachineError(Fault(kind="environment", message=f"export runs in one process, not in {world.ranks}",
                                 mend="peftune export ..., without a launcher"))
    refuse_odd_name(wanted.to, "--to")
    if Path(wanted.to).exists() or Path(wanted.to).is_symlink():
        raise RunFolderError(Fault(kind="run_folder", file=wanted.to, mend="give a new folder in --to",
                                   message="is there already; nothing is written over"))
    folder, config = find_trained(wanted.source, wanted.config, needs_data=False)
    adapter = adapter_of(folder)
    _refuse(wanted, config, adapter)
    converter = find_converter(wanted.llama_cpp) if wanted.gguf else None
    try:
        with published(Path(wanted.to)) as draft:
            record = _fill(wanted, folder, config, adapter, draft, converter, world, display)
    except OSError as error:
        raise MachineError(Fault(kind="environment", file=wanted.to, message=f"cannot be written: {error}",
                                 mend="give another --to, or free disk space")) from None
    return record


def _refuse(wanted: Wanted, config: RunConfig, adapter: Adapter | None) -> None:
    def refused(message: str, mend: str) -> ConfigError:
        return ConfigError(Fault(kind="config", message=message, mend=mend))

    if adapter is not None and not wanted.merge:
        if wanted.dtype is not None:
            raise refused("--dtype: an adapter is exported as it is", "add --merge, or leave --dtype out")
        if wanted.gguf:
            raise refused("--gguf: an adapter alone is no model", "add --merge")
    if SIZE.fullmatch(wanted.shard_size) is None:
        raise refused(f"--max-shard-size {wanted.shard_size}: no size of a file",
                      "a number of KB, MB, GB or TB: 500MB, 5GB")
    if wanted.merge and adapter is not None:
        refuse_unmergeable(adapter, wanted.source)
    if wanted.into == "original" and not (wanted.merge and adapter is not None):
        raise refused("--into: nothing is merged here", "add --merge for an adapter, or leave --into out")
    if wanted.gguf and config.task not in GENERATIVE:
        raise refused(f"--gguf: llama.cpp runs no {config.task}", "leave --gguf out")


def _fill(
    wanted: Wanted, folder: str, config: RunConfig, adapter: Adapter | None, draft: Path,
    converter: Converter | None, world: World, display: Display,
) -> dict[str, Any]:
    kind = "model" if adapter is None else "merged" if wanted.merge else "adapter"
    trained = open_weights(folder, config, world, display)
    rows, auto_class = _rows(trained, display), trained.evaluator.task.auto_class
    with display.phase("compare") as notes:
        dtype = _dtype(wanted, trained, adapter)
        source, checks, logits, distance = _write(wanted, trained, adapter, rows, draft, dtype)
        layers = trained.text.config.get_text_config().num_hidden_layers
        quantization = quantised_by(base_of(trained.model))
        trained_with = config.model if kind == "adapter" else config.model.model_copy(update={"quantization": "none"})
        del trained  # one model in memory at a time
        again = _plain(draft, trained_with, auto_class, dtype, world)
        of_folder = rows.logits(again)
        del again
        exact = _exact(logits)
        if wanted.merge or adapter is None:
            checks.append(Check("folder, read again, = what was written, float32", deviation(of_folder, source), exact))
        tolerance = rounding_tolerance(dtype, logits, exact, layers) if kind != "adapter" else exact
        checks.append(Check("folder = trained model", deviation(of_folder, logits),
                            tolerance if wanted.tolerance is None else wanted.tolerance))
        gguf = None if converter is None else _gguf(converter, draft, dtype, rows, of_folder, auto_class, checks)
        notes.append(f"logits of {counted(len(rows.inputs), 'row')} ({rows.origin})")
    record = {
        "published": True, "kind": kind, "source": wanted.source, "weights": folder, "task": config.task,
        "loads_with": head_for(auto_class, own_config(
            str(draft), trust_remote_code=config.model.trust_remote_code)).__name__,
        "base": None if adapter is None else adapter.base,
        "base_revision": None if adapter is None else adapter.revision,
        "method": "full fine-tuning" if adapter is None else adapter.method,
        "merged_into": _said(wanted, config) if kind == "merged" else None,
        "dtype": str(dtype).removeprefix("torch."),
        "rows": {"from": rows.origin, "held_out": rows.held_out, "count": len(rows.inputs)},
        "deviation": max(check.deviation for check in checks if check.what == "folder = trained model"),
        "tolerance": next(check.tolerance for check in checks if check.what == "folder = trained model"),
        "checks": [asdict(check) for check in checks],
        "distance_from_training_precision": distance, "quantization": quantization, "gguf": gguf,
        **environment(world.device),
    }
    _judge(checks, record, display)
    _describe(draft, record, folder, config)
    return record


def _write(
    wanted: Wanted, trained: Trained, adapter: Adapter | None, rows: Rows, draft: Path, dtype: torch.dtype
) -> tuple[list[Tensor], list[Check], list[Tensor], float]:
    """Fill the draft; return the logits of what was written, the checks so far, the trained model's logits in
    float32, and how far these are from those in the training's own precision."""
    model: nn.Module = trained.model
    in_training = rows.logits(model, trained.evaluator.autocast)
    source, settings, auto_class = trained.text.source, trained.config.model, trained.evaluator.task.auto_class
    remote = settings.trust_remote_code
    if adapter is not None and wanted.into == "original":
        model = load_trained(source, auto_class, dtype=own_dtype(adapter, remote), trust_remote_code=remote,
                             device=trained.evaluator.world.device, dequantised=True)
    elif is_quantised(base_of(model)):
        model = _plain(source, settings, auto_class, weight_dtype(settings, adapted=True), trained.evaluator.world)
    plain = model.float()
    attached = rows.logits(plain)
    distance = deviation(in_training, attached)
    save_tokenizer(source, draft, trust_remote_code=remote)
    if adapter is not None and not wanted.merge:
        copy_adapter(Path(source), plain, draft)
        return attached, [], attached, distance
    checks = []
    if has_adapter(plain):
        plain = merge(plain, wanted.source)
        checks.append(Check("merged = attached, float32", deviation(rows.logits(plain), attached), _exact(attached)))
    save_whole(plain, draft, dtype, wanted.shard_size)
    return rows.logits(plain), checks, attached, distance


def _plain(folder: Path | str, settings: ModelConfig, auto_class: Any, dtype: torch.dtype, world: World) -> nn.Module:
    """The folder's model in float32, with the values that quantised weights stand for in plain layers."""
    return load_trained(folder, auto_class, dtype=dtype, trust_remote_code=settings.trust_remote_code,
                        quantization=settings.quantization, device=world.device, dequantised=True).float()


def _exact(logits: list[Tensor]) -> float:
    return EXACT * max(1.0, largest_logit(logits))


def _dtype(wanted: Wanted, trained: Trained, adapter: Adapter | None) -> torch.dtype:
    if wanted.dtype is not None:
        return TYPES[wanted.dtype]
    if adapter is None:
        return trained.text.config.dtype or torch.float32
    if wanted.into == "original":
        return own_dtype(adapter, trained.config.model.trust_remote_code)
    return weight_dtype(trained.config.model, adapted=True)


def _said(wanted: Wanted, config: RunConfig) -> str:
    if wanted.into == "original":
        return "the checkpoint's own weights"
    kind = config.model.quantization
    return ("the weights that the training saw "
            f"({config.model.dtype if kind == 'none' else f'{kind}, each value as it stands for'})")


def _rows(trained: Trained, display: Display) -> Rows:
    """Held-out rows of the run; random tokens where it has none, or its data are gone."""
    evaluator, data = trained.evaluator, trained.config.data
    for name in SPLITS:
        if data.model_dump()[name] is None:
            continue
        try:
            split = open_split(trained, name)
        except PeftuneError as error:
            display.warn(f"rows of {name} cannot be had, random tokens are compared instead: {error.faults[0].message}")
            continue
        inputs: list[dict[str, Any]] = []
        tokens = 0
        for position in range(min(len(split), ROWS)):
            example = split[position]
            if inputs and tokens + len(example.input_ids) > ROW_TOKENS:
                break
            tokens += len(example.input_ids)
            inputs.append(lay_out([example], [0], pad_id=evaluator.tokenizer.pad_token_id, kind=evaluator.targets.kind,
                                  width=evaluator.targets.width, device=torch.device("cpu")).inputs)
        return Rows(inputs, f"{name} rows of the run", True)
    return made_rows(len(trained.text.tokenizer))


def _gguf(
    converter: Converter, draft: Path, dtype: torch.dtype, rows: Rows, of_folder: list[Tensor], auto_class: Any,
    checks: list[Check],
) -> dict[str, Any]:
    """Convert the folder, load the file through transformers and compare it; the file's part of the record."""
    made = convert(converter, draft, str(dtype).removeprefix("torch."))
    again = auto_class.from_pretrained(str(draft), gguf_file=made.name, dtype=torch.float32)
    checks.append(Check("gguf, read by transformers, = folder", deviation(rows.logits(again), of_folder),
                        _exact(of_folder)))
    return {"file": made.name, "converter": str(converter.script), "bytes": made.stat().st_size}


def _judge(checks: list[Check], record: dict[str, Any], display: Display) -> None:
    display.table("logits", ["", "largest deviation", "tolerance"],
                  [[check.what, f"{check.deviation:.3g}", f"{check.tolerance:.3g}"] for check in checks])
    wrong = [check for check in checks if not check.deviation <= check.tolerance]
    if wrong:
        record |= {"published": False}
        raise ExportError([Fault(
            kind="self_check", message=f"{check.what}: logits differ by {check.deviation:.3g} "
            f"(tolerance {check.tolerance:.3g}) on {record['rows']['from']}; nothing was published",
            mend="train the folder's model again if its files were changed; else report this") for check in wrong])


def _describe(draft: Path, record: Mapping[str, Any], folder: str, config: RunConfig) -> None:
    """Model card and export.json."""
    run = Path(folder).parent
    known: dict[str, Any] = {}
    for name in ("summary", "manifest"):
        file = run / f"{name}.json"
        known[name] = read_json(file) if file.is_file() else None
    story = Story(config=config.model_dump(mode="json"), summary=known["summary"], manifest=known["manifest"],
                  best=Path(folder).name == "best")
    write_text(draft / "README.md", export_card(record, story))
    sizes = {str(file.relative_to(draft)): file.stat().st_size for file in sorted(draft.rglob("*")) if file.is_file()}
    write_json(draft / RECORD, {**record, "files": sizes})
