"""Files -> tokenised splits, once: the result is kept under a hash of everything that decides it."""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peftune.config.schema import DataConfig
from peftune.data import cache
from peftune.data.findings import Finding, Place
from peftune.data.formats import Found
from peftune.data.rows import Faults
from peftune.data.sources import as_sources, fingerprint
from peftune.data.spool import SPLITS, Progress, Spool, needed_sources, spool_rows
from peftune.data.store import Split
from peftune.data.survey import Survey
from peftune.data.targets import Targets
from peftune.data.tokenise import Counts, Outcome, RowEncoder, Work, longest, tokenise
from peftune.errors import DataError, Fault

LOOKED_AT = 200
"""Rows of a split whose tokens are turned back into text."""
MAY_DIFFER = {"layout", "on_bad_row"}
"""Keys of the data section that change no example."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Tokenised splits, and what is to be said of them."""

    splits: dict[str, Split]
    targets: Targets
    formats: dict[str, str]
    counts: dict[str, Counts]
    fingerprints: dict[str, list[dict[str, Any]]]
    weights: tuple[float, ...]
    faults: tuple[Fault, ...]
    """Bad rows that were left out; the first of them."""
    findings: tuple[Finding, ...]
    """What looks wrong in the good ones."""

    @property
    def longest(self) -> int:
        """Tokens of the longest example of any split."""
        return max(int(split.lengths.max(initial=0)) for split in self.splits.values())


def prepare(
    config: DataConfig, encoder: RowEncoder, *, seed: int, identity: Mapping[str, Any], targets: Targets | None = None,
    only: Sequence[str] = SPLITS, inspect: bool = False, progress: Progress = lambda what, done, total: None,
) -> Path:
    """Read, check and tokenise the splits unless that was done before; return the folder that holds them.

    Args:
        config: the data section.
        encoder: how the task reads rows.
        seed: decides the held-out part.
        identity: what else the tokens depend on (task, tokenizer, template, code), as JSON values.
        targets: classes of a model that is already trained; None learns them from the training rows.
        only: the splits that are wanted.
        inspect: go on past bad rows whatever `on_bad_row` says, so that all there is to say is found.
        progress: told how many rows are read, and how much is tokenised where that takes several processes.

    Raises:
        DataError: bad rows where they are errors; sources that cannot be read; a split without any good row.
        MachineError: the cache folder cannot be written.
    """
    try:
        fingerprints = {name: [fingerprint(source) for source in sources]
                        for name, sources in needed_sources(config, only).items()}
    except DataError:
        row_faults(config, encoder.formats, seed, only)  # raises this fault along with those of the other files
        raise
    decides = {"data": config.model_dump(mode="json", exclude=MAY_DIFFER), "seed": seed, "identity": dict(identity),
               "content": fingerprints, "targets": targets and asdict(targets), "only": list(only)}
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache.root() / key
    if not cache.is_whole(folder):
        stops = config.on_bad_row == "error" and not inspect
        cache.publish(folder, lambda draft: _fill(
            draft, config, encoder, seed, targets, only, fingerprints, stops, progress))
    if config.on_bad_row == "error" and not inspect:
        faults = _meta(folder)["faults"]
        if faults:
            raise DataError([Fault(**fault) for fault in faults])
    return folder


def row_faults(config: DataConfig, formats: tuple[str, ...], seed: int, only: Sequence[str] = SPLITS) -> list[Fault]:
    """Bad rows, as far as they can be told without a tokenizer. Raises DataError where a source cannot be read."""
    with tempfile.TemporaryDirectory() as scratch:
        return spool_rows(config, formats, seed, only, Path(scratch))[1].faults.kept


def open_prepared(folder: Path) -> Prepared:
    """Open what `prepare` left; the data stays on disk."""
    meta = _meta(folder)
    targets = Targets(meta["targets"]["problem"], tuple(meta["targets"]["names"]), meta["targets"]["kind"])
    counts = {name: Counts(**values) for name, values in meta["counts"].items()}
    splits = {name: Split(sorted(folder.glob(f"{name}-*.arrow")), targets.kind) for name in counts}
    findings = tuple(Finding(**{**finding, "places": tuple(Place(**place) for place in finding["places"])})
                     for finding in meta["findings"])
    return Prepared(splits, targets, meta["formats"], counts, meta["fingerprints"], tuple(meta["weights"]),
                    tuple(Fault(**fault) for fault in meta["faults"]), findings)


def _meta(folder: Path) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return meta


def _fill(
    draft: Path, config: DataConfig, encoder: RowEncoder, seed: int, targets: Targets | None, only: Sequence[str],
    fingerprints: Mapping[str, Any], stops: bool, progress: Progress,
) -> None:
    spools, found = spool_rows(config, encoder.formats, seed, only, draft, progress)
    if found.faults.count and stops:
        raise DataError(found.faults.kept)
    for name, spool in spools.items():
        if not spool.rows:
            raise DataError([*found.faults.kept, _without_rows(name, spools, config)])
    known = targets or encoder.targets(spools["train"].read(), config)
    survey = Survey(encoder.surveyed_as, scores=known.problem == "regression")
    doubts: list[Finding] = []

    def look_over() -> None:
        for name, spool in spools.items():
            for row in spool.read():
                survey.add(name, row)
            doubts.extend(_doubts(name, spool, encoder))

    works = [Work(name, spool, encoder, known, config, draft) for name, spool in spools.items()]
    outcomes = tokenise(works, look_over if set(only) == set(SPLITS) else lambda: None, progress)
    faults = found.faults
    for name, outcome in outcomes.items():
        faults.add_all(outcome.faults.kept)
        outcome.counts.rows += spools[name].bad
        outcome.counts.bad += spools[name].bad
        if not outcome.counts.kept and not faults.count:
            raise DataError(_empty(name, f"no row is left to use: {_told(outcome.counts)}", config))
        spools[name].path.unlink()
    findings = [*survey.findings(), *doubts, *(finding for name, outcome in outcomes.items()
                                      for finding in _length_findings(name, outcome, config))]
    if any(not outcome.counts.kept for outcome in outcomes.values()):
        raise DataError(faults.kept)
    _write_meta(draft, known, found, faults, findings, outcomes, fingerprints, config)


def _write_meta(
    draft: Path, targets: Targets, found: Found, faults: Faults, findings: Sequence[Finding],
    outcomes: Mapping[str, Outcome], fingerprints: Mapping[str, Any], config: DataConfig,
) -> None:
    meta = {
        "targets": asdict(targets), "formats": found.formats, "fingerprints": fingerprints,
        "counts": {name: asdict(outcome.counts) for name, outcome in outcomes.items()},
        "weights": [source.weight for source in as_sources(config.train)],
        "faults": [asdict(fault) for fault in faults.kept], "findings": [asdict(finding) for finding in findings],
    }
    (draft / "meta.json").write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")


DOUBTS = {
    "round_trip": ("do not come back from their tokens",
                   "give the tokenizer's own chat template, or a tokenizer that knows these characters"),
    "joined_tokens": ("begin their completion inside a token of the prompt: `peftune predict` reads another prompt",
                      "end prompts without a blank, and begin completions with it"),
}


def _doubts(name: str, spool: Spool, encoder: RowEncoder) -> Iterator[Finding]:
    """Rows among the first whose tokens may not say what they say: the same fault is in the others."""
    found = [(row, encoder.doubt(row)) for row in itertools.islice(spool.read(), LOOKED_AT)]
    for kind, (message, mend) in DOUBTS.items():
        places = tuple(Place(row.file, row.line, why.message) for row, why in found if why and why.kind == kind)
        if places:
            yield Finding(kind, name, f"{len(places)} of the first {len(found)} rows of {name} {message}", mend,
                          len(places), places)


def _length_findings(name: str, outcome: Outcome, config: DataConfig) -> Iterator[Finding]:
    counts = outcome.counts
    too_long = counts.truncated + counts.dropped_too_long
    if too_long:
        verb = "dropped" if config.too_long == "drop" else "cut"
        yield Finding("too_long", name, f"{too_long:,} of {counts.rows:,} rows of {name} are too long and were {verb}",
                      f"raise data.max_length (the longest has {counts.longest:,} tokens), or delete them", too_long,
                      tuple(place for _, place in longest(outcome.too_long)))
    if counts.dropped_no_target:
        yield Finding("no_target", name, f"{counts.dropped_no_target:,} of {counts.rows:,} rows of {name} were "
                      "dropped: nothing of them is to be learned", "raise data.max_length, or look at data.train_on",
                      counts.dropped_no_target, tuple(outcome.no_target))


def _without_rows(name: str, spools: Mapping[str, Spool], config: DataConfig) -> Fault:
    held = spools["validation"].rows if "validation" in spools else 0
    if name == "train" and isinstance(config.validation, float) and held:
        return Fault(kind="data", file=as_sources(config.train)[0].path, mend="add rows that differ, or "
                     "data.validation=null", message=f"data.validation = {config.validation} holds out all {held:,} "
                     "rows: equal ones stay together")
    return _empty(name, "the split has no good row", config)


def _empty(name: str, why: str, config: DataConfig) -> Fault:
    sources = needed_sources(config, (name,))
    given = sources.get(name) or as_sources(config.train)  # a held-out part lies in the files of train
    return Fault(kind="data", file=given[0].path, message=f"{name}: {why}",
                 mend="mend or add rows, or raise data.max_length if they were dropped for their length")


def _told(counts: Counts) -> str:
    return ", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in asdict(counts).items() if number)
