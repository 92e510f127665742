"""The noise has the stated distribution, is never repeated, and nobody can read its key."""

import copy
import json
import math
import os
import pickle

import numpy as np
import pytest
import torch
from scipy import stats

from dp_trainer.errors import ConfigurationError
from dp_trainer.privacy import noise as noise_module
from dp_trainer.privacy.noise import NoiseGenerator

COUNT = 2_000_000
KERNEL = noise_module._kernel
needs_kernel = pytest.mark.skipif(KERNEL is None, reason="the kernel was not built")


@pytest.fixture(params=[pytest.param("kernel", marks=needs_kernel), "operations"])
def way(request, monkeypatch):
    """The compiled kernel, and PyTorch's operations in its place."""
    if request.param == "operations":
        monkeypatch.setattr(noise_module, "_kernel", None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield request.param
    torch.set_num_threads(threads)


def check_noise(draw, std):
    """``draw(count)`` gives independent N(0, std²); false failures are below 1e-6."""
    values = draw(COUNT).double() / std
    assert abs(values.std().item() - 1.0) < 0.005
    assert abs(values.mean().item()) < 5 / math.sqrt(COUNT)
    assert stats.kstest(values[:200_000].numpy(), "norm").pvalue > 1e-6
    assert values.abs().max() > 4.5  # tails exist
    for lag in (1, 2, 128, 4096, COUNT // 2):
        assert abs((values[lag:] * values[:-lag]).mean().item()) < 5.5 / math.sqrt(COUNT)
    following = draw(COUNT).double() / std
    assert abs((values * following).mean().item()) < 5.5 / math.sqrt(COUNT)


@pytest.mark.parametrize("std", [1.0, 0.037, 250.0])
def test_noise_is_gaussian_with_the_stated_std(std, way):
    noise = NoiseGenerator(device="cpu", insecure_seed=7)
    check_noise(lambda count: noise.gaussian((count,), std), std)


def test_secure_noise_is_gaussian_too():
    noise = NoiseGenerator(device="cpu")
    check_noise(lambda count: noise.gaussian((count,), 1.0), 1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda noise, count: noise.gaussian((count,), 0.5),
        lambda noise, count: noise.gaussian((count,), 1 / math.sqrt(2)),
        lambda noise, count: NoiseGenerator(device="cpu", insecure_seed=1).gaussian((count,), 1.0),
        lambda noise, count: noise.gaussian((count // 2,), 1.0).repeat(2),
        lambda noise, count: (torch.rand(count) - 0.5) * math.sqrt(12),
        lambda noise, count: noise.gaussian((count,), 1.0) + 0.01,
        lambda noise, count: noise.gaussian((count // 2,), 1.0).repeat_interleave(2),
    ],
    ids=[
        "half the std",
        "1/√2 of it",
        "same at every step",
        "same in two tensors",
        "uniform",
        "shifted",
        "in pairs",
    ],
)
def test_the_check_rejects_wrong_noise(wrong):
    noise = NoiseGenerator(device="cpu", insecure_seed=7)
    with pytest.raises(AssertionError):
        check_noise(lambda count: wrong(noise, count), 1.0)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4)])
def test_shapes_and_dtype(shape):
    drawn = NoiseGenerator(device="cpu", insecure_seed=0).gaussian(shape, 2.0)
    assert drawn.shape == torch.Size(shape)
    assert drawn.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divisor", [1, 64])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("std", [0.0, 0.5])
def test_noise_is_added_in_place_and_divided(dtype, divisor, contiguous, std, way):
    total = torch.full((5, 4), 3.0, dtype=dtype)
    total = total if contiguous else total.T
    noise = NoiseGenerator(device="cpu", insecure_seed=2).gaussian(total.shape, std)
    expected = (total + noise) / divisor
    returned = NoiseGenerator(device="cpu", insecure_seed=2).add_noise_(total, std, divisor=divisor)
    assert returned is total
    torch.testing.assert_close(total, expected, rtol=2e-6, atol=0)
    assert (std == 0) == torch.equal(total, torch.full_like(total, 3.0 / divisor))


def test_a_sum_of_several_chunks_is_divided_once(way):
    total = torch.full((300_001,), 3.0)
    noise = NoiseGenerator(device="cpu", insecure_seed=2).gaussian(total.shape, 0.5)
    expected = (total + noise) / 64
    NoiseGenerator(device="cpu", insecure_seed=2).add_noise_(total, 0.5, divisor=64)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("contiguous", [True, False])
def test_torchs_generator_adds_noise_and_divides_too(contiguous):
    """As on a GPU."""
    noise, total = NoiseGenerator(device="cpu"), torch.full((5, 4), 3.0)
    total = total if contiguous else total.T
    noise._keystream, noise._torch = None, torch.Generator().manual_seed(2)
    drawn = torch.randn(total.shape, generator=torch.Generator().manual_seed(2))
    noise.add_noise_(total, 0.5, divisor=64)
    torch.testing.assert_close(total, (3.0 + 0.5 * drawn) / 64, rtol=1e-6, atol=0)


def test_zero_std_changes_nothing_and_draws_nothing():
    noise, twin = (NoiseGenerator(device="cpu", insecure_seed=4) for _ in range(2))
    total = torch.tensor([1.0, -0.0, math.inf])
    before = total.clone()
    noise.add_noise_(total, 0.0)
    assert torch.equal(total, before)
    assert torch.equal(noise.gaussian((3,), 0.0), torch.zeros(3))
    assert torch.equal(noise.gaussian((3,), 1.0), twin.gaussian((3,), 1.0))


@pytest.mark.parametrize("std", [-1.0, math.nan, math.inf, 1e38])
def test_unusable_std_is_refused(std):
    total = torch.zeros(3)
    with pytest.raises(ConfigurationError, match="std"):
        NoiseGenerator(device="cpu").add_noise_(total, std)
    assert torch.equal(total, torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype):
    with pytest.raises(ConfigurationError, match="float32"):
        NoiseGenerator(device="cpu").add_noise_(torch.zeros(3, dtype=dtype), 1.0)


def test_global_seeds_neither_predict_nor_notice():
    drawn = []
    for _ in range(2):
        torch.manual_seed(42)
        np.random.seed(42)
        before = torch.get_rng_state()
        drawn.append(NoiseGenerator(device="cpu").gaussian((8,), 1.0))
        assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(drawn[0], drawn[1])
    torch.manual_seed(42)
    assert not torch.equal(drawn[1], torch.randn(8))


def test_seeds_that_share_their_low_bits_differ():
    # torch's CPU generator keeps 32 bits of a seed; 2**32 apart would give equal noise.
    first, second = (
        NoiseGenerator(device="cpu", insecure_seed=seed).gaussian((8,), 1.0) for seed in (5, 5 + 2**32)
    )
    assert not torch.equal(first, second)


def test_the_whole_key_is_used(monkeypatch):
    """256 bits go into the cipher; torch's CPU generator would keep 32 of its seed."""
    keys = []

    def randbits(bits):
        keys.append((bits, 1 << (bits - 1 - len(keys))))
        return keys[-1][1]

    monkeypatch.setattr("dp_trainer.privacy.noise.secrets.randbits", randbits)
    draws = {tuple(NoiseGenerator(device="cpu").gaussian((4,), 1.0).tolist()) for _ in range(256)}
    assert {bits for bits, _ in keys} == {256}
    assert len(draws) == 256


def test_values_are_gaussian_in_the_middle_and_in_the_tails(way):
    import scipy.stats

    for size in (1_000_000, 65_537):
        values = NoiseGenerator(device="cpu", insecure_seed=4).gaussian((size,), 1.0).double()
        assert scipy.stats.kstest(values.numpy(), "norm").pvalue > 1e-3
        for bound in (1.0, 2.0, 3.0, 4.0):
            expected = size * 2 * scipy.stats.norm.sf(bound)
            assert abs(int((values.abs() > bound).sum()) - expected) < 5 * expected**0.5
        assert values.abs().max() < 6.7
        # Two values of one pair share a radius and must still be independent.
        half = min(size, noise_module._CHUNK) // 2
        begin = half + (size % 2 if size < noise_module._CHUNK else 0)
        pairs = torch.stack((values[:half], values[begin : begin + half]))
        assert abs(float(torch.corrcoef(pairs)[0, 1])) < 5 / half**0.5
        assert abs(float(torch.corrcoef(pairs.square())[0, 1])) < 5 / half**0.5


@pytest.mark.parametrize("store", [pickle.dumps, copy.copy, copy.deepcopy])
def test_it_cannot_be_stored(store):
    with pytest.raises(ConfigurationError, match="replayed or predicted"):
        store(NoiseGenerator(device="cpu"))
    with pytest.raises(TypeError):
        json.dumps(NoiseGenerator(device="cpu"))


def test_it_says_how_secret_it_is_but_not_the_key():
    secure, fixed = NoiseGenerator(device="cpu"), NoiseGenerator(device="cpu", insecure_seed=1234567)
    assert secure.is_secure
    assert not fixed.is_secure
    assert "INSECURE" in fixed.describe()
    assert "INSECURE" not in secure.describe()
    assert "1234567" not in repr(fixed) + fixed.describe()
    assert repr(secure) == "NoiseGenerator(device='cpu', is_secure=True)"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_noise_on_the_gpu():
    noise = NoiseGenerator(device="cuda")
    check_noise(lambda count: noise.gaussian((count,), 3.0), 3.0)
    torch.manual_seed(42)
    before = torch.cuda.get_rng_state()
    noise.add_noise_(torch.zeros(10, device="cuda"), 1.0)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_two_threads_never_share_the_buffers(way, monkeypatch):
    """On the same buffers two threads would give out the same noise twice: while they are filled and while read."""
    noise, held = NoiseGenerator(device="cpu"), []
    keystream = noise._keystream
    plain = keystream._add_chunk_

    def operations(*arguments):
        held.append(keystream._lock.locked())
        return plain(*arguments)

    class Kernel:
        @staticmethod
        def add(*arguments):
            held.append(keystream._lock.locked())
            return KERNEL.add(*arguments)

    keystream._add_chunk_ = operations
    if way == "kernel":
        monkeypatch.setattr(noise_module, "_kernel", Kernel)

    class Spy:
        def __init__(self, cipher):
            self.cipher = cipher

        def update_into(self, *buffers):
            held.append(keystream._lock.locked())
            return self.cipher.update_into(*buffers)

    keystream._cipher = Spy(keystream._cipher)
    noise.add_noise_(torch.zeros(3), 1.0)
    assert held == [True, True]


def test_a_forked_noise_generator_refuses_to_draw(monkeypatch):
    noise = NoiseGenerator(device="cpu")
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    with pytest.raises(ConfigurationError, match="forked"):
        noise.add_noise_(torch.zeros(3), 1.0)
