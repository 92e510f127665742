"""QNLI: does a sentence hold the answer to a question.

Source: Wang et al. 2019 (GLUE), from Rajpurkar et al. 2016; read from the hub or from a local folder.
"""

from dp_trainer.tasks.base import HubData
from dp_trainer.tasks.classification import sequence_classification
from dp_trainer.tasks.infilling import Infilling, Slot, continued, without_last_character

# GLUE's test split has no labels, so it is no further split here.
QNLI = sequence_classification(
    name="qnli",
    source=HubData(repository="nyu-mll/glue", configuration="qnli"),
    text_columns=("question", "sentence"),
    labels=("entailment", "not_entailment"),
    max_length=256,
    # "{question without its mark}? <mask>, {sentence}"
    infilling=Infilling(
        before=(Slot(column="question", change=without_last_character), "?"),
        after=(",", Slot(column="sentence", change=continued)),
        words=("yes", "no"),
    ),
)
