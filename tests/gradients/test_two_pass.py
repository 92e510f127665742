"""What two passes could get wrong that one cannot: a second pass that is not of the gradients measured."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from dp_trainer import ConfigurationError, FlatClipping, UnsupportedOperationError, clipped_gradient_sum
from dp_trainer.gradients import planner, two_pass


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_second_pass_draws_the_dropout_of_the_first(dropout):
    """Otherwise the norm measured would be that of another gradient, and the contribution not at its bound."""
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(dropout), nn.Tanh(), nn.Linear(50, 2)).double()
    for _ in range(5):
        result = clipped_gradient_sum(
            model,
            [{"x": torch.randn(1, 4).double()}],
            per_sample_loss=lambda m, b: m(b["x"]).pow(2).sum(1),
            clipping=FlatClipping(1e-3),
            strategy="two_pass",
        )
        size = torch.stack([g.norm() for g in result.gradients.values()]).norm()
        assert float(size) == pytest.approx(1e-3, rel=1e-6)


def test_two_passes_that_differ_are_refused():
    """Chance from outside torch's generators cannot be drawn again."""
    chance = random.Random(3)

    def loss(model, micro_batch):
        return model(micro_batch["x"]).pow(2).sum(1) * (1 + chance.random())

    with pytest.raises(ConfigurationError, match="second forward pass"):
        clipped_gradient_sum(
            nn.Linear(4, 2),
            [{"x": torch.randn(3, 4)}],
            per_sample_loss=loss,
            clipping=FlatClipping(1.0),
            strategy="two_pass",
        )


def _run(x, strategy="two_pass"):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    return clipped_gradient_sum(
        model,
        [{"x": x}],
        per_sample_loss=lambda m, b: m(b["x"]).pow(2).sum(1),
        clipping=FlatClipping(1e-3),
        strategy=strategy,
    )


def test_a_sum_longer_than_the_norms_allow_is_refused(monkeypatch):
    """Norms measured too small, for instance of a use that only the second pass sees."""
    measured = two_pass._measure

    def too_small(*arguments):
        norms_B, losses_B = measured(*arguments)
        return norms_B * 0.9, losses_B

    _run(torch.randn(1, 4))
    monkeypatch.setattr(two_pass, "_measure", too_small)
    with pytest.raises(UnsupportedOperationError, match="longer together"):
        _run(torch.randn(1, 4))


def test_an_infinite_gradient_that_only_the_second_pass_sees_is_left_out(monkeypatch):
    """One such sample must not make NaN of all others."""
    x = torch.randn(3, 4)
    x[1, 2] = float("inf")
    finite = torch.ones(3), torch.ones(3)
    monkeypatch.setattr(two_pass, "_measure", lambda *_: finite)
    monkeypatch.setattr(two_pass.torch, "allclose", lambda *_, **__: True)
    result = _run(x)
    assert result.dropped_samples == 1
    alone = _run(x[[0, 2]], strategy="loop")
    torch.testing.assert_close(result.gradients["0.weight"], alone.gradients["0.weight"])


@pytest.mark.parametrize("apart", [1e-3, 1e-4])
def test_two_uses_that_nearly_cancel_are_never_measured_too_short(apart, monkeypatch):
    """Autograd rounds otherwise than a built gradient would be: measured so, contributions were up to four times the bound."""
    monkeypatch.setattr(planner, "_COST_OF_A_BUILT_ELEMENT", 0)
    monkeypatch.setattr(planner, "_LARGEST_GROWTH_IN_BLOCKS", 1e12)

    class Difference(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 6))

        def forward(self, x):
            other = x.roll(1, 1) + apart * torch.sin(x.roll(2, 1))
            return (nn.functional.linear(x, self.weight) - nn.functional.linear(other, self.weight)) * 100

    for seed in range(6):
        torch.manual_seed(seed)
        model, x = Difference(), (torch.randn(8, 20, 6) + 3) * torch.randn(8, 1, 1).sign()
        ways = {
            strategy: clipped_gradient_sum(
                model,
                [{"x": x}],
                per_sample_loss=lambda m, b: m(b["x"]).flatten(1).sum(1),
                clipping=FlatClipping(1e9),
                strategy=strategy,
            ).norms
            for strategy in ("loop", "two_pass")
        }
        assert (ways["two_pass"] >= ways["loop"]).all()
