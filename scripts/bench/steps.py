"""Whole steps of true size: time beside the plain step, and peak memory."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import torch

from bench.cases import CASES
from bench.contenders import CONTENDERS, Contender
from bench.device import Device
from bench.figures import Bar, draw_bars
from bench.measure import in_child, in_turns
from bench.report import Report, Spread, ratios, spread, table

# A logical batch of more micro-batches than this needs no more memory: totals exist from the first on,
# and all later micro-batches are alike.
MEMORY_MICRO_BATCHES = 3


@dataclass(frozen=True, kw_only=True)
class Result:
    """One contender on one case.

    Args:
        contender: Its name.
        micro_batches: Micro-batches of a step.
        seconds: Of one step, one a round.
        plain_seconds: Of the plain step beside it.
        peak_gib: Peak memory.
    """

    contender: str
    micro_batches: int
    seconds: list[float]
    plain_seconds: list[float]
    peak_gib: float

    @property
    def ratio(self) -> Spread:
        """Time over the plain step's."""
        return ratios(self.seconds, self.plain_seconds)


Results = dict[str, list[Result]]


def measure(
    *,
    cases: Sequence[str],
    contenders: Sequence[str],
    micro_batches: Sequence[int],
    rounds: Sequence[int],
    device: Device,
    earlier: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> Report:
    """Measures all cases, printing each one's table as it is done.

    Args:
        cases: Names in ``CASES``; one whose package is missing is left out with a line.
        contenders: Names in ``CONTENDERS``.
        micro_batches: Micro-batches of a step, one table row each; Opacus runs with one only.
        rounds: For each entry of ``micro_batches``, the steps timed.
        device: Where.
        earlier: ``data`` of another run's report; what it has and this run does not measure is kept.
    """
    if not find_spec("opacus") and any(name.startswith("opacus") for name in contenders):
        contenders = [name for name in contenders if not name.startswith("opacus")]
        print("opacus is not installed: left out")
    pairs = dict(zip(micro_batches, rounds, strict=True))
    results: Results = {case: [Result(**made) for made in found] for case, found in (earlier or {}).items()}
    for case in cases:
        if not CASES[case].is_available:
            print(f"\n{case}: left out, {CASES[case].needs} is not installed")
            continue
        results[case] = joined(results.get(case, []), measure_case(case, contenders, pairs, device))
        print(f"\n### {case}: {CASES[case].title}\n\n{case_table(results[case])}", flush=True)
    bars = [
        Bar(label=f"{case}: {described(result)}", kind=result.contender, spread=result.ratio, peak=result.peak_gib)
        for case, found in results.items()
        for result in found
    ]  # fmt: skip
    results = {case: results[case] for case in CASES if case in results}
    data = {case: [asdict(result) for result in found] for case, found in results.items()}
    figure = draw_bars(bars, kinds=tuple(CONTENDERS)) if bars else None
    return Report(name="steps", text=page(results), data=data, figure=figure)


def measure_case(
    case: str, contenders: Sequence[str], rounds: Mapping[int, int], device: Device
) -> list[Result]:
    """Measures one case in processes of their own; what fails is printed and left out."""
    others = [name for name in contenders if name != "plain"]
    if CASES[case].for_opacus is None:
        others = [name for name in others if not name.startswith("opacus")]
    results: list[Result] = []
    for name in (*others, *(name for name in contenders if name == "plain")):
        counts = [n for n in rounds if n == 1 or not name.startswith("opacus")]
        if not counts:
            continue
        settings: dict[str, Any] = {"case": case, "contender": name, **asdict(device)}
        label = f"{case}: {name}"
        peaks = {
            n: in_child("step-memory", {**settings, "micro_batches": n}, label=label, keeps_memory=False)
            for n in counts
        }
        counts = [n for n in counts if peaks[n] is not None]
        if not counts:
            continue
        if name == "plain" and results:
            # Timed already, beside the first of the others.
            beside = {r.micro_batches: r.plain_seconds for r in reversed(results)}
            timed = [(n, {name: beside[n]}) for n in counts if n in beside]
        else:
            wanted = [(n, rounds[n]) for n in counts]
            timed = in_child("step-time", {**settings, "rounds": wanted}, label=label) or []
        results += [
            Result(contender=name, micro_batches=n, seconds=seconds[name],
                   plain_seconds=seconds["plain"], peak_gib=peaks[n])
            for n, seconds in timed
        ]  # fmt: skip
    return in_order(results)


def joined(earlier: Sequence[Result], now: Sequence[Result]) -> list[Result]:
    """The results of now, and those earlier ones that were not measured again."""
    measured = {(result.contender, result.micro_batches) for result in now}
    return in_order([*now, *(r for r in earlier if (r.contender, r.micro_batches) not in measured)])


def in_order(results: Sequence[Result]) -> list[Result]:
    """By micro-batches, then as ``CONTENDERS`` has them."""
    order = list(CONTENDERS)
    return sorted(results, key=lambda r: (r.micro_batches, order.index(r.contender)))


def memory_task(*, case: str, contender: str, micro_batches: int, name: str, bf16: bool) -> float:
    """Returns the peak in GiB of this process, or of its GPU memory, over two steps.

    The first step, of one micro-batch, allocates optimizer state and checks every use of a parameter.
    """
    device = Device(name=name, bf16=bf16)
    measured = build(case, contender, device)
    measured.step(1)
    measured.step(min(micro_batches, MEMORY_MICRO_BATCHES))
    return device.peak_gib()


def time_task(
    *, case: str, contender: str, rounds: Sequence[tuple[int, int]], name: str, bf16: bool
) -> list[tuple[int, dict[str, list[float]]]]:
    """Returns, for each (micro-batches, rounds), seconds of the contender's and of the plain step."""
    device = Device(name=name, bf16=bf16)
    built = {each: build(case, each, device) for each in dict.fromkeys(("plain", contender))}
    for each in built.values():
        each.step(1)
    return [
        (
            count,
            in_turns(
                {each: functools.partial(made.step, count) for each, made in built.items()},
                rounds=turns,
                device=device,
            ),
        )
        for count, turns in rounds
    ]


def build(case: str, contender: str, device: Device) -> Contender:
    """Builds a contender from a fixed seed."""
    torch.manual_seed(0)
    return CONTENDERS[contender](CASES[case], device)


def described(result: Result) -> str:
    """The contender, and its micro-batches where there are several."""
    return result.contender + (f" ×{result.micro_batches}" if result.micro_batches > 1 else "")


def case_table(results: Sequence[Result]) -> str:
    """One case: a row for each contender and each number of micro-batches."""
    plain = {result.micro_batches: result.peak_gib for result in results if result.contender == "plain"}
    header = ("step", "median s", "plain s beside it", "time / plain (quartiles)", "peak GiB", "of plain")
    rows = []
    for result in results:
        beside = plain.get(result.micro_batches)
        rows.append(
            (
                described(result),
                f"{spread(result.seconds).middle:.3f}",
                f"{spread(result.plain_seconds).middle:.3f}",
                result.ratio,
                f"{result.peak_gib:.2f}",
                "–" if beside is None else f"{result.peak_gib / beside:.2f}",
            )
        )
    return table(header, rows)


def overall_table(results: Results) -> str:
    """All cases: plain in seconds and GiB, the others as ratios to it."""
    columns = sorted(
        {(result.micro_batches, result.contender) for found in results.values() for result in found},
        key=lambda key: (key[0], list(CONTENDERS).index(key[1])),
    )
    header = ["case"]
    for count, name in columns:
        batches = "one micro-batch" if count == 1 else f"{count} micro-batches"
        header.append(
            f"{name}, {batches}: " + ("s / GiB" if name == "plain" else "time (quartiles) / memory")
        )
    rows = []
    for case, found in results.items():
        cells = {(result.micro_batches, result.contender): result for result in found}
        rows.append([case, *(_cell(cells, column) for column in columns)])
    return table(header, rows)


def _cell(cells: Mapping[tuple[int, str], Result], column: tuple[int, str]) -> str:
    result, plain = cells.get(column), cells.get((column[0], "plain"))
    if result is None:
        return "–"
    if result is plain:
        return f"{spread(result.seconds).middle:.2f} / {result.peak_gib:.2f}"
    return f"{result.ratio} / {'–' if plain is None else f'{result.peak_gib / plain.peak_gib:.2f}'}"


def page(results: Results) -> str:
    """The overall table, what the cases are, and each one's own table."""
    rounds: dict[int, set[int]] = {}
    for found in results.values():
        for result in found:
            rounds.setdefault(result.micro_batches, set()).add(len(result.seconds))
    counts = "; ".join(
        f"{' or '.join(map(str, sorted(turns)))} rounds with {n} micro-batch{'es' * (n > 1)} a step"
        for n, turns in sorted(rounds.items())
    )
    lines = [f"{counts}.", "", overall_table(results), ""]
    for case, found in results.items():
        lines += ["", f"**{case}**: {CASES[case].title}.", "", case_table(found)]
        if CASES[case].opacus_note and any(r.contender.startswith("opacus") for r in found):
            lines += ["", f"For Opacus: {CASES[case].opacus_note}."]
    return "\n".join(lines)
