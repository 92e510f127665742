"""SST-2: sentiment of a phrase or sentence from film reviews.

Source: Socher et al. 2013, in GLUE's split; read from the hub or from a local folder.
"""

from dp_trainer.tasks.base import HubData
from dp_trainer.tasks.classification import sequence_classification
from dp_trainer.tasks.infilling import SENTIMENT_INFILLING

# GLUE's test split has no labels, so it is no further split here.
SST2 = sequence_classification(
    name="sst2",
    source=HubData(repository="nyu-mll/glue", configuration="sst2"),
    text_columns=("sentence",),
    labels=("negative", "positive"),
    infilling=SENTIMENT_INFILLING,
    max_length=256,
)
