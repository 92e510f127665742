"""ROUGE-L, in percent: how much of a reference's words the prediction has in the same order.

    P = LCS / words of the prediction,  R = LCS / words of the reference
    F = (1 + β²) · P · R / (R + β² · P)

The longest common subsequences are rouge-score's.
"""

from __future__ import annotations

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

from dp_trainer.tasks.metrics.base import References, TextMetric, Texts, check_texts
from dp_trainer.tasks.metrics.words import caption_words

BETA = 1.2


class _CaptionTokenizer(Tokenizer):  # type: ignore[misc]  # rouge_score has no types
    def tokenize(self, text: str) -> tuple[str, ...]:
        return caption_words(text)


class RougeL(TextMetric):
    """ROUGE-L as published for E2E: best precision and best recall, joined with β = 1.2.

    Guarantee: ``score`` is the mean over samples of F in percent, where P and R
    are each the largest over the sample's references, not necessarily of the same one.

    Source: Lin 2004; coco-caption's choice of β and of the maxima, which the E2E
    challenge's scorer uses.
    """

    key = "rouge_l"
    description = "ROUGE-L, maximal precision and recall over references, beta 1.2, in percent."
    citation = "Lin 2004. ROUGE: a package for automatic evaluation of summaries."

    @classmethod
    def score(cls, predictions: Texts, references: References) -> float:
        """See :meth:`TextMetric.score`."""
        check_texts(predictions, references)
        scorer = RougeScorer(["rougeL"], tokenizer=_CaptionTokenizer())
        values = []
        for prediction, texts in zip(predictions, references, strict=True):
            pairs = [scorer.score(text, prediction)["rougeL"] for text in texts]
            values.append(_f_measure(max(p.precision for p in pairs), max(p.recall for p in pairs)))
        return 100 * sum(values) / len(values)


class RougeLF1(TextMetric):
    """ROUGE-L as the package rouge-score has it: F1 against the best single reference.

    Guarantee: ``score`` is the mean of rouge-score's ``score_multi`` in percent,
    with its own tokenization and without stemming.
    """

    key = "rouge_l_f1"
    description = "ROUGE-L F1 of rouge-score, best single reference, in percent."
    citation = RougeL.citation

    @classmethod
    def score(cls, predictions: Texts, references: References) -> float:
        """See :meth:`TextMetric.score`."""
        check_texts(predictions, references)
        scorer = RougeScorer(["rougeL"], use_stemmer=False)
        pairs = zip(predictions, references, strict=True)
        values = [scorer.score_multi(texts, prediction)["rougeL"].fmeasure for prediction, texts in pairs]
        return float(100 * sum(values) / len(values))


def _f_measure(precision: float, recall: float) -> float:
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)
