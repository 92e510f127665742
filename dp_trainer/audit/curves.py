"""The claimed trade-off curve, from the same accounting as the claimed ε."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dp_trainer.privacy.accounting import Mechanism
from dp_trainer.privacy.attack import attack_rates

_SMALLEST_RATE = 1e-6


class ClaimedCurve:
    """The best true-positive rate that the claim leaves to any attack.

    Guarantee: never below the true bound of the mechanism, so an attack above it contradicts the claim.

    Args:
        mechanism: One release, as accounted.
        steps: Number of releases.
    """

    def __init__(self, mechanism: Mechanism, steps: int) -> None:
        self._mechanism, self._steps = mechanism, steps
        self.rates: NDArray[np.float64] = np.concatenate(
            [np.geomspace(_SMALLEST_RATE, 0.05, 60), np.linspace(0.05, 0.999, 140)[1:]]
        )
        allowed = attack_rates(mechanism, steps, false_positive_rates=[float(rate) for rate in self.rates])
        self.powers: NDArray[np.float64] = np.array([allowed[float(rate)] for rate in self.rates])

    def allowed(self, false_positive_rate: float) -> float:
        """The bound at a false-positive rate; rounded up to the next point where there is no closed form."""
        if self._mechanism.is_unsampled and 0.0 < false_positive_rate < 1.0:
            return attack_rates(self._mechanism, self._steps, false_positive_rates=[false_positive_rate])[
                false_positive_rate
            ]
        place = int(np.searchsorted(self.rates, false_positive_rate))
        return 1.0 if place == len(self.rates) else float(self.powers[place])


def when_drawn(mechanism: Mechanism) -> Mechanism:
    """The same release for a sample that is known to have been drawn: noise alone protects it."""
    return replace(
        mechanism, sampling="full_batch", sampling_probability=1.0, batch_cap=mechanism.dataset_size
    )
