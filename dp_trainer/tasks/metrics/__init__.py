"""Metrics of generated text that need no hub; a new one is one file and one row of ``METRICS``.

Needs the extra ``tasks`` (sacrebleu, rouge-score, nltk).
"""

from __future__ import annotations

from transformers.utils import logging

from dp_trainer.tasks.metrics.base import (
    MetricUnavailableError,
    References,
    TextMetric,
    Texts,
    check_texts,
)
from dp_trainer.tasks.metrics.bleu import Bleu
from dp_trainer.tasks.metrics.cider import Cider
from dp_trainer.tasks.metrics.meteor import Meteor, MeteorExactStem
from dp_trainer.tasks.metrics.nist import Nist
from dp_trainer.tasks.metrics.rouge_l import RougeL, RougeLF1

logger = logging.get_logger(__name__)

METRICS: dict[str, type[TextMetric]] = {
    metric.key: metric for metric in (Bleu, Nist, Meteor, MeteorExactStem, RougeL, RougeLF1, Cider)
}


def generation_metrics(predictions: Texts, references: References) -> dict[str, float]:
    """Returns every metric that can be computed here, and warns once about each that cannot.

    Guarantee: what is returned under a name is that metric in full; one that lacks
    something (WordNet for ``meteor_nltk``) is left out rather than approximated.

    Args:
        predictions: N texts. An empty one counts as the answer that it is.
        references: N lists of texts, of any lengths.

    Returns:
        ``bleu``, ``rouge_l`` and ``rouge_l_f1`` in percent; ``nist``, ``cider``,
        ``meteor_nltk`` and ``meteor_nltk_exact_stem`` as they are. The last two are
        not the Meteor 1.5 of published numbers.

    Raises:
        ConfigurationError: If the shapes do not fit, or a sample has no reference.
    """
    check_texts(predictions, references)
    values = {}
    for name, metric in METRICS.items():
        try:
            values[name] = metric.score(predictions, references)
        except MetricUnavailableError as error:
            logger.warning_once(f"Left out of the metrics. {error}")
    return values


__all__ = ["METRICS", "MetricUnavailableError", "TextMetric", "generation_metrics"]
