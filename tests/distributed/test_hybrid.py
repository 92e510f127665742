"""Two replicas of two shards: four processes."""

from __future__ import annotations

import json

import pytest

from distributed.launch import launch


@pytest.mark.slow
def test_two_replicas_of_two_shards(tmp_path):
    result = tmp_path / "found.json"
    ended = launch("worker.py", str(result), "hybrid_sharding", "noise", "sharded_noise", processes=4)
    assert ended.code == 0, ended.output[-3000:]
    for rank in json.loads(result.read_text(encoding="utf-8")):
        assert rank["hybrid_sharding"]["error"] < 1e-6
        assert rank["hybrid_sharding"]["equal"]
        assert abs(rank["hybrid_sharding"]["std"] - 1) < 0.06
        assert abs(rank["noise"]["std"] - 1) < 0.01
        assert rank["noise"]["largest correlation"] < 0.02
        assert rank["sharded_noise"]["largest correlation"] < 0.03
