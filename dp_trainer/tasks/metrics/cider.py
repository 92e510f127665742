"""CIDEr-D: agreement with all references of a sample, in words that are rare among the samples.

    g(text)[w] = count of the n-gram w in the text · ln( N / max(1, samples with w in a reference) )
    sim_n(c, r) = Σ_w min(g(c)[w], g(r)[w]) · g(r)[w] / (‖g(c)‖ · ‖g(r)‖) · exp( −(|c| − |r|)² / 2σ² )
    CIDEr-D = 10 · mean over samples, their references, and n = 1…4

|c| and |r| are lengths and σ = 6. A sum without a rare word has length zero; its
similarity is then 0.

Source: Vedantam, Zitnick, Parikh 2015. The paper defines CIDEr (without minimum
and length factor) and CIDEr-D; what coco-caption, and with it the E2E challenge's
scorer, prints as CIDEr is CIDEr-D. Two of its habits are kept because the published
numbers have them: counts are not divided by the text's length, and lengths are
counted in pairs of words (one less than the words, but 0 for no word at all).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from dp_trainer.tasks.metrics.base import (
    MetricUnavailableError,
    References,
    TextMetric,
    Texts,
    check_texts,
)
from dp_trainer.tasks.metrics.words import NGram, caption_words, ngram_counts

MAX_LENGTH = 4
SIGMA = 6.0


class Cider(TextMetric):
    """CIDEr-D against all references, in [0, 10], with document frequencies from the references.

    Guarantee: ``score`` is the formula above. It depends on the whole set of
    references: scores of different sets of samples cannot be compared, and of a
    single sample it is undefined (every word is in all samples, so none is rare).
    """

    key = "cider"
    description = "CIDEr-D, n-grams up to four, sigma 6, times ten."
    citation = "Vedantam, Zitnick, Parikh 2015. CIDEr: consensus-based image description evaluation."

    @classmethod
    def score(cls, predictions: Texts, references: References) -> float:
        """See :meth:`TextMetric.score`."""
        values = sample_scores(predictions, references)
        return sum(values) / len(values)


def sample_scores(predictions: Texts, references: References) -> list[float]:
    """Returns each sample's CIDEr-D, N numbers in [0, 10].

    Raises:
        MetricUnavailableError: For a single sample.
    """
    check_texts(predictions, references)
    if len(predictions) == 1:
        raise MetricUnavailableError(
            "cider: undefined for one sample, whose words are all in every sample. Give at least two."
        )
    truths = [[_Counted.of(text) for text in texts] for texts in references]
    rarity = _rarity(truths)
    values = []
    for prediction, sample in zip(predictions, truths, strict=True):
        answer = _weighed(_Counted.of(prediction), rarity, samples=len(truths))
        weighed = (_weighed(text, rarity, samples=len(truths)) for text in sample)
        values.append(10 * sum(_similarity(answer, truth) for truth in weighed) / len(sample))
    return values


@dataclass(frozen=True, kw_only=True)
class _Counted:
    """A text's n-grams, one count for each n, and its length."""

    counts: list[Counter[NGram]]
    length: int

    @classmethod
    def of(cls, text: str) -> _Counted:
        words = caption_words(text)
        counts = [ngram_counts(words, length) for length in range(1, MAX_LENGTH + 1)]
        return cls(counts=counts, length=max(len(words) - 1, 0))


@dataclass(frozen=True, kw_only=True)
class _Weighed:
    """A text's weighted n-grams, one mapping for each n; their Euclidean norms; its length."""

    weights: list[dict[NGram, float]]
    norms: list[float]
    length: int


def _rarity(truths: list[list[_Counted]]) -> dict[NGram, float]:
    """Returns ln(N / samples that have it) for each n-gram of the references."""
    having: Counter[NGram] = Counter()
    for sample in truths:
        having.update({ngram for text in sample for part in text.counts for ngram in part})
    return {ngram: math.log(len(truths) / count) for ngram, count in having.items()}


def _weighed(text: _Counted, rarity: dict[NGram, float], *, samples: int) -> _Weighed:
    # What no reference has is as rare as what one sample has.
    rarest = math.log(samples)
    weights = [
        {ngram: count * rarity.get(ngram, rarest) for ngram, count in part.items()} for part in text.counts
    ]
    norms = [math.sqrt(sum(weight**2 for weight in part.values())) for part in weights]
    return _Weighed(weights=weights, norms=norms, length=text.length)


def _similarity(answer: _Weighed, truth: _Weighed) -> float:
    total = 0.0
    for n in range(MAX_LENGTH):
        norm = answer.norms[n] * truth.norms[n]
        if norm > 0:
            shared = answer.weights[n].keys() & truth.weights[n].keys()
            total += (
                sum(min(answer.weights[n][w], truth.weights[n][w]) * truth.weights[n][w] for w in shared)
                / norm
            )
    return total / MAX_LENGTH * math.exp(-((answer.length - truth.length) ** 2) / (2 * SIGMA**2))
