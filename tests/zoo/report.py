"""Writes what became of the zoo: a page of tables, and a list by reason."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
import transformers

from .compare import OUTCOMES, Outcome
from .heads import HEADS

# What is worth knowing about an exact case: the mark, when it applies, what it means.
_MARKS: tuple[tuple[str, Callable[[Outcome], bool], str], ...] = (
    (
        "§",
        lambda o: o.padding,
        "padding changes the loss, so padded micro-batches are refused by the certificate",
    ),
    (
        "*",
        lambda o: o.frozen > 0,
        "with `freeze_batch_norm`, statistics as they came; with training's own batch normalization it is refused",
    ),
    ("†", lambda o: o.own_loss, "no per-sample loss that is this model's is built in, so one must be passed"),
    (
        "‡",
        lambda o: o.reached < 0.75,
        "fed with text alone, or routed past some layers: over a quarter of the parameters had no gradient",
    ),
)


def _marks(outcome: Outcome) -> str:
    return "".join(mark for mark, applies, _ in _MARKS if applies(outcome))


def reasons(outcomes: Iterable[Outcome]) -> str:
    """Totals, then each reason with its cases, commonest first."""
    outcomes = list(outcomes)
    lines = ["", totals(outcomes), ""]
    for verdict in OUTCOMES[1:]:
        groups: dict[str, list[str]] = {}
        for outcome in outcomes:
            if outcome.verdict == verdict:
                groups.setdefault(_kind(outcome.reason), []).append(str(outcome.case))
        for reason, cases in sorted(groups.items(), key=lambda item: -len(item[1])):
            lines += [f"{verdict}, {len(cases)}: {reason}", f"    {' '.join(cases)}"]
    frozen = [str(o.case) for o in outcomes if o.verdict == "exact" and o.frozen]
    lines += [f"exact with frozen batch normalization, {len(frozen)}:", f"    {' '.join(frozen)}"]
    sensitive = [str(o.case) for o in outcomes if o.padding]
    lines += [f"exact, but padding changes the loss, {len(sensitive)}:", f"    {' '.join(sensitive)}"]
    return "\n".join(lines)


def _kind(reason: str) -> str:
    """The reason without what differs from model to model: parameter paths and numbers."""
    return re.sub(r"\d+(\.\d+)?", "N", re.sub(r"^(\w+Error: )[\w., ]+\.[\w.]+: ", r"\1", reason))[:230]


def totals(outcomes: Sequence[Outcome]) -> str:
    counts = Counter(outcome.verdict for outcome in outcomes)
    buildable = len(outcomes) - counts["not buildable"]
    share = counts["exact"] / max(1, buildable)
    frozen = sum(outcome.verdict == "exact" and outcome.frozen > 0 for outcome in outcomes)
    told = {"exact": f" (of which {frozen} with frozen batch normalization)"} if frozen else {}
    return ", ".join(f"{verdict} {counts[verdict]}{told.get(verdict, '')}" for verdict in OUTCOMES) + (
        f"; exact {share:.1%} of the {buildable} buildable; "
        f"not buildable {counts['not buildable'] / max(1, len(outcomes)):.1%} of {len(outcomes)}"
    )


def coverage_page(outcomes: Sequence[Outcome]) -> str:
    """The page in Markdown: totals, a row a head, then what is not exact with its reason."""
    lines = [
        "# Coverage",
        "",
        "Every architecture that transformers can build under these heads, at toy size, with random weights: "
        "per-sample gradient norms and clipped sums against one sample at a time by plain autograd, at a clipping "
        "norm that clips some samples and not others. Written by `make zoo`; do not edit.",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, float32, CPU.",
        "",
        f"**{totals(outcomes)}**",
        "",
        "- exact: relative difference of at most 1e-3 in every norm and in each parameter's clipped sum.",
        "- refused: stops with an error that names the cause and the way out, before any noise is drawn.",
        "- wrong, error: counted against this package.",
        "- not buildable: no toy model ran here, with or without privacy.",
        "",
        "| head | " + " | ".join(OUTCOMES) + " |",
        "| --- |" + " --- |" * len(OUTCOMES),
    ]
    for head in HEADS:
        counts = Counter(o.verdict for o in outcomes if o.case.head == head)
        lines.append(f"| {head} | " + " | ".join(str(counts[v]) for v in OUTCOMES) + " |")
    for verdict in ("wrong", "error", "refused", "not buildable"):
        lines += _listed(verdict, [o for o in outcomes if o.verdict == verdict])
    lines += [
        "",
        "## exact",
        "",
        *(f"- `{mark}` {meaning}" for mark, _, meaning in _MARKS),
        "",
    ]
    for head in HEADS:
        exact = sorted(
            (o for o in outcomes if o.case.head == head and o.verdict == "exact"),
            key=lambda o: o.case.model_type,
        )
        names = ", ".join(o.case.model_type + _marks(o) for o in exact)
        lines += [f"**{head}** ({len(exact)}): {names}", ""]
    return "\n".join(lines).rstrip() + "\n"


def _listed(verdict: str, outcomes: list[Outcome]) -> list[str]:
    if not outcomes:
        return []
    rows = sorted(outcomes, key=lambda o: (o.case.head, o.case.model_type))
    return ["", f"## {verdict}", "", "| head | architecture | why |", "| --- | --- | --- |"] + [
        f"| {o.case.head} | {o.case.model_type} | {o.reason.replace('|', chr(92) + '|')} |" for o in rows
    ]
