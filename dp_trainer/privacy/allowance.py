"""From a privacy target to how much training it allows: the most steps, or the largest logical batch."""

from __future__ import annotations

import math
from collections.abc import Callable

from dp_trainer.errors import ConfigurationError, PrivacyBudgetError
from dp_trainer.privacy.accounting import COARSE_CELLS, FINE_CELLS, EpsilonCurve, most_steps
from dp_trainer.privacy.calibration import ROUGH_CELLS, check_target
from dp_trainer.privacy.mechanism import Mechanism, mechanism_of, steps_of_one_pass

# More steps are not looked at: the accounting of a longer run takes long and needs a large δ.
LARGEST_STEPS = 1_000_000
# So near the target ε a search for whole numbers ends.
_CLOSE = 0.999


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
    check_target("calibrate_steps", target_epsilon, target_delta)

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
    check_target("calibrate_batch_size", target_epsilon, target_delta)
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


def _largest_within(spent: Callable[[int, int], float], target: float, *, low: int, high: int) -> int:
    """A whole number in [low, high) whose ε on the fine grid is on target, and within 0.1 % of it or of the largest.

    Args:
        spent: ε of a number, on a grid of so many cells; grows with the number.
        target: ε wanted.
        low: On target.
        high: Not on target.
    """
    rough, slope = _closing_in(
        lambda number: spent(number, ROUGH_CELLS),
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
    rough = spent(number, ROUGH_CELLS)
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
