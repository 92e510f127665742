"""NIST: n-gram matches weighted by how much each tells.

    NIST = penalty · Σ_{n=1..5} Σ_matches info(w1…wn) / Σ_predictions n-grams
    info(w1…wn) = log2( count(w1…wn−1) / count(w1…wn) ),  counts over all references
    penalty = exp( −β · ln(min(1, L / L_ref))² ),  β = ln 2 / (ln 1.5)²

A match is clipped at the largest count in any one reference. L sums the lengths
of the predictions, L_ref the mean length of each sample's references.

nltk's ``corpus_nist`` is no substitute: for each n it takes the one best reference
of a sample instead of all of them, and its lengths are those of these references.
With a single reference the two agree (a test holds them together), but for the
predictions of fewer than five words at which nltk may divide by zero.

Source: Doddington 2002; mteval-v13a as the E2E challenge runs it, and its own
Python port for the length penalty (github.com/tuetschek/e2e-metrics). The Perl
script divides the references' words by the largest number of references of any
sample, which switches the penalty off where numbers differ; the port and this
module take each sample's mean.
"""

from __future__ import annotations

import math
from collections import Counter

from dp_trainer.tasks.metrics.base import References, TextMetric, Texts, check_texts
from dp_trainer.tasks.metrics.words import NGram, mteval_words, ngram_counts

MAX_LENGTH = 5
BETA = math.log(2) / math.log(1.5) ** 2


class Nist(TextMetric):
    """Information-weighted n-gram precision up to five words, with a length penalty.

    Guarantee: ``score`` is the formula above, 0 for nothing in common and without
    a fixed upper end (the best reachable value grows with the references).
    """

    key = "nist"
    description = "Corpus NIST-5, multi-reference, case-insensitive, 13a tokenization."
    citation = "Doddington 2002. Automatic evaluation of machine translation quality using n-gram co-occurrence statistics."

    @classmethod
    def score(cls, predictions: Texts, references: References) -> float:
        """See :meth:`TextMetric.score`."""
        check_texts(predictions, references)
        answers = [mteval_words(prediction) for prediction in predictions]
        truths = [[mteval_words(text) for text in texts] for texts in references]
        weights = _information([words for sample in truths for words in sample])
        total = 0.0
        for length in range(1, MAX_LENGTH + 1):
            matched, possible = 0.0, 0
            for answer, sample in zip(answers, truths, strict=True):
                counts = ngram_counts(answer, length)
                most: Counter[NGram] = Counter()
                for words in sample:
                    most |= ngram_counts(words, length)
                matched += sum(weights[ngram] * count for ngram, count in (counts & most).items())
                possible += counts.total()
            total += matched / max(possible, 1)
        mean_lengths = [sum(map(len, sample)) / len(sample) for sample in truths]
        return total * _length_penalty(sum(map(len, answers)) / sum(mean_lengths))


def _information(references: list[tuple[str, ...]]) -> dict[NGram, float]:
    """Returns what each n-gram of the references tells, in bits."""
    # The empty sequence precedes every word.
    counts: Counter[NGram] = Counter({(): sum(map(len, references))})
    for length in range(1, MAX_LENGTH + 1):
        for words in references:
            counts.update(ngram_counts(words, length))
    return {ngram: math.log2(counts[ngram[:-1]] / count) for ngram, count in counts.items() if ngram}


def _length_penalty(ratio: float) -> float:
    return math.exp(-BETA * math.log(min(ratio, 1.0)) ** 2) if ratio > 0 else 0.0
