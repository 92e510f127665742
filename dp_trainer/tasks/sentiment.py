"""Sentiment of a snippet (film review, product review, tweet, editorial); ships with the package.

Source: the rated sentences of Hutto and Gilbert 2014, see NOTICE. Rows with a mean
rating within 0.5 of neutral are left out.
"""

from dp_trainer.tasks.base import BundledData
from dp_trainer.tasks.classification import sequence_classification

SENTIMENT = sequence_classification(
    name="sentiment",
    source=BundledData(folder="sentiment_snippets"),
    text_columns=("sentence",),
    labels=("negative", "positive"),
    max_length=128,
)
