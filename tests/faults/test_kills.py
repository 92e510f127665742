"""SIGKILL at chosen places and at random times: what is left loads, and never counts too little."""

from __future__ import annotations

import pytest

from .kills import Place, clean_environment, many, targets


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    clean_environment()


def test_three_kills(tmp_path):
    kills = many(tmp_path, [("optimizer half done", 3), ("weights half written", 2), ("random", 1)])
    assert [kill.faults for kill in kills] == [(), (), ()]
    assert kills[0].spent_before == 3
    assert kills[0].spent_after == kills[0].released == 2
    assert kills[1].cut_short == 1
    assert kills[1].spent_after == 2


PLANTED = {
    "record one step short": ("forward", 3, "counts 1 steps, its weights hold 2 releases"),
    "manifest written first": ("weights half written", 2, "does not load"),
}


@pytest.mark.parametrize("plant", PLANTED)
def test_a_planted_fault_is_found(tmp_path, plant):
    place, steps, fault = PLANTED[plant]
    kill, error = Place(tmp_path, plant=plant).kill(place, steps)
    assert not error
    assert any(fault in found for found in kill.faults), kill


@pytest.mark.slow
def test_fifty_kills(tmp_path):
    assert [kill for kill in many(tmp_path, targets(50)) if kill.faults] == []
