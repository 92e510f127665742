"""The model of clusters: bytes, limits, and the table."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import cluster

SMALL = cluster.Model(name="small", parameters=1e6, tokens=10, batch=64, micro_batch=4)
FREE = cluster.Cluster(within_machine=1e30, between_machines=1e30, latency=0.0, noise_seconds=0.0)


def test_replicated_sums_are_sent_once_whatever_the_micro_batches():
    for micro_batch in (1, 4):
        model = replace(SMALL, micro_batch=micro_batch)
        assert cluster.bytes_sent(model, FREE, 2, sharded=False) == 4e6
        assert cluster.bytes_sent(model, FREE, 4, sharded=False) == 2 * 3 / 4 * 4e6


def test_sharded_micro_batches_gather_twice_and_reduce_once():
    # 64 samples on 2 ranks are 8 micro-batches of 4; half of 2 · 2 + 4 bytes a parameter each.
    assert cluster.bytes_sent(SMALL, FREE, 2, sharded=True) == 8 * 0.5 * 8e6


@pytest.mark.parametrize("sharded", [False, True])
def test_where_sending_is_free_only_computing_counts(sharded):
    step = cluster.private_step(SMALL, FREE, 4, sharded=sharded)
    plain = cluster.plain_seconds(SMALL, FREE, 4, sharded=sharded)
    assert step.seconds / plain == pytest.approx(FREE.private_over_plain)


@pytest.mark.parametrize("sharded", [False, True])
def test_slower_networks_never_help(sharded):
    seconds = [
        cluster.private_step(SMALL, replace(FREE, between_machines=speed), 16, sharded=sharded).seconds
        for speed in (1e12, 1e10, 1e8)
    ]
    assert seconds == sorted(seconds)
    assert seconds[0] < seconds[-1]


def test_the_page_has_a_row_for_each_model_and_way():
    text, figure = cluster.page(cluster.MODELS, cluster.Cluster())
    assert len(text.splitlines()) == 2 + len(cluster.MODELS) * 2 * 3
    assert figure.startswith(b"\x89PNG")
