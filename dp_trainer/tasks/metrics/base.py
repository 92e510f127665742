"""What all metrics of generated text share: their shapes, their checks, their face towards ``evaluate``.

Shapes: predictions are N texts; references are N lists of texts, of any lengths.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate

from dp_trainer.errors import ConfigurationError

Texts = Sequence[str]
References = Sequence[Sequence[str]]


class MetricUnavailableError(ConfigurationError):
    """This metric is not defined, or lacks something, for what it was given; other metrics may go on."""


class TextMetric(evaluate.Metric, ABC):  # type: ignore[misc]  # evaluate has no types
    """A metric of generated text that needs no hub: ``evaluate``'s interface, one function inside.

    Guarantee: ``compute(predictions=…, references=…)`` returns ``{key: score(…)}``
    and nothing is downloaded. ``score`` can be called without an instance, which
    spares a copy of the texts.
    """

    key: str
    description: str
    citation: str

    def __init__(self) -> None:
        # evaluate would write the texts into a cache file otherwise.
        super().__init__(keep_in_memory=True)

    @classmethod
    @abstractmethod
    def score(cls, predictions: Texts, references: References) -> float:
        """Returns the corpus score of N predictions against N lists of references.

        Raises:
            ConfigurationError: If the shapes do not fit, or a sample has no reference.
            MetricUnavailableError: If the metric cannot be computed here.
        """

    def _info(self) -> Any:
        features = {
            "predictions": datasets.Value("string"),
            "references": datasets.Sequence(datasets.Value("string")),
        }
        return evaluate.MetricInfo(
            description=self.description, citation=self.citation, features=datasets.Features(features)
        )

    def _compute(self, predictions: Texts, references: References) -> Mapping[str, float]:
        return {self.key: self.score(predictions, references)}


def check_texts(predictions: Texts, references: References) -> None:
    """Raises ConfigurationError unless there are N texts and N lists that hold a reference each.

    An empty prediction is a model's answer and stays; an empty reference is a fault of the data.
    """
    if len(predictions) == 0:
        raise ConfigurationError("predictions: there are none. Give at least one text.")
    if len(predictions) != len(references):
        raise ConfigurationError(
            f"references: {len(references)} lists for {len(predictions)} predictions. "
            "Give one list of references for each prediction, in the same order."
        )
    for i, (prediction, texts) in enumerate(zip(predictions, references, strict=True)):
        if not isinstance(prediction, str):
            raise ConfigurationError(
                f"prediction {i}: {type(prediction).__name__} is not a text. Decode tokens first."
            )
        # One text in place of a list would be read letter by letter.
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise ConfigurationError(f"references of sample {i}: not a list of texts. Give [text, …].")
        if not texts or not all(text.strip() for text in texts):
            raise ConfigurationError(
                f"references of sample {i}: {'an empty text' if texts else 'none'}. "
                "Give each sample at least one reference, or leave the sample out."
            )
