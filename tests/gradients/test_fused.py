"""When a fused kernel serves: only after it was right on made-up tensors, and faster on real ones."""

from __future__ import annotations

import logging

import pytest
import torch

from dp_trainer.gradients import fused, measures
from dp_trainer.gradients.forms import OuterProduct, RowScatter

B, T, P, D = 3, 150, 33, 20
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def trials(monkeypatch):
    """Kernels may run here, however short the samples, and win every race; none was tried yet."""
    monkeypatch.setattr(fused, "_runs_on", lambda device: True)
    monkeypatch.setattr(fused, "_seconds", lambda work, device: 2.0 if _is_twin(work) else 1.0)
    monkeypatch.setattr(fused, "_SHORTEST", 2)
    monkeypatch.setattr(fused, "_serves", {})
    monkeypatch.setattr(fused, "_right", {})
    return fused._serves


def _is_twin(work):
    return work.args == (None,)


def _outer(positions=T, dtype=torch.float32, batch=B):
    return OuterProduct(
        torch.randn(batch, positions, P).to(DEVICE, dtype),
        torch.randn(batch, positions, D).to(DEVICE, dtype),
    )


def _right_kernel(first, second):
    """What a right kernel returns: not rounded up."""
    if first.is_floating_point():
        squares_B, spreads_B = OuterProduct(first, second).gram_norms()
        return squares_B / (1 + measures.rounding_of_products(first, second)), spreads_B
    return RowScatter(first, second, int(first.max()) + 1).summed_norms()


def _kernel(monkeypatch, change=lambda squares, spreads: (squares, spreads)):
    """Puts a kernel in place that is right but for ``change``; returns its calls with real tensors."""
    calls = []

    def kernel(first, second):
        if first.shape[1] != fused._TRIED_POSITIONS:
            calls.append(first.shape)
        return change(*_right_kernel(first, second))

    monkeypatch.setattr(fused, "_kernel", lambda name: kernel)
    return calls


def test_a_right_and_faster_kernel_serves_from_the_second_time_on(trials, monkeypatch):
    calls = _kernel(monkeypatch, lambda squares, spreads: (squares * (1 + 1e-6), spreads))
    form = _outer()
    twin = form.gram_norms()[0]
    assert torch.equal(form.measure().squares_B, twin)
    assert list(trials.values()) == [True]
    tried, other = len(calls), _outer(T - 1)
    found = other.measure().squares_B
    assert len(calls) == tried + 1
    assert not torch.equal(found, other.gram_norms()[0])
    torch.testing.assert_close(found, other.gram_norms()[0] * (1 + 1e-6), rtol=2e-7, atol=0)


def test_a_served_norm_is_rounded_up_as_its_twin(trials, monkeypatch):
    calls = _kernel(monkeypatch)
    form = OuterProduct(torch.ones(1, 2, 1024, device=DEVICE), torch.ones(1, 2, 8, device=DEVICE))
    form.measure()
    served = form.measure().squares_B
    assert calls
    assert torch.equal(served, form.gram_norms()[0])
    assert served > 4 * 1024 * 8


def test_a_slower_kernel_does_not_serve(trials, monkeypatch):
    calls = _kernel(monkeypatch)
    monkeypatch.setattr(fused, "_seconds", lambda work, device: 1.0 if _is_twin(work) else 1.01)
    _outer().measure()
    tried = len(calls)
    assert torch.equal((form := _outer()).measure().squares_B, form.gram_norms()[0])
    assert len(calls) == tried
    assert list(trials.values()) == [False]


def _without_what_cancels(squares, spreads):
    """Gradients as if positions had nothing in common, which random ones hardly have."""
    return torch.minimum(squares, spreads.square() / T), spreads


@pytest.mark.parametrize(
    "change",
    [
        lambda squares, spreads: (squares * 0.9999, spreads),
        lambda squares, spreads: (squares * 1.01, spreads),
        lambda squares, spreads: (squares - 1e-6 * spreads.square(), spreads),
        lambda squares, spreads: (squares.flip(0), spreads.flip(0)),
        lambda squares, spreads: (squares, spreads * 0.99),
        lambda squares, spreads: (squares * float("nan"), spreads),
        lambda squares, spreads: (squares.nan_to_num(1.0), spreads.nan_to_num(1.0)),
        lambda squares, spreads: (torch.zeros_like(squares), torch.zeros_like(spreads)),
        lambda squares, spreads: (squares.mean().expand_as(squares), spreads),
        _without_what_cancels,
    ],
    ids=[
        "short",
        "long",
        "short-of-spread",
        "samples",
        "spread",
        "nan",
        "finite",
        "zeros",
        "mixed",
        "no-cross",
    ],
)
@pytest.mark.parametrize("first_batch", ["ordinary", "zeros", "nan"])
def test_a_wrong_kernel_never_serves_whatever_comes_first(trials, monkeypatch, caplog, change, first_batch):
    """A batch of zeros, as LoRA's first gradients are, agrees with everything that returns zero."""
    calls = _kernel(monkeypatch, change)
    forms = [_outer() for _ in range(3)]
    if first_batch != "ordinary":
        forms[0].left_BTP.fill_(0.0 if first_batch == "zeros" else float("nan"))
    with caplog.at_level(logging.WARNING):
        for form in forms:
            measure = form.measure()
            squares_B, spreads_B = form.gram_norms()
            torch.testing.assert_close(measure.squares_B, squares_B, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(measure.spreads_B, spreads_B, rtol=0, atol=0, equal_nan=True)
    assert not calls
    assert ["norms are wrong" in record.message for record in caplog.records] == [True]
    assert "outer_product_norms" in caplog.text


def _raise(*_):
    raise RuntimeError("no C compiler")


@pytest.mark.parametrize("where", ["_kernel", "_made_up", "_seconds"])
def test_a_kernel_that_fails_in_its_trial_never_serves_and_is_named_once(trials, monkeypatch, caplog, where):
    """A folder named triton, a compiler that is missing, memory that runs out."""
    _kernel(monkeypatch)
    monkeypatch.setattr(fused, where, _raise)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            form = _outer()
            assert torch.equal(form.measure().squares_B, form.gram_norms()[0])
    assert ["no C compiler" in record.message for record in caplog.records] == [True]


def test_a_kernel_that_fails_later_serves_no_more(trials, monkeypatch, caplog):
    _kernel(monkeypatch)
    _outer().measure()
    assert list(trials.values()) == [True]
    monkeypatch.setattr(fused, "_kernel", lambda name: _raise)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            form = _outer()
            assert torch.equal(form.measure().squares_B, form.gram_norms()[0])
    assert len(caplog.records) == 1
    assert list(trials.values()) == [False]


def test_each_kind_has_its_own_trial(trials, monkeypatch):
    _kernel(monkeypatch)
    forms = [
        *(_outer(positions) for positions in (128, 65, 129)),
        _outer(128, torch.float16),
        OuterProduct(torch.randn(B, 128, P, device=DEVICE), torch.randn(B, 128, D + 1, device=DEVICE)),
        RowScatter(torch.zeros(B, 128, dtype=torch.long), torch.randn(B, 128, D), 1),
    ]
    for form in forms:
        form.measure()
    assert len(trials) == 5
    assert len(fused._right) == 4


def test_trials_leave_the_generators_alone(trials, monkeypatch):
    _kernel(monkeypatch)
    form, state = _outer(), torch.get_rng_state()
    form.measure()
    assert trials
    assert torch.equal(torch.get_rng_state(), state)


def _misaligned():
    left, right = _outer().left_BTP, torch.randn(B * T * D + 1, device=DEVICE)[1:].view(B, T, D)
    return OuterProduct(left, right)


@pytest.mark.parametrize(
    "form",
    [
        lambda: _outer(dtype=torch.float64),
        lambda: OuterProduct(_outer().left_BTP, _outer(dtype=torch.float64).right_BTD),
        lambda: _outer(1),
        lambda: _outer(0),
        lambda: _outer(batch=0),
        lambda: OuterProduct(_outer().left_BTP, torch.zeros(B, T, 0, device=DEVICE)),
        lambda: RowScatter(torch.zeros(B, T, dtype=torch.uint8), torch.randn(B, T, D), 1),
        _misaligned,
    ],
    ids=[
        "float64",
        "one-float64",
        "one-position",
        "no-position",
        "no-sample",
        "no-width",
        "bytes",
        "misaligned",
    ],
)
def test_what_kernels_do_not_take_is_never_tried(trials, monkeypatch, form):
    calls = _kernel(monkeypatch)
    form().measure()
    assert not calls
    assert not trials


def test_a_batch_of_more_samples_than_a_grid_has_places_is_not_tried(trials, monkeypatch):
    monkeypatch.setattr(fused, "_LARGEST_BATCH", B - 1)
    _outer().measure()
    assert not trials


def test_who_asks_for_deterministic_results_gets_no_race(trials, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    _outer().measure()
    assert not trials


def test_a_short_sample_and_a_cpu_are_not_worth_a_trial(monkeypatch):
    calls = _kernel(monkeypatch)
    OuterProduct(torch.randn(B, T, P), torch.randn(B, T, D)).measure()
    monkeypatch.setattr(fused, "_runs_on", lambda device: True)
    _outer(fused._SHORTEST - 1).measure()
    assert not calls
