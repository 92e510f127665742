"""METEOR, with WordNet's synonyms; and without them, under another name.

Both are nltk's, after Lavie and Agarwal 2007: words are aligned by form, then by
Porter stem, then by synonym; the score joins precision and recall (α = 0.9) and
takes off for matches that do not stand together (β = 3, γ = 0.5). nltk looks synonyms up
by the stem, so it misses those of words that Porter's stemmer changes.

Neither is the Meteor 1.5 (Denkowski and Lavie 2014) of the E2E challenge's scorer,
a Java program that also knows paraphrases, weighs function words less, has tuned
constants and joins the counts of all samples before it scores. The scales differ:
on 44 outputs of the challenge Meteor 1.5 gave .48 in the mean where nltk's, without
synonyms, gives .81. The published .38 to .47 are no yardstick for these numbers,
hence their names.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import nltk.corpus
from nltk.translate.meteor_score import meteor_score

from dp_trainer.tasks.metrics.base import (
    MetricUnavailableError,
    References,
    TextMetric,
    Texts,
    check_texts,
)
from dp_trainer.tasks.metrics.words import caption_words


class Meteor(TextMetric):
    """METEOR with exact, stem and synonym matches.

    Guarantee: ``score`` is the mean over samples of nltk's ``meteor_score``, each
    against its best reference, in [0, 1], with WordNet's synonyms; without
    WordNet it raises, and never leaves the synonyms out silently.
    """

    key = "meteor_nltk"
    description = "METEOR (2007) of nltk: exact, Porter stem and WordNet synonym matches."
    citation = "Lavie, Agarwal 2007. METEOR: an automatic metric for MT evaluation with high levels of correlation with human judgments."

    @classmethod
    def score(cls, predictions: Texts, references: References) -> float:
        """See :meth:`TextMetric.score`."""
        check_texts(predictions, references)
        return _mean_score(predictions, references, _wordnet())


class MeteorExactStem(TextMetric):
    """The same without synonyms: exact and stem matches alone.

    Guarantee: ``score`` is the mean over samples of nltk's ``meteor_score`` with a
    WordNet that has no entries, in [0, 1]. Needs no data.
    """

    key = "meteor_nltk_exact_stem"
    description = "METEOR (2007) of nltk without synonyms: exact and Porter stem matches only."
    citation = Meteor.citation

    @classmethod
    def score(cls, predictions: Texts, references: References) -> float:
        """See :meth:`TextMetric.score`."""
        check_texts(predictions, references)
        return _mean_score(predictions, references, _NoSynonyms())


class _NoSynonyms:
    """A WordNet in which no word is found."""

    @staticmethod
    def synsets(word: str) -> list[Any]:
        return []


def _wordnet() -> Any:
    try:
        nltk.corpus.wordnet.ensure_loaded()
    except LookupError as error:
        raise MetricUnavailableError(
            "meteor_nltk: WordNet is not installed, and METEOR matches synonyms by it. "
            "Run python -m nltk.downloader wordnet, or use meteor_nltk_exact_stem."
        ) from error
    return nltk.corpus.wordnet


def _mean_score(predictions: Texts, references: References, wordnet: Any) -> float:
    stemmer = _CachedStemmer()
    values = [
        meteor_score(
            [caption_words(text) for text in texts],
            caption_words(prediction),
            stemmer=stemmer,
            wordnet=wordnet,
        )
        for prediction, texts in zip(predictions, references, strict=True)
    ]
    return float(sum(values) / len(values))


class _CachedStemmer:
    """Porter's stemmer, each word once: a few hundred words make up the whole of E2E."""

    def __init__(self) -> None:
        self.stem = lru_cache(maxsize=None)(nltk.PorterStemmer().stem)
