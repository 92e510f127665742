"""From a mechanism to its ε, by one of three accountants behind one interface.

Every ε here is an upper bound for the mechanism that runs. Three ways to compose steps:

- ``pld`` (decides by default): privacy loss distributions on a grid, rounded
  pessimistically (``loss_distribution.py``). A coarser grid only raises ε.
  Losses too large for any grid (noise of a few hundredths over very many steps) get a formal bound instead.
- ``rdp``: Rényi divergences; looser, an independent cross-check.
- ``prv``: opacus' composition, an independent cross-check. It follows the loss of
  removing a sample only, the larger of the two wherever both were compared.

Without sampling there is a closed form (``gaussian.py``), which stands in for ``pld`` and ``prv``; shuffled
batches count as unsampled. The central-limit formula called GDP under-reports and is not offered.

Under sampling, replacing a sample is known to ``pld`` alone; the others refuse it by name.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import dp_accounting
import numpy as np
import numpy.typing as npt
from dp_accounting.pld import pld_pmf, privacy_loss_distribution
from dp_accounting.rdp import RdpAccountant, compute_epsilon
from scipy import stats  # type: ignore[import-untyped]

from dp_trainer.errors import ConfigurationError
from dp_trainer.privacy.gaussian import gaussian_epsilon
from dp_trainer.privacy.loss_distribution import (
    composed,
    grid_width,
    one_step_distributions,
    rounding_allowance,
)
from dp_trainer.privacy.mechanism import (
    NEIGHBOURING_RELATIONS,
    SAMPLINGS,
    Mechanism,
    check_delta,
    default_batch_cap,
)

__all__ = [
    "ACCOUNTANTS",
    "COARSE_CELLS",
    "FINE_CELLS",
    "NEIGHBOURING_RELATIONS",
    "SAMPLINGS",
    "EpsilonCurve",
    "Mechanism",
    "check_delta",
    "check_supported",
    "default_batch_cap",
    "epsilon",
    "epsilon_of_divergences",
    "is_supported",
    "most_steps",
    "renyi_divergences",
    "renyi_epsilon_without_cap",
    "rounded_up",
    "rounding_allowance",
]

ACCOUNTANTS = ("pld", "rdp", "prv")

# Grid cells in one step's range of losses: the run's verdict, and log lines.
FINE_CELLS, COARSE_CELLS = 40_000, 15_000
# Beyond this width of a cell the losses are so large that only a formal bound is left.
WIDEST_GRID = 20.0
# δ stays so many times above what rounding may take from it.
_ABOVE_ROUNDING = 10.0


class EpsilonCurve:
    """ε after any number of steps of one mechanism, quickly.

    Guarantee: every value is an upper bound on the mechanism's ε; a coarser grid
    or longer horizon only raises it. One step's distribution is built once and kept.

    Args:
        mechanism: The release that is repeated.
        horizon: The most steps that will be asked about; sets the grid.
        accountant: ``"pld"``, ``"rdp"`` or ``"prv"``. Without sampling ``pld`` and ``prv`` mean the closed form.
        cells: Grid cells over one step's range of losses: accuracy against time.

    Raises:
        ConfigurationError: On an unknown accountant, steps outside [0, horizon], or a δ too
            small for the arithmetic.
    """

    def __init__(
        self, mechanism: Mechanism, *, horizon: int, accountant: str = "pld", cells: int = COARSE_CELLS
    ) -> None:
        if accountant not in ACCOUNTANTS:
            raise ConfigurationError(f"accountant is {accountant!r}. Choose one of {', '.join(ACCOUNTANTS)}.")
        if isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 1:
            raise ConfigurationError(
                f"EpsilonCurve: horizon is {horizon!r}. It must be a positive number of steps."
            )
        check_supported(mechanism, accountant)
        self.mechanism = mechanism
        self.horizon = horizon
        self.accountant = accountant
        self._grid = grid_width(mechanism, horizon, cells)
        self._one_step: list[pld_pmf.PLDPmf] | None = None

    @property
    def grid(self) -> float | None:
        """Width of the grid of privacy losses; None where no grid is used."""
        return None if self.is_closed_form or self.accountant != "pld" else self._grid

    @property
    def is_closed_form(self) -> bool:
        """Whether the exact Gaussian formula is used: without sampling, unless RDP is asked for."""
        return self.mechanism.is_unsampled and self.accountant != "rdp"

    @property
    def is_out_of_reach(self) -> bool:
        """Whether losses are too large for a grid, and ε is bounded by that of as many steps without sampling."""
        return self.accountant == "pld" and not self.mechanism.is_unsampled and self._grid > WIDEST_GRID

    def epsilon(self, steps: int, delta: float) -> float:
        """An upper bound on ε after ``steps`` steps, at this δ; infinite without noise."""
        check_delta(delta, "EpsilonCurve.epsilon")
        if not 0 <= steps <= self.horizon:
            raise ConfigurationError(
                f"EpsilonCurve: {steps} steps is not in [0, {self.horizon}], its horizon."
            )
        if steps == 0:
            return 0.0
        if self.mechanism.noise_multiplier == 0.0:
            return math.inf
        if self.is_closed_form:
            return gaussian_epsilon(self.mechanism.distance(steps), delta)
        if self.is_out_of_reach:
            return self._unsampled_bound(steps, delta)
        if self.accountant == "pld":
            rounding = rounding_allowance(steps)
            if delta < _ABOVE_ROUNDING * rounding:
                raise ConfigurationError(
                    f"delta {delta:g} is too small to be told from rounding after {steps} steps. "
                    f"Use at least {_ABOVE_ROUNDING * rounding:.1e}, or accountant='rdp'."
                )
            found = float(self.composed(steps).get_epsilon_for_delta(delta - rounding))
            return min(found, self._unsampled_bound(steps, delta))
        uncapped = _rdp_epsilon if self.accountant == "rdp" else _prv_epsilon
        return _epsilon_of_capped(uncapped, self.mechanism, steps, delta)

    def _unsampled_bound(self, steps: int, delta: float) -> float:
        """ε of as many steps without sampling, which never hurts; where the cap acts the sum moves twice as far."""
        farther = 1.0 if self.mechanism.cap_probability == 0.0 else 2.0
        return gaussian_epsilon(farther * self.mechanism.distance(steps), delta)

    def composed(self, steps: int) -> privacy_loss_distribution.PrivacyLossDistribution:
        """The privacy loss distribution of ``steps`` steps, pessimistic up to ``rounding_allowance``."""
        if self._one_step is None:
            self._one_step = one_step_distributions(self.mechanism, self._grid)
        return composed(self._one_step, steps)

    def steps_within(self, *, target_epsilon: float, target_delta: float) -> int:
        """The most steps, up to the horizon, whose ε does not exceed the target; 0 if none."""
        if self.epsilon(self.horizon, target_delta) <= target_epsilon:
            return self.horizon
        within, beyond = 0, self.horizon
        while beyond - within > 1:
            middle = (within + beyond) // 2
            fits = self.epsilon(middle, target_delta) <= target_epsilon
            within, beyond = (middle, beyond) if fits else (within, middle)
        return within


def most_steps(delta: float) -> int:
    """The most steps whose ε at this δ can be told from rounding."""
    fixed = rounding_allowance(0)
    return math.floor((delta / _ABOVE_ROUNDING - fixed) / (rounding_allowance(1) - fixed) * (1.0 - 1e-3))


def is_supported(mechanism: Mechanism, accountant: str) -> bool:
    """Whether an accountant knows a bound for this kind of mechanism."""
    return accountant == "pld" or mechanism.is_unsampled or not mechanism.replaces


def check_supported(mechanism: Mechanism, accountant: str) -> None:
    """Checks that an accountant knows a bound for this kind of mechanism.

    Raises:
        ConfigurationError: If it does not.
    """
    if not is_supported(mechanism, accountant):
        raise ConfigurationError(
            f"accountant='{accountant}' knows no bound for neighbouring_relation='replace_one' under Poisson "
            "sampling. Use accountant='pld', or neighbouring_relation='add_or_remove_one'."
        )


def epsilon(mechanism: Mechanism, steps: int, delta: float, *, accountant: str = "pld") -> float:
    """An upper bound on ε after ``steps`` releases, on the fine grid; infinite without noise.

    Args:
        mechanism: The release that is repeated.
        steps: Number of releases, at least 1.
        delta: δ, in [1e-10, 1).
        accountant: ``"pld"``, ``"rdp"`` or ``"prv"``.

    Raises:
        ConfigurationError: If an argument is out of range.
    """
    return EpsilonCurve(mechanism, horizon=steps, accountant=accountant, cells=FINE_CELLS).epsilon(
        steps, delta
    )


def rounded_up(value: float, digits: int = 3) -> str:
    """Writes a privacy loss with so many decimals, never smaller than it is."""
    shift = 10.0**digits
    return "∞" if math.isinf(value) else f"{math.ceil(value * shift) / shift:.{digits}f}"


def _epsilon_of_capped(
    uncapped: Callable[[Mechanism, int, float], float], mechanism: Mechanism, steps: int, delta: float
) -> float:
    """ε of the capped run from that of uncapped Poisson sampling, for any accountant.

    Compare the real run on a dataset with sample i to one that leaves i out
    whenever the others reach the cap. The latter is no easier to tell from the dataset
    without i than uncapped sampling is. *Removing:* the two differ only if i
    gets in at such a step, which has probability at most steps·w·q in all; that
    adds to δ. *Adding:* at such a step the real run equals the other with probability
    at least 1 - q, so each costs at most log 1/(1 - q) in ε, and more than k of them happen
    with a probability that adds to δ.
    """
    weight, q = mechanism.cap_probability, mechanism.sampling_probability
    if weight == 0.0:
        return uncapped(mechanism, steps, delta)
    allowance = max(steps * weight * q, delta / 100.0)
    if allowance >= delta or q == 1.0:
        return math.inf
    reached = int(stats.binom.isf(allowance, steps, weight))
    return uncapped(mechanism, steps, delta - allowance) - reached * math.log1p(-q)


_ORDERS = tuple(1.0 + tenth / 10.0 for tenth in range(1, 100)) + tuple(range(11, 65)) + (128, 256, 512, 1024)


def _rdp_epsilon(mechanism: Mechanism, steps: int, delta: float) -> float:
    return renyi_epsilon_without_cap(mechanism, steps, delta, _ORDERS)


def renyi_epsilon_without_cap(
    mechanism: Mechanism, steps: int, delta: float, orders: Sequence[float]
) -> float:
    """ε of plain Poisson sampling from Rényi divergences of these orders; ignores the cap.

    A replaced sample counts as one that moves the sum twice as far: exact without sampling, else a guess.
    """
    release = dp_accounting.PoissonSampledDpEvent(
        mechanism.sampling_probability,
        dp_accounting.GaussianDpEvent(mechanism.noise_multiplier / mechanism.shift),
    )
    with _quiet_absl():
        accountant = RdpAccountant(orders=list(orders))
        accountant.compose(release, mechanism.releases_with_one_sample(steps))
        return float(accountant.get_epsilon(delta))


def renyi_divergences(mechanism: Mechanism) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Orders, and bounds on one release's Rényi divergences at them, the cap included; needs noise.

    Raises:
        ConfigurationError: If no such bound is known.
    """
    check_supported(mechanism, "rdp")
    noise_multiplier = mechanism.noise_multiplier / mechanism.shift
    orders, weight = np.asarray(_ORDERS, dtype=np.float64), mechanism.cap_probability
    found = []
    for noise in (noise_multiplier, noise_multiplier / 2.0):
        event = dp_accounting.GaussianDpEvent(noise)
        with _quiet_absl():
            accountant = RdpAccountant(orders=list(_ORDERS)).compose(
                dp_accounting.PoissonSampledDpEvent(mechanism.sampling_probability, event)
            )
        found.append(np.asarray(accountant.rdp))
    if weight == 0.0:
        return orders, found[0]
    # exp((order - 1) · divergence) is convex in the pair of outputs: the mixture's is at most the mean of both.
    plain, replacing = ((orders - 1.0) * divergences for divergences in found)
    return orders, np.logaddexp(math.log1p(-weight) + plain, math.log(weight) + replacing) / (orders - 1.0)


def epsilon_of_divergences(orders: Sequence[float], divergences: Sequence[float], delta: float) -> float:
    """ε of a mechanism whose Rényi divergences are bounded so."""
    return float(compute_epsilon(orders, divergences, delta)[0])


def _prv_epsilon(mechanism: Mechanism, steps: int, delta: float) -> float:
    # Loaded here because it brings torch.
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(mechanism.noise_multiplier, mechanism.sampling_probability, steps)]
    with warnings.catch_warnings():
        # A remark about the range of orders that sizes its domain, not about the result.
        warnings.filterwarnings("ignore", message="Optimal order is the", category=UserWarning)
        rough = float(accountant.get_epsilon(delta, eps_error=0.01, delta_error=delta / 1000.0))
        # Its error is absolute, so a small ε is worth a finer second look.
        if rough >= 0.5:
            return rough
        fine = max(rough / 50.0, 1e-4)
        return max(0.0, float(accountant.get_epsilon(delta, eps_error=fine, delta_error=delta / 1000.0)))


@contextmanager
def _quiet_absl() -> Iterator[None]:
    """Silences notes that an order's series did not converge; dropping an order only raises ε."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
