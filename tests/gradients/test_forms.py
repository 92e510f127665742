"""The mathematics on forms against the gradients themselves."""

from __future__ import annotations

import itertools

import pytest
import torch

from dp_trainer.gradients import forms as forms_module
from dp_trainer.gradients import measures, planner
from dp_trainer.gradients.forms import (
    OuterProduct,
    RowScatter,
    inner_products,
    measure_uses,
    round_up,
    sum_dense,
    sum_squared_norms,
)
from dp_trainer.gradients.measures import GramCache
from dp_trainer.gradients.slots import SlottedOuterProduct
from dp_trainer.gradients.stored import Materialized, MaterializedInBlocks, build_in_blocks

B, T, P, D = 3, 150, 7, 5


def _normal(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def _forms(positions: int = T):
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(0, P, (B, positions), generator=generator)
    return {
        "outer": OuterProduct(_normal(B, positions, P), _normal(B, positions, D)),
        "outer-short": OuterProduct(_normal(B, 2, P), _normal(B, 2, D)),
        "outer-one": OuterProduct(_normal(B, 1, P), _normal(B, 1, D)),
        "rows": RowScatter(rows, _normal(B, positions, D), P),
        "rows-few": RowScatter(rows[:, :3], _normal(B, 3, D), P),
        "stored": Materialized(_normal(B, P, D)),
        "blocks": MaterializedInBlocks([Materialized(_normal(size, P, D)) for size in (1, B - 1)]),
    }


@pytest.mark.parametrize("name", _forms())
def test_norm_and_weighted_sum(name):
    form, factors = _forms()[name], torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    dense = form.dense()
    assert form.shape == dense.shape[1:]
    torch.testing.assert_close(form.measure().squares_B, dense.flatten(1).square().sum(1))
    expected = torch.einsum("b,bpd->pd", factors, dense)
    torch.testing.assert_close(form.weighted_sum(factors, None), expected)
    total = _normal(P, D)
    before = total.clone()
    assert form.weighted_sum(factors, total) is total
    torch.testing.assert_close(total, before + expected)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(_forms(), repeat=2)))
def test_inner_product_of_any_two_forms(first, second):
    one, other = _forms()[first], _forms()[second]
    torch.testing.assert_close(inner_products(one, other), (one.dense() * other.dense()).flatten(1).sum(1))


@pytest.mark.parametrize(
    "names",
    [("outer", "rows"), ("outer", "outer-short"), ("outer", "outer-short", "rows-few", "stored"), ("rows",)],
)
@pytest.mark.parametrize("cost", [1e12, 0], ids=["ghost", "built"])
def test_both_ways_to_a_norm_agree(names, cost, monkeypatch):
    """Whatever the planner chooses, the shared parameter's norm is that of the summed gradients."""
    forms = [_forms()[name] for name in names]
    dense = sum(form.dense() for form in forms)
    monkeypatch.setattr(planner, "_COST_OF_A_BUILT_ELEMENT", cost)
    forms_by_name = {"weight": list(forms)}
    squares = planner.squared_norms(forms_by_name)["weight"]
    kept = forms_by_name["weight"]
    assert isinstance(kept[0], Materialized | MaterializedInBlocks) == (cost == 0 and "outer" in names)
    torch.testing.assert_close(squares, dense.flatten(1).square().sum(1))
    torch.testing.assert_close(sum_squared_norms(forms), dense.flatten(1).square().sum(1))
    factors = torch.tensor([0.5, 3.0, 2.0], dtype=torch.float64)
    total = None
    for form in kept:
        total = form.weighted_sum(factors, total)
    torch.testing.assert_close(total, torch.einsum("b,bpd->pd", factors, dense))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_gram_matrix_serves_again_only_for_the_same_tensor(dtype):
    """Narrow tensors are widened into memory that is freed and given out again."""
    shared, other = _normal(B, T, D).to(dtype), _normal(B, T, D).to(dtype)
    rights = [shared, shared.detach().view(B, T, D), other, shared[:, : T // 2], other.clone(), shared]
    forms = [OuterProduct(_normal(B, r.shape[1], P).to(dtype), r) for r in rights]
    grams = GramCache()
    for form in forms:
        measured, alone = form.measure(grams), form.measure()
        torch.testing.assert_close(measured.squares_B, alone.squares_B, rtol=0, atol=0)
        torch.testing.assert_close(measured.spreads_B, alone.spreads_B, rtol=0, atol=0)


@pytest.mark.parametrize(
    "other",
    [lambda t: t.mT, lambda t: t[:, : D - 1], lambda t: t.view(torch.float16)],
    ids=["strides", "shape", "dtype"],
)
def test_a_gram_matrix_does_not_serve_for_another_view_of_its_memory(other):
    square, grams = _normal(B, D, D).to(torch.bfloat16), GramCache()
    for right in (square, other(square)):
        form = OuterProduct(_normal(B, right.shape[1], P), right)
        torch.testing.assert_close(form.measure(grams).squares_B, form.measure().squares_B)


def test_a_projections_input_is_measured_once(monkeypatch):
    made = []
    plain = measures.gram_blocks
    for module in (measures, forms_module):
        monkeypatch.setattr(module, "gram_blocks", lambda f: made.append(f) or plain(f))
    shared, grams = _normal(B, T, D), GramCache()
    for _ in range(3):
        OuterProduct(_normal(B, T, P), shared.detach()).measure(grams)
    assert len(made) == 3 + 1


@pytest.mark.parametrize(("device", "rows"), [("cpu", 64), ("meta", 512)])
def test_gram_matrices_come_in_larger_blocks_off_a_cpu(device, rows):
    blocks = list(measures.gram_blocks(torch.zeros(2, 600, 3, device=device)))
    assert [tuple(block.shape[1:]) for block in blocks] == [
        (min(rows, 600 - start), min(start + rows, 600)) for start in range(0, 600, rows)
    ]


def test_only_a_cpu_is_asked_whether_positions_are_in_use():
    """Elsewhere the answer would be waited for; a tensor without data has none to give."""
    unused = OuterProduct(torch.zeros(2, 9, 3), torch.ones(2, 9, 3))
    assert planner.without_unused_positions(unused).left_BTP.shape[1] == 1
    elsewhere = OuterProduct(unused.left_BTP.to("meta"), unused.right_BTD.to("meta"))
    assert planner.without_unused_positions(elsewhere) is elsewhere


def test_no_position_is_a_gradient_of_zero():
    for dtype in (torch.float32, torch.float64):
        form = OuterProduct(_normal(B, 0, P, dtype=dtype), _normal(B, 0, D, dtype=dtype))
        assert torch.equal(form.measure().squares_B, torch.zeros(B, dtype=dtype))
        table = RowScatter(torch.zeros(B, 0, dtype=torch.long), form.right_BTD, P)
        assert torch.equal(table.measure().squares_B, torch.zeros(B, dtype=dtype))


@pytest.mark.parametrize("name", [name for name in _forms() if name not in ("stored", "blocks")])
def test_the_spread_is_the_sum_of_the_terms_norms(name):
    form = _forms()[name]
    norms = form.values_BTD.norm(dim=2) if name.startswith("rows") else None
    norms = form.left_BTP.norm(dim=2) * form.right_BTD.norm(dim=2) if norms is None else norms
    torch.testing.assert_close(form.measure().spreads_B, norms.sum(1))


def test_cross_terms_matter():
    """The check above would catch a dropped cross term."""
    forms = [_forms()["outer"], _forms()["rows"]]
    without = sum(form.measure().squares_B for form in forms)
    assert ((without / sum_squared_norms(forms) - 1).abs() > 1e-3).any()


@pytest.mark.parametrize("name", _forms())
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_dropped_sample_leaves_no_trace(name, poison):
    form = _forms()[name]
    clean = form.weighted_sum(torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64), None)
    # The second sample is the first of the second block.
    tensors = [form.blocks[1].gradients_BK] if name == "blocks" else vars(form).values()
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            tensor[0 if name == "blocks" else 1] = poison
    assert not torch.isfinite(form.measure().squares_B[1])
    assert torch.isfinite(form.measure().squares_B[[0, 2]]).all()
    kept = form.select(torch.tensor([True, False, True]))
    summed = kept.weighted_sum(torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64), None)
    torch.testing.assert_close(summed, clean)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float64, torch.float64), torch.float64),
        ((torch.float32, torch.float64), torch.float64),
        ((torch.float32, torch.bfloat16), torch.float32),
        ((torch.float16, torch.float16), torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("lengths", "sizes"), [((24,), [3, 1]), ((24, 9), [1] * 4), ((1, 7, 90), [1] * 4), ((90,), [4])], ids=str
)
def test_gradients_are_built_in_blocks_no_larger_than_a_factor_or_of_one_sample(
    dtypes, expected, lengths, sizes
):
    """Factors of 24 positions have 960 and 2880 numbers, a sample's gradient has 300."""
    uses = [(_normal(4, t, 30).to(dtypes[0]), _normal(4, t, 10).to(dtypes[1])) for t in lengths]
    form = build_in_blocks(uses)
    exact = sum(torch.einsum("btp,btd->bpd", left.double(), right.double()) for left, right in uses)
    torch.testing.assert_close(form.dense(), exact.to(expected))
    if dtypes[0] == dtypes[1] == expected:
        assert [len(block.gradients_BK) for block in form.blocks] == sizes
    places = {block.gradients_BK.untyped_storage().data_ptr() for block in form.blocks}
    assert len(places) == len(form.blocks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_narrow_tensors_are_accumulated_in_float32(dtype):
    """In float16 these squares underflow to zero, which would mean no clipping at all."""
    left, right = torch.full((1, 4, 64), 1e-4, dtype=dtype), torch.full((1, 4, 64), 1e-4, dtype=dtype)
    form = OuterProduct(left, right)
    squares = form.measure().squares_B
    assert squares.dtype == torch.float32
    expected = OuterProduct(left.double(), right.double()).dense().square().sum()
    torch.testing.assert_close(squares.double(), expected[None], rtol=1e-5, atol=0)
    assert form.weighted_sum(torch.ones(1), None).dtype == torch.float32


def _cancelling(shift: float):
    """Positions that undo each other: the gradient is about ``shift`` times what its Gram product sums."""
    half_right, half_left = torch.randn(1, 50, 768), torch.randn(1, 50, 256)
    right = torch.cat((half_right, half_right), 1)
    right = right + shift * torch.randn_like(right)
    return OuterProduct(torch.cat((half_left, -half_left), 1), right)


@pytest.mark.parametrize(
    "forms",
    [
        lambda f: [f],
        lambda f: [SlottedOuterProduct(f.left_BTP, f.right_BTD, torch.zeros(1, 100, dtype=torch.long), 2)],
        lambda f: [f, RowScatter(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, 768), 256)],
    ],
    ids=["alone", "experts", "shared"],
)
@pytest.mark.parametrize("shift", [1e-5, 5e-4, 0.12], ids=["mostly-rounding", "partly-rounding", "trusted"])
def test_a_norm_is_never_below_what_is_summed(forms, shift):
    """Without a bound on rounding one built sample reached 153 times the sensitivity."""
    for seed in range(8):  # rounding may fall either way
        torch.manual_seed(seed)
        form = _cancelling(shift)
        summed = form.weighted_sum(torch.ones(1), None).norm()
        assert sum_squared_norms(forms(form)).sqrt() >= summed


def test_many_parameters_measured_together_are_measured_as_each_alone():
    """Of several shapes, dtypes and kinds; some nearly cancel, and get the closer bound of their own gradient."""
    torch.manual_seed(0)
    names = {
        "cancels": [_cancelling(1e-4)],
        "plain": [OuterProduct(torch.randn(1, 20, 256), torch.randn(1, 20, 768))],
        "stored": [Materialized(torch.randn(1, 30))],
        "long": [OuterProduct(torch.randn(1, 70, 9), torch.randn(1, 70, 7))],
        "cancels too": [_cancelling(1e-5)],
        "double": [OuterProduct(_normal(1, 20, 9), _normal(1, 20, 7))],
        "several": [
            _cancelling(1e-4),
            RowScatter(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, 768), 256),
        ],
    }
    together = planner.squared_norms({name: list(forms) for name, forms in names.items()})
    assert list(together) == list(names)
    for name, forms in names.items():
        # Built or not, which rounding tells apart.
        torch.testing.assert_close(together[name], sum_squared_norms(forms), rtol=1e-3, atol=0)
    exact = names["cancels too"][0].dense().norm()
    assert exact <= together["cancels too"].sqrt() < 1.5 * exact
    rough = measure_uses(names["cancels too"])
    # The rough bound is far above, so the closer one was taken.
    assert round_up(rough.squares_B, rough.spreads_B, 4.0).bounds_B.sqrt() > 5 * exact


@pytest.mark.parametrize("shift", [1e-6, 1e-5, 1e-4])
def test_stored_gradients_that_nearly_cancel_are_never_measured_too_short(shift):
    """Their squares and cross term cancel as those of positions do."""
    for seed in range(20):
        torch.manual_seed(seed)
        first = torch.randn(1, 300, 200)
        second = -first + shift * torch.randn_like(first)
        assert (
            sum_squared_norms([Materialized(first), Materialized(second)]).sqrt() >= (first + second).norm()
        )


def _spike_and_tail(count, tail):
    """A large number, then many whose squares are each less than its last place."""
    return torch.cat([torch.ones(1), torch.full((count - 1,), tail)])


@pytest.mark.parametrize(
    "numbers",
    [
        lambda: torch.randn(8_000_000),
        lambda: torch.full((8_000_000,), 0.7),
        lambda: torch.full((8_000_000,), 1.1e-3),
        lambda: _spike_and_tail(8_000_000, 2e-4),
        lambda: _spike_and_tail(50_304, 1 / 50_304),
        lambda: torch.ones(300),
        lambda: torch.ones(1),
        lambda: torch.zeros(1000),
        lambda: torch.ones(0),
    ],
    ids=["normal", "alike", "alike-small", "tail", "head", "more-than-a-piece", "one", "zeros", "none"],
)
def test_a_length_is_never_below_the_true_one_and_hardly_above(numbers):
    """The first was 0.04 % too short when its squares were added one after the other, the third 0.1 %."""
    row = numbers()
    true = row.double().square().sum()
    found = measures.squared_lengths(torch.stack([row, row]).unflatten(1, (-1, 1)) if len(row) else row[None])
    for square in found.double():
        assert true <= square <= true * (1 + 4e-5)


@pytest.mark.parametrize("kind", ["one-position", "positions", "rows", "stored", "blocks", "experts"])
@pytest.mark.parametrize("place", [0, -1], ids=["label-first", "label-last"])
def test_a_heads_norm_with_one_large_and_many_small_numbers_is_not_too_short(kind, place):
    """A head's output gradient: nearly -1 at the label, tiny at every other word. All forms."""
    words, tail = 50_304, 2e-4
    gradient = _spike_and_tail(words, tail)
    gradient = gradient if place == 0 else gradient.flip(0)
    positions = 1 if kind == "one-position" else 70
    left = gradient.expand(1, positions, words).contiguous()
    right = torch.randn(1, 1, 2).expand(1, positions, 2).contiguous()
    form = {
        "one-position": lambda: OuterProduct(left, right),
        "positions": lambda: OuterProduct(left, right),
        "rows": lambda: RowScatter(torch.arange(70)[None] % 64, left[:, :, :2000].contiguous(), 64),
        "stored": lambda: Materialized(torch.einsum("btp,btd->bpd", left, right)),
        "blocks": lambda: build_in_blocks([(left, right)]),
        "experts": lambda: SlottedOuterProduct(
            left[:, :, :2000].contiguous(), right, torch.zeros(1, 70, dtype=torch.long), 1
        ),
    }[kind]()
    true = sum_dense([form]).double().square().sum()
    if kind not in ("stored", "blocks"):
        # In float64: a built gradient has its own rounding.
        true = type(form)(
            *(v.double() if torch.is_tensor(v) and v.is_floating_point() else v for v in vars(form).values())
        )
        true = true.dense().square().sum()
    found = sum_squared_norms([form]).double()
    assert true <= found <= true * (1 + 1e-3)


@pytest.mark.parametrize("positions", [1, 5])
@pytest.mark.parametrize("width", [64, 768, 4096])
def test_factors_that_lie_across_are_not_measured_too_short(width, positions):
    """Convolutions' factors are transposed; a product of a few such positions is one chain of additions."""
    rows = _spike_and_tail(width, 2.4e-4).expand(3, positions, -1).contiguous()
    across = rows.mT.contiguous().mT
    true = (positions * rows[0, 0].double().square().sum()) ** 2
    for left, right in itertools.product((rows, across), repeat=2):
        assert (sum_squared_norms([OuterProduct(left, right)]) >= true).all()


@pytest.mark.parametrize("second", ["outer", "stored"])
@pytest.mark.parametrize("positions", [1, 8])
def test_a_head_used_twice_is_not_measured_too_short(second, positions):
    """The cross term of two uses, 50,304 words in one chain of additions, lost 1e-4 of the square."""
    left = _spike_and_tail(50_304, 2e-4).expand(1, positions, -1).contiguous()
    right = torch.ones(1, positions, 2)
    once = OuterProduct(left, right)
    again = {"outer": OuterProduct(left.clone(), right), "stored": Materialized(once.dense())}[second]
    true = (2 * left.double().mT @ right.double()).square().sum()
    assert true <= sum_squared_norms([once, again]) <= true * (1 + 1e-3)


@pytest.mark.parametrize("first", ["outer", "rows"])
def test_wide_rows_used_twice_are_not_measured_too_short(first):
    """A wide row that a product or a look-up and another look-up add to."""
    values = _spike_and_tail(50_304, 2e-4).expand(1, 3, -1).contiguous()
    rows = torch.zeros(1, 3, dtype=torch.long)
    other = {"outer": OuterProduct(torch.ones(1, 3, 1), values.clone()), "rows": RowScatter(rows, values, 1)}
    true = (2 * values.double().sum(1)).square().sum()
    assert true <= sum_squared_norms([RowScatter(rows, values, 1), other[first]]) <= true * (1 + 1e-3)


@pytest.mark.parametrize("shift", [1e-2, 3e-3, 3e-4, 1e-4])
def test_a_tables_norm_with_one_large_and_many_small_rows_is_not_too_short(shift):
    for positions, width in ((1024, 768), (8192, 64)):
        values = torch.randn(1, positions, width) * shift / width**0.5
        values[:, 0] = torch.randn(width) / width**0.5
        form = RowScatter(torch.arange(positions)[None], values, positions)
        true = values.double().square().sum()
        measure = form.measure()
        assert (1 - 1e-6) * true <= measure.squares_B <= (1 + 3e-5) * true
        assert sum_squared_norms([form]) >= true


def test_a_very_wide_factors_products_keep_long_tails():
    """In one chain of additions 256,000 words lost 7e-5 of a square."""
    row = _spike_and_tail(256_000, 2e-4)
    squares = torch.cat(
        [block[0].diagonal() for block in measures.gram_blocks(row.expand(1, 3, -1).contiguous())]
    )
    torch.testing.assert_close(squares.double(), row.double().square().sum().expand(3), rtol=2e-5, atol=0)


def test_a_large_gradient_that_is_built_for_its_norm_is_not_measured_too_short():
    """Positions nearly cancel, so its 8 million numbers are added up: square after square lost 0.03 %."""
    left, right = torch.randn(1, 50, 2000), torch.randn(1, 50, 4000)
    form = OuterProduct(
        torch.cat([left, -left], 1), torch.cat([right, right + 0.1 * torch.randn_like(right)], 1)
    )
    measure = form.measure()
    assert measure.squares_B < 1e-4 * measure.spreads_B.square()
    true = form.weighted_sum(torch.ones(1), None).double().norm()
    assert true <= sum_squared_norms([form]).sqrt() <= true * (1 + 2e-4)
