"""Whether logical batches are really drawn as the accounting assumes.

Axes: D draw, N sample.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]
from tqdm import tqdm

from dp_trainer.audit.findings import Finding
from dp_trainer.distributed import RankSampler
from dp_trainer.privacy.plan import PrivacyPlan
from dp_trainer.trainer import DPTrainer

CHECKS = 4
# From here on the cap changes what can be seen, not only what is accounted.
_CAP_IS_SEEN = 1e-6


def check_draws(audited: DPTrainer, *, draws: int, failure: float, quiet: bool = False) -> list[Finding]:
    """Draws logical batches from the run's own DataLoader's sampler and tests them.

    Guarantee: on a correct run a finding disagrees with probability at most about ``failure`` in all.

    Args:
        audited: The run in question.
        draws: How many logical batches.
        failure: Allowed probability of a false alarm.
        quiet: No progress bar.
    """
    rows = len(audited.train_dataset)
    sampler: Any = audited.get_train_dataloader().batch_sampler
    if isinstance(sampler, RankSampler):
        sampler = sampler.sampler  # the whole draw, of which a rank takes its share
    taken: list[NDArray[np.int64]] = []
    with tqdm(total=draws, desc="draws", disable=quiet, leave=False) as progress:
        while len(taken) < draws:
            for draw in sampler:
                taken.append(np.asarray(draw, dtype=np.int64))
                progress.update()
                if len(taken) == draws:
                    break
    return judge_draws(taken, rows=rows, plan=audited.plan, failure=failure)


def judge_draws(
    taken: list[NDArray[np.int64]], *, rows: int, plan: PrivacyPlan, failure: float
) -> list[Finding]:
    """Tests draws against the stated sampling."""
    if plan.sampling == "full_batch":
        whole = all(np.array_equal(np.sort(draw), np.arange(rows)) for draw in taken)
        return [_finding("draws", whole, f"{len(taken)} draws", "every sample in every draw")]
    each = failure / CHECKS
    q = plan.sampling_probability
    counts_N = np.bincount(np.concatenate(taken), minlength=rows)
    sizes_D = np.array([len(draw) for draw in taken])
    single = all(len(np.unique(draw)) == len(draw) for draw in taken) and sizes_D.max() <= plan.batch_cap
    findings = [
        _finding(
            "draws: each sample at most once, the cap kept",
            single,
            f"largest of {len(taken)} draws {sizes_D.max()}",
            f"at most {plan.batch_cap}",
        ),
        _rate(int(counts_N.sum()), rows * len(taken), q, each, capped=_capped(plan)),
    ]
    if _capped(plan):
        return findings
    return [
        *findings,
        _scatter("draws: how often each sample is in", counts_N, len(taken), q, each),
        _scatter("draws: their sizes", sizes_D, rows, q, each),
        _overlaps(taken, rows, q, each),
    ]


def _capped(plan: PrivacyPlan) -> bool:
    return plan.mechanism.cap_probability > _CAP_IS_SEEN


def _rate(hits: int, trials: int, q: float, failure: float, *, capped: bool) -> Finding:
    low, high = stats.binom.ppf(failure / 2, trials, q), stats.binom.isf(failure / 2, trials, q)
    return _finding(
        "draws: sampling probability",
        hits <= high and (capped or hits >= low),
        f"{hits / trials:.6g} over {trials:,} coins",
        f"{q:.6g} (between {low / trials:.6g} and {high / trials:.6g})",
    )


def _scatter(name: str, counts: NDArray[np.int64], trials: int, q: float, failure: float) -> Finding:
    """Whether counts scatter like independent binomial ones: neither less (dealt out) nor more (in groups)."""
    variance = trials * q * (1 - q)
    if variance == 0:
        return _finding(name, bool(np.all(counts == trials)), "every time", "every time")
    ratio = float(np.sum((counts - trials * q) ** 2)) / (len(counts) * variance)
    # A gamma distribution with the sum's own mean and variance, where a chi-squared one would need large counts.
    shape = len(counts) / (2 + (1 - 6 * q * (1 - q)) / variance)
    low, high = stats.gamma.ppf(failure / 2, shape) / shape, stats.gamma.isf(failure / 2, shape) / shape
    return _finding(
        name,
        low <= ratio <= high,
        f"variance {ratio:.4f} of a binomial's",
        f"1 (between {low:.4f} and {high:.4f})",
    )


def _overlaps(taken: list[NDArray[np.int64]], rows: int, q: float, failure: float) -> Finding:
    """Whether a draw tells something about the next one; disjoint pairs, so that their overlaps are independent."""
    shared = sum(
        len(np.intersect1d(first, second, assume_unique=False))
        for first, second in zip(taken[::2], taken[1::2], strict=False)
    )
    trials = rows * (len(taken) // 2)
    low, high = stats.binom.ppf(failure / 2, trials, q * q), stats.binom.isf(failure / 2, trials, q * q)
    return _finding(
        "draws: samples in two draws in a row",
        low <= shared <= high,
        f"{shared:,}",
        f"between {low:,.0f} and {high:,.0f}",
    )


def _finding(name: str, agrees: bool, measured: str, claimed: str) -> Finding:
    return Finding(layer="exact", name=name, agrees=bool(agrees), measured=measured, claimed=claimed)
