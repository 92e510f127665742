"""Running out of memory changes how samples are grouped, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dp_trainer import FlatClipping
from dp_trainer.gradients.halving import Halving
from dp_trainer.gradients.strategies import clipped_gradient_sum

D, P = 6, 4


def _loss_with_room_for(samples, calls):
    def loss(model, micro_batch):
        calls.append(len(micro_batch["x"]))
        if len(micro_batch["x"]) > samples:
            raise torch.OutOfMemoryError("out of memory")
        return model(micro_batch["x"]).square().sum(1)

    return loss


@pytest.mark.parametrize("room", [1, 2, 3, 100])
def test_halving_gives_the_same_sum_and_is_remembered(room):
    model, calls = nn.Linear(D, P).double(), []
    micro_batches = [{"x": torch.randn(n, D).double()} for n in (8, 8, 3)]
    loss = _loss_with_room_for(room, calls)

    def attempt(pieces):
        return clipped_gradient_sum(model, pieces, per_sample_loss=loss, clipping=FlatClipping(0.5))

    whole = clipped_gradient_sum(
        model,
        micro_batches,
        per_sample_loss=lambda m, b: m(b["x"]).square().sum(1),
        clipping=FlatClipping(0.5),
    )
    halving = Halving()
    for _ in range(2):
        result = halving.run(micro_batches, attempt)
        torch.testing.assert_close(result.norms, whole.norms)
        torch.testing.assert_close(result.gradients["weight"], whole.gradients["weight"])
    failed = sum(size > room for size in calls)
    assert failed == {1: 3, 2: 2, 3: 2, 100: 0}[room]


def test_running_out_after_some_micro_batches_counts_none_twice():
    model, calls = nn.Linear(D, P).double(), []
    micro_batches = [{"x": torch.randn(n, D).double()} for n in (2, 2, 4)]
    loss = _loss_with_room_for(2, calls)
    result = Halving().run(
        micro_batches,
        lambda pieces: clipped_gradient_sum(model, pieces, per_sample_loss=loss, clipping=FlatClipping(0.5)),
    )
    assert calls == [2, 2, 4, 1, 1, 1, 1, 2, 2]
    assert len(result.norms) == 8


def test_one_sample_that_does_not_fit_is_an_error():
    model, calls = nn.Linear(D, P), []
    loss = _loss_with_room_for(0, calls)
    with pytest.raises(torch.OutOfMemoryError):
        Halving().run(
            [{"x": torch.randn(4, D)}],
            lambda pieces: clipped_gradient_sum(
                model, pieces, per_sample_loss=loss, clipping=FlatClipping(1)
            ),
        )
    assert calls == [4, 2, 1]


def test_another_error_is_not_taken_for_it():
    def broken(pieces):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        Halving().run([{"x": torch.randn(4, D)}], broken)


def test_where_ranks_must_stay_in_step_nothing_is_halved():
    model, calls = nn.Linear(D, P), []
    loss = _loss_with_room_for(2, calls)
    with pytest.raises(torch.OutOfMemoryError):
        Halving(allowed=False).run(
            [{"x": torch.randn(4, D)}],
            lambda pieces: clipped_gradient_sum(
                model, pieces, per_sample_loss=loss, clipping=FlatClipping(1)
            ),
        )
    assert calls == [4]
