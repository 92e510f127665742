"""Operation rules, one file a family. Importing this package fills the table."""

from dp_trainer.gradients.rules import (
    broadcast,
    convolution,
    embedding,
    experts,
    indexing,
    layers,
    linear,
    normalization,
    sequential,
)
from dp_trainer.gradients.rules.base import OPERATION_RULES, Call, operation_rule

__all__ = [
    "OPERATION_RULES",
    "Call",
    "broadcast",
    "convolution",
    "embedding",
    "experts",
    "indexing",
    "layers",
    "linear",
    "normalization",
    "operation_rule",
    "sequential",
]
