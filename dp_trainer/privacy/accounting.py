"""From a mechanism to its ε: the only place that talks to an accounting library.

Every ε here is an upper bound for the mechanism that runs, under adding or
removing one sample of a dataset of up to N + 1. Three ways to compose steps:

- ``pld`` (decides by default): privacy loss distributions on a grid, rounded
  pessimistically. A coarser grid only raises ε.
- ``rdp``: Rényi divergences; looser, an independent cross-check.
- ``prv``: opacus' composition, an independent cross-check. It follows the loss of
  removing a sample only.

Full batches have a closed form (``gaussian``), which stands in for ``pld`` and ``prv``. The central-limit formula called
GDP under-reports and is not offered.

**The cap.** Poisson sampling that keeps at most ``batch_cap`` samples is not quite
Poisson: where the cap acts, adding a sample may push another one out. Write w for
the probability that the cap is reached by the others, P[Bin(N, q) ≥ cap]. Given
that, the new sample gets in with probability at most q, replacing one whose
clipped gradient also has norm R, so the sum moves by up to 2R. One step is hence
dominated by: with probability w a Poisson-sampled Gaussian of sensitivity 2R,
else one of sensitivity R. ``pld`` composes this mixture. For ``rdp`` and ``prv``
see ``_epsilon_of_capped``.

Rounding: against the closed form, compositions by FFT of k = 1 to 10^5 steps were
found to lose up to 3e-17·k from δ. More than three times that is taken off the target δ first.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import dp_accounting
import numpy as np
import numpy.typing as npt
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.rdp import RdpAccountant, compute_epsilon
from scipy import stats  # type: ignore[import-untyped]

from dp_trainer.errors import ConfigurationError
from dp_trainer.privacy.gaussian import gaussian_epsilon

ACCOUNTANTS = ("pld", "rdp", "prv")
SAMPLINGS = ("poisson", "full_batch")
SMALLEST_DELTA = 1e-10

# Grid cells in one step's range of losses: the run's verdict, and log lines.
FINE_CELLS, COARSE_CELLS = 40_000, 15_000
_TAIL_Z = 10.0  # standard normals beyond this are the tail that dp_accounting cuts at e^-50
_SMALLEST_MIXTURE_WEIGHT = 1e-17


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """One release, as far as privacy is concerned: everything ε depends on but the steps and δ.

    Args:
        dataset_size: Public number N of samples. At most this many may be at hand.
        sampling: ``"poisson"`` or ``"full_batch"``.
        sampling_probability: q, in (0, 1]; 1 for full batches.
        batch_cap: Largest logical batch that is processed; at or above N it never acts.
        noise_multiplier: Noise std over sensitivity; 0 means no privacy.

    Raises:
        ConfigurationError: If a value is out of range.
    """

    dataset_size: int
    sampling: str
    sampling_probability: float
    batch_cap: int
    noise_multiplier: float

    def __post_init__(self) -> None:
        for name in ("dataset_size", "batch_cap"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigurationError(
                    f"Mechanism.{name} is {value!r}. It must be a positive whole number."
                )
        if self.sampling not in SAMPLINGS:
            raise ConfigurationError(
                f"Mechanism.sampling is {self.sampling!r}. Choose one of {', '.join(SAMPLINGS)}."
            )
        if not 0.0 < self.sampling_probability <= 1.0:
            raise ConfigurationError(
                f"Mechanism.sampling_probability is {self.sampling_probability!r}. It must be in (0, 1]: "
                "the expected batch size over the dataset size."
            )
        if self.sampling == "full_batch" and self.sampling_probability != 1.0:
            raise ConfigurationError(
                f"Mechanism: full batches have sampling_probability 1, not {self.sampling_probability!r}."
            )
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0.0):
            raise ConfigurationError(
                f"Mechanism.noise_multiplier is {self.noise_multiplier!r}. It must be finite and not negative."
            )

    @property
    def cap_probability(self) -> float:
        """w: probability that the other samples alone reach the cap, for any dataset of up to N + 1."""
        if self.sampling == "full_batch" or self.batch_cap >= self.dataset_size:
            return 0.0
        return float(stats.binom.sf(self.batch_cap - 1, self.dataset_size, self.sampling_probability))

    @property
    def is_unsampled(self) -> bool:
        """Whether every sample enters every step, so that the closed form applies."""
        return self.sampling_probability == 1.0 and self.cap_probability == 0.0

    def event(self, steps: int) -> dp_accounting.DpEvent:
        """The run in dp_accounting's vocabulary, for records and other accountants.

        It names N + 1, the larger of the two datasets that are compared.
        """
        if self.is_unsampled:
            release = dp_accounting.GaussianDpEvent(self.noise_multiplier)
        elif self.cap_probability == 0.0:
            release = dp_accounting.PoissonSampledDpEvent(
                self.sampling_probability, dp_accounting.GaussianDpEvent(self.noise_multiplier)
            )
        else:
            release = dp_accounting.TruncatedSubsampledGaussianDpEvent(
                dataset_size=self.dataset_size + 1,
                sampling_probability=self.sampling_probability,
                truncated_batch_size=self.batch_cap,
                noise_multiplier=self.noise_multiplier,
            )
        return dp_accounting.SelfComposedDpEvent(release, steps)


class EpsilonCurve:
    """ε after any number of steps of one mechanism, quickly.

    Guarantee: every value is an upper bound on the mechanism's ε; a coarser grid
    or longer horizon only raises it. One step's distribution is built once and kept.

    Args:
        mechanism: The release that is repeated.
        horizon: The most steps that will be asked about; sets the grid.
        accountant: ``"pld"``, ``"rdp"`` or ``"prv"``. For full batches ``pld`` and ``prv`` mean the closed form.
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
        self.mechanism = mechanism
        self.horizon = horizon
        self.accountant = accountant
        self._grid = _grid_width(mechanism, horizon, cells)
        self._one_step: privacy_loss_distribution.PrivacyLossDistribution | None = None

    @property
    def grid(self) -> float | None:
        """Width of the grid of privacy losses; None where no grid is used."""
        return None if self.is_closed_form or self.accountant != "pld" else self._grid

    @property
    def is_closed_form(self) -> bool:
        """Whether the exact Gaussian formula is used: for full batches, unless RDP is asked for."""
        return self.mechanism.is_unsampled and self.accountant != "rdp"

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
            return gaussian_epsilon(math.sqrt(steps) / self.mechanism.noise_multiplier, delta)
        if self.accountant == "pld":
            rounding = rounding_allowance(steps)
            if delta < 10.0 * rounding:
                raise ConfigurationError(
                    f"delta {delta:g} is too small to be told from rounding after {steps} steps. "
                    f"Use at least {10.0 * rounding:.1e}, or accountant='rdp'."
                )
            return float(self.composed(steps).get_epsilon_for_delta(delta - rounding))
        uncapped = _rdp_epsilon if self.accountant == "rdp" else _prv_epsilon
        return _epsilon_of_capped(uncapped, self.mechanism, steps, delta)

    def composed(self, steps: int) -> privacy_loss_distribution.PrivacyLossDistribution:
        """The pessimistic privacy loss distribution of ``steps`` steps."""
        if self._one_step is None:
            self._one_step = _one_step_distribution(self.mechanism, self._grid)
        return self._one_step.self_compose(steps)

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


def default_batch_cap(*, dataset_size: int, expected_batch_size: int) -> int:
    """Six standard deviations above the expected batch size: rarely reached, so it costs almost no ε."""
    return min(dataset_size, math.ceil(expected_batch_size + 6.0 * math.sqrt(expected_batch_size)))


def check_delta(delta: float, place: str) -> None:
    """Checks that δ is one that double precision can account for.

    Raises:
        ConfigurationError: If it is not in [1e-10, 1).
    """
    if not (math.isfinite(delta) and SMALLEST_DELTA <= delta < 1.0):
        raise ConfigurationError(
            f"{place}: delta is {delta!r}. It must be in [{SMALLEST_DELTA:g}, 1), well below one over the dataset "
            "size; smaller values drown in the rounding of the accounting."
        )


def rounding_allowance(steps: int) -> float:
    """More than the FFT's rounding can take from δ in a composition of so many steps."""
    return 1e-14 + 1e-16 * steps


def _grid_width(mechanism: Mechanism, horizon: int, cells: int) -> float:
    """Cell width that spends ``cells`` on one step and a few times that on all of them; only costs accuracy."""
    if mechanism.noise_multiplier == 0.0:
        return 1.0
    q, sigma = mechanism.sampling_probability, mechanism.noise_multiplier
    shift = 2.0 if mechanism.cap_probability > 0.0 else 1.0
    largest = shift**2 / (2.0 * sigma**2) + shift * _TAIL_Z / sigma
    one_step = largest + math.log(q + (1.0 - q) * math.exp(-largest)) + (largest if q == 1.0 else 0.0)
    exponent = min(700.0, 1.0 / sigma**2)
    mean_loss = min(0.5 / sigma**2, 0.5 * math.log1p(q**2 * math.expm1(exponent)))
    all_steps = 2.0 * (horizon * mean_loss + 8.0 * math.sqrt(2.0 * horizon * mean_loss))
    return max(one_step / cells, all_steps / (6 * cells), 1e-9)


def _one_step_distribution(
    mechanism: Mechanism, grid: float
) -> privacy_loss_distribution.PrivacyLossDistribution:
    """The mixture of the module's text: sensitivity R, or with probability w sensitivity 2R."""
    plain = privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=mechanism.noise_multiplier,
        sampling_prob=mechanism.sampling_probability,
        value_discretization_interval=grid,
    )
    weight = mechanism.cap_probability
    if weight == 0.0:
        return plain
    weight = max(weight, _SMALLEST_MIXTURE_WEIGHT)
    replacing = privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=mechanism.noise_multiplier / 2.0,
        sampling_prob=mechanism.sampling_probability,
        value_discretization_interval=grid,
        # Tails of a rare event may be cut earlier; what is cut counts as infinite loss.
        log_mass_truncation_bound=max(-50.0, math.log(1e-18 / weight)),
    )
    return replacing.compute_mixture(plain, weight)


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
    """ε of plain Poisson sampling from Rényi divergences of these orders; ignores the cap."""
    release = dp_accounting.PoissonSampledDpEvent(
        mechanism.sampling_probability, dp_accounting.GaussianDpEvent(mechanism.noise_multiplier)
    )
    with _quiet_absl():
        accountant = RdpAccountant(orders=list(orders)).compose(release, steps)
        return float(accountant.get_epsilon(delta))


def renyi_divergences(mechanism: Mechanism) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Orders, and bounds on one release's Rényi divergences at them, the cap included; needs noise."""
    orders, weight = np.asarray(_ORDERS, dtype=np.float64), mechanism.cap_probability
    found = []
    for noise_multiplier in (mechanism.noise_multiplier, mechanism.noise_multiplier / 2.0):
        event = dp_accounting.GaussianDpEvent(noise_multiplier)
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
