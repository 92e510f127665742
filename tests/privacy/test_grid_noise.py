"""Secure noise: Gaussian, on one grid with the sum, and never weaker than stated."""

import math
import os

import pytest
import torch
from test_noise import check_noise

from dp_trainer.arguments import PrivacyArguments
from dp_trainer.errors import ConfigurationError
from dp_trainer.privacy import grid_noise
from dp_trainer.privacy.grid_noise import GridNoise, added_sensitivity, grid_spacing
from dp_trainer.privacy.noise import NoiseGenerator

COUNT = 2_000_000


def made(seed=7):
    return NoiseGenerator(device="cpu", insecure_seed=seed, on_grid=True)


@pytest.mark.parametrize("std", [1.0, 0.037])
def test_noise_is_gaussian_with_the_stated_std(std):
    noise = made()
    check_noise(lambda count: noise.gaussian((count,), std), std)


def added_in_float64(total, std, noise=None):
    """The noised sum before anything rounds it to float32."""
    values = total.double().clone()
    (made() if noise is None else noise).add_noise_(values, std)
    return values


def everything_lies_on_one_grid(values, std):
    cells = values / grid_spacing(std)
    assert torch.equal(cells, cells.round())


@pytest.mark.parametrize("std", [1e-6, 0.3, 1.0, 77.0])
def test_sum_and_noise_lie_on_one_grid_whatever_the_sum(std):
    """What the last digits of a release can be does not depend on the data."""
    for total in (torch.zeros(1000), torch.randn(1000) * std, std * torch.randn(1000, dtype=torch.float64)):
        everything_lies_on_one_grid(added_in_float64(total, std), std)


def test_plain_noise_does_not_and_the_check_sees_it(monkeypatch):
    total = torch.randn(1000, dtype=torch.float64)
    plain = total + NoiseGenerator(device="cpu", insecure_seed=7).gaussian((1000,), 0.3).double()
    with pytest.raises(AssertionError):
        everything_lies_on_one_grid(plain, 0.3)
    # Unrounded sums, the fault that leaves the data's own digits in the release.
    monkeypatch.setattr(torch.Tensor, "round_", lambda tensor: tensor)
    with pytest.raises(AssertionError):
        everything_lies_on_one_grid(added_in_float64(total, 0.3), 0.3)


def test_neighbouring_sums_share_their_reachable_values():
    """The attack: with few words of noise, what one candidate can become the other cannot.

    With a coarse grid and as many draws as there are cells within reach, both
    candidates hit the same cells, as often as a Gaussian does.
    """
    cells = []
    for total in (0.0, 0.37):
        noise = made(seed=int(total * 100))
        values = noise.gaussian((400_000,), 1.0).double() + total
        cells.append(torch.histc(values, bins=40, min=-4, max=4))
    assert (cells[0] > 0).all()
    assert (cells[1] > 0).all()


def test_the_sum_moves_by_half_a_cell_at_most():
    std = 0.3
    total = torch.randn(10_000, dtype=torch.float64)
    zero = added_in_float64(torch.zeros(10_000), std)
    moved = added_in_float64(total, std) - zero - total
    assert moved.abs().max() <= grid_spacing(std) / 2
    assert moved.norm() <= added_sensitivity(std, 10_000) / 2
    # A bound for one entry would not hold for all of them.
    assert moved.norm() > added_sensitivity(std, 1) / 2


@pytest.mark.parametrize("std", [1.0, 1.9999, 2.0, 1e-5])
def test_the_grid_is_a_power_of_two_and_the_added_sensitivity_covers_a_doubled_std(std):
    assert math.log2(grid_spacing(std)) == int(math.log2(grid_spacing(std)))
    assert 2.0**-33 < grid_spacing(std) / std <= 2.0**-32
    assert added_sensitivity(std, 100) >= 10 * grid_spacing(2 * std)
    assert added_sensitivity(0.0, 100) == 0.0
    # Invisible: a model of ten billion parameters adds less than a ten-thousandth of the noise.
    assert added_sensitivity(std, 10**10) < 1e-4 * std


def test_a_release_has_so_much_more_noise_as_rounding_adds(monkeypatch):
    import torch.nn as nn

    from dp_trainer.privacy.plan import make_plan
    from dp_trainer.release import release

    # So coarse that it shows.
    monkeypatch.setattr(grid_noise, "_FINENESS", 4)
    plan = make_plan(
        PrivacyArguments(noise_multiplier=2.0, target_delta=1e-3, sampling="full_batch", secure_noise=True),
        dataset_size=10, expected_batch_size=10, steps=1,
    )  # fmt: skip
    model = nn.Linear(200, 400, bias=False)
    release(
        model, [], per_sample_loss=lambda *_: None, plan=plan, noise=NoiseGenerator(device="cpu", on_grid=True),
        strategy="book_keeping", rounding_margin=0.0,
    )  # fmt: skip
    stated = plan.noise_std + 2.0 * added_sensitivity(plan.noise_std, 80_000)
    assert stated > 1.5 * plan.noise_std
    assert float(model.weight.grad.std()) * 10 == pytest.approx(stated, rel=0.02)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_added_in_place_and_divided(dtype, contiguous):
    total = torch.full((300, 201), 3.0, dtype=dtype)
    total = total if contiguous else total.T
    noise = made(2).gaussian(total.shape, 0.5)
    returned = made(2).add_noise_(total, 0.5, divisor=64)
    assert returned is total
    torch.testing.assert_close(total, ((3.0 + noise.double()) / 64).to(dtype), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("value", [1e9, float("nan"), float("inf")])
def test_sums_beyond_the_grid_are_refused(value):
    total = torch.tensor([0.0, value])
    with pytest.raises(ConfigurationError, match="does not fit the grid"):
        made().add_noise_(total, 1e-3)


def test_no_word_is_used_twice_and_no_two_keys_agree():
    noise = made()
    first, second = (noise.gaussian((50_000,), 1.0) for _ in range(2))
    other = made(8).gaussian((50_000,), 1.0)
    for pair in ((first, second), (first, other), (first[:25_000], first[25_000:])):
        assert abs(float(torch.corrcoef(torch.stack(pair))[0, 1])) < 0.03
    secret = [NoiseGenerator(device="cpu", on_grid=True).gaussian((8,), 1.0) for _ in range(2)]
    assert not torch.equal(*secret)


def test_four_gaussians_of_53_bits_make_each_value(monkeypatch):
    """One of 31 bits would leave holes that a search of all words finds."""
    drawn = []
    plain = GridNoise(bytes(32))
    cipher = plain._cipher

    class Counting:
        def update_into(self, zeros, stream):
            drawn.append(len(zeros))
            return cipher.update_into(zeros, stream)

    plain._cipher = Counting()
    plain.add_to_(torch.zeros(1000), 1.0, 1.0)
    assert drawn == [8000] * 4


def test_it_says_what_it_is_and_refuses_what_noise_refuses(monkeypatch):
    noise = NoiseGenerator(device="cpu", on_grid=True)
    assert "common grid" in noise.describe()
    assert "AES-256" in noise.describe()
    assert "common grid" not in NoiseGenerator(device="cpu").describe()
    assert NoiseGenerator(device="cpu").added_sensitivity(1.0, 10) == 0.0
    assert torch.equal(noise.gaussian((3,), 0.0), torch.zeros(3))
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    with pytest.raises(ConfigurationError, match="forked"):
        noise.add_noise_(torch.zeros(3), 1.0)


def test_a_fixed_seed_contradicts_secure_noise():
    with pytest.raises(ConfigurationError, match="contradicts secure_noise"):
        PrivacyArguments(target_epsilon=8.0, target_delta=1e-5, secure_noise=True, insecure_noise_seed=3)
    for value in (1, "true", None):
        with pytest.raises(ConfigurationError, match="true or false"):
            PrivacyArguments(target_epsilon=8.0, target_delta=1e-5, secure_noise=value)
