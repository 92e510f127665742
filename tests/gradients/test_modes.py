"""The engine in the settings that real runs use."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import reference
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import MODEL_CASES
from torch import nn
from torch.distributed.fsdp import fully_shard

from dp_trainer import (
    AutomaticClipping,
    ConfigurationError,
    FlatClipping,
    UnsupportedOperationError,
    clipped_gradient_sum,
)
from dp_trainer.gradients.capture import capture
from dp_trainer.gradients.forms import OuterProduct
from dp_trainer.losses import per_sample_loss_for

CASES = {case.name: case for case in MODEL_CASES}


def _compare(model, micro_batch, loss, tolerance=1e-5, strategy="automatic"):
    expected = reference.per_sample_gradients(model, micro_batch, loss)
    norms = reference.norms(expected)
    clipping = FlatClipping(float(norms.median()) * 1.01)
    actual = clipped_gradient_sum(
        model, [micro_batch], per_sample_loss=loss, clipping=clipping, strategy=strategy
    )
    torch.testing.assert_close(actual.norms.double(), norms, rtol=tolerance, atol=0)
    assert reference.distance(actual.gradients, reference.clipped_sum(expected, actual.factors)) < tolerance
    return actual


PATTERNS = {
    "biases": ("gpt2-tied", lambda name: name.endswith("bias")),
    "norms": ("llama-tied", lambda name: "norm" in name),
    "head-and-embedding": ("gpt2-tied", lambda name: "wte" in name),
    "positions": ("bert-masked-tied", lambda name: "position" in name or "token_type" in name),
    "attention": ("t5-tied", lambda name: "SelfAttention" in name),
    "one-layer": ("vit", lambda name: "layers.1" in name or "cls_token" in name),
    "classifier": ("roberta-classifier", lambda name: "classifier" in name),
}


@pytest.mark.parametrize("subset", PATTERNS)
def test_any_subset_of_parameters(subset):
    """Bias-only training returned raw, unclipped gradients in a published library."""
    case, pattern = CASES[PATTERNS[subset][0]], PATTERNS[subset][1]
    model = case.build()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(pattern(name))
    result = _compare(model, case.micro_batch(), per_sample_loss_for(model))
    assert set(result.gradients) == {name for name, p in model.named_parameters() if p.requires_grad}


def _enable_checkpointing(model, *, use_reentrant):
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


STRATEGIES = ["automatic", "book_keeping", "two_pass", "direct", "loop"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["gpt2-tied", "llama-tied", "bert-masked-tied", "t5-tied"])
def test_gradient_checkpointing(name, strategy):
    case = CASES[name]
    model = case.build()
    _enable_checkpointing(model, use_reentrant=False)
    _compare(model, case.micro_batch(), per_sample_loss_for(model), strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_reentrant_checkpointing_is_refused(strategy):
    case = CASES["gpt2-tied"]
    model = case.build()
    _enable_checkpointing(model, use_reentrant=True)
    with pytest.raises(UnsupportedOperationError, match="use_reentrant"):
        _compare_once(model, case, strategy=strategy)


def _compare_once(model, case, **settings):
    return clipped_gradient_sum(
        model,
        [case.micro_batch()],
        per_sample_loss=per_sample_loss_for(model),
        clipping=AutomaticClipping(),
        **settings,
    )


@pytest.mark.parametrize("name", ["gpt2-tied", "llama-tied", "roberta-classifier", "vit"])
def test_bfloat16_autocast_stays_near_float32(name):
    case = CASES[name]
    model, loss = case.build(), per_sample_loss_for(case.build())
    plain = _compare_once(model, case)

    def under_autocast(model, micro_batch):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(model, micro_batch)

    mixed = clipped_gradient_sum(
        model, [case.micro_batch()], per_sample_loss=under_autocast, clipping=FlatClipping(1e-3)
    )
    torch.testing.assert_close(mixed.norms, plain.norms, rtol=0.05, atol=0)
    assert all(total.dtype == torch.float32 for total in mixed.gradients.values())
    # The contribution is bounded by its own norm, whatever bfloat16 did to the gradient.
    one = {k: v[:1] for k, v in case.micro_batch().items()}
    single = clipped_gradient_sum(model, [one], per_sample_loss=under_autocast, clipping=FlatClipping(1e-3))
    size = torch.stack([g.norm() for g in single.gradients.values()]).norm()
    assert size <= 1e-3 * (1 + 1e-4)


def test_pure_bfloat16_model():
    case = CASES["llama-tied"]
    model = case.build(torch.bfloat16)
    result = _compare_once(model, case)
    assert all(total.dtype == torch.float32 for total in result.gradients.values())
    torch.testing.assert_close(result.norms, _compare_once(model.float(), case).norms, rtol=0.1, atol=0)


@pytest.mark.parametrize("name", ["gpt2-tied", "llama-tied", "roberta-classifier", "vit"])
def test_low_rank_adapters(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        case = CASES[name]
        model = peft.get_peft_model(
            case.build(), peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        )
    assert len([n for n, p in model.named_parameters() if p.requires_grad and "lora" in n]) > 4
    _compare(model, case.micro_batch(), per_sample_loss_for(model))


def test_dropout_draws_one_mask_for_forward_and_backward():
    """With dropout on, norms must be those of the very gradients that are summed."""
    case = next(c for c in MODEL_CASES if c.name == "roberta-classifier")
    model = type(case)(
        case.name, case.model_class, {**case.config, "hidden_dropout_prob": 0.5}, case.head
    ).build()
    one = {k: v[:1] for k, v in case.micro_batch().items()}
    sizes = set()
    for _ in range(3):
        result = clipped_gradient_sum(
            model, [one], per_sample_loss=per_sample_loss_for(model), clipping=FlatClipping(1e-3)
        )
        size = torch.stack([g.norm() for g in result.gradients.values()]).norm()
        assert abs(float(size) / 1e-3 - 1) < 1e-4
        sizes.add(float(result.norms[0]))
    assert len(sizes) == 3


class _Branching(nn.Module):
    """Takes a layer never, once or twice, depending on the data."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.never = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        hidden = self.first(x)
        if x.sum() > 0:
            hidden = self.second(torch.tanh(self.second(hidden)))
        return hidden


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_branches_that_depend_on_the_data(sign):
    model = _Branching()
    result = _compare(model, {"x": sign * torch.rand(5, 4)}, lambda m, b: m(b["x"]).pow(2).sum(1))
    assert not result.gradients["never.weight"].any()
    assert bool(result.gradients["second.weight"].any()) == (sign > 0)


@pytest.mark.parametrize("strategy", ["book_keeping", "two_pass", "direct", "loop"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_sample_with_nan_or_infinity_is_left_out(poison, strategy):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 2))
    good = torch.randn(4, 4)
    bad = torch.cat((good[:2], torch.full((1, 4), poison), good[2:]))
    arguments = {
        "per_sample_loss": lambda m, b: m(b["x"]).pow(2).sum(1),
        "clipping": FlatClipping(0.5),
        "strategy": strategy,
    }
    clean = clipped_gradient_sum(model, [{"x": good}], **arguments)
    result = clipped_gradient_sum(model, [{"x": bad}], **arguments)
    assert result.dropped_samples == 1
    assert clean.dropped_samples == 0
    assert result.factors[2] == 0
    assert reference.distance(result.gradients, clean.gradients) < 5e-6


def test_micro_batches_do_not_pile_up_in_memory():
    """A tape that refers to a graph that refers to the tape keeps everything alive."""
    case = CASES["gpt2-tied"]
    model = case.build()
    loss = per_sample_loss_for(model)
    alive: list[weakref.ref[torch.Tensor]] = []

    def watched(model, micro_batch):
        losses = loss(model, micro_batch)
        alive.append(weakref.ref(losses))
        return losses

    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            clipped_gradient_sum(
                model, [case.micro_batch()] * 2, per_sample_loss=watched, clipping=AutomaticClipping()
            )
        before = _live_tensors()
        for _ in range(3):
            clipped_gradient_sum(
                model, [case.micro_batch()] * 2, per_sample_loss=watched, clipping=AutomaticClipping()
            )
        assert _live_tensors() <= before + 2
    finally:
        gc.enable()
    assert all(reference() is None for reference in alive)


def test_what_a_use_needed_is_freed_as_soon_as_it_is_recorded():
    """The graph keeps its hooks until all of it is gone; they must not keep a layer's input as long."""
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 2))
    x, inputs = torch.randn(3, 4, 5), []

    def drop(_name, form):
        if isinstance(form, OuterProduct):
            inputs.append(weakref.ref(form.right_BTD))

    with capture(model, 3, settle=drop) as tape:
        losses = model(x).square().sum((1, 2))
        losses.sum().backward()
        # The graph is still there.
        assert losses.grad_fn is not None
        assert len(inputs) == 3
        assert [reference() for reference in inputs] == [None] * 3
    assert not tape.take_forms()


class Scaled(nn.Module):
    """A parameter that is multiplied with the data."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x):
        return x * self.scale


@pytest.mark.parametrize(
    "model", [nn.Linear(5, 2), Scaled(), nn.GroupNorm(2, 4), nn.LayerNorm(5)], ids=lambda m: type(m).__name__
)
def test_a_second_backward_pass_is_refused(model):
    """What the first one recorded is gone, so the second would be recorded in part, or twice."""
    x = torch.randn(3, 4, 5)
    with capture(model, 3):
        loss = model(x).square().sum()
        loss.backward(retain_graph=True)
        with pytest.raises(UnsupportedOperationError, match="arrived twice"):
            loss.backward()


@pytest.mark.parametrize("failing", [1, 2])
def test_a_backward_pass_that_failed_half_way_is_not_taken_up_again(failing):
    """A loss function that catches the error would have a gradient without what was dropped."""
    model, x, seen = nn.Linear(5, 2), torch.randn(3, 4, 5), []

    def fail(_name, form):
        seen.append(form)
        if len(seen) == failing:
            raise MemoryError("out of memory")
        return form

    with capture(model, 3, settle=fail):
        loss = model(x).square().sum()
        with pytest.raises(MemoryError):
            loss.backward(retain_graph=True)
        with pytest.raises(UnsupportedOperationError, match="arrived twice"):
            loss.backward()


def _live_tensors() -> int:
    return sum(issubclass(type(obj), torch.Tensor) for obj in gc.get_objects())


def test_gradients_of_others_are_left_alone():
    case = CASES["gpt2-tied"]
    model = case.build()
    marks = {name: torch.full_like(p, 7.0) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = marks[name]
    _compare_once(model, case)
    assert all(p.grad is marks[name] for name, p in model.named_parameters())


def test_an_error_in_the_forward_pass_leaves_nothing_behind():
    model = nn.Linear(3, 3)

    def failing(model, micro_batch):
        model(micro_batch["x"])
        raise RuntimeError("from the user's loss")

    with pytest.raises(RuntimeError, match="user's loss"):
        clipped_gradient_sum(
            model, [{"x": torch.ones(2, 3)}], per_sample_loss=failing, clipping=FlatClipping(1.0)
        )
    assert torch.overrides._get_current_function_mode() is None
    F.linear(torch.ones(1, 3), model.weight).sum().backward()
    assert model.weight.grad is not None


def test_empty_logical_batch():
    model = nn.Linear(3, 2)
    result = clipped_gradient_sum(
        model, [], per_sample_loss=lambda m, b: m(b["x"]).sum(1), clipping=FlatClipping(1.0)
    )
    assert result.norms.shape == (0,)
    assert {k: v.shape for k, v in result.gradients.items()} == {"weight": (2, 3), "bias": (2,)}
    assert not any(v.any() for v in result.gradients.values())


BAD_CALLS = {
    "averaged loss": ({"per_sample_loss": lambda m, b: m(b["x"]).mean()}, r"shape \(2,\)"),
    "unknown strategy": ({"strategy": "fastest"}, "book_keeping"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused(name):
    changes, fragment = BAD_CALLS[name]
    arguments = {"per_sample_loss": lambda m, b: m(b["x"]).sum(1), "clipping": FlatClipping(1.0), **changes}
    with pytest.raises(ConfigurationError, match=fragment):
        clipped_gradient_sum(nn.Linear(3, 2), [{"x": torch.ones(2, 3)}], **arguments)


def test_a_model_without_trainable_parameters_is_refused():
    model = nn.Linear(3, 2).requires_grad_(False)
    with pytest.raises(ConfigurationError, match="requires_grad"):
        clipped_gradient_sum(model, [], per_sample_loss=lambda m, b: b["x"], clipping=FlatClipping(1.0))


@pytest.mark.parametrize("strategy", ["automatic", "book_keeping", "loop", "direct"])
@pytest.mark.parametrize("ended", [False, True])
def test_parameters_spread_by_anything_but_fsdp_around_the_model_are_refused(strategy, ended):
    """Also after the group of processes has ended, when the shards are still there."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        fully_shard(model[1], mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        if ended:
            dist.destroy_process_group()
        with pytest.raises(
            UnsupportedOperationError, match=r"1\.weight: this parameter is spread over ranks"
        ):
            clipped_gradient_sum(
                model,
                [{"x": torch.ones(3, 4)}],
                per_sample_loss=lambda m, b: m(b["x"]).sum(1),
                clipping=FlatClipping(1.0),
                strategy=strategy,
            )
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
