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
from dp_trainer.gradients import fused
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
    return fused._serves


def _is_twin(work):
    return work.args == (None,)


def _outer(positions=T, dtype=torch.float32, batch=B):
    return OuterProduct(
        torch.randn(batch, positions, P).to(DEVICE, dtype),
        torch.randn(batch, positions, D).to(DEVICE, dtype),
    )


def _kernel(monkeypatch, change=lambda squares, spreads: (squares, spreads)):
    """Puts a kernel in place that is right but for ``change``; returns its calls."""
    calls = []

    def kernel(left, right):
        calls.append(left.shape)
        return change(*OuterProduct(left, right).gram_norms())

    monkeypatch.setattr(fused, "_kernel", lambda name: kernel)
    return calls


def test_a_kernel_that_agrees_and_is_faster_serves_from_the_second_time_on(trials, monkeypatch):
    calls = _kernel(monkeypatch, lambda squares, spreads: (squares * (1 + 1e-7), spreads))
    form = _outer()
    twin = form.gram_norms()[0]
    assert torch.equal(form.measure().squares_B, twin)
    assert len(calls) == 1
    assert list(trials.values()) == [True]
    other = _outer(T - 1)
    torch.testing.assert_close(other.measure().squares_B, other.gram_norms()[0] * (1 + 1e-7), rtol=0, atol=0)
    assert len(calls) == 2


def test_a_slower_kernel_does_not_serve(trials, monkeypatch):
    calls = _kernel(monkeypatch)
    monkeypatch.setattr(fused, "_seconds", lambda work, device: 1.0 if _is_twin(work) else 1.01)
    for _ in range(3):
        _outer().measure()
    assert len(calls) == 1
    assert list(trials.values()) == [False]


def _a_fifth_too_short(squares, spreads):
    return squares * torch.tensor([1.0, 0.8, 1.0], device=squares.device), spreads


def _spread_too_short(squares, spreads):
    return squares, spreads * torch.tensor([1.0, 1.0, 0.99], device=spreads.device)


def _nothing_finite(squares, spreads):
    return squares * float("nan"), spreads


def _fails(squares, spreads):
    raise RuntimeError("no C compiler")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_a_fifth_too_short, "differ"),
        (_spread_too_short, "differ"),
        (_nothing_finite, "differ"),
        (_fails, "no C compiler"),
    ],
)
def test_a_kernel_that_disagrees_or_fails_never_serves_and_is_named_once(
    trials, monkeypatch, caplog, change, said
):
    calls = _kernel(monkeypatch, change)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            # Orthogonal positions: the square is no small part of the squared spread.
            form = _outer(2)
            measure = form.measure()
            assert torch.equal(measure.squares_B, form.gram_norms()[0])
            assert torch.equal(measure.spreads_B, form.gram_norms()[1])
    assert len(calls) == 1
    assert [said in record.message for record in caplog.records] == [True]
    assert "outer_product_norms" in caplog.text


def test_want_of_memory_in_a_trial_is_no_fault_of_the_kernel(trials, monkeypatch, caplog):
    def full(squares, spreads):
        raise torch.OutOfMemoryError("full")

    _kernel(monkeypatch, full)
    form = _outer()
    assert torch.equal(form.measure().squares_B, form.gram_norms()[0])
    assert not caplog.records


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_must_be_so_in_both(trials, monkeypatch, poison):
    form = _outer()
    form.left_BTP[1, 3] = poison
    _kernel(monkeypatch)
    assert not form.measure().squares_B[1].isfinite()
    assert list(trials.values()) == [True]
    trials.clear()
    _kernel(
        monkeypatch, lambda squares, spreads: (squares.nan_to_num(1.0, 1.0), spreads.nan_to_num(1.0, 1.0))
    )
    assert not form.measure().squares_B[1].isfinite()
    assert list(trials.values()) == [False]


def test_each_kind_has_its_own_trial(trials, monkeypatch):
    calls = _kernel(monkeypatch)
    forms = [
        *(_outer(positions) for positions in (128, 65, 129)),
        _outer(128, torch.bfloat16),
        OuterProduct(torch.randn(B, 128, P, device=DEVICE), torch.randn(B, 128, D + 1, device=DEVICE)),
    ]
    for form in forms:
        form.measure()
    assert len(trials) == 4
    assert len(calls) == len(forms)


@pytest.mark.parametrize(
    "form",
    [
        lambda: _outer(dtype=torch.float64),
        lambda: _outer(1),
        lambda: _outer(0),
        lambda: _outer(batch=0),
    ],
    ids=["float64", "one-position", "no-position", "no-sample"],
)
def test_what_kernels_do_not_take_is_never_tried(trials, monkeypatch, form):
    calls = _kernel(monkeypatch)
    form().measure()
    assert not calls
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
def test_kernels_agree_with_their_twins(positions, dtype):
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("needs a GPU")
    from dp_trainer.gradients import kernels

    outer = _outer(positions, dtype)
    # Also where positions are not side by side, and where rows repeat.
    across = OuterProduct(
        torch.randn(B, P, positions).to(DEVICE, dtype).mT,
        torch.randn(B, positions, 2 * D).to(DEVICE, dtype)[:, :, ::2],
    )
    for form in (outer, across):
        found = kernels.outer_product_norms(form.left_BTP, form.right_BTD)
        assert fused.agree(found, form.gram_norms())
        assert fused.agree(found, OuterProduct(form.left_BTP.double(), form.right_BTD.double()).gram_norms())
    for values in (outer.left_BTP, across.right_BTD):
        rows = torch.randint(0, 7, (positions, B), device=DEVICE).T
        table = RowScatter(rows, values, 7)
        found = kernels.row_scatter_norms(rows, values)
        assert fused.agree(found, table.summed_norms())
        dense = RowScatter(rows, values.double(), 7).dense().flatten(1).square().sum(1)
        torch.testing.assert_close(found[0].double(), dense, rtol=1e-5, atol=0)


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
    assert all(trials.values())
    together = run(clipping=clipping, strategy="book_keeping")
    torch.testing.assert_close(together.norms, alone.norms, rtol=1e-4, atol=0)
    largest = max(float(total.abs().max()) for total in alone.gradients.values())
    torch.testing.assert_close(together.gradients, alone.gradients, rtol=1e-4, atol=1e-6 * largest)
