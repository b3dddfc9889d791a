"""Rows that say what an earlier row says: exactly, by hashes of their texts; nearly, by MinHash over their words."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash, RMinHashLSH

from peftune.data.canonical import class_names

THRESHOLD = 0.75
"""Smallest Jaccard similarity of two near duplicates. One changed word in the midst of 11 is 0.75, of 100 is 0.97."""
SHORT_SHINGLES, SHORT_THRESHOLD = 19, 0.85
"""The same for rows of fewer words than 10, which have 19 shingles: there a single word makes another row. A word more
at the end of 7 is 0.87."""
PART_THRESHOLD = 0.5
"""The same for each part (prompt, answer; text, second text) alone: two questions on one long text are two rows."""
FEWEST_WORDS = 6
"""Shorter rows are not compared: short utterances resemble each other without harm."""

RUN_WORDS = 8
"""So many words in a row that many rows share are a template, not what a row says."""
TEMPLATE_SHARE = 0.05
TEMPLATE_ROWS = 20
"""A run of words is a template if this share of a batch, and at least so many of its rows, hold it."""

PERMUTATIONS, BANDS = 120, 24
"""24 bands of 5 hashes: a pair at similarity s is met with chance 1 - (1 - s^5)^24; 0.9985 at 0.75, 0.9999 at 0.8.

Source: Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4."""
SEED = 1
MOST_CANDIDATES = 256
"""A row is compared with so many earlier rows at most. One that meets more is not indexed: its like are there."""
SHOWN_CHARACTERS = 60
MOST_CHARACTERS = 200_000
"""Of a longer part the beginning is compared."""
PARTS = 4
"""A row has at most so many parts; the number of the part is in the low bits of a feature."""

Features = NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class View:
    """A row as it is compared.

    Texts are compared in Unicode's composed form (NFC), with each run of white space as one blank, and none at the
    ends.
    """

    whole: int
    """Hash of all fields, case kept: equal for exact duplicates."""
    input: int
    """Hash of what the model is given, case folded; of the whole row for generation and preference."""
    label: str | None
    """What the input is taught to mean, where two meanings contradict each other: a class, the tags, or the answers."""
    parts: tuple[str, ...]
    """The texts in which near duplicates resemble each other, each to its counterpart."""
    context: str
    """Rows are near duplicates within one context only: of squad the passage with the answers, else empty."""
    shown: str
    """The beginning of the text that tells the row from others, for people."""


def view(kind: str, fields: Mapping[str, Any]) -> View:
    """The view of a row's canonical fields. `kind` is as for `Survey`."""
    tidied = _tidy(fields)
    given, label, parts, context, shown = _VIEWS[kind](tidied)
    cut = shown if len(shown) <= SHOWN_CHARACTERS else shown[:SHOWN_CHARACTERS - 1] + "…"
    return View(hash_of(tidied), hash_of(given, fold=True), label, parts, context, cut)


def hash_of(value: Any, *, fold: bool = False) -> int:
    """64 bits of BLAKE2 over the value's JSON; `fold` makes upper and lower case equal."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b((text.casefold() if fold else text).encode(), digest_size=8).digest())


def _tidy(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(unicodedata.normalize("NFC", value).split())
    if isinstance(value, Mapping):
        return {key: _tidy(member) for key, member in value.items()}
    return [_tidy(member) for member in value] if isinstance(value, list | tuple) else value


_Pieces = tuple[Any, str | None, tuple[str, ...], str, str]
"""Input, label, parts, context and shown text of a row."""


def _classification(fields: Mapping[str, Any]) -> _Pieces:
    text, pair = fields["text"], fields.get("text_pair")
    parts = (text, pair) if pair else (text,)
    return [text, pair or ""], ", ".join(sorted(class_names(fields["label"]))), parts, "", text


def _ner(fields: Mapping[str, Any]) -> _Pieces:
    text = " ".join(fields["tokens"])
    return fields["tokens"], " ".join(map(str, fields["tags"])), (text,), "", text


def _squad(fields: Mapping[str, Any]) -> _Pieces:
    question, context = fields["question"], fields["context"]
    answers = sorted({answer["text"].casefold() for answer in fields["answers"]})
    place = f"{hash_of([context, answers], fold=True):x}"
    return [question, context], " | ".join(answers), (question,), place, question


def _generation(fields: Mapping[str, Any]) -> _Pieces:
    if "messages" in fields:
        turns = fields["messages"]
        last = max((n for n, turn in enumerate(turns) if turn["role"] == "assistant"), default=len(turns))
        said = [_said(turn) for turn in turns]
        shown = next((turn["content"] for turn in reversed(turns[:last]) if turn["role"] == "user"), " ".join(said))
        return fields, None, (" ".join(said[:last]), " ".join(said[last:])), "", shown
    if "prompt" in fields:
        return fields, None, (fields["prompt"], fields["completion"]), "", fields["prompt"] or fields["completion"]
    return fields, None, (fields["text"],), "", fields["text"]


def _preference(fields: Mapping[str, Any]) -> _Pieces:
    turns = fields.get("messages") or [{"role": "user", "content": fields.get("prompt", "")}]
    prompt = " ".join(map(_said, turns))
    chosen, rejected = (said if isinstance(said, str) else " ".join(map(_said, said))
                        for said in (fields["chosen"], fields["rejected"]))
    return fields, None, (prompt, chosen, rejected), "", turns[-1]["content"] or chosen


def _said(turn: Mapping[str, Any]) -> str:
    calls = turn.get("tool_calls")
    return f"{turn['content']} {json.dumps(calls, default=str)}" if calls else str(turn["content"])


_VIEWS: dict[str, Callable[[Mapping[str, Any]], _Pieces]] = {
    "classification": _classification,
    "ner": _ner,
    "squad": _squad,
    "preference": _preference,
    "generation": _generation,
}

_ALONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Scripts written without blanks between words: each character counts as a word."""
_BETWEEN = r"\s!-/:-@\[-`{-~\u00a1-\u00bf\u2000-\u206f\u3000-\u303f\uff01-\uff0f"
"""White space and punctuation."""
_WORD = re.compile(f"[{_ALONE}]|[^{_BETWEEN}{_ALONE}]+")

Words = list[list[str]]
"""The words of a row, by part."""


def words_of(parts: Sequence[str]) -> Words:
    """Words of each part, in lower case and without punctuation."""
    return [_WORD.findall(part[:MOST_CHARACTERS].casefold()) for part in parts]


class Templates:
    """Runs of words that many rows share, such as an instruction that is put before every text."""

    def __init__(self) -> None:
        self._known: set[int] = set()

    def strip(self, rows: Sequence[Words]) -> list[Words]:
        """Learn the templates of these rows, and return their words without those of any template known by now."""
        counts = Counter(run for words in rows for run in {run for part in words for run in _runs(part)})
        least = max(TEMPLATE_ROWS, TEMPLATE_SHARE * len(rows))
        self._known.update(run for run, rows_with in counts.items() if rows_with >= least)
        return [[self._without(part) for part in words] for words in rows] if self._known else list(rows)

    def _without(self, part: list[str]) -> list[str]:
        covered = {word for start, run in enumerate(_runs(part)) if run in self._known
                   for word in range(start, start + RUN_WORDS)}
        return [word for number, word in enumerate(part) if number not in covered] if covered else part


def _runs(part: list[str]) -> list[int]:
    return [hash(tuple(part[start:start + RUN_WORDS])) for start in range(len(part) - RUN_WORDS + 1)]


@dataclass(frozen=True, slots=True)
class Match:
    """An earlier row, by its number, and its Jaccard similarity."""

    row: int
    similarity: float


class NearIndex:
    """Finds rows whose words and pairs of neighbouring words are nearly those of an earlier row.

    Similarity is the Jaccard index |A and B| / |A or B| of the two sets. MinHash (Broder, 1997) proposes pairs, and
    each is verified on the sets, which are kept as 32-bit hashes. Templates are left out of them.
    """

    def __init__(self) -> None:
        self._index = RMinHashLSH(THRESHOLD, PERMUTATIONS, BANDS)
        self._kept: dict[int, Features] = {}
        self._templates = Templates()
        self.rows = 0
        """Rows that were offered for comparison and indexing."""
        self.features = 0
        """Hashes held in memory, 4 bytes each."""
        self.crowded = 0
        """Rows that met too many earlier ones to be compared with all of them."""

    def match(self, rows: Sequence[tuple[int, View]], *, index: bool = True) -> list[list[Match]]:
        """The earlier rows that each row nearly repeats, in their order.

        Args:
            rows: numbers, rising from call to call, and views.
            index: whether later rows are to be compared with these.
        """
        stripped = self._templates.strip([words_of(row.parts) for _, row in rows])
        long_enough = [n for n, words in enumerate(stripped) if sum(map(len, words)) >= FEWEST_WORDS]
        found: list[list[Match]] = [[] for _ in rows]
        if not long_enough:
            return found
        texts = [_shingles(stripped[n], rows[n][1].context) for n in long_enough]
        sketches = RMinHash.from_token_sets(texts, PERMUTATIONS, SEED)
        features = _features(texts, [stripped[n] for n in long_enough])
        numbers = [rows[n][0] for n in long_enough]
        if index:
            self._index.insert_pairs(list(zip(numbers, sketches)))
            self._kept.update(zip(numbers, features))
            self.rows += len(numbers)
            self.features += sum(map(len, features))
        for n, number, own, near in zip(long_enough, numbers, features, self._index.query_all(sketches)):
            earlier = sorted(row for row in near if row < number)
            found[n] = self._verified(own, earlier[:MOST_CANDIDATES])
            if len(earlier) > MOST_CANDIDATES:
                self.crowded += 1
                self._forget(number)
        return found

    def _verified(self, own: Features, earlier: list[int]) -> list[Match]:
        rows = [row for row in earlier if row in self._kept]
        if not rows:
            return []
        others = [self._kept[row] for row in rows]
        return [Match(row, value) for row, other, value in zip(rows, others, similarities(own, others))
                if value >= (THRESHOLD if min(len(own), len(other)) >= SHORT_SHINGLES else SHORT_THRESHOLD)]

    def _forget(self, number: int) -> None:
        if number in self._kept:
            self._index.remove(number)
            self.features -= len(self._kept.pop(number))


def _shingles(words: Words, context: str) -> list[str]:
    """Words and pairs of neighbouring words, with the number of their part in front, and the context."""
    return [f"{part}{context} {shingle}" for part, known in enumerate(words)
            for shingle in (*known, *(f"{first} {second}" for first, second in pairwise(known)))]


def _features(texts: Sequence[list[str]], rows: Sequence[Words]) -> list[Features]:
    """The set of 32-bit hashes of each row's shingles, sorted; the low two bits hold the number of the part."""
    features = []
    for hashes, words in zip(RMinHash.hash_token_sets(texts), rows):
        parts = np.repeat(np.arange(len(words), dtype=np.uint64), [max(0, 2 * len(part) - 1) for part in words])
        features.append(np.unique((np.array(hashes, np.uint64) >> 32) // PARTS * PARTS + parts).astype(np.uint32))
    return features


def similarities(own: Features, others: Sequence[Features]) -> list[float]:
    """Jaccard index of a set with each of the others; 0.0 where some part alone falls below PART_THRESHOLD."""
    flat = np.concatenate(others)
    cell = np.repeat(np.arange(len(others)), [len(other) for other in others]) * PARTS + flat % PARTS
    both = np.bincount(cell[np.isin(flat, own)], minlength=len(others) * PARTS).reshape(-1, PARTS)
    either = np.bincount(cell, minlength=len(others) * PARTS).reshape(-1, PARTS) - both
    either += np.bincount(own % PARTS, minlength=PARTS)
    alike = (both >= PART_THRESHOLD * either).all(axis=1)
    return [float(value) for value in both.sum(axis=1) / either.sum(axis=1) * alike]
