"""The audit's tests of noise and draws on numbers made for them: right ones pass, wrong ones do not."""

from types import SimpleNamespace

import numpy as np
import pytest

from dp_trainer.audit.draws import judge_draws
from dp_trainer.audit.noise import judge_noise

pytestmark = pytest.mark.audit
FAILURE = 1e-3
ROWS, DRAWS, Q = 300, 400, 0.2


def disagreeing(findings):
    return {finding.name for finding in findings if not finding.agrees}


def noise(seed=0):
    return np.random.default_rng(seed).normal(scale=3.0, size=(10, 20_000))


def judged(values):
    return disagreeing(judge_noise(values, {"first": 5, "second": 19_995}, stated=3.0, failure=FAILURE))


def test_right_noise_passes():
    assert [judged(noise(seed)) for seed in range(20)] == [set()] * 20


def changed(kind):
    values = noise()
    match kind:
        case "two percent short":
            values *= 0.98
        case "shifted":
            values += 0.05
        case "uniform":
            values = np.random.default_rng(0).uniform(-3 * 3**0.5, 3 * 3**0.5, size=values.shape)
        case "five entries left out":
            values[3, :5] = 0
        case "same at two releases":
            values[7] = values[2]
        case "same within a release":
            values[4, 10_000:] = values[4, :10_000]
        case "partly the last one's":
            values[1:] = (values[1:] + 0.2 * values[:-1]) / (1 + 0.2**2) ** 0.5
    return values


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("two percent short", "noise std"),
        ("shifted", "noise mean"),
        ("uniform", "noise shape"),
        ("five entries left out", "noise std of each parameter and release"),
        ("same at two releases", "noise of one release in another"),
        ("same within a release", "noise repeats at some distance"),
        ("partly the last one's", "noise of one release in another"),
    ],
)
def test_wrong_noise_is_seen(kind, name):
    assert name in judged(changed(kind))


PLAN = SimpleNamespace(
    sampling="poisson", sampling_probability=Q, batch_cap=ROWS, mechanism=SimpleNamespace(cap_probability=0.0)
)


def poisson(seed=0, q=Q):
    generator = np.random.default_rng(seed)
    return [np.flatnonzero(generator.random(ROWS) < q) for _ in range(DRAWS)]


def judged_draws(taken):
    return disagreeing(judge_draws(taken, rows=ROWS, plan=PLAN, failure=FAILURE))


def test_poisson_draws_pass():
    assert [judged_draws(poisson(seed)) for seed in range(20)] == [set()] * 20


def dealt_out():
    generator = np.random.default_rng(0)
    size = int(ROWS * Q)
    return [
        np.sort(part)
        for _ in range(DRAWS // 5)
        for part in np.split(generator.permutation(ROWS), ROWS // size)
    ]


def in_pairs():
    return [np.flatnonzero(np.repeat(np.isin(np.arange(ROWS // 2), draw), 2)) for draw in poisson()]


def with_a_favourite():
    return [np.union1d(draw, [7]) for draw in poisson()]


@pytest.mark.parametrize(
    ("taken", "name"),
    [
        (dealt_out(), "draws: their sizes"),
        (dealt_out(), "draws: samples in two draws in a row"),
        (poisson(q=1.1 * Q), "draws: sampling probability"),
        (in_pairs(), "draws: their sizes"),
        (with_a_favourite(), "draws: how often each sample is in"),
        ([d for draw in poisson()[::2] for d in (draw, draw)], "draws: samples in two draws in a row"),
        ([np.append(draw, draw[:1]) for draw in poisson()], "draws: each sample at most once, the cap kept"),
    ],
    ids=["dealt out", "dealt out, overlap", "more often", "in pairs", "a favourite", "twice in a row", "one sample twice"],
)  # fmt: skip
def test_other_draws_are_seen(taken, name):
    assert name in judged_draws(taken)


def test_full_batches_hold_everything():
    plan = SimpleNamespace(sampling="full_batch")
    whole = [np.arange(ROWS)] * 3
    assert disagreeing(judge_draws(whole, rows=ROWS, plan=plan, failure=FAILURE)) == set()
    assert disagreeing(judge_draws([*whole, np.arange(1, ROWS)], rows=ROWS, plan=plan, failure=FAILURE)) == {
        "draws"
    }
