"""Two processes write what one writes: replicated, sharded, with more ranks than batches."""

from __future__ import annotations

import json

import pytest

from distributed.launch import launch


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    result = tmp_path_factory.mktemp("generation") / "found.json"
    ended = launch("generate.py", str(result), processes=2, timeout=120.0)
    assert ended.code == 0, ended.output[-3000:]
    return json.loads(result.read_text(encoding="utf-8"))


def test_all_ranks_have_the_texts_of_one_process(found):
    expected = found[0]["alone"]
    assert len(set(expected)) == 5
    for rank in found:
        assert rank["alone"] == rank["replicated"] == rank["one batch"] == rank["sharded"] == expected


def test_the_work_is_shared(found):
    first, second = (rank["passes"] for rank in found)
    assert first > 0
    assert second == 0


def test_a_sharded_model_stays_sharded(found):
    for rank in found:
        assert rank["left sharded"]
        assert rank["left training"]
