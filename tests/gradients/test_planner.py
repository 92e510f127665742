"""What the planner chooses changes cost only; and it chooses as its costs say."""

from __future__ import annotations

import functools

import pytest
import reference
import torch
from cases import MODEL_CASES
from torch import nn

from dp_trainer import AutomaticClipping, FlatClipping
from dp_trainer.gradients import book_keeping, measures, planner
from dp_trainer.gradients.explain import explain
from dp_trainer.gradients.forms import OuterProduct, RowScatter, sum_squared_norms
from dp_trainer.gradients.stored import Materialized, MaterializedInBlocks
from dp_trainer.gradients.strategies import clipped_gradient_sum
from dp_trainer.losses import per_sample_loss_for

CASES = {case.name: case for case in MODEL_CASES}
B, D, P = 5, 6, 4


def _outer(positions, width=8, dtype=torch.float64):
    return OuterProduct(
        torch.randn(B, positions, width, dtype=dtype), torch.randn(B, positions, width, dtype=dtype)
    )


@pytest.mark.parametrize("case", MODEL_CASES, ids=str)
def test_built_at_once_or_later_or_not_the_result_is_the_same(case, monkeypatch):
    """Whole models, tied weights included, some samples clipped and some not."""
    model = case.build(torch.float64)
    loss = per_sample_loss_for(model)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in case.micro_batch().items()}
    run = functools.partial(
        clipped_gradient_sum, model, [batch], per_sample_loss=loss, strategy="book_keeping"
    )
    median = float(run(clipping=AutomaticClipping()).norms.median())
    results, plain = [], planner.squared_norms
    settled, settle = [], planner.settle
    monkeypatch.setattr(
        book_keeping, "settle", lambda name, form: settled.append(settle(name, form)) or settled[-1]
    )
    for cost, uses_of_an_input in ((1e12, 3), (0, 1e12), (0, 1e-12)):
        kinds: set[type] = set()
        settled.clear()
        monkeypatch.setattr(planner, "_COST_OF_A_BUILT_ELEMENT", cost)
        monkeypatch.setattr(planner, "_USES_OF_AN_INPUT", uses_of_an_input)
        monkeypatch.setattr(planner, "_LARGEST_GROWTH", 1e12)
        monkeypatch.setattr(planner, "_LARGEST_GROWTH_IN_BLOCKS", 1e12)

        def spy(forms_by_name, kinds=kinds):
            squares = plain(forms_by_name)
            kinds.update(type(form) for forms in forms_by_name.values() for form in forms)
            return squares

        monkeypatch.setattr(book_keeping, "squared_norms", spy)
        results.append(run(clipping=FlatClipping(1.01 * median)))
        assert (OuterProduct in kinds) == (cost > 0)
        assert any(isinstance(form, OuterProduct) for form in settled) == (uses_of_an_input > 1)
    assert 0 < int((results[0].factors < 0.999).sum()) < len(batch["labels"])
    for other in results[1:]:
        torch.testing.assert_close(results[0].norms, other.norms)
        assert reference.distance(results[0].gradients, other.gradients) < 1e-10


@pytest.mark.parametrize("used", [[0], [2], [7], [1, 3], []], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_without_gradient_are_left_out(used, side):
    form, zero = _outer(8), torch.ones(8, dtype=torch.bool)
    zero[used] = False
    getattr(form, f"{side}_BT{'P' if side == 'left' else 'D'}")[:, zero] = 0
    short = planner.without_unused_positions(form)
    torch.testing.assert_close(short.dense(), form.dense())
    torch.testing.assert_close(sum_squared_norms([short]), sum_squared_norms([form]))
    # The position in the middle is looked at first, so one that is used there may hide the others.
    assert short.left_BTP.shape[1] == max(1, len(used))


def test_a_position_that_one_sample_uses_stays():
    form = _outer(8)
    form.left_BTP[:, 1:] = 0
    form.left_BTP[3, 5] = 1.0
    short = planner.without_unused_positions(form)
    assert short.left_BTP.shape[1] == 2
    torch.testing.assert_close(short.dense(), form.dense())


def test_nan_counts_as_used():
    form = _outer(8)
    form.left_BTP[:, 1:] = 0
    form.left_BTP[2, 6] = float("nan")
    assert torch.isnan(sum_squared_norms([planner.without_unused_positions(form)])[2])


def test_a_classifier_that_reads_one_position_is_exact_and_shorter():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(D, D), nn.Linear(D, P)

        def forward(self, x):
            return self.head(self.layer(x)[:, 0].tanh())

    loss = lambda m, b: m(b["x"]).square().sum(1)  # noqa: E731
    model, batch = Model().double(), {"x": torch.randn(B, 9, D).double()}
    expected = reference.per_sample_gradients(model, batch, loss)
    norms = reference.norms(expected)
    result = clipped_gradient_sum(
        model, [batch], per_sample_loss=loss, clipping=FlatClipping(float(norms.median()) * 1.01)
    )
    torch.testing.assert_close(result.norms, norms)
    assert reference.distance(result.gradients, reference.clipped_sum(expected, result.factors)) < 1e-10
    line = next(row for row in explain(model, batch, per_sample_loss=loss).splitlines() if " 9 " in row)
    assert line.split()[:7] == ["6", "×", "6", "1", "1", "9", "1"]


@pytest.mark.parametrize(
    ("forms", "built"),
    [
        ([_outer(100, 768)], False),
        ([_outer(400, 768)], True),
        # Built, it would take more memory than the short factors it replaces.
        ([_outer(250, 768)], False),
        # Twelve uses of one weight have 78 pairs.
        ([_outer(100, 768)] * 12, True),
        ([RowScatter(torch.zeros(B, 400, dtype=torch.long), torch.randn(B, 400, 8), 8)], False),
    ],
    ids=["short", "long", "too large", "shared", "table"],
)
def test_what_is_built(forms, built):
    if len(forms) > 1:
        forms = [_outer(100, 768) for _ in forms]
    assert planner.what_is_built({"weight": forms}) == ({"weight"} if built else set())


def _uses(number, positions, left, right, *, shared=False):
    """One use each of several parameters."""
    inputs = [torch.randn(1, positions, right) for _ in range(1 if shared else number)]
    return {
        str(k): [OuterProduct(torch.randn(1, positions, left), inputs[k % len(inputs)])]
        for k in range(number)
    }


@pytest.mark.parametrize(("in_blocks", "number"), [(True, 21), (False, 10)])
def test_built_gradients_are_as_many_as_memory_allows(in_blocks, number, monkeypatch):
    """Each takes 1.56 times the memory of its factors; together they may take 1.5 or 1.25 times that of all."""
    monkeypatch.setattr(planner, "_is_built_in_blocks", lambda forms: in_blocks)
    assert len(planner.what_is_built(_uses(24, 197, 1536, 384))) == number


def test_what_is_built_in_one_piece_has_less_room_beside_what_is_not(monkeypatch):
    """The same forms, of which one is said to be built for all samples at once: it comes too late, or not at all."""
    forms = _uses(24, 197, 1536, 384)
    monkeypatch.setattr(planner, "_is_built_in_blocks", lambda own: own is not forms["20"])
    assert planner.what_is_built(forms) == {str(k) for k in range(22) if k != 20}


def test_a_cpu_builds_in_blocks_and_a_gpu_all_at_once():
    outer, table = _outer(8), RowScatter(torch.zeros(B, 4, dtype=torch.long), torch.randn(B, 4, 8), 8)
    assert isinstance(planner._built([outer, outer]), MaterializedInBlocks)
    assert isinstance(planner._built([outer, table]), Materialized)
    elsewhere = OuterProduct(outer.left_BTP.to("meta"), outer.right_BTD.to("meta"))
    assert isinstance(planner._built([elsewhere]), Materialized)


def test_those_come_first_that_save_most_time_for_their_memory(monkeypatch):
    """Building saves 17 million multiplications for 0.29 MB, and 25 million for 0.85 MB."""
    forms = {"wide": _uses(1, 197, 1536, 384)["0"]} | _uses(4, 197, 384, 384, shared=True)
    monkeypatch.setattr(planner, "_LARGEST_GROWTH_IN_BLOCKS", 0.3)
    assert planner.what_is_built(forms) == {"0", "1", "2", "3"}


def test_an_input_that_others_need_is_not_free(monkeypatch):
    """Three 384 × 384 gradients take less than six factors of 197 positions, and more than four."""
    monkeypatch.setattr(planner, "_LARGEST_GROWTH_IN_BLOCKS", 0.2)
    assert len(planner.what_is_built(_uses(3, 197, 384, 384))) == 3
    assert not planner.what_is_built(_uses(3, 197, 384, 384, shared=True))
    monkeypatch.setattr(planner, "_LARGEST_GROWTH_IN_BLOCKS", 0.6)
    assert len(planner.what_is_built(_uses(3, 197, 384, 384, shared=True))) == 3


@pytest.mark.parametrize(("positions", "at_once"), [(197, False), (280, False), (300, True)])
def test_gradients_are_built_at_once_where_that_takes_no_memory_even_if_the_input_stays(positions, at_once):
    (form,) = _uses(1, positions, 384, 384)["0"]
    settled = planner.settle("", form)
    assert isinstance(settled, OuterProduct) == (not at_once)
    torch.testing.assert_close(settled.dense(), form.dense())


def test_either_factor_may_be_the_input_that_stays():
    """Of x @ W the left factor is the input: 1024 wide and needed by others, the gradients are no gain."""
    (form,) = _uses(1, 200, 1024, 150)["0"]
    for either in (form, form.transposed()):
        assert isinstance(planner.settle("", either), OuterProduct)


def test_what_adding_up_takes_must_fit_as_well(monkeypatch):
    """Three copies of a table's gradients, where one would fit, unless uses are added up in place."""
    uses = [OuterProduct(torch.randn(1, 200, 1000), torch.randn(1, 200, 1000)) for _ in range(2)]
    forms = {"shared": uses} | _uses(2, 100, 3000, 700)
    assert planner.what_is_built(forms) == {"shared"}
    monkeypatch.setattr(planner, "_is_built_in_blocks", lambda forms: False)
    assert not planner.what_is_built(forms)
    roomy = forms | {"long": _uses(1, 800, 9000, 700)["0"]}
    assert planner.what_is_built(roomy) == {"shared", "long"}


TOKENS = lambda batch, length: {"input_ids": torch.zeros(batch, length, dtype=torch.long)}  # noqa: E731


@pytest.mark.parametrize(
    ("micro_batch", "checkpointing", "expected"),
    [
        (TOKENS(4, 1000), False, "direct"),
        (TOKENS(4, 300), False, "book_keeping"),
        ({"pixel_values": torch.zeros(4, 3, 8, 8)}, False, "book_keeping"),
        (TOKENS(1, 1000), False, "direct"),
        (TOKENS(1, 20), False, "book_keeping"),
        ({"pixel_values": torch.zeros(1, 3, 8, 8)}, False, "direct"),
        (TOKENS(4, 1000), True, "direct"),
        (TOKENS(4, 300), True, "direct"),
        (TOKENS(4, 20), True, "direct"),
        (TOKENS(1, 1000), True, "direct"),
    ],
)
def test_the_strategy_for_a_micro_batch(micro_batch, checkpointing, expected):
    model = nn.Sequential(nn.Linear(300, 300))
    model.gradient_checkpointing = checkpointing
    assert planner.choose_strategy(model, micro_batch) == expected
    # Nothing is checkpointed in evaluation mode.
    plain = nn.Sequential(nn.Linear(300, 300))
    assert planner.choose_strategy(model.eval(), micro_batch) == planner.choose_strategy(plain, micro_batch)


def test_explain_says_what_is_done_and_leaves_the_model_alone():
    case = CASES["gpt2-tied"]
    model = case.build()
    state = torch.random.get_rng_state()
    text = explain(model, case.micro_batch(), per_sample_loss=per_sample_loss_for(model))
    assert text.startswith("strategy for this micro-batch of 5: book_keeping")
    assert "ghost norm" in text
    assert "stored" in text
    assert "rows of a table" in text
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_weights_in_two_bfloat16_pieces_keep_sixteen_digits():
    weighted = torch.randn(1000, 50) * torch.rand(1000, 1)
    upper, lower = measures.split_in_halves(weighted)
    error = (upper.float() + lower.float() - weighted).abs() / weighted.abs()
    assert error.max() <= measures.ROUNDING_OF_WEIGHTS * torch.finfo(torch.float32).eps
    # One piece alone would not do.
    assert ((upper.float() - weighted).abs() / weighted.abs()).max() > 1e-3


def test_inputs_are_kept_as_autocast_multiplied_them():
    """Otherwise one factor would be float32, and a device could not use its half-precision units."""
    layer, x = nn.Linear(D, P), torch.randn(B, 7, D)
    kinds = []

    def loss(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(batch["x"]).float().square().sum((1, 2))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(book_keeping, "settle", lambda n, form: kinds.append(form) or planner.settle(n, form))
        result = clipped_gradient_sum(layer, [{"x": x}], per_sample_loss=loss, clipping=FlatClipping(1e9))
    outer = [form for form in kinds if isinstance(form, OuterProduct)]
    assert {(f.left_BTP.dtype, f.right_BTD.dtype) for f in outer} == {(torch.bfloat16, torch.bfloat16)}
    loss(layer, {"x": x}).sum().backward()
    torch.testing.assert_close(result.gradients["weight"], layer.weight.grad, rtol=1e-2, atol=1e-2)
