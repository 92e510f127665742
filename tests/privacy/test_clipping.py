"""The contract that every clipping function keeps, and each one's formula."""

import math

import pytest
import torch

from dp_trainer.errors import ConfigurationError
from dp_trainer.privacy.clipping import (
    CLIPPING_FUNCTIONS,
    AutomaticClipping,
    ClippingFunction,
    FlatClipping,
    GlobalClipping,
    NormalizingClipping,
)

CASES = [
    AutomaticClipping(),
    AutomaticClipping(gamma=1e-6, clipping_norm=0.3),
    NormalizingClipping(),
    NormalizingClipping(clipping_norm=37.7),
    FlatClipping(1.0),
    FlatClipping(clipping_norm=1e-3),
    FlatClipping(0.1),
    GlobalClipping(clipping_norm=1.0, cutoff=3.0),
    GlobalClipping(clipping_norm=5.0, cutoff=0.7),
]
REACH = torch.cat([torch.logspace(-45, 38, 4001, dtype=torch.float64), torch.tensor([0.0, 1e-45, 3.4e38])])
AROUND = torch.cat(
    [torch.linspace(0.0, 50.0, 5001, dtype=torch.float64), torch.linspace(0.9999, 1.0001, 501)]
)


def product(clip, norms):
    """factor · norm without further rounding."""
    return clip(norms).double() * norms.double()


@pytest.mark.parametrize("clip", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("norms", [REACH, AROUND], ids=["every size", "around the bound"])
def test_no_contribution_exceeds_the_sensitivity(clip, dtype, norms):
    norms = norms.to(dtype)
    bound = float(torch.tensor(clip.sensitivity, dtype=dtype))  # R itself may round up by half a unit
    assert torch.isfinite(clip(norms)).all()
    assert (clip(norms) >= 0).all()
    assert product(clip, norms).max() <= bound
    assert (clip(norms) * norms <= bound).all()


@pytest.mark.parametrize("clip", CASES, ids=str)
def test_groups_share_the_sensitivity(clip):
    norms_BG = torch.rand(2000, 7, dtype=torch.float32, generator=torch.Generator().manual_seed(1)) * 40
    contributions_B = product(clip, norms_BG).square().sum(1).sqrt()
    assert contributions_B.max() <= clip.sensitivity * (1 + 1e-12)
    assert clip(norms_BG).shape == norms_BG.shape


@pytest.mark.parametrize("clip", CASES, ids=str)
def test_one_group_is_flat_clipping(clip):
    assert torch.equal(clip(AROUND.unsqueeze(1)).squeeze(1), clip(AROUND))


@pytest.mark.parametrize("clip", CASES, ids=str)
def test_samples_that_are_not_finite_are_left_out(clip):
    norms_B = torch.tensor([math.nan, math.inf, -math.inf, 0.5, -1.0])
    assert clip(norms_B).tolist()[:3] == [0.0, 0.0, 0.0]
    assert clip(norms_B)[3] > 0
    assert clip(norms_B)[4] == 0.0
    norms_BG = torch.tensor([[math.nan, 0.1], [0.1, math.inf], [0.1, 0.1]])
    assert clip(norms_BG)[:2].tolist() == [[0.0, 0.0]] * 2
    assert (clip(norms_BG)[2] > 0).all()


@pytest.mark.parametrize("clip", CASES, ids=str)
def test_dtype_and_shape_are_kept_and_empty_batches_work(clip):
    for dtype in (torch.float32, torch.float64):
        assert clip(torch.ones(3, dtype=dtype)).dtype == dtype
        assert clip(torch.empty(0, dtype=dtype)).shape == (0,)
        assert clip(torch.empty(0, 2, dtype=dtype)).shape == (0, 2)


@pytest.mark.parametrize("clip", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64], ids=str)
def test_norms_that_underflow_are_refused(clip, dtype):
    with pytest.raises(ConfigurationError, match="float32"):
        clip(torch.ones(3).to(dtype))
    with pytest.raises(ConfigurationError, match="shape"):
        clip(torch.ones(3, 2, 2))


@pytest.mark.parametrize(
    ("clip", "formula"),
    [
        (AutomaticClipping(gamma=0.5, clipping_norm=2.0), lambda n: 2.0 / (n + 0.5)),
        (NormalizingClipping(clipping_norm=2.0), lambda n: 2.0 / n if n > 0 else 0.0),
        (FlatClipping(2.0), lambda n: min(1.0, 2.0 / n) if n > 0 else 1.0),
        (GlobalClipping(2.0, 8.0), lambda n: 0.25 if n <= 8.0 else 0.0),
    ],
    ids=["automatic", "normalizing", "flat", "global"],
)
def test_formula(clip, formula):
    norms = [0.0, 0.1, 1.0, 1.9, 2.0, 2.1, 7.9, 8.1, 100.0]
    expected = torch.tensor([formula(n) for n in norms], dtype=torch.float64)
    torch.testing.assert_close(clip(torch.tensor(norms, dtype=torch.float64)), expected, rtol=1e-12, atol=0.0)


def test_flat_clipping_leaves_short_gradients_exactly_alone():
    assert (FlatClipping(1.0)(torch.linspace(0.0, 1.0, 101)) == 1.0).all()


def test_defaults_are_automatic_clipping_at_one():
    assert AutomaticClipping() == AutomaticClipping(gamma=0.01, clipping_norm=1.0)
    assert NormalizingClipping().sensitivity == 1.0


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, True, "1", None, 1e-13])
@pytest.mark.parametrize(
    "make",
    [
        lambda value: AutomaticClipping(gamma=value),
        lambda value: AutomaticClipping(clipping_norm=value),
        lambda value: NormalizingClipping(value),
        lambda value: FlatClipping(value),
        lambda value: GlobalClipping(value, 1.0),
        lambda value: GlobalClipping(1.0, value),
    ],
)
def test_settings_are_checked(make, value):
    with pytest.raises(ConfigurationError, match="must be a number"):
        make(value)


def test_table_covers_every_case_and_describes_it():
    assert {type(clip) for clip in CASES} == set(CLIPPING_FUNCTIONS.values())
    assert FlatClipping(2).describe() == {"name": "flat", "clipping_norm": 2.0}
    for clip in CASES:
        described = clip.describe()
        assert CLIPPING_FUNCTIONS[described.pop("name")](**described) == clip


@pytest.mark.parametrize(
    "wrong",
    [
        lambda n: torch.full_like(n, 1.0),
        lambda n: 1.0 / n,  # infinite at 0
        lambda n: 1.0 / n.clamp(max=1.0),  # the wrong way round
        lambda n: torch.where(n > 0, 1.0 / n, 0.0) * (1 + 3e-7),
    ],
    ids=["no clipping", "overflow", "min for max", "rounded up"],
)
def test_the_contract_rejects_a_wrong_function(wrong):
    class Wrong(FlatClipping):
        def __call__(self, norms):
            return wrong(norms)

    with pytest.raises(AssertionError):
        test_no_contribution_exceeds_the_sensitivity(Wrong(1.0), torch.float32, torch.cat([REACH, AROUND]))


def test_base_class_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        ClippingFunction()
