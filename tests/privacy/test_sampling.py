"""Draws have the distribution that the accounting assumes, and cannot be replayed or predicted.

Statistical checks use fixed keys, so they are repeatable; thresholds were set
for a false failure below 1e-6 had the keys been random.
"""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from scipy import stats

from dp_trainer.errors import ConfigurationError
from dp_trainer.privacy.sampling import (
    FullBatchSampler,
    PoissonSampler,
    SecretKey,
    fresh_key,
    insecure_key,
    rank_slice,
)

SMALLEST_P = 1e-6


def sampler(seed=0, *, size=50, q=0.2, cap=50, steps=10, key=None):
    return PoissonSampler(
        dataset_size=size, sampling_probability=q, batch_cap=cap, steps=steps, key=key or insecure_key(seed)
    )


def inclusions(draws, size):
    table = np.zeros((len(draws), size), dtype=bool)
    for row, draw in enumerate(draws):
        table[row, draw] = True
    return table


def check_distribution(draws, size, q):
    """Inclusion frequencies, sizes and pairwise counts of draws without a cap."""
    table = inclusions(draws, size)
    count = len(draws)
    for column in table.T:
        assert stats.binomtest(int(column.sum()), count, q).pvalue > SMALLEST_P / size
    edges = stats.binom.ppf([0.1, 0.25, 0.5, 0.75, 0.9], size, q)
    shares = np.diff(np.concatenate([[0.0], stats.binom.cdf(edges, size, q), [1.0]]))
    observed = np.histogram(table.sum(1), bins=np.concatenate([[-1], edges + 0.5, [size + 1]]))[0]
    assert stats.chisquare(observed, shares * count).pvalue > SMALLEST_P
    pairs = table.T.astype(np.int64) @ table.astype(np.int64)
    upper = pairs[np.triu_indices(size, 1)]
    z = (upper - count * q**2) / np.sqrt(count * q**2 * (1 - q**2))
    assert np.abs(z).max() < stats.norm.isf(SMALLEST_P / len(upper)) * 1.1
    following = (table[1:] & table[:-1]).sum(0)
    z = (following - (count - 1) * q**2) / np.sqrt((count - 1) * q**2 * (1 - q**2) * 2)
    assert np.abs(z).max() < stats.norm.isf(SMALLEST_P / size)


def test_draws_are_poisson():
    drawn = sampler(seed=3)
    check_distribution([drawn.draw() for _ in range(20_000)], 50, 0.2)


def _shuffled(generator, size):
    return sorted(generator.permutation(size)[: size // 5].tolist())


def _in_pairs(generator, size):
    return [
        i
        for half in np.flatnonzero(generator.random(size // 2) < 0.2).tolist()
        for i in (2 * half, 2 * half + 1)
    ]


def _repeated(generator, size, memory=[]):  # noqa: B006
    if len(memory) % 2 == 0:
        memory.append(np.flatnonzero(generator.random(size) < 0.2).tolist())
        return memory[-1]
    return memory.pop()


@pytest.mark.parametrize(
    "wrong",
    [
        _shuffled,
        _in_pairs,
        _repeated,
        lambda generator, size: np.flatnonzero(generator.random(size) < 0.19).tolist(),
        lambda generator, size: np.flatnonzero(generator.random(size - 1) < 0.2).tolist(),
    ],
    ids=["fixed size", "samples in pairs", "each draw twice", "too rarely", "last one never"],
)
def test_the_check_rejects_a_wrong_sampler(wrong):
    generator = np.random.default_rng(0)
    with pytest.raises(AssertionError):
        check_distribution([wrong(generator, 50) for _ in range(20_000)], 50, 0.2)


def test_cap_holds_and_keeps_a_uniform_subset():
    drawn = sampler(seed=5, cap=9)
    draws = [drawn.draw() for _ in range(20_000)]
    sizes = np.array([len(draw) for draw in draws])
    assert sizes.max() == 9
    assert all(draw == sorted(set(draw)) for draw in draws)
    reached = stats.binom.sf(8, 50, 0.2)
    assert stats.binomtest(int((sizes == 9).sum()), len(draws), reached).pvalue > SMALLEST_P
    counts = inclusions([draw for draw in draws if len(draw) == 9], 50).sum(0)
    assert stats.chisquare(counts).pvalue > SMALLEST_P


def test_leaving_the_loop_early_never_replays():
    drawn = sampler(seed=1, steps=5)
    epochs = []
    for _ in range(4):
        epoch = []
        for draw in drawn:  # as the Trainer does: the iterator is dropped before it ends
            epoch.append(tuple(draw))
            if len(epoch) == 3:
                break
        epochs += epoch
    continued = sampler(seed=1)
    assert epochs == [tuple(continued.draw()) for _ in range(12)]
    assert len(set(epochs)) == 12


def test_two_iterators_at_once_share_one_stream():
    drawn = sampler(seed=1)
    first, second = iter(drawn), iter(drawn)
    assert len({tuple(next(it)) for it in (first, second, first, second)}) == 4


def test_length_and_empty_draws():
    drawn = sampler(q=1e-9, steps=7)
    assert len(drawn) == 7
    assert list(drawn) == [[]] * 7
    assert next(iter(sampler(q=1.0))) == list(range(50))


def test_loader_takes_it_as_batch_sampler():
    loader = torch.utils.data.DataLoader(range(50), batch_sampler=sampler(seed=2), collate_fn=list)
    assert [list(batch) for batch in loader] == list(sampler(seed=2))
    assert len(loader) == 10


def test_global_seeds_neither_matter_nor_notice():
    draws = []
    for seed in (0, 42):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        draws.append(list(sampler(seed=9)))
        assert before == (
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
        )
    assert draws[0] == draws[1]


def test_fresh_keys_differ_whatever_the_global_seed():
    keys = set()
    for _ in range(50):
        torch.manual_seed(42)
        random.seed(42)
        np.random.seed(42)
        keys.add(fresh_key().reveal())
    assert len(keys) == 50
    assert max(keys) > 2**120
    assert fresh_key().secure
    assert not insecure_key(0).secure
    assert insecure_key(0).reveal() != insecure_key(1).reveal()
    assert list(sampler(key=fresh_key())) != list(sampler(key=fresh_key()))


@pytest.mark.parametrize("secret", [insecure_key(1), sampler()], ids=["key", "sampler"])
@pytest.mark.parametrize("store", [pickle.dumps, copy.copy, copy.deepcopy])
def test_secrets_are_neither_stored_nor_shown(secret, store):
    with pytest.raises(ConfigurationError, match="replayed or predicted"):
        store(secret)
    for text in (repr(secret), str(secret)):
        assert str(insecure_key(1).reveal()) not in text
        assert f"{insecure_key(1).reveal():x}" not in text


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_share_a_draw_without_overlap(world_size):
    draw = sampler(seed=4).draw()
    shares = [rank_slice(draw, rank, world_size) for rank in range(world_size)]
    assert sorted(i for share in shares for i in share) == draw
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    with pytest.raises(ConfigurationError, match="rank"):
        rank_slice(draw, world_size, world_size)


def test_full_batches():
    drawn = FullBatchSampler(dataset_size=4, steps=2)
    assert list(drawn) == [[0, 1, 2, 3]] * 2
    assert len(drawn) == 2


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("size", 0),
        ("cap", 0),
        ("steps", 0),
        ("q", 0.0),
        ("q", 1.1),
        ("q", float("nan")),
        ("size", 2.5),
        ("steps", True),
    ],
)
def test_arguments_are_checked(setting, value):
    with pytest.raises(ConfigurationError, match="PoissonSampler"):
        sampler(**{setting: value})


def test_keys_are_checked():
    with pytest.raises(ConfigurationError, match="128 bits"):
        SecretKey(2**128, secure=True)
