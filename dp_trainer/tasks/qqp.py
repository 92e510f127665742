"""QQP: do two questions ask the same.

Source: Quora's question pairs in GLUE's splits; read from the hub or from a local folder.
"""

from dp_trainer.tasks.base import HubData
from dp_trainer.tasks.classification import accuracy_and_f1, sequence_classification
from dp_trainer.tasks.infilling import Infilling, Slot, continued

# GLUE's test split has no labels, so it is no further split here.
QQP = sequence_classification(
    name="qqp",
    source=HubData(repository="nyu-mll/glue", configuration="qqp"),
    text_columns=("question1", "question2"),
    labels=("not_duplicate", "duplicate"),
    max_length=256,
    compute_metrics=accuracy_and_f1,
    # "{question1} <mask>, {question2}"
    infilling=Infilling(
        before=(Slot(column="question1"),),
        after=(",", Slot(column="question2", change=continued)),
        words=("no", "yes"),
    ),
)
