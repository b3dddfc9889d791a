"""Files -> tokenised splits, once: the result is kept under a hash of everything that decides it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from peftune.config.schema import DataConfig, Source
from peftune.data.examples import Example, TargetKind
from peftune.data.formats import Found, canonical_rows
from peftune.data.rows import Row
from peftune.data.sources import MAX_FAULTS, as_sources, fingerprint, read
from peftune.data.splits import split_off
from peftune.data.store import Split, write
from peftune.errors import DataError, Fault, MachineError

SPLITS = ("train", "validation", "test")


class RowFault(ValueError):
    """A row that cannot become an example: what is wrong, and the mend."""

    def __init__(self, message: str, mend: str) -> None:
        super().__init__(message)
        self.message, self.mend = message, mend


@dataclass(frozen=True, slots=True)
class Targets:
    """What there is to predict: the kind of target, and the classes in the order of the model's outputs."""

    problem: str
    """single_label | multi_label | regression | next_token."""
    names: tuple[str, ...] = ()
    kind: TargetKind = "token"

    @property
    def width(self) -> int:
        """K, the number of outputs of a classifier or regressor; 0 for token targets."""
        return 1 if self.problem == "regression" else len(self.names)


@dataclass(frozen=True, slots=True)
class Counts:
    """What became of the rows of a split. rows = kept + dropped_too_long + dropped_no_target."""

    rows: int = 0
    kept: int = 0
    truncated: int = 0
    dropped_too_long: int = 0
    dropped_no_target: int = 0
    tokens: int = 0
    supervised_targets: int = 0
    longest: int = 0


class RowEncoder(Protocol):
    """A task's view of the data, as `tasks/` gives it."""

    @property
    def formats(self) -> tuple[str, ...]:
        """Row formats the task can learn from."""
        ...

    def targets(self, rows: Sequence[Row], config: DataConfig) -> Targets: ...
    def encode(self, row: Row, targets: Targets) -> Example: ...


@dataclass(frozen=True, slots=True)
class Prepared:
    """Tokenised splits, and what is to be said of them."""

    splits: dict[str, Split]
    targets: Targets
    formats: dict[str, str]
    counts: dict[str, Counts]
    fingerprints: dict[str, list[dict[str, Any]]]
    weights: tuple[float, ...]


def needed_sources(config: DataConfig, only: Sequence[str]) -> dict[str, tuple[Source, ...]]:
    """The sources that must be read for the splits `only`, by the split whose files they are."""
    holds_validation = isinstance(config.validation, float) and "validation" in only
    sources = {}
    if "train" in only or holds_validation:
        sources["train"] = as_sources(config.train)
    if "validation" in only and config.validation is not None and not isinstance(config.validation, float):
        sources["validation"] = as_sources(config.validation)
    if "test" in only and config.test is not None:
        sources["test"] = as_sources(config.test)
    return sources


def read_rows(
    config: DataConfig, formats: tuple[str, ...], seed: int, only: Sequence[str] = SPLITS
) -> tuple[dict[str, list[Row]], Found]:
    """All rows by split, held-out part included, and what the reader found.

    Raises:
        DataError: every fault of every file, with its line.
    """
    rows: dict[str, list[Row]] = {}
    found = Found()
    for name, sources in needed_sources(config, only).items():
        rows[name] = []
        for number, source in enumerate(sources):
            try:
                rows[name] += list(canonical_rows(
                    read(source), format=config.format, accepts=formats, columns=config.columns, source=number,
                    first_id=len(rows[name]), found=found))
            except DataError as error:
                found.faults += error.faults
    if found.faults:
        raise DataError(found.faults)
    if isinstance(config.validation, float) and "train" in rows:
        rows["train"], rows["validation"] = split_off(rows["train"], config.validation, seed)
        if not rows["train"]:
            raise DataError(Fault(kind="data", message="data.validation leaves no row to train on",
                                  mend="use a smaller fraction or more rows"))
    return {name: rows[name] for name in SPLITS if name in rows and name in only}, found


def prepare(
    config: DataConfig, encoder: RowEncoder, *, seed: int, identity: Mapping[str, Any], targets: Targets | None = None,
    only: Sequence[str] = SPLITS,
) -> Path:
    """Read, check and tokenise the splits unless that was done before; return the folder that holds them.

    Args:
        config: the data section.
        encoder: how the task reads rows.
        seed: decides the held-out part.
        identity: what else the tokens depend on (task, tokenizer, template, code), as JSON values.
        targets: classes of a model that is already trained; None learns them from the training rows.
        only: the splits that are wanted.

    Raises:
        DataError: every fault found.
        MachineError: the cache folder cannot be written.
    """
    try:
        fingerprints = {name: [fingerprint(source) for source in sources]
                        for name, sources in needed_sources(config, only).items()}
    except DataError:
        read_rows(config, encoder.formats, seed, only)  # says this fault and those of the other files, all at once
        raise
    decides = {"data": config.model_dump(mode="json", exclude={"layout"}), "seed": seed, "identity": dict(identity),
               "content": fingerprints, "targets": targets and asdict(targets), "only": list(only)}
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_root() / key
    if (folder / "meta.json").exists():
        return folder
    rows, found = read_rows(config, encoder.formats, seed, only)
    known = targets or encoder.targets(rows["train"], config)
    return _publish(folder, lambda draft: _fill(draft, rows, encoder, known, config, found, fingerprints))


def open_prepared(folder: Path) -> Prepared:
    """Open what `prepare` left; the data stays on disk."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    targets = Targets(meta["targets"]["problem"], tuple(meta["targets"]["names"]), meta["targets"]["kind"])
    counts = {name: Counts(**values) for name, values in meta["counts"].items()}
    splits = {name: Split(folder / f"{name}.arrow") for name in counts}
    return Prepared(splits, targets, meta["formats"], counts, meta["fingerprints"], tuple(meta["weights"]))


def cache_root() -> Path:
    """Folder of prepared data: PEFTUNE_CACHE, or peftune/ under the user's cache folder."""
    own = os.environ.get("PEFTUNE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(own) if own else Path(base) / "peftune"


def _publish(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Fill a draft beside `folder` and rename it: readers see all of it or nothing."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder.parent))
    except OSError as error:
        raise MachineError(
            Fault(kind="environment", file=str(folder.parent), message=f"the data cache: {error.strerror}",
                  mend="set PEFTUNE_CACHE to a folder that can be written")
        ) from None
    try:
        fill(draft)
        draft.rename(folder)
    except OSError as error:
        if not (folder / "meta.json").exists():  # else another process has published the same data first
            raise MachineError(
                Fault(kind="environment", file=str(folder.parent), message=f"the data cache: {error.strerror}",
                      mend="free disk space, or set PEFTUNE_CACHE to another folder")
            ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _fill(
    draft: Path, rows: Mapping[str, Sequence[Row]], encoder: RowEncoder, targets: Targets, config: DataConfig,
    found: Found, fingerprints: Mapping[str, Any],
) -> None:
    faults: list[Fault] = []
    counts = {}
    for name, several in rows.items():
        tally = dict.fromkeys(asdict(Counts()), 0)
        write(draft / f"{name}.arrow", _encoded(several, encoder, targets, config, tally, faults), targets.kind)
        counts[name] = tally
        if not tally["kept"] and not faults:
            place = several[0].file if several else name
            faults.append(Fault(kind="data", file=place, message=f"no row of the {name} split is left to use",
                                mend="raise data.max_length, or see what was dropped: " + json.dumps(tally)))
    if faults:
        raise DataError(faults)
    meta = {"targets": asdict(targets), "formats": found.formats, "counts": counts, "fingerprints": fingerprints,
            "weights": [source.weight for source in as_sources(config.train)]}
    (draft / "meta.json").write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")


def _encoded(
    rows: Sequence[Row], encoder: RowEncoder, targets: Targets, config: DataConfig, tally: dict[str, int],
    faults: list[Fault],
) -> Iterator[Example]:
    """Encode rows one by one; count what is cut or dropped, collect what is wrong."""
    for row in rows:
        tally["rows"] += 1
        try:
            example = encoder.encode(row, targets)
        except RowFault as error:
            faults.append(Fault(kind="data", file=row.file, line=row.line, message=error.message, mend=error.mend))
            if len(faults) > MAX_FAULTS:
                return
            continue
        tally["longest"] = max(tally["longest"], example.full_length)
        if example.full_length > config.max_length:
            if config.too_long == "error":
                faults.append(Fault(
                    kind="data", file=row.file, line=row.line,
                    message=f"{example.full_length} tokens are more than data.max_length = {config.max_length}",
                    mend=f"data.max_length={example.full_length}, or data.too_long=truncate or drop",
                ))
                continue
            if config.too_long == "drop":
                tally["dropped_too_long"] += 1
                continue
        if example.num_targets == 0:
            tally["dropped_no_target"] += 1
            continue
        tally["truncated"] += example.full_length > config.max_length
        tally["kept"] += 1
        tally["tokens"] += len(example.input_ids)
        tally["supervised_targets"] += example.num_targets
        yield example
