"""Two and three processes against one: sums, noise, draws, and what plain data parallelism sends."""

from __future__ import annotations

import json

import pytest

from distributed.launch import launch

# Norms are rounded up: with the loop less than with Gram matrices.
EXACT = 5e-6


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def found(request, tmp_path_factory):
    """All checks of ``worker.py`` in one launch: the numbers of each rank."""
    result = tmp_path_factory.mktemp("ranks") / "found.json"
    ended = launch("worker.py", str(result), processes=request.param)
    assert ended.code == 0, ended.output[-3000:]
    return json.loads(result.read_text(encoding="utf-8"))


def test_the_sum_is_that_of_one_process(found):
    """Noise off; some samples clipped and some not, unequal lengths, a rank without samples, tied weights."""
    for rank in found:
        assert max(rank["replicated_sums"].values()) < EXACT
        assert len(rank["replicated_sums"]) == 6


def test_shards_give_the_sum_of_one_process(found):
    for rank in found:
        assert max(rank["sharded_sums"].values()) < EXACT
        assert rank["sharded_adapters"]["error"] < EXACT
        assert rank["sharded_checkpointing"]["error"] < EXACT
        assert rank["hybrid_sharding"]["error"] < EXACT


def test_sharded_certificate(found):
    for rank in found:
        certificate = rank["sharded_certificate"]
        assert certificate["norm error"] < 1e-4
        assert certificate["sum error"] < 1e-4
        assert 0.9 < certificate["largest"] <= 1 + 1e-5
        assert certificate["weights moved by"] == 0


def test_sharded_bfloat16_keeps_its_bound(found):
    for rank in found:
        assert rank["sharded_bfloat16"]["error"] < 0.05
        assert rank["sharded_bfloat16"]["contributions over their bound"] <= 1 + 1e-4
        assert rank["sharded_bfloat16"]["dtype"] == "torch.float32"


def test_what_cannot_be_sharded_is_refused(found):
    for rank in found:
        messages = rank["what_sharding_refuses"]
        assert "relative_attention_bias" in messages["position bias"]
        for strategy in ("loop", "direct", "two_pass"):
            assert "spread over ranks" in messages[strategy]


def _is_right(noise):
    """600 000 entries: the std is known to 0.1 %, a correlation of slices to 0.003."""
    return (
        abs(noise["std"] - 1) < 0.01
        and noise["largest correlation"] < 0.02
        and noise["replicas differ by"] == 0
    )


def test_noise_is_added_once_and_equal_on_all_replicas(found):
    for rank in found:
        assert _is_right(rank["noise"])
        assert _is_right(rank["noise_with_a_fixed_seed"])
        assert abs(rank["noise_two_releases"]["correlation"]) < 0.02


@pytest.mark.parametrize(
    "fault", ["planted_one_seed_on_all_ranks", "planted_noise_on_each_rank_before_the_sum"]
)
def test_wrong_noise_is_found(found, fault):
    assert not _is_right(found[0][fault])


def test_shards_have_noise_of_their_own_and_replicas_the_same(found):
    for rank in found:
        assert abs(rank["sharded_noise"]["std"] - 1) < 0.02
        assert rank["sharded_noise"]["largest correlation"] < 0.03
        assert rank["hybrid_sharding"]["equal"]
        assert abs(rank["hybrid_sharding"]["std"] - 1) < 0.05


def test_an_empty_draw_releases_noise(found):
    for rank in found:
        assert abs(rank["empty_draw"]["std"] - 1) < 0.05
        assert rank["empty_draw"]["equal"]


def _is_one_poisson_draw(inclusion):
    """Over 400 draws of 60 samples: pairs of samples that come up together have covariances of ±0.25 by chance."""
    return (
        abs(inclusion["frequency"] - 0.1) < 0.01
        and inclusion["most in one draw"] == 1
        and inclusion["largest covariance"] < 0.5
    )


def test_the_shares_of_ranks_are_one_poisson_draw(found):
    assert _is_one_poisson_draw(found[0]["sampling"])


def test_draws_over_shards_with_one_seed_are_found(found):
    assert not _is_one_poisson_draw(found[0]["planted_draws_over_shards_with_one_seed"])


def test_lengths_balance_the_work(found):
    balance = found[0]["balance"]
    assert balance["by length"] < 1.03
    assert balance["by length"] < balance["as drawn"]


def test_ranks_that_draw_ahead_share_one_draw(found):
    for rank in found:
        assert rank["draws_after_uneven_epochs"] == {"most in one draw": 1, "taken differ by": 0}


def test_samples_in_another_order_are_refused(found):
    """Each rank would draw by its own numbers, and some samples on two ranks at once."""
    for rank in found:
        assert "the samples and their order" in rank["other_order"]["message"]


def test_ranks_that_disagree_are_refused_on_all(found):
    for number, rank in enumerate(found):
        assert f"the dataset's length = {100 + number}" in rank["disagreement"]["message"]
        assert "the plan" not in rank["disagreement"]["message"]


def test_bytes_sent_are_those_of_plain_data_parallelism(found):
    """With accumulation under ``no_sync``; ours sends four more numbers, and pads slices to equal length."""
    sent = found[0]["bytes_sent"]
    assert sent["plain"] == 8 * sent["parameters"]
    assert sent["plain"] <= sent["ours"] <= sent["plain"] + 200
