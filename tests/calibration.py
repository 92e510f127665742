"""How fast and how tight calibration is: ``python tests/calibration.py --write docs/calibration.md``.

*Excess* is how much larger the noise multiplier is than the optimal one: that whose ε by privacy loss distributions,
on the better of its own and a finer grid and with nothing taken off δ for rounding, is the target. Every grid is pessimistic,
so the smallest ε is the nearest to the truth.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pages import write_page

from dp_trainer.privacy.accounting import FINE_CELLS, EpsilonCurve
from dp_trainer.privacy.allowance import calibrate_batch_size, calibrate_steps
from dp_trainer.privacy.calibration import calibrate_noise
from dp_trainer.privacy.gaussian import gaussian_distance
from dp_trainer.privacy.mechanism import mechanism_of

# Calibration's own grid, and a finer one, which is not always the better: its rounding adds up as well.
CELLS = (FINE_CELLS, 2 * FINE_CELLS)
LARGEST_EXCESS, LONGEST_SECONDS = 0.005, 4.0
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Run:
    """What is asked: (ε, N, B, T), and δ = min(1e-5, 1 / (10 N))."""

    epsilon: float
    size: int
    batch: int
    steps: int
    relation: str = "add_or_remove_one"

    @property
    def delta(self) -> float:
        """δ, well below 1/N."""
        return min(1e-5, 0.1 / self.size)

    @property
    def sampling(self) -> str:
        """Full batches where B is N."""
        return "full_batch" if self.batch == self.size else "poisson"

    def mechanism(self, noise_multiplier: float):
        """One step of it."""
        return mechanism_of(
            dataset_size=self.size,
            sampling=self.sampling,
            expected_batch_size=self.batch,
            noise_multiplier=noise_multiplier,
            neighbouring_relation=self.relation,
        )

    def noise(self) -> float:
        """The noise multiplier that calibration finds."""
        return calibrate_noise(
            self.mechanism(1.0), target_epsilon=self.epsilon, target_delta=self.delta, steps=self.steps
        )


# Batches from one sample to nearly all, steps from one to a million.
BATCHES = {10**3: (1, 10, 100, 500), 10**5: (32, 1000, 256, 30_000), 10**8: (10**6, 256, 10**4, 3 * 10**7)}
STEPS = (1, 300, 20_000, 10**6)
RUNS = [
    *(Run(target, size, batch, steps) for size, batches in BATCHES.items()
      for batch, steps in zip(batches, STEPS, strict=True) for target in (0.1, 8.0, 100.0)),
    *(Run(target, 10**4, 10**4, steps) for target in (0.1, 100.0) for steps in (1, 10**6)),
    *(Run(target, 10**5, 500, 2000, "replace_one") for target in (0.1, 1.0, 8.0, 100.0)),
]  # fmt: skip


def timed(answer: Callable[[], Answer]) -> tuple[Answer, float]:
    """Returns the answer and the processor seconds it took."""
    start = time.process_time()
    return answer(), time.process_time() - start


def epsilon_on(run: Run, noise_multiplier: float, cells: int) -> float:
    """ε on one grid, nothing taken off δ."""
    composed = EpsilonCurve(run.mechanism(noise_multiplier), horizon=run.steps, cells=cells).composed(
        run.steps
    )
    return float(composed.get_epsilon_for_delta(run.delta))


def excess(run: Run, noise_multiplier: float) -> float:
    """How much larger than the optimal one a noise multiplier is, relatively."""
    if run.mechanism(1.0).is_unsampled:
        optimal = math.sqrt(run.steps) / gaussian_distance(run.epsilon, run.delta)
        return noise_multiplier / optimal - 1.0
    grids = [epsilon_on(run, noise_multiplier, cells) for cells in CELLS]
    # ε is nearly a power of σ over half a percent, so its slope tells where the target is met.
    slope = math.log(epsilon_on(run, noise_multiplier / 1.005, CELLS[0]) / grids[0]) / math.log(1.005)
    return math.expm1(math.log(run.epsilon / min(grids)) / slope)


def page() -> str:
    """Returns the tables as Markdown."""
    lines = [
        "# Calibration",
        "",
        "Noise multipliers for (ε, N, B, T) at δ = min(1e-5, 1 / (10 N)), the processor seconds that finding one took on",
        "one core, and its *excess* over the optimal one: that whose ε by privacy loss distributions on finer grids is the",
        "target. Poisson sampling with the default cap, or full batches where B = N (closed form); the last rows with",
        "replaced samples. Written by `make calibration`.",
        "",
        "| ε | N | B | T | δ | noise multiplier | seconds | excess |",
        "| --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    worst, longest = 0.0, 0.0
    for run in RUNS:
        noise, seconds = timed(run.noise)
        over = excess(run, noise)
        relation = " (replaced)" if run.relation == "replace_one" else ""
        lines.append(
            f"| {run.epsilon:g}{relation} | {run.size:.0e} | {run.batch} | {run.steps} | {run.delta:g} | {noise:.5g} | "
            f"{seconds:.2f} | {over:.3%} |"
        )
        worst, longest = max(worst, over), max(longest, seconds)
        print(lines[-1], flush=True)  # noqa: T201
    lines += [
        "",
        f"{len(RUNS)} runs. Largest excess {worst:.3%}, longest {longest:.2f} s.",
        "",
        "The way back, from the noise multiplier that 1 % more than the target of each run needs: the steps and the",
        "logical batch it allows.",
        "",
        "| ε | N | B | T | noise multiplier | steps | seconds | logical batch | seconds |",
        "| --: | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for run in (Run(8.0, 67_349, 1000, 203), Run(1.0, 10**6, 1000, 20_000), Run(2.0, 10**8, 10**4, 10**5), Run(0.5, 1000, 20, 500)):  # fmt: skip
        noise = 1.01 * run.noise()
        target = {"target_epsilon": run.epsilon, "target_delta": run.delta}
        steps, first = timed(
            lambda run=run, noise=noise, target=target: calibrate_steps(run.mechanism(noise), **target)
        )
        batch, second = timed(
            lambda run=run, noise=noise, target=target: calibrate_batch_size(
                noise_multiplier=noise, dataset_size=run.size, steps=run.steps, **target
            )
        )
        lines.append(
            f"| {run.epsilon:g} | {run.size:.0e} | {run.batch} | {run.steps} | {noise:.5g} | {steps} | {first:.2f} | "
            f"{batch} | {second:.2f} |"
        )
        longest = max(longest, first, second)
    assert worst <= LARGEST_EXCESS, f"excess {worst:.3%}"
    assert longest <= LONGEST_SECONDS, f"{longest:.2f} s"
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    write_page(page, description=__doc__)
