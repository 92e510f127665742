"""Chooses the cheapest of several exact ways, from the current shapes.

For each use of a parameter: the ghost norm of an outer product costs about
T²(P + D) multiplications a sample and no memory. Building the gradient costs
T·P·D and P·D memory, but a built gradient also serves the weighted sum, which
saves T·P·D there. For each micro-batch: see ``choose_strategy``. A choice never
changes a result beyond rounding.

Axes: B sample, T position, P first weight axis, D second.
"""

from __future__ import annotations

from collections import ChainMap, Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dp_trainer.batches import micro_batch_size
from dp_trainer.gradients.checkpointing import saves_memory
from dp_trainer.gradients.forms import (
    Form,
    OuterProduct,
    SquaredNorms,
    closer_bounds,
    measure_uses,
    round_up,
    rounding_of,
    sum_dense,
)
from dp_trainer.gradients.measures import GramCache, accumulation_dtype
from dp_trainer.gradients.parts import full_precision
from dp_trainer.gradients.sharding import is_sharded
from dp_trainer.gradients.stored import Materialized, MaterializedInBlocks, build_in_blocks

# What touching one element of a built gradient costs, in multiplications of a matrix product: it is written
# once and read twice. Measured on two CPUs: building wins from T ≈ 180 at P = D = 768.
_COST_OF_A_BUILT_ELEMENT = 84
# The same for a gradient that autograd leaves whole, read for its norm and added to the total: an estimate.
_COST_OF_A_WHOLE_ELEMENT = 60
# The share of a Gram matrix that is computed: the lower triangle, in blocks.
_SHARE_OF_A_GRAM = 0.6
# Gradients built after the backward pass may take so much more memory than the factors of all parameters.
_LARGEST_GROWTH = 0.25
# The same where they are built in blocks, on a CPU: these fit into the gaps that the backward pass left in the
# heap, some 200 MB beside 430 MB of factors for ViT-small.
_LARGEST_GROWTH_IN_BLOCKS = 0.5
# As many uses share an input, as a rule at most: queries, keys and values.
_USES_OF_AN_INPUT = 3
# A sample of so many positions keeps a CPU busy by itself: several at a time take more memory and no less time.
_LONG = 512
# Positions that no sample uses are left out where that halves the work, or better.
_MOST_USED_POSITIONS = 0.5


def settle(_name: str, form: Form) -> Form:
    """Returns an equal form that costs less to keep and to measure, for the only use of a parameter.

    Called as gradients arrive, before it is known which uses share an input, so it
    builds only what takes no more memory if ``_USES_OF_AN_INPUT`` do;
    ``what_is_built`` decides later about the rest.
    """
    form = without_unused_positions(form)
    if not isinstance(form, OuterProduct) or _saved_by_building([form]) <= 0:
        return form
    left, right = form.left_BTP.nbytes, form.right_BTD.nbytes
    # Either factor may be the input.
    if _built_bytes([form]) > min(left + right / _USES_OF_AN_INPUT, right + left / _USES_OF_AN_INPUT):
        return form
    with full_precision(form.left_BTP.device):
        return _built([form])


def what_is_built(forms_by_name: Mapping[str, Sequence[Form]]) -> set[str]:
    """Returns the parameters whose gradients to build: where that takes less time, as memory allows.

    Factors that several parameters share, as queries, keys and values share an
    input, count once, and are free only when all of these are built. Those come
    first that save most time for the memory.
    """
    savings = {name: _saved_by_building(forms) for name, forms in forms_by_name.items()}
    candidates = [name for name, saved in savings.items() if saved > 0]
    factors = {name: _distinct_factors(forms) for name, forms in forms_by_name.items()}
    users = Counter(key for keys in factors.values() for key in keys)
    kept = sum(ChainMap(*factors.values()).values())

    def growth(name: str) -> int:
        freed = (size for key, size in factors[name].items() if users[key] == 1)
        return _built_bytes(forms_by_name[name]) - sum(freed)

    chosen, taken = set(), 0
    for name in sorted(candidates, key=lambda name: growth(name) / savings[name]):
        forms, added = forms_by_name[name], growth(name)
        in_blocks = _is_built_in_blocks(forms)
        # Where several uses are not added up in place, that takes a second and a third copy for that moment.
        copies = 2 * _built_bytes(forms) if len(forms) > 1 and not in_blocks else 0
        if taken + added + copies <= kept * (_LARGEST_GROWTH_IN_BLOCKS if in_blocks else _LARGEST_GROWTH):
            # What is freed is not given to others, which may be built before.
            taken += max(0, added)
            users.subtract(factors[name].keys())
            chosen.add(name)
    return chosen


def _built(forms: Sequence[Form]) -> Materialized | MaterializedInBlocks:
    """Returns one parameter's gradients, all uses added up."""
    if _is_built_in_blocks(forms):
        outer = [form for form in forms if isinstance(form, OuterProduct)]
        return build_in_blocks([(form.left_BTP, form.right_BTD) for form in outer])
    return Materialized(sum_dense(forms))


def _is_built_in_blocks(forms: Sequence[Form]) -> bool:
    """Whether gradients are built a few samples at a time: not on a GPU, which wants few large products."""
    return all(isinstance(form, OuterProduct) and form.left_BTP.device.type == "cpu" for form in forms)


def _distinct_factors(forms: Sequence[Form]) -> dict[tuple[int, torch.Size], int]:
    """The sizes in bytes of what outer products are made of, by where it lies."""
    outer = [form for form in forms if isinstance(form, OuterProduct)]
    tensors = [tensor for form in outer for tensor in (form.left_BTP, form.right_BTD)]
    return {(tensor.data_ptr(), tensor.shape): tensor.nbytes for tensor in tensors}


def _built_bytes(forms: Sequence[Form]) -> int:
    """What the built gradients of one parameter take."""
    outer = next(form for form in forms if isinstance(form, OuterProduct))
    dtype = accumulation_dtype(outer.left_BTP, outer.right_BTD)
    return outer.left_BTP.shape[0] * outer.shape.numel() * dtype.itemsize


def _saved_by_building(forms: Sequence[Form]) -> float:
    """Multiplications a sample that building one parameter's gradients saves against their ghost norm."""
    outer = [form for form in forms if isinstance(form, OuterProduct)]
    return cost_of_ghost_norm(outer) - cost_of_building(outer) if outer else 0.0


def cost_of_ghost_norm(forms: Sequence[OuterProduct]) -> float:
    """Multiplications a sample for the ghost norm of a parameter with these uses."""
    # Every pair of uses has a Gram product; (Σ T)² counts the pairs of a shared weight.
    return float(sum(form.left_BTP.shape[1] for form in forms) ** 2 * sum(forms[0].shape))


def cost_of_building(forms: Sequence[OuterProduct]) -> float:
    """The same for touching built gradients; building them replaces their part of the weighted sum."""
    return float(_COST_OF_A_BUILT_ELEMENT * forms[0].shape.numel())


def without_unused_positions(form: Form) -> Form:
    """Returns an outer product without the positions where a factor is zero for all samples; others unchanged.

    A head that reads one position, as a classifier reads the first, leaves the
    gradients of all others zero in the last layers. Only on a CPU: elsewhere the
    question would wait for all that the device has to do, for every layer.
    """
    if not isinstance(form, OuterProduct) or form.left_BTP.device.type != "cpu":
        return form
    positions = form.left_BTP.shape[1]
    for factor_BTK in (form.left_BTP, form.right_BTD):
        # One position is looked at first: where it is in use, as nearly always, that is all it costs.
        if positions < 2 or bool(factor_BTK[:, positions // 2].any()):
            continue
        used_U = factor_BTK.any(2).any(0).nonzero()[:, 0]
        if len(used_U) <= _MOST_USED_POSITIONS * positions:
            used_U = used_U if len(used_U) else used_U.new_zeros(1)
            return OuterProduct(form.left_BTP[:, used_U], form.right_BTD[:, used_U])
    return form


def squared_norms(forms_by_name: dict[str, list[Form]]) -> dict[str, Tensor]:
    """Returns each parameter's squared norms (B,), and leaves the forms to sum in ``forms_by_name``."""
    grams, measures, chosen = GramCache(), {}, what_is_built(forms_by_name)
    for name, forms in forms_by_name.items():
        if name in chosen:
            forms_by_name[name] = [_built(forms)]
        measures[name] = measure_uses(forms_by_name[name], grams)
    squares = {name: measure.squares_B for name, measure in measures.items()}
    # Many parameters are rounded up in one go, and asked all at once, so that a device has little to start and waits once.
    alike = defaultdict(list)
    for name, measure in measures.items():
        if measure.spreads_B is not None:
            alike[measure.squares_B.shape, measure.squares_B.dtype, rounding_of(forms_by_name[name])].append(
                name
            )
    for (*_, rounding), names in alike.items():
        spreads = [spread for name in names if (spread := measures[name].spreads_B) is not None]
        rough = round_up(torch.stack([squares[name] for name in names]), torch.stack(spreads), rounding)
        squares |= zip(names, rough.bounds_B, strict=True)
        for place in rough.cancelled_B.any(1).nonzero()[:, 0].tolist():
            own = SquaredNorms(rough.bounds_B[place], rough.spreads_B[place], rough.cancelled_B[place])
            squares[names[place]] = closer_bounds(forms_by_name[names[place]], own)
    return squares


def choose_strategy(model: nn.Module, micro_batch: Mapping[str, Any]) -> str:
    """Returns the strategy that takes least time for a micro-batch.

    ``direct`` reads and adds each sample's gradient whole, where ``book_keeping``
    has a ghost norm, which is less for short samples, and serves several at once.
    Long samples keep a CPU busy one by one. Gradient checkpointing asks to save
    memory, and keeping every layer's inputs and gradients would undo it.

    A sharded model has one way: the others need the gradients of whole parameters.

    Only these two: what ``two_pass`` adds is rounded once more, by the model's own
    precision, so it is for those who ask for it and have it certified.
    """
    if is_sharded(model):
        return "book_keeping"
    positions = _positions(micro_batch)
    if micro_batch_size(micro_batch) > 1:
        on_cpu = next(model.parameters()).device.type == "cpu"
        is_long = on_cpu and positions is not None and positions >= _LONG
        return "direct" if is_long or saves_memory(model) else "book_keeping"
    weights = [p.shape for p in model.parameters() if p.requires_grad and p.ndim == 2]
    whole = _COST_OF_A_WHOLE_ELEMENT * sum(p.numel() for p in model.parameters() if p.requires_grad)
    if positions is None:
        return "direct"
    kept = sum(
        min(_SHARE_OF_A_GRAM * positions**2 * sum(shape), _COST_OF_A_BUILT_ELEMENT * shape.numel())
        for shape in weights
    )
    return "direct" if whole <= kept else "book_keeping"


def _positions(micro_batch: Mapping[str, Any]) -> int | None:
    """How many positions its tokens have; None where it has no tokens."""
    tokens = micro_batch.get("input_ids")
    return tokens.shape[-1] if isinstance(tokens, Tensor) and tokens.ndim > 1 else None
