"""What Python costs on the private path: calls that the capture sees, and the time each adds.

Models of tiny width have so little to compute that a step's time is its calls.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.cases import Case, small_gpt2, small_llama
from bench.contenders import plain, private
from bench.device import Device
from bench.measure import Seconds, in_child, in_turns, repeats_for
from bench.report import Report, Spread, ratios, spread, table
from dp_trainer.gradients.capture import CaptureMode, capture
from dp_trainer.losses import per_sample_loss_for

WIDTH, SAMPLES, LENGTH = 32, 4, 32
MODELS: dict[str, Callable[[], Case]] = {
    "GPT-2-like, 12 layers": lambda: small_gpt2(width=WIDTH, layers=12, samples=SAMPLES, length=LENGTH),
    "Llama-like, 30 layers": lambda: small_llama(width=WIDTH, layers=30, samples=SAMPLES, length=LENGTH),
}
ROUND_SECONDS = 0.2
CALLS_TIMED = 20_000


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """One model.

    Args:
        model: Its name.
        calls: Torch calls that the capture's function mode sees in one forward and backward.
        operations: Tensor operations of the private and the plain step; a GPU starts each by itself.
        seconds: Of the private and the plain step, one a round.
    """

    model: str
    calls: int
    operations: dict[str, int]
    seconds: Seconds

    @property
    def microseconds_a_call(self) -> Spread:
        """What the private step takes longer than the plain one, for each call seen.

        Everything is in it: rules, norms, sums, noise.
        """
        extra = [a - b for a, b in zip(self.seconds["private"], self.seconds["plain"], strict=True)]
        return spread([1e6 * value / self.calls for value in extra])


def measure(*, rounds: int, device: Device) -> Report:
    """Measures each model and the bare calls, in processes of their own."""
    found = []
    for name in MODELS:
        result = in_child("overhead", {"model": name, "rounds": rounds, **asdict(device)}, label=name)
        if result is not None:
            found.append(Overhead(**result))
    bare = in_child("bare-calls", {"rounds": rounds, **asdict(device)}, label="bare calls") or {}
    data = {"models": [asdict(overhead) for overhead in found], "bare_calls": bare}
    return Report(name="overhead", text=page(found, bare), data=data)


def model_task(*, model: str, rounds: int, name: str, bf16: bool) -> dict[str, Any]:
    """Counts calls and times steps of one model in this process."""
    device = Device(name=name, bf16=bf16)
    case = MODELS[model]()
    built = {}
    for key, contender in (("plain", plain), ("private", private)):
        torch.manual_seed(0)
        built[key] = contender(case, device)
        built[key].step(1)
    calls = count_calls(case, device)
    repeats = repeats_for(functools.partial(built["plain"].step, 1), ROUND_SECONDS, device)
    steps = {key: functools.partial(made.step, 1) for key, made in built.items()}
    operations = {key: count_operations(step) for key, step in steps.items()}
    seconds = in_turns(steps, rounds=rounds, device=device, repeats=repeats)
    return asdict(Overhead(model=model, calls=calls, operations=operations, seconds=seconds))


def count_operations(step: Callable[[], object]) -> int:
    """Tensor operations that compute something: views and memory without values are left out."""
    with _Operations() as counted:
        step()
    return counted.number


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        packet = func.overloadpacket.__name__
        self.number += not (
            func.is_view or packet.startswith(("empty", "new_empty", "promote_types", "_record_function"))
        )
        return func(*args, **(kwargs or {}))


def count_calls(case: Case, device: Device) -> int:
    """Torch calls that the capture's function mode sees in one forward and one backward pass."""
    model = case.model().to(device.name).train()
    batch = {name: column.to(device.name) for name, column in case.batch().items()}
    loss = per_sample_loss_for(model)
    with counting() as seen, capture(model, len(batch["labels"])):
        loss(model, batch).sum().backward()
    return len(seen)


@contextmanager
def counting() -> Iterator[list[None]]:
    """Adds an entry to the list for each call that a capture sees."""
    seen: list[None] = []
    sort = CaptureMode.__torch_function__

    def counted(
        mode: CaptureMode, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        seen.append(None)
        return sort(mode, func, types, args, kwargs)

    with mock.patch.object(CaptureMode, "__torch_function__", counted):
        yield seen


def bare_calls_task(*, rounds: int, name: str, bf16: bool) -> Seconds:
    """Seconds of calls that do next to nothing, by what is called and whether a capture watches."""
    device = Device(name=name, bf16=bf16)
    # Sample data of no consequence: the capture looks at the call and lets it pass.
    data_BT = torch.zeros(SAMPLES, 1, device=device.name)
    calls: dict[str, Callable[[], object]] = {"x.shape": lambda: data_BT.shape, "x.detach()": data_BT.detach}
    seconds: Seconds = {f"{key}, {way}": [] for key in calls for way in ("plain", "watched")}
    for _ in range(rounds):
        for key, call in calls.items():
            seconds[f"{key}, plain"].append(_seconds_a_call(call))
            with capture(torch.nn.Linear(1, 1, device=device.name), SAMPLES):
                seconds[f"{key}, watched"].append(_seconds_a_call(call))
    return seconds


def _seconds_a_call(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS_TIMED):
        call()
    return (time.perf_counter() - start) / CALLS_TIMED


def page(found: list[Overhead], bare: Seconds) -> str:
    """Two tables: models, and bare calls."""
    rows = [
        (
            overhead.model,
            overhead.calls,
            overhead.operations["plain"],
            overhead.operations["private"],
            f"{1e3 * spread(overhead.seconds['plain']).middle:.2f}",
            f"{1e3 * spread(overhead.seconds['private']).middle:.2f}",
            ratios(overhead.seconds["private"], overhead.seconds["plain"]),
            f"{overhead.microseconds_a_call:.1f}",
        )
        for overhead in found
    ]
    header = ("model", "calls seen", "operations, plain", "private", "plain ms", "private ms")
    header += ("time / plain (quartiles)", "extra µs a call")
    text = f"Width {WIDTH}, {SAMPLES} samples of {LENGTH} tokens.\n\n{table(header, rows)}"
    names = [key.removesuffix(", plain") for key in bare if key.endswith(", plain")]
    micro = [
        [spread([1e6 * s for s in bare[f"{key}, {way}"]]) for way in ("plain", "watched")] for key in names
    ]
    cells = [(f"`{key}`", *(f"{each:.2f}" for each in pair)) for key, pair in zip(names, micro, strict=True)]
    return f"{text}\n\n{table(('one call', 'µs', 'µs under the capture'), cells)}"
