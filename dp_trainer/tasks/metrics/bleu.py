"""BLEU, in percent: sacrebleu's, with the settings that the E2E challenge's scorer has."""

from __future__ import annotations

from itertools import zip_longest

import sacrebleu

from dp_trainer.tasks.metrics.base import References, TextMetric, Texts, check_texts


class Bleu(TextMetric):
    """The geometric mean of clipped n-gram precisions up to four, times a brevity penalty.

    Guarantee: ``score`` is sacrebleu's corpus BLEU without regard to case, in
    [0, 100]. A sample may have any number of references; the one whose length is
    nearest counts for brevity.

    Source: Papineni et al. 2002; tokenization, lower case and smoothing of
    mteval-v13a, which the E2E challenge uses (github.com/tuetschek/e2e-metrics).
    """

    key = "bleu"
    description = "Corpus BLEU-4, multi-reference, case-insensitive, 13a tokenization, in percent."
    citation = (
        "Papineni, Roukos, Ward, Zhu 2002. BLEU: a method for automatic evaluation of machine translation."
    )

    @classmethod
    def score(cls, predictions: Texts, references: References) -> float:
        """See :meth:`TextMetric.score`."""
        check_texts(predictions, references)
        # sacrebleu wants the first references of all samples, then the second ones, …;
        # None stands where a sample has no more.
        streams = list(zip_longest(*references))
        return float(sacrebleu.corpus_bleu(list(predictions), streams, lowercase=True, force=True).score)
