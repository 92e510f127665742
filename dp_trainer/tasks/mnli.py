"""MNLI: does a sentence follow from another, contradict it, or neither.

Source: Williams, Nangia, Bowman 2018, in GLUE's splits; read from the hub or from a local folder.
"""

from dp_trainer.tasks.base import HubData
from dp_trainer.tasks.classification import sequence_classification
from dp_trainer.tasks.infilling import Infilling, Slot, continued, without_last_character

# GLUE's test splits have no labels. The matched split has the genres of the training set, the other has not.
MNLI = sequence_classification(
    name="mnli",
    source=HubData(repository="nyu-mll/glue", configuration="mnli"),
    text_columns=("premise", "hypothesis"),
    labels=("entailment", "neutral", "contradiction"),
    max_length=256,
    validation_split="validation_matched",
    further_splits=("validation_mismatched",),
    # "{premise without its full stop}? <mask>, {hypothesis}"
    infilling=Infilling(
        before=(Slot(column="premise", change=without_last_character), "?"),
        after=(",", Slot(column="hypothesis", change=continued)),
        words=("yes", "maybe", "no"),
    ),
)
