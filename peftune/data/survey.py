"""What is silently wrong with rows that are well-formed: repeats, leaks, contradictions, rare classes, broken tags."""

from __future__ import annotations

import re
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftune.data.canonical import class_names
from peftune.data.class_counts import ClassCounts
from peftune.data.duplicates import NearIndex, View, view
from peftune.data.findings import SHOWN_PLACES, Finding, Place
from peftune.data.first_seen import FirstSeen
from peftune.data.rows import Row
from peftune.data.tag_schemes import read_tags

BATCH_ROWS, BATCH_CHARACTERS = 1024, 1 << 20
"""Texts that wait for near-duplicate search, at most."""
LOST = re.compile("[\\x00-\\x08\\x0b\\x0e-\\x1f\\ufffd]")
"""Control characters that are no white space; U+FFFD, which converters put in place of bytes they could not read."""
LABEL = {"ner": "tags", "squad": "answers"}
"""What contradicts what, by kind; else a label."""
MOST_ROWS, MOST_FEATURES = 100_000, 50_000_000
"""So many rows, or hashes of their words at 4 bytes each, are indexed at most."""

WORDS: dict[str, tuple[str, str]] = {
    "leak": ("of {split} {are} in {others} too", "delete them from {split} or from {others}: they raise the scores"),
    "near_leak": ("of {split} nearly repeat{s} a row of {others}", "look at them; delete those that say the same"),
    "conflicting_label": ("of {split} {have} the input of an earlier row, not its {label}", "mend or delete one"),
    "unwanted_answer": ("of {split} {are} marked as unwanted (KTO), and learned like the others",
                        "delete them, or pair them as chosen and rejected, for task: preference"),
    "lost_characters": ("of {split} hold{s} characters that no text has", "convert the source from its own encoding"),
    "exact_duplicate": ("of {split} repeat{s} an earlier row exactly", "delete the repeats"),
    "near_duplicate": ("of {split} nearly repeat{s} an earlier row", "look at them; delete those that say the same"),
    "BIO": ("of {split} break{s} the BIO scheme of tags", "begin each entity with B-, go on with I- of its type"),
    "BIOES": ("of {split} break{s} the BIOES scheme of tags",
              "write B- I- E- for an entity of several tokens, and S- for one of a single token"),
}
"""Message, after the number of rows, and mend; the gravest first."""


@dataclass(slots=True)
class _Tally:
    """Rows of one kind of finding in one split."""

    count: int = 0
    places: list[Place] = field(default_factory=list)
    others: dict[str, None] = field(default_factory=dict)
    """Splits of the earlier rows."""


class Survey:
    """Looks over the rows of all splits once. Keeps hashes and numbers of each row, and texts of those it shows.

    - exact_duplicate: all fields equal those of an earlier row of the same split, in Unicode's composed form (NFC) and
      with white space collapsed.
    - leak: the input (text and pair; tokens; question and context) equals that of a row of an earlier split, upper and
      lower case taken as equal. Of generation and preference the whole row must be equal: one prompt may well have
      two answers.
    - conflicting_label: the same input, as for leak, with another label, other tags or other answers than the first row
      that has it, in whatever split.
    - near_duplicate, near_leak: similar to an earlier row of the same, or of another split, as `NearIndex` defines it.
      Rows of the lists above are not listed again. Rows of fewer than six words are not compared.
    - unwanted_answer: a mark beside it says that the answer is not wanted.
    - lost_characters: control characters, or U+FFFD.
    - imbalance, few_examples, label_spelling of the training rows: as `ClassCounts` has them.
    - tag_scheme: an I-X does not continue a B-X or I-X; or, where any row has an E- or S- tag, an entity does not run
      B- I- E- or S-.
    """

    def __init__(self, kind: str, *, scores: bool = False) -> None:
        """`kind` is classification, ner, squad, preference or generation; `scores`: labels are numbers to predict."""
        self._kind, self._scores = kind, scores
        self._files: dict[str, int] = {}
        self._splits: dict[str, int] = {}
        self._train = ""
        self._place_of = (array("B"), array("I"), array("Q"))
        """Split, file and line of each row."""
        self._label_of = array("q")
        self._label_names: dict[int, str] = {}
        self._whole: dict[str, FirstSeen] = {}
        self._input = FirstSeen()
        self._tallies: defaultdict[tuple[str, str], _Tally] = defaultdict(_Tally)
        self._classes = ClassCounts("entity" if kind == "ner" else "row")
        self._bioes = False
        self._near = NearIndex()
        self._waiting: list[tuple[int, Row, View, bool]] = []
        self._waiting_characters = self._uncompared = 0

    def add(self, split: str, row: Row) -> None:
        """Look at the next row. Splits come one after the other, the training rows first, each in file order."""
        if split not in self._splits:
            self._compare_waiting()
            self._splits[split] = len(self._splits)
            self._train = self._train or split
        seen = view(self._kind, row.fields)
        number = len(self._label_of)
        place = (self._splits[split], self._files.setdefault(row.file, len(self._files)), row.line)
        for column, value in zip(self._place_of, place):
            column.append(value)
        self._label_of.append(hash(seen.label))
        repeated = self._whole.setdefault(split, FirstSeen()).row_of(seen.whole, number)
        if repeated != number:
            self._note("exact_duplicate", split, row, f"repeats {self._where(repeated, row)}: {seen.shown!r}")
        listed = self._note_same_input(split, row, seen, number)
        if row.fields.get("unwanted"):
            self._note("unwanted_answer", split, row, f"{seen.shown!r}")
        self._look_at_characters(split, row)
        if self._kind == "classification" and split == self._train and not self._scores:
            label = row.fields["label"]
            self._classes.add(row, class_names(label), label)
        elif self._kind == "ner":
            self._look_at_tags(split, row, row.fields["tags"])
        if repeated == number:
            self._wait(split, row, seen, number, listed)

    def findings(self) -> list[Finding]:
        """All findings so far, by split, the gravest first."""
        self._compare_waiting()
        return [finding for split in self._splits for finding in (
            *self._row_findings(split), *(self._classes.findings(split) if split == self._train else ()))]

    def _note_same_input(self, split: str, row: Row, seen: View, number: int) -> bool:
        """Note a leak from, or a conflict with, the first row of the same input; say whether there is one."""
        first = self._input.row_of(seen.input, number)
        if self._kind == "classification":
            self._label_names.setdefault(self._label_of[number], seen.label or "")
        if first == number:
            return False
        other, where = self._split_name(first), self._where(first, row)
        if other != split:
            self._note("leak", split, row, f"is {where} too: {seen.shown!r}", other)
        conflict = self._label_of[first] != self._label_of[number]
        if conflict:
            labels = (f"other {LABEL[self._kind]} than" if self._kind in LABEL else
                      f"label {seen.label!r:.60}, but {self._label(first)}")
            self._note("conflicting_label", split, row, f"{labels} at {where}: {seen.shown!r}")
        return other != split or conflict

    def _look_at_characters(self, split: str, row: Row) -> None:
        for text in _texts(row.fields):
            lost = LOST.search(text)
            if lost:
                near = text[max(0, lost.start() - 20) : lost.start() + 20]
                self._note("lost_characters", split, row, f"U+{ord(lost.group()):04X} in {near!r}")
                return

    def _look_at_tags(self, split: str, row: Row, tags: list[Any]) -> None:
        if not all(isinstance(tag, str) for tag in tags):
            return  # numbers: their names are not known here
        types, faults = read_tags(tags, row.fields["tokens"])
        self._bioes |= any(tag.startswith(("E-", "S-")) for tag in tags)
        for scheme, said in faults.items():
            if said:
                self._note(scheme, split, row, said[0] + (f", and {len(said) - 1} more" if said[1:] else ""))
        if split == self._train:
            self._classes.add(row, types)

    def _wait(self, split: str, row: Row, seen: View, number: int, listed: bool) -> None:
        """Let the row wait for near-duplicate search, unless the training rows have filled the index."""
        if split == self._train and self._is_full():
            self._uncompared += 1
            return
        self._waiting.append((number, row, seen, listed))
        self._waiting_characters += sum(map(len, seen.parts))
        if len(self._waiting) == BATCH_ROWS or self._waiting_characters > BATCH_CHARACTERS:
            self._compare_waiting()

    def _is_full(self) -> bool:
        return self._near.rows >= MOST_ROWS or self._near.features >= MOST_FEATURES

    def _compare_waiting(self) -> None:
        """Note which waiting rows resemble earlier ones: the likest of the same split, and of the others."""
        matches = self._near.match([(number, seen) for number, _, seen, _ in self._waiting], index=not self._is_full())
        for (number, row, seen, listed), near in zip(self._waiting, matches):
            split = self._split_name(number)
            kinds = defaultdict(list)
            for match in () if listed else near:
                kinds["near_duplicate" if self._split_name(match.row) == split else "near_leak"].append(match)
            for kind, chosen in kinds.items():
                best = max(chosen, key=lambda match: match.similarity)
                same = self._label_of[best.row] == self._label_of[number] or self._kind != "classification"
                label = "" if same else f" with label {self._label(best.row)}"
                message = f"{best.similarity:.0%} like {self._where(best.row, row)}{label}: {seen.shown!r}"
                self._note(kind, split, row, message, self._split_name(best.row))
        self._waiting.clear()
        self._waiting_characters = 0

    def _row_findings(self, split: str) -> Iterator[Finding]:
        limit = (f"; compared with the first {self._near.rows:,} rows only, and {self._uncompared:,} rows of "
                 f"{self._train} not at all" if self._is_full() else "")
        limit += "; perhaps more: rows like hundreds of others are not compared with all" if self._near.crowded else ""
        for kind, (message, mend) in WORDS.items():
            said = limit if kind.startswith("near") else ""
            tally = self._tallies[kind, split]
            unsaid = self._uncompared and (kind, split) == ("near_duplicate", self._train)
            if not (tally.count or unsaid) or kind == ("BIO" if self._bioes else "BIOES"):
                continue
            rows, s, are, have = ("row", "s", "is", "has") if tally.count == 1 else ("rows", "", "are", "have")
            names = {"split": split, "others": " and ".join(tally.others), "s": s, "are": are, "have": have,
                     "label": LABEL.get(self._kind, "label")}
            yield Finding("tag_scheme" if kind.startswith("BIO") else kind, split,
                          f"{tally.count:,} {rows} {message.format(**names)}{said}", mend.format(**names), tally.count,
                          tuple(tally.places))

    def _note(self, kind: str, split: str, row: Row, message: str, other: str = "") -> None:
        tally = self._tallies[kind, split]
        tally.count += 1
        tally.others[other] = None
        if len(tally.places) < SHOWN_PLACES:
            tally.places.append(Place(row.file, row.line, message))

    def _split_name(self, number: int) -> str:
        return list(self._splits)[self._place_of[0][number]]

    def _label(self, number: int) -> str:
        return f"{self._label_names[self._label_of[number]]!r:.60}"

    def _where(self, number: int, row: Row) -> str:
        """File and line of a row, without the folder where that is the folder of the row in question."""
        file = list(self._files)[self._place_of[1][number]]
        name = Path(file).name if Path(file).parent == Path(row.file).parent else file
        return f"{name}:{self._place_of[2][number]}"


def _texts(value: Any) -> Iterator[str]:
    """All texts of a row, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from _texts(member)
    elif isinstance(value, list | tuple):
        for member in value:
            yield from _texts(member)
