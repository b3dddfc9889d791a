"""The same from Python: a config, a run, its scores and predictions as plain objects. `from peftune import ...`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftune.config.document import Document
from peftune.config.load import load, validate
from peftune.config.schema import RunConfig
from peftune.errors import ConfigError, DataError, Fault
from peftune.observe.json_lines import read_json_lines

if TYPE_CHECKING:  # torch comes with it, and a config can be made without
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from peftune.reopen import Trained

__all__ = ["FinishedRun", "RunConfig", "configure", "fine_tune", "open_run"]


def configure(settings: str | os.PathLike[str] | Mapping[str, Any], *overrides: str) -> RunConfig:
    """A checked config from a YAML file, or from its content as nested dicts.

    Args:
        settings: the file, or the values.
        overrides: `key=value` words, as on the command line; for files only, since a dict holds what it shall.

    Raises:
        ConfigError: with every fault of it.
        TypeError: overrides that are no words, or beside a dict.
    """
    for override in overrides:
        if not isinstance(override, str):
            raise TypeError(f"configure: {override!r} is no override: give key=value words, such as "
                            'configure("tickets.yaml", "train.batch_size=4", "seed=1")')
    if isinstance(settings, Mapping):
        if overrides:
            raise TypeError("key=value words override a file; write into the dict what it shall hold")
        return validate(Document(json.loads(json.dumps(settings, default=os.fspath))))
    return load([os.fspath(settings), *overrides])


def fine_tune(config: RunConfig) -> FinishedRun:
    """Train, evaluate and save, in this process, on one device. A run that is done is not done again.

    After an interruption (Ctrl-C, or the stop button of a notebook) the same call goes on from the newest checkpoint.

    Raises:
        PeftuneError: whatever can be mended; `faults` says what and how.
        TypeError: what is given is no config.
    """
    if not isinstance(config, RunConfig):
        given = repr(os.fspath(config)) if isinstance(config, str | os.PathLike) else "..."
        raise TypeError(f"fine_tune takes a config, not {type(config).__name__}: configure makes one of a YAML file or "
                        f"of a dict, fine_tune(configure({given}))")
    from peftune.parallel.stop import Stop
    from peftune.train import train

    checked = validate(Document(config.model_dump(mode="json")))  # one that was made by hand has met no rules
    train(checked, Stop())
    return FinishedRun(Path(checked.output_dir))


def open_run(folder: str | os.PathLike[str]) -> FinishedRun:
    """A run that was trained before. Raises RunFolderError where there is none."""
    from peftune.reopen import find_trained

    find_trained(os.fspath(folder), None)
    return FinishedRun(Path(folder))


@dataclass(frozen=True)
class FinishedRun:
    """A run folder. The model is loaded when it is first needed, and kept."""

    folder: Path

    @property
    def summary(self) -> dict[str, Any]:
        """What summary.json says: scores with intervals, the untrained model's, speed, memory."""
        found: dict[str, Any] = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
        return found

    @property
    def log(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl: the curves."""
        return read_json_lines(self.folder / "metrics.jsonl")

    @cached_property
    def _trained(self) -> Trained:
        from peftune.reopen import open_trained, opened

        with opened(only_json=False) as (world, display):
            return open_trained(str(self.folder), None, world, display)

    @property
    def model(self) -> nn.Module:
        """The trained model, in evaluation mode: a transformers model, or peft's around one."""
        return self._trained.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer, with the chat template of the training."""
        return self._trained.text.tokenizer

    def evaluate(self, split: str | None = None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Metrics with intervals on a split, and one record an example.

        Args:
            split: train, validation or test. None: test, or validation where the config has no test.

        Raises:
            ConfigError: there is no such split, or the config has none of that name.
            DataError: faults in its rows, or rows among them that the run has learned from.
        """
        if split not in (None, "train", "validation", "test"):
            raise ConfigError(Fault(kind="config", message=f"evaluate: no split is called {split!r}",
                                    mend='evaluate("train"), "validation" or "test"'))
        from peftune.loop.finish import shown
        from peftune.reopen import held_out, score

        scored = score(self._trained, split or held_out(self._trained.config))
        return dict(scored.metrics), [shown(record) for record in scored.records]

    def predict(self, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """One record a row: its id, the prediction, and what belongs to it. Rows are as in training, without answers.

        Raises:
            DataError: rows that cannot be predicted from, by their number, from 1.
        """
        from peftune.data.rows import RawRow
        from peftune.loop.finish import shown
        from peftune.reopen import predict_rows

        rows = list(rows)
        wrong = [Fault(kind="data", file="rows", line=number, message=f"a row is a dict, not {type(row).__name__}",
                       mend="a list of rows as in training, such as [{'text': ...}]")
                 for number, row in enumerate(rows, start=1) if not isinstance(row, Mapping)]
        if wrong:
            raise DataError(wrong)
        raws = [RawRow(row, "rows", number) for number, row in enumerate(rows, start=1)]
        return [shown(record) for record in predict_rows(self._trained, raws)]
