"""Hashes seen before, and the fast search for near rows beside a slow one."""

import itertools
import random
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftune.data import first_seen
from peftune.data.duplicates import THRESHOLD, NearIndex, View, words_of
from peftune.data.first_seen import FirstSeen


@given(st.lists(st.integers(0, 20), max_size=200), st.integers(1, 9))
def test_the_first_row_of_a_hash_is_remembered_however_many_follow(keys, recent):
    seen, first = FirstSeen(), {}
    with mock.patch.object(first_seen, "RECENT", recent):
        for row, key in enumerate(keys):
            assert seen.row_of(key * 2**58 + 7, row) == first.setdefault(key, row)


def shingles_of(parts):
    """Set of words and neighbours, each with its part: the definition, slowly."""
    return {(number, *run) for number, words in enumerate(words_of(parts)) for size in (1, 2)
            for run in zip(*(words[start:] for start in range(size)))}


def jaccard(one, other):
    return len(one & other) / len(one | other) if one | other else 1.0


def near(one, other):
    """The definition of near rows, slowly."""
    alike = all(jaccard({s for s in one if s[0] == part}, {s for s in other if s[0] == part}) >= 0.5 for part in (0, 1))
    return alike and jaccard(one, other) >= (0.75 if min(len(one), len(other)) >= 19 else 0.85)


def random_texts(rng, count):
    """Texts of a small vocabulary, half of them edited copies of earlier ones."""
    texts = []
    for _ in range(count):
        if texts and rng.random() < 0.5:
            words = rng.choice(texts).split()
            for _ in range(rng.randint(0, 4)):
                words[rng.randrange(len(words))] = f"w{rng.randrange(60)}"
        else:
            words = [f"w{rng.randrange(60)}" for _ in range(rng.randint(6, 40))]
        texts.append(" ".join(words))
    return texts


@pytest.mark.parametrize("seed", range(3))
def test_the_fast_search_finds_the_pairs_that_comparing_all_with_all_finds(seed):
    rng = random.Random(seed)
    rows = [(text, f"w{rng.randrange(3)} yes indeed") for text in random_texts(rng, 300)]
    index = NearIndex()
    fast = set()
    for start in range(0, len(rows), 64):
        batch = [(start + n, View(0, 0, None, parts, "", "")) for n, parts in enumerate(rows[start:start + 64])]
        fast |= {(number, match.row) for (number, _), matches in zip(batch, index.match(batch)) for match in matches}
    sets = [shingles_of(parts) for parts in rows]
    slow = {(later, earlier) for later, earlier in itertools.product(range(300), repeat=2)
            if earlier < later and near(sets[later], sets[earlier])}
    assert len(slow) > 40 and fast == slow


def test_similarities_are_those_of_the_definition():
    words = "the quick brown fox jumps over one lazy dog near my house"
    texts = [(words, "yes"), (words.replace("fox", "wolf"), "yes")]
    matches = NearIndex().match([(n, View(0, 0, None, parts, "", "")) for n, parts in enumerate(texts)])
    assert matches[1][0].similarity == pytest.approx(jaccard(*map(shingles_of, texts))) and THRESHOLD == 0.75
