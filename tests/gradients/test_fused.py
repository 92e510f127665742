"""When a fused kernel serves: tried against PyTorch's result first. And the Triton kernels, compiled or interpreted."""

from __future__ import annotations

import functools
import logging
import os
from importlib.util import find_spec

import pytest
import torch
from cases import MODEL_CASES

from dp_trainer import AutomaticClipping, FlatClipping
from dp_trainer.gradients import fused, measures
from dp_trainer.gradients.forms import OuterProduct, RowScatter
from dp_trainer.gradients.strategies import clipped_gradient_sum
from dp_trainer.losses import per_sample_loss_for

B, T, P, D = 3, 150, 33, 20
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None or not (DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1: `make test-kernels`",
)


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


@needs_triton
@pytest.mark.parametrize("positions", [2, 63, 64, 65, 150])
@pytest.mark.parametrize(
    "dtype",
    # Triton's interpreter does not multiply bfloat16.
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
    ids=str,
)
def test_kernels_agree_with_float64(positions, dtype):
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("needs a GPU")
    from dp_trainer.gradients import kernels

    outer = _outer(positions, dtype)
    # Also where positions are not side by side, and where rows repeat.
    across = OuterProduct(
        torch.randn(B, P, positions).to(DEVICE, dtype).mT,
        torch.randn(B, positions, 2 * D).to(DEVICE, dtype)[:, :, ::2],
    )
    rows = torch.randint(0, 7, (positions, B), device=DEVICE).T
    for kernel, first, second in (
        *((kernels.outer_product_norms, form.left_BTP, form.right_BTD) for form in (outer, across)),
        *((kernels.row_scatter_norms, rows, values) for values in (outer.left_BTP, across.right_BTD)),
    ):
        squares_B, spreads_B = kernel(first, second)
        exact_B, exact_spreads_B = fused._exact(first, second)
        slack_B = 4 * torch.finfo(torch.float32).eps * exact_spreads_B.square()
        assert ((squares_B - exact_B).abs() <= slack_B).all()
        torch.testing.assert_close(spreads_B.double(), exact_spreads_B, rtol=1e-5, atol=0)
    dense = RowScatter(rows, outer.left_BTP.double(), 7).dense().flatten(1).square().sum(1)
    torch.testing.assert_close(fused._exact(rows, outer.left_BTP)[0], dense)


@needs_triton
@pytest.mark.parametrize(
    ("place", "words", "tail"),
    [*((place, 10_000, 2e-4) for place in (0, 31, 127, 128, -1)), (0, 256_000, 2e-5)],
)
def test_a_kernel_keeps_a_long_tail(place, words, tail):
    """A head's output gradient: nearly -1 at the label, tiny at every other word, even 128 of them together."""
    from dp_trainer.gradients import kernels

    left = torch.full((1, 2, words), tail, device=DEVICE)
    left[:, :, place] = 1
    right = torch.ones(1, 2, 1, device=DEVICE)
    exact = fused._exact(left, right)[0]
    for squares_B, _ in (
        kernels.outer_product_norms(left, right),
        kernels.row_scatter_norms(torch.zeros(1, 2, dtype=torch.long, device=DEVICE), left),
    ):
        torch.testing.assert_close(squares_B.double(), exact, rtol=1e-5, atol=0)


@needs_triton
@pytest.mark.parametrize("name", ["outer_product_norms", "row_scatter_norms"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str
)
def test_kernels_pass_their_trial(name, dtype):
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("needs a GPU")
    from dp_trainer.gradients import kernels

    form = _outer(2, dtype)
    first = torch.zeros(B, 2, dtype=torch.long, device=DEVICE) if name.startswith("row") else form.left_BTP
    assert fused.is_right(name, getattr(kernels, name), first, form.right_BTD)


@needs_triton
def test_kernels_refuse_factors_of_other_positions():
    from dp_trainer.gradients import kernels

    with pytest.raises(ValueError, match="positions differ"):
        kernels.outer_product_norms(_outer(3).left_BTP, _outer(4).right_BTD)
    with pytest.raises(ValueError, match="positions differ"):
        kernels.row_scatter_norms(torch.zeros(B, 3, dtype=torch.long), _outer(4).right_BTD)


@needs_triton
def test_a_kernel_mixes_no_samples():
    from dp_trainer.gradients import kernels

    form, rows = _outer(70), torch.zeros(B, 70, dtype=torch.long, device=DEVICE)
    form.left_BTP[1, 69] = float("nan")
    for squares_B, spreads_B in (
        kernels.outer_product_norms(form.left_BTP, form.right_BTD),
        kernels.row_scatter_norms(rows, form.left_BTP),
    ):
        assert squares_B.isfinite().tolist() == spreads_B.isfinite().tolist() == [True, False, True]


@needs_triton
@pytest.mark.parametrize("case", MODEL_CASES, ids=str)
def test_whole_models_with_kernels_agree_with_one_sample_at_a_time(case, trials, monkeypatch):
    """Tied weights included, some samples clipped and some not."""
    model = case.build(torch.float32).to(DEVICE)
    batch = {name: tensor.to(DEVICE) for name, tensor in case.micro_batch().items()}
    run = functools.partial(clipped_gradient_sum, model, [batch], per_sample_loss=per_sample_loss_for(model))
    median = float(run(clipping=AutomaticClipping(), strategy="loop").norms.median())
    clipping = FlatClipping(1.01 * median)
    alone = run(clipping=clipping, strategy="loop")
    assert 0 < (alone.norms > 1.01 * median).sum() < len(alone.norms)
    run(clipping=clipping, strategy="book_keeping")
    assert trials
    assert all(trials.values())
    together = run(clipping=clipping, strategy="book_keeping")
    torch.testing.assert_close(together.norms, alone.norms, rtol=1e-4, atol=0)
    largest = max(float(total.abs().max()) for total in alone.gradients.values())
    torch.testing.assert_close(together.gradients, alone.gradients, rtol=1e-4, atol=1e-6 * largest)
