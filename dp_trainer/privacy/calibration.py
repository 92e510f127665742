"""From a privacy target to what meets it: the noise multiplier, the steps, or the logical batch."""

from __future__ import annotations

import math
from collections.abc import Callable

from dp_trainer.errors import ConfigurationError, PrivacyBudgetError
from dp_trainer.privacy.accounting import (
    COARSE_CELLS,
    FINE_CELLS,
    EpsilonCurve,
    check_supported,
    most_steps,
    renyi_epsilon_without_cap,
)
from dp_trainer.privacy.gaussian import gaussian_distance
from dp_trainer.privacy.mechanism import Mechanism, check_delta, mechanism_of, steps_of_one_pass

SMALLEST_NOISE_MULTIPLIER, LARGEST_NOISE_MULTIPLIER = 0.05, 1e6
# More steps are not looked at: the accounting of a longer run takes long and needs a large δ.
LARGEST_STEPS = 1_000_000
_ROUGH_CELLS = 4_000
# So near the target ε a search for whole numbers ends.
_CLOSE = 0.999
_FEW_ORDERS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512, 1024)


def calibrate_noise(
    *,
    target_epsilon: float,
    target_delta: float,
    steps: int,
    sampling_probability: float,
    dataset_size: int,
    sampling: str,
    batch_cap: int,
    accountant: str = "pld",
    neighbouring_relation: str = "add_or_remove_one",
) -> float:
    """The smallest noise multiplier that keeps a whole run within (ε, δ).

    Guarantee: the verified ε of the returned value is at most ``target_epsilon``, and
    the value is within half a percent of the smallest such one (but never
    below 0.05). RDP brackets it, a rough grid narrows it, the fine grid finds and verifies it.

    Args:
        target_epsilon: ε of the run, positive.
        target_delta: δ of the run.
        steps: Releases in the run.
        sampling_probability: q, in (0, 1].
        dataset_size: Public number of samples.
        sampling: ``"poisson"``, ``"full_batch"`` or ``"shuffle"``.
        batch_cap: Largest logical batch.
        accountant: Which accountant decides.
        neighbouring_relation: ``"add_or_remove_one"`` or ``"replace_one"``.

    Raises:
        ConfigurationError: If an argument is out of range.
        PrivacyBudgetError: If no noise multiplier reaches the target.
    """
    _check_target("calibrate_noise", target_epsilon, target_delta)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigurationError(f"calibrate_noise: steps is {steps!r}. It must be a positive whole number.")

    def mechanism(noise_multiplier: float) -> Mechanism:
        return Mechanism(
            dataset_size=dataset_size,
            sampling=sampling,
            sampling_probability=sampling_probability,
            batch_cap=batch_cap,
            noise_multiplier=noise_multiplier,
            neighbouring_relation=neighbouring_relation,
        )

    def spent(noise_multiplier: float, cells: int = COARSE_CELLS) -> float:
        curve = EpsilonCurve(mechanism(noise_multiplier), horizon=steps, accountant=accountant, cells=cells)
        return curve.epsilon(steps, target_delta)

    check_supported(mechanism(1.0), accountant)
    if mechanism(1.0).is_unsampled and accountant != "rdp":
        # The distance of the means is inversely proportional to the noise.
        distance = gaussian_distance(target_epsilon, target_delta)
        found = max(SMALLEST_NOISE_MULTIPLIER, mechanism(1.0).distance(steps) / distance)
        # Rounding in σ → μ → ε may land a hair above the target.
        hair = 1e-9
        while spent(found) > target_epsilon:
            found, hair = found * (1.0 + hair), 2.0 * hair
        if found > LARGEST_NOISE_MULTIPLIER:
            raise _unreachable(target_epsilon)
        return found
    start = _renyi_guess(
        lambda value: renyi_epsilon_without_cap(mechanism(value), steps, target_delta, _FEW_ORDERS),
        target_epsilon,
    )
    rough, slope = _smallest_within(lambda value: spent(value, _ROUGH_CELLS), target_epsilon, start)
    return _polished(lambda value: spent(value, FINE_CELLS), target_epsilon, rough, slope)


def calibrate_steps(
    mechanism: Mechanism, *, target_epsilon: float, target_delta: float, accountant: str = "pld"
) -> int:
    """The most steps of a mechanism whose ε is within the target.

    Guarantee: the verified ε of the returned number is at most ``target_epsilon``. It is the largest such
    number to about half a percent, but never more than ``LARGEST_STEPS`` or than can be told from rounding at
    this δ, beyond which it does not look.

    Args:
        mechanism: The release that is repeated, with its noise.
        target_epsilon: ε of the run, positive.
        target_delta: δ of the run.
        accountant: Which accountant decides.

    Raises:
        ConfigurationError: If an argument is out of range.
        PrivacyBudgetError: If not one step fits.
    """
    _check_target("calibrate_steps", target_epsilon, target_delta)

    def spent(steps: int, cells: int = COARSE_CELLS) -> float:
        curve = EpsilonCurve(mechanism, horizon=steps, accountant=accountant, cells=cells)
        return curve.epsilon(steps, target_delta)

    if spent(1) > target_epsilon and spent(1, FINE_CELLS) > target_epsilon:
        raise PrivacyBudgetError(
            f"Not one step with noise_multiplier {mechanism.noise_multiplier:g} fits epsilon {target_epsilon:g} at "
            f"delta {target_delta:g}. Raise the noise or the target."
        )
    most = min(LARGEST_STEPS, most_steps(target_delta)) if accountant == "pld" else LARGEST_STEPS
    within, beyond = 1, 8
    while beyond <= most and _fits(spent, beyond, target_epsilon):
        within, beyond = beyond, 8 * beyond
    if beyond > most and spent(most, FINE_CELLS) <= target_epsilon:
        return most
    return _largest_within(spent, target_epsilon, low=within, high=min(beyond, most))


def calibrate_batch_size(
    *,
    target_epsilon: float,
    target_delta: float,
    noise_multiplier: float,
    dataset_size: int,
    steps: int | None = None,
    epochs: float | None = None,
    sampling: str = "poisson",
    neighbouring_relation: str = "add_or_remove_one",
    accountant: str = "pld",
) -> int:
    """The largest expected logical batch whose run is within the target.

    Guarantee: the verified ε of the returned size is at most ``target_epsilon``. It is the largest such size to
    about half a percent. With epochs, batches so small that they take more than ``LARGEST_STEPS``
    are not looked at, and ε may jump where a batch no longer divides the samples evenly.

    Args:
        target_epsilon: ε of the run, positive.
        target_delta: δ of the run.
        noise_multiplier: Noise std over sensitivity.
        dataset_size: Public number of samples N.
        steps: Releases in the run, whatever the batch; or
        epochs: passes over the data, each ceil(N / B) steps.
        sampling: ``"poisson"`` or ``"shuffle"``; under Poisson sampling the cap is the default one.
        neighbouring_relation: ``"add_or_remove_one"`` or ``"replace_one"``.
        accountant: Which accountant decides.

    Raises:
        ConfigurationError: If an argument is out of range.
        PrivacyBudgetError: If not even the smallest batch fits.
    """
    _check_target("calibrate_batch_size", target_epsilon, target_delta)
    if epochs is not None:
        _check_epochs(epochs)
    if (steps is None) == (epochs is None) or sampling == "full_batch":
        raise ConfigurationError(
            "calibrate_batch_size: give steps or epochs, one of them, and a sampling other than 'full_batch', whose "
            "batch is the dataset."
        )

    def spent(batch: int, cells: int = COARSE_CELLS) -> float:
        length = steps_in(epochs, dataset_size, batch) if epochs is not None else steps
        assert length is not None
        mechanism = mechanism_of(
            dataset_size=dataset_size,
            sampling=sampling,
            expected_batch_size=batch,
            noise_multiplier=noise_multiplier,
            neighbouring_relation=neighbouring_relation,
        )
        curve = EpsilonCurve(mechanism, horizon=length, accountant=accountant, cells=cells)
        return curve.epsilon(length, target_delta)

    low = 1 if epochs is None else min(dataset_size, math.ceil(dataset_size * epochs / LARGEST_STEPS))
    if spent(low) > target_epsilon and spent(low, FINE_CELLS) > target_epsilon:
        raise PrivacyBudgetError(
            f"Not even a logical batch of {low} with noise_multiplier {noise_multiplier:g} fits epsilon "
            f"{target_epsilon:g} at delta {target_delta:g}. Raise the noise or the target, or train for less long."
        )
    if spent(dataset_size, FINE_CELLS) <= target_epsilon:
        return dataset_size
    return _largest_within(spent, target_epsilon, low=low, high=dataset_size)


def steps_in(epochs: float, dataset_size: int, batch_size: int) -> int:
    """Optimizer steps of so many passes over the data, rounded up as in ``Trainer``.

    Raises:
        ConfigurationError: If ``epochs`` is not positive.
    """
    _check_epochs(epochs)
    return math.ceil(epochs * steps_of_one_pass(dataset_size, batch_size))


def _check_epochs(epochs: float) -> None:
    if not (math.isfinite(epochs) and epochs > 0.0):
        raise ConfigurationError(f"epochs is {epochs!r}. It must be a positive number.")


def _check_target(place: str, target_epsilon: float, target_delta: float) -> None:
    if not (math.isfinite(target_epsilon) and target_epsilon > 0.0):
        raise ConfigurationError(f"{place}: target_epsilon is {target_epsilon!r}. It must be positive.")
    check_delta(target_delta, place)


def _largest_within(spent: Callable[[int, int], float], target: float, *, low: int, high: int) -> int:
    """A whole number in [low, high) whose ε on the fine grid is on target, and within 0.1 % of it or of the largest.

    Args:
        spent: ε of a number, on a grid of so many cells; grows with the number.
        target: ε wanted.
        low: On target.
        high: Not on target.
    """
    rough, slope = _closing_in(
        lambda number: spent(number, _ROUGH_CELLS),
        target,
        low,
        high,
        math.sqrt(low * high),
        0.5,
        precision=20,
    )
    # A rough grid asks for too small a number, by less than a third wherever that was measured.
    bound = min(high, 2 * rough + 8)
    found, _ = _closing_in(
        lambda number: spent(number, FINE_CELLS), target, low, bound, rough, slope, precision=500
    )
    # All but the lowest number was looked at on the fine grid.
    while found == low and spent(found, FINE_CELLS) > target:
        if found == 1:
            raise PrivacyBudgetError(f"Not even 1 fits epsilon {target:g}. Raise the noise or the target.")
        low = found = max(1, found - max(1, found // 1000))
    return found


def _fits(spent: Callable[[int, int], float], number: int, target: float) -> bool:
    """Whether ε of a number is on target on the fine grid; looks at it only where the rough grid leaves doubt."""
    rough = spent(number, _ROUGH_CELLS)
    return rough <= target or (rough <= 1.5 * target and spent(number, FINE_CELLS) <= target)


def _closing_in(
    spent: Callable[[int], float],
    target: float,
    low: int,
    high: int,
    guess: float,
    slope: float,
    *,
    precision: int,
) -> tuple[int, float]:
    """A number within one in ``precision`` of the largest in [low, high) that is on target; and ε's slope in log-log."""
    last, at_last = 0, 0.0
    while high - low > max(1, low // precision):
        whole = min(max(round(guess), low + 1), high - 1)
        at_whole = spent(whole)
        usable = 0.0 < at_whole < math.inf
        if usable and at_last > 0.0 and at_last != at_whole:
            # Nearly a straight line in log-log, through the last two.
            slope = min(max(math.log(at_whole / at_last) / math.log(whole / last), 0.1), 10.0)
        last, at_last = (whole, at_whole) if usable else (0, 0.0)
        low, high = (whole, high) if at_whole <= target else (low, whole)
        if _CLOSE * target <= at_whole <= target:
            break
        guess = math.sqrt(low * high)
        if usable and high < 16 * low:
            # Once near, one step past the target closes the other side.
            aim = whole * (target / at_whole) ** (1.0 / slope)
            near = max(1, low // precision)
            guess = max(aim, low + near) if at_whole <= target else min(aim, high - near)
            guess = guess if low < guess < high else math.sqrt(low * high)
    return low, slope


def _renyi_guess(spent: Callable[[float], float], target: float) -> float:
    low, high = math.log(SMALLEST_NOISE_MULTIPLIER), math.log(1000.0)
    while high - low > 0.02:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if spent(math.exp(middle)) <= target else (middle, high)
    return math.exp(high)


def _polished(spent: Callable[[float], float], target: float, start: float, slope: float) -> float:
    """The smallest noise multiplier on target, to 0.12 % or to 0.2 % of the target, in few evaluations.

    Args:
        spent: ε of a noise multiplier; decreases.
        target: ε wanted.
        start: Where to begin.
        slope: How many times faster than the noise grows ε falls there, about.
    """
    low, high, at_low, at_high = 0.0, math.inf, math.inf, 0.0
    guess, last, at_last = start, start, math.inf
    while True:
        at_guess = spent(guess)
        if at_guess <= target:
            high, at_high = guess, at_guess
        else:
            low, at_low = guess, at_guess
        if high <= max(1.0012 * low, SMALLEST_NOISE_MULTIPLIER) or 0.998 * target <= at_high:
            return high
        known = 0.0 < at_high < at_low < math.inf
        if 0.0 < at_guess < math.inf and 0.0 < at_last < math.inf and at_guess != at_last:
            # Nearly a straight line in log-log, through the last two.
            slope = max(0.3, math.log(at_last / at_guess) / math.log(guess / last))
        last, at_last = guess, at_guess
        # A little to the safe side, so that the next one is on target.
        factor = (at_guess / (0.9996 * target)) ** (1.0 / slope) if 0.0 < at_guess < math.inf else 1.1
        guess *= min(max(factor if at_guess > 0.0 else 1 / 1.1, 0.8), 1.25)
        if low > 0.0 and math.isfinite(high):
            guess = min(max(guess, low * 1.0005), high / 1.0005) if known else math.sqrt(low * high)
        guess = max(guess, SMALLEST_NOISE_MULTIPLIER)
        if guess > LARGEST_NOISE_MULTIPLIER:
            raise _unreachable(target)


def _smallest_within(spent: Callable[[float], float], target: float, start: float) -> tuple[float, float]:
    """A noise multiplier within 3 % of the smallest whose ε is on target, and how fast ε falls; ``spent`` decreases."""
    low = high = start
    at_low = at_high = spent(start)
    factor = 1.1
    while at_high > target:
        low, at_low = high, at_high
        high, factor = high * factor, factor**2
        if high > LARGEST_NOISE_MULTIPLIER:
            raise _unreachable(target)
        at_high = spent(high)
    factor = 1.1
    while at_low <= target:
        high, at_high = low, at_low
        if low == SMALLEST_NOISE_MULTIPLIER:
            return low, 1.0
        low, factor = max(SMALLEST_NOISE_MULTIPLIER, low / factor), factor**2
        at_low = spent(low)
    while high / low > 1.03:
        guess = math.sqrt(low * high)
        if 0.0 < at_high < at_low < math.inf:
            # Nearly a straight line in log-log, so interpolation lands close; the clamp closes the other side.
            share = math.log(at_low / target) / math.log(at_low / at_high)
            guess = low * (high / low) ** share
        guess = min(max(guess, low * 1.01), high / 1.01)
        at_guess = spent(guess)
        if at_guess <= target:
            high, at_high = guess, at_guess
        else:
            low, at_low = guess, at_guess
    slope = 1.0
    if 0.0 < at_high < at_low < math.inf and high > low:
        slope = max(0.5, math.log(at_low / at_high) / math.log(high / low))
    return high, slope


def _unreachable(target_epsilon: float) -> PrivacyBudgetError:
    return PrivacyBudgetError(
        f"No noise multiplier up to {LARGEST_NOISE_MULTIPLIER:g} keeps this run within epsilon {target_epsilon:g}. "
        "Raise target_epsilon or target_delta, take fewer steps or smaller batches, or raise batch_cap."
    )
