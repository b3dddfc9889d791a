"""Scores of generated text against what was to be written."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from sacrebleu.metrics import BLEU

from peftune.numerics import scores
from peftune.numerics.intervals import resampled_sums

NAMES = ("exact_match", "rouge_l", "bleu", "final_number")

SIGNS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Kana and Chinese characters."""
SIGN = re.compile(f"[{SIGNS}]")
WORD = re.compile(f"[{SIGNS}]|[^\\W_{SIGNS}]+")

Score = tuple[str, float, Callable[[], np.ndarray]]
"""Name, value, and what gives its values in resamples."""

FINAL_NUMBER = re.compile(r"#### (-?[0-9.,]+)")
"""How GSM8K marks an answer (Cobbe et al., 2021, arXiv:2110.14168)."""


def generation_scores(predictions: Sequence[str], references: Sequence[str]) -> Iterator[Score]:
    """Exact match, ROUGE-L (F measure) and BLEU (0 to 100) of texts; of GSM8K's answers the final number too.

    ROUGE-L is rouge-score's, without stemming, over words of any script (`Words`). BLEU is sacrebleu's corpus BLEU with
    its default settings, for Chinese and Japanese with its tokenizer zh; undefined where no reference has four words.
    """
    from rouge_score import rouge_scorer  # it imports nltk, and that scikit-learn: nearly a second, for each command

    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=Words())
    pairs = list(zip(predictions, references, strict=True))
    yield _mean("exact_match", [float(got.strip() == want.strip()) for got, want in pairs])
    yield _mean("rouge_l", [scorer.score(want, got)["rougeL"].fmeasure for got, want in pairs])
    metric = BLEU(tokenize=_tokenizer_of(references))
    if any(len(metric.tokenizer(want).split()) >= metric.max_ngram_order for want in references):
        yield ("bleu", metric.corpus_score(list(predictions), [list(references)]).score,
               partial(_bleu_resampled, predictions, references))
    else:
        yield "bleu", math.nan, lambda: np.array([math.nan])
    numbers = [final_number(want) for want in references]
    if all(number is not None for number in numbers):
        yield _mean("final_number", [float(final_number(got) == number)
                                     for got, number in zip(predictions, numbers, strict=True)])


class Words:
    """Words of letters and digits, in lower case, as rouge-score cuts English; of Chinese and Japanese each sign."""

    def tokenize(self, text: str) -> list[str]:
        """In order."""
        return WORD.findall(text.lower())


def _tokenizer_of(texts: Sequence[str]) -> str:
    """sacrebleu's: zh where most letters are signs that no blank parts, else its default."""
    together = "".join(texts)
    return "zh" if 2 * len(SIGN.findall(together)) > sum(map(str.isalpha, together)) else "13a"


def final_number(text: str) -> str | None:
    """The number after `####`, without thousands separators, as GSM8K's own scoring reads it; None without one."""
    found = FINAL_NUMBER.search(text)
    return None if found is None else found.group(1).strip().replace(",", "")


def _mean(name: str, values: Sequence[float]) -> Score:
    table = np.column_stack([values, np.ones(len(values))])
    return name, float(np.mean(values)), lambda: resampled_sums(table, scores.ratio)


def _bleu_resampled(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """BLEU is a function of sums over sentences: matching and possible n-grams, and the two lengths."""
    metric = BLEU(effective_order=True, tokenize=_tokenizer_of(references))
    parts = [metric.sentence_score(got, [want]) for got, want in zip(predictions, references, strict=True)]
    sums = np.array([[*part.counts, *part.totals, part.sys_len, part.ref_len] for part in parts])
    return resampled_sums(sums, lambda table: np.array([_bleu(row.astype(int).tolist()) for row in table]))


def _bleu(row: list[int]) -> float:
    order = (len(row) - 2) // 2
    return BLEU.compute_bleu(row[:order], row[order : 2 * order], row[-2], row[-1], smooth_method="exp").score
