"""The noise that really reaches the gradients: its size, shape and independence.

Noise is what a release holds beyond its clipped sum. It is collected from empty
draws and from draws with samples, in one or several micro-batches, and from two
trainers built one after the other with the same seed: noise from a global
generator would be the same in both.

Axes: R release, E entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]
from torch import Tensor
from tqdm import tqdm
from transformers import set_seed

from dp_trainer.audit.canaries import CanaryTrainer, flat
from dp_trainer.audit.findings import Finding
from dp_trainer.gradients.certificate import LARGEST_EXCESS
from dp_trainer.trainer import DPTrainer

CHECKS = 6
_TRAINERS = 2
# At least so many releases, so that empty and other draws of both trainers are seen.
_FEWEST = 8
# Entries looked at in all: two million of each release at least, and a transform that fits in memory.
_MOST_ENTRIES = 2**24
_SHAPE_ENTRIES = 200_000


def check_noise(
    audited: DPTrainer, samples: Sequence[Any], *, entries: int, failure: float, quiet: bool = False
) -> list[Finding]:
    """Measures the noise of many releases against the plan's.

    Guarantee: on a correct run a finding disagrees with probability at most ``failure`` in all.

    Args:
        audited: The run in question.
        samples: Samples of the draws that are not empty.
        entries: Entries to collect at least.
        failure: Allowed probability of a false alarm.
        quiet: No progress bar.
    """
    noise_RE, names = collect_noise(audited, samples, entries=entries, quiet=quiet)
    return judge_noise(noise_RE, names, stated=audited.plan.noise_std, failure=failure)


def collect_noise(
    audited: DPTrainer, samples: Sequence[Any], *, entries: int, quiet: bool
) -> tuple[NDArray[np.float64], dict[str, int]]:
    """The noise of at least eight releases, (R, E), and how many of the entries each parameter has."""
    clean = CanaryTrainer(audited=audited, samples=samples, entries=2, steps=3, noised=False)
    draws: list[Sequence[Any]] = [(), samples[:1], samples]
    sums = [flat(clean.released(clean.batch(draw))) for draw in draws]
    size = len(sums[0])
    releases = max(_FEWEST, -(-entries // size))
    kept = min(size, _MOST_ENTRIES // releases)
    rows: list[Tensor] = []
    progress = tqdm(total=releases, desc="noise", disable=quiet, leave=False)
    names: dict[str, int] = {}
    for part in range(_TRAINERS):
        set_seed(audited.args.seed)
        count = releases // _TRAINERS if part else releases - releases // _TRAINERS
        trainer = CanaryTrainer(audited=audited, samples=samples, entries=2, steps=count, noised=True)
        for index in range(count):
            which = index % len(draws)
            pieces = trainer.batch(draws[which], samples_per_micro_batch=max(1, len(draws[which]) // 2))
            released = trainer.released(pieces)
            names = {name: tensor.numel() for name, tensor in released.items()}
            rows.append((flat(released) - sums[which])[:kept])
            progress.update()
    progress.close()
    return torch.stack(rows).numpy(), names


def judge_noise(
    noise_RE: NDArray[np.float64], names: dict[str, int], *, stated: float, failure: float
) -> list[Finding]:
    """Six tests of the noise, each at a sixth of the allowed probability of a false alarm."""
    each = failure / CHECKS
    standard_RE = noise_RE / stated
    return [
        _size(standard_RE, stated, each),
        _size_of_each(standard_RE, names, each),
        _mean(standard_RE, each),
        _shape(standard_RE, each),
        *_echoes(standard_RE, each),
    ]


def _spread_is_possible(squares: NDArray[np.float64], counts: NDArray[np.int64], failure: float) -> bool:
    """Whether sums of so many squares fit a variance between the stated one and the one with rounding's margin."""
    each = failure / (2 * len(counts))
    low = stats.chi2.ppf(each, counts)
    high = stats.chi2.isf(each, counts) * (1 + LARGEST_EXCESS) ** 2
    return bool(np.all((low <= squares) & (squares <= high)))


def _size(standard_RE: NDArray[np.float64], stated: float, failure: float) -> Finding:
    count = standard_RE.size
    squares = np.array([float(np.sum(standard_RE**2))])
    half = stats.norm.isf(failure / 2) / np.sqrt(2 * count)
    return Finding(
        layer="exact",
        name="noise std",
        agrees=_spread_is_possible(squares, np.array([count]), failure),
        measured=f"{np.sqrt(squares[0] / count):.5f} ± {half:.5f} of the stated, on {count:,} entries of "
        f"{len(standard_RE)} releases",
        claimed=f"{stated:.6g} on the clipped sum",
    )


def _size_of_each(standard_RE: NDArray[np.float64], names: dict[str, int], failure: float) -> Finding:
    """Each parameter of each release by itself, so that one left without noise cannot hide."""
    squares, counts, start = [], [], 0
    worst, worst_name = 1.0, ""
    for name, length in names.items():
        piece = standard_RE[:, start : start + length]
        start += length
        if piece.size == 0:
            continue
        sums = np.sum(piece**2, axis=1)
        squares.append(sums)
        counts.append(np.full(len(sums), piece.shape[1]))
        ratios = np.sqrt(sums / piece.shape[1])
        # Small parameters scatter more: what counts is how many of their own errors they are off.
        off = np.abs(ratios - 1) * np.sqrt(2 * piece.shape[1])
        if not worst_name or np.max(off) > worst:
            worst, worst_name = float(np.max(off)), name
    return Finding(
        layer="exact",
        name="noise std of each parameter and release",
        agrees=_spread_is_possible(np.concatenate(squares), np.concatenate(counts), failure),
        measured=f"furthest off: {worst_name}, by {worst:.1f} standard errors",
        claimed="the same for every entry of every release",
    )


def _mean(standard_RE: NDArray[np.float64], failure: float) -> Finding:
    z = float(np.sum(standard_RE) / np.sqrt(standard_RE.size))
    limit = float(stats.norm.isf(failure / 2))
    return Finding(
        layer="exact",
        name="noise mean",
        agrees=abs(z) <= limit,
        measured=f"{z:.2f} standard errors",
        claimed=f"0 (±{limit:.2f})",
    )


def _shape(standard_RE: NDArray[np.float64], failure: float) -> Finding:
    values = standard_RE.ravel()[:: max(1, standard_RE.size // _SHAPE_ENTRIES)]
    p_value = float(stats.kstest(values, "norm").pvalue)
    return Finding(
        layer="exact",
        name="noise shape",
        agrees=p_value >= failure,
        measured=f"p = {p_value:.2g} (Kolmogorov-Smirnov on {len(values):,} entries)",
        claimed="Gaussian",
    )


def _echoes(standard_RE: NDArray[np.float64], failure: float) -> list[Finding]:
    """Whether noise repeats anywhere: within a release, from one to the next, or from one trainer to the next."""
    values = standard_RE.ravel()
    count = len(values)
    spectrum = np.fft.rfft(values, n=2 * count)
    correlations = np.fft.irfft(np.abs(spectrum) ** 2, n=2 * count)[1 : count // 2]
    # Lags that leave at least half of the entries in overlap; each correlation is then nearly standard normal.
    z = correlations / np.sqrt(count - np.arange(1, count // 2))
    place = int(np.argmax(np.abs(z)))
    limit = float(stats.norm.isf(failure / (2 * len(z))))
    # Products of Gaussians have longer tails than a Gaussian; their sums, over so many, only a little.
    limit *= 1.02
    rows = standard_RE @ standard_RE.T / np.sqrt(standard_RE.shape[1])
    pairs = rows[np.triu_indices(len(rows), 1)]
    pair_limit = 1.02 * float(stats.norm.isf(failure / (2 * len(pairs))))
    return [
        Finding(
            layer="exact",
            name="noise repeats at some distance",
            agrees=abs(float(z[place])) <= limit,
            measured=f"largest of {len(z):,} correlations {z[place]:.2f} standard errors, {place + 1} entries apart",
            claimed=f"independent entries (±{limit:.2f})",
        ),
        Finding(
            layer="exact",
            name="noise of one release in another",
            agrees=float(np.max(np.abs(pairs))) <= pair_limit,
            measured=f"largest of {len(pairs):,} correlations {np.max(np.abs(pairs)):.2f} standard errors",
            claimed=f"independent releases (±{pair_limit:.2f})",
        ),
    ]
