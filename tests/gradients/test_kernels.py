"""The Triton kernels, compiled on a GPU or interpreted on a CPU: ``make test-kernels``."""

from __future__ import annotations

import functools
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

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if find_spec("triton") is None or not (DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"):
    pytest.skip("needs Triton, and a GPU or its interpreter: make test-kernels", allow_module_level=True)

from dp_trainer.gradients import kernels  # noqa: E402 - needs Triton

B, T, P, D = 3, 150, 33, 20


@pytest.fixture(autouse=True)
def _bfloat16_interpreted(monkeypatch):
    """The interpreter keeps bfloat16 as bits and multiplies those; here it multiplies the numbers, as a GPU does."""
    if DEVICE == "cuda":
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def number(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    plain = InterpreterBuilder.create_dot
    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: plain(self, number(a), number(b), *rest)
    )


def _outer(positions=T, dtype=torch.float32):
    return OuterProduct(
        torch.randn(B, positions, P).to(DEVICE, dtype), torch.randn(B, positions, D).to(DEVICE, dtype)
    )


@pytest.mark.parametrize("positions", [2, 63, 64, 65, 150])
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16],
    ids=str,
)
def test_kernels_agree_with_float64(positions, dtype):
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


@pytest.mark.parametrize(
    ("place", "words", "tail"),
    [*((place, 10_000, 2e-4) for place in (0, 31, 127, 128, -1)), (0, 256_000, 2e-5)],
)
def test_a_kernel_keeps_a_long_tail(place, words, tail):
    """A head's output gradient: nearly -1 at the label, tiny at every other word, even 128 of them together."""
    left = torch.full((1, 2, words), tail, device=DEVICE)
    left[:, :, place] = 1
    right = torch.ones(1, 2, 1, device=DEVICE)
    exact = fused._exact(left, right)[0]
    for squares_B, _ in (
        kernels.outer_product_norms(left, right),
        kernels.row_scatter_norms(torch.zeros(1, 2, dtype=torch.long, device=DEVICE), left),
    ):
        torch.testing.assert_close(squares_B.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["outer_product_norms", "row_scatter_norms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kernels_pass_their_trial(name, dtype):
    form = _outer(2, dtype)
    first = torch.zeros(B, 2, dtype=torch.long, device=DEVICE) if name.startswith("row") else form.left_BTP
    assert fused.is_right(name, getattr(kernels, name), first, form.right_BTD)


def test_kernels_refuse_factors_of_other_positions():
    with pytest.raises(ValueError, match="positions differ"):
        kernels.outer_product_norms(_outer(3).left_BTP, _outer(4).right_BTD)
    with pytest.raises(ValueError, match="positions differ"):
        kernels.row_scatter_norms(torch.zeros(B, 3, dtype=torch.long), _outer(4).right_BTD)


def test_a_kernel_mixes_no_samples():
    form, rows = _outer(70), torch.zeros(B, 70, dtype=torch.long, device=DEVICE)
    form.left_BTP[1, 69] = float("nan")
    for squares_B, spreads_B in (
        kernels.outer_product_norms(form.left_BTP, form.right_BTD),
        kernels.row_scatter_norms(rows, form.left_BTP),
    ):
        assert squares_B.isfinite().tolist() == spreads_B.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("case", MODEL_CASES, ids=str)
def test_whole_models_with_kernels_agree_with_one_sample_at_a_time(case, monkeypatch):
    """Tied weights included, some samples clipped and some not."""
    trials: dict = {}
    monkeypatch.setattr(fused, "_runs_on", lambda device: True)
    monkeypatch.setattr(fused, "_is_faster", lambda *arguments: True)
    monkeypatch.setattr(fused, "_SHORTEST", 2)
    monkeypatch.setattr(fused, "_serves", trials)
    monkeypatch.setattr(fused, "_right", {})
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
