"""Private fine-tuning for transformers: public names, each loaded on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dp_trainer.arguments import PrivacyArguments
    from dp_trainer.batch_norm import freeze_batch_norm
    from dp_trainer.errors import (
        CertificateError,
        ConfigurationError,
        DPTrainerError,
        PrivacyBudgetError,
        RunFaultError,
        UnsupportedOperationError,
    )
    from dp_trainer.gradients.certificate import Certificate, certify
    from dp_trainer.gradients.explain import explain
    from dp_trainer.gradients.rules.base import operation_rule
    from dp_trainer.gradients.strategies import ClippedGradientSum, clipped_gradient_sum
    from dp_trainer.privacy.clipping import (
        AutomaticClipping,
        ClippingFunction,
        FlatClipping,
        GlobalClipping,
        NormalizingClipping,
    )
    from dp_trainer.trainer import DPTrainer

_HOMES = {
    "AutomaticClipping": "dp_trainer.privacy.clipping",
    "Certificate": "dp_trainer.gradients.certificate",
    "CertificateError": "dp_trainer.errors",
    "ClippedGradientSum": "dp_trainer.gradients.strategies",
    "ClippingFunction": "dp_trainer.privacy.clipping",
    "ConfigurationError": "dp_trainer.errors",
    "DPTrainer": "dp_trainer.trainer",
    "DPTrainerError": "dp_trainer.errors",
    "FlatClipping": "dp_trainer.privacy.clipping",
    "GlobalClipping": "dp_trainer.privacy.clipping",
    "NormalizingClipping": "dp_trainer.privacy.clipping",
    "PrivacyArguments": "dp_trainer.arguments",
    "PrivacyBudgetError": "dp_trainer.errors",
    "RunFaultError": "dp_trainer.errors",
    "UnsupportedOperationError": "dp_trainer.errors",
    "certify": "dp_trainer.gradients.certificate",
    "clipped_gradient_sum": "dp_trainer.gradients.strategies",
    "explain": "dp_trainer.gradients.explain",
    "freeze_batch_norm": "dp_trainer.batch_norm",
    "operation_rule": "dp_trainer.gradients.rules.base",
}

__all__ = [
    "AutomaticClipping",
    "Certificate",
    "CertificateError",
    "ClippedGradientSum",
    "ClippingFunction",
    "ConfigurationError",
    "DPTrainer",
    "DPTrainerError",
    "FlatClipping",
    "GlobalClipping",
    "NormalizingClipping",
    "PrivacyArguments",
    "PrivacyBudgetError",
    "RunFaultError",
    "UnsupportedOperationError",
    "certify",
    "clipped_gradient_sum",
    "explain",
    "freeze_batch_norm",
    "operation_rule",
]


def __getattr__(name: str) -> Any:
    """Loads a public name from its module, so that the numbers alone import quickly."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dp_trainer' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
