"""Says in words what the planner chooses for a model and a micro-batch, and why.

Axes: T position, P first weight axis, D second.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from dp_trainer.batches import micro_batch_size
from dp_trainer.gradients.capture import capture
from dp_trainer.gradients.forms import Form, OuterProduct
from dp_trainer.gradients.independence import repeatable
from dp_trainer.gradients.parts import MicroBatch, PerSampleLoss
from dp_trainer.gradients.planner import (
    choose_strategy,
    cost_of_building,
    cost_of_ghost_norm,
    settle,
    what_is_built,
)
from dp_trainer.gradients.stored import Materialized, MaterializedInBlocks


@dataclass(frozen=True)
class _Choice:
    """What is done with one parameter's gradients; equal ones are counted together."""

    shape: tuple[int, ...]
    uses: int
    positions: int
    used_positions: int
    choice: str
    ghost: float
    building: float


def explain(model: nn.Module, micro_batch: MicroBatch, *, per_sample_loss: PerSampleLoss) -> str:
    """Runs one forward and one backward pass and describes the planner's decisions.

    Leaves weights, gradients, modes and the global generators as they were.

    Args:
        model: The model, in the mode that training will use.
        micro_batch: Samples of the sizes that training will see.
        per_sample_loss: As in ``clipped_gradient_sum``.

    Returns:
        The strategy for this micro-batch, and one line for each kind of weight under ``book_keeping``: its
        shape, uses, positions T, those in use, what is done, and what both ways cost in millions of
        multiplications a sample.
    """
    made: dict[str, tuple[Form, Form]] = {}

    def note(name: str, form: Form) -> Form:
        made[name] = form, settle(name, form)
        return made[name][1]

    with repeatable(model), capture(model, micro_batch_size(micro_batch), settle=note) as tape:
        losses_B = per_sample_loss(model, micro_batch)
        if losses_B.requires_grad:
            losses_B.sum().backward()  # type: ignore[no-untyped-call]
    choices: Counter[_Choice] = Counter()
    forms_by_name = tape.take_forms()
    chosen = what_is_built(forms_by_name)
    for name, forms in forms_by_name.items():
        first, settled = made.get(name, (forms[0], forms[0]))
        used = [settled] if name in made else forms
        built = isinstance(settled, Materialized | MaterializedInBlocks) and isinstance(first, OuterProduct)
        choices[_describe([first] if name in made else forms, used, built=built or name in chosen)] += 1
    lines = [
        f"strategy for this micro-batch of {micro_batch_size(micro_batch)}: {choose_strategy(model, micro_batch)}",
        f"{'shape':>16} {'count':>6} {'uses':>5} {'T':>6} {'in use':>7} {'ghost':>9} {'built':>9}  choice",
    ]
    for choice, count in sorted(choices.items(), key=lambda item: -item[0].ghost * item[1]):
        shape = " × ".join(map(str, choice.shape))
        lines.append(
            f"{shape:>16} {count:>6} {choice.uses:>5} {choice.positions:>6} {choice.used_positions:>7} "
            f"{choice.ghost / 1e6:>9.1f} {choice.building / 1e6:>9.1f}  {choice.choice}"
        )
    return "\n".join(lines)


def _describe(forms: list[Form], used: list[Form], *, built: bool) -> _Choice:
    outer = [form for form in forms if isinstance(form, OuterProduct)]
    kept = [form for form in used if isinstance(form, OuterProduct)] or outer
    if not outer:
        return _Choice(tuple(forms[0].shape), len(forms), 0, 0, _NAMES[type(forms[0]).__name__], 0.0, 0.0)
    return _Choice(
        shape=tuple(forms[0].shape),
        uses=len(forms),
        positions=sum(form.left_BTP.shape[1] for form in outer),
        used_positions=sum(form.left_BTP.shape[1] for form in kept),
        choice="gradients built and kept" if built else "ghost norm",
        ghost=cost_of_ghost_norm(kept),
        building=cost_of_building(kept),
    )


_NAMES = {
    "RowScatter": "rows of a table",
    "Materialized": "stored",
    "SlottedOuterProduct": "ghost norm, position by position",
}
