"""Operation rules, one file a family. Importing this package fills the table."""

from dp_trainer.gradients.rules import broadcast, convolution, embedding, linear, normalization
from dp_trainer.gradients.rules.base import OPERATION_RULES, Call, operation_rule

__all__ = [
    "OPERATION_RULES",
    "Call",
    "broadcast",
    "convolution",
    "embedding",
    "linear",
    "normalization",
    "operation_rule",
]
