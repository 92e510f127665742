"""Sentiment of a snippet (film review, product review, tweet, editorial); ships with the package.

Source: the rated sentences of Hutto and Gilbert 2014, see NOTICE. Rows with a mean
rating within 0.5 of neutral are left out.
"""

from dp_trainer.tasks.base import BundledData
from dp_trainer.tasks.classification import sequence_classification
from dp_trainer.tasks.infilling import SENTIMENT_INFILLING

SENTIMENT = sequence_classification(
    name="sentiment",
    source=BundledData(folder="sentiment_snippets"),
    text_columns=("sentence",),
    labels=("negative", "positive"),
    infilling=SENTIMENT_INFILLING,
    max_length=128,
)
