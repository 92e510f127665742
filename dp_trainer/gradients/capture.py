"""Records what every sample contributes to every trainable parameter.

``capture`` surrounds one forward and one backward pass. A torch function mode
sees each torch call. Calls without a trainable parameter pass untouched; calls
of parameters and constants alone give *derived* tensors; a call that joins one
with sample data goes to its operation rule, or is refused. The rules run on
values without an autograd link to the parameters, so the backward pass computes
input gradients only.

It fails closed: no rule is an error, and after the backward pass a ``.grad`` on
any trainable parameter shows a use that escaped, which is an error too.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dp_trainer.errors import UnsupportedOperationError
from dp_trainer.gradients.calls import CapturedCall, refusal
from dp_trainer.gradients.checkpointing import recomputation_under
from dp_trainer.gradients.derived import Derived, Link, check_recorded, to_parameters
from dp_trainer.gradients.forms import Form
from dp_trainer.gradients.layouts import describe_rows
from dp_trainer.gradients.links import describe
from dp_trainer.gradients.rows import RowFollower
from dp_trainer.gradients.rules import OPERATION_RULES
from dp_trainer.gradients.sharding import gathered_parameters, put_to_rest
from dp_trainer.gradients.slots import SlottedOuterProduct, join
from dp_trainer.gradients.stored import Materialized

# What asks a tensor about itself: most calls in a forward pass, and none holds values.
_QUESTIONS = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad")),
        *(getattr(Tensor, name).__get__ for name in ("is_cuda", "layout", "is_nested", "is_leaf", "grad_fn")),
        *(getattr(Tensor, name).__get__ for name in ("is_meta", "is_quantized", "is_sparse", "grad")),
        *(
            Tensor.size,
            Tensor.dim,
            Tensor.numel,
            Tensor.stride,
            Tensor.is_floating_point,
            Tensor.is_contiguous,
        ),
        *(Tensor.element_size, Tensor.__len__, Tensor.data_ptr, Tensor.get_device, Tensor.is_complex),
        *(Tensor.nelement, Tensor.is_same_size, torch.is_tensor, torch.is_floating_point, torch.numel),
    }
)
_CASTING = frozenset({Tensor.to, Tensor.type_as})
_OPENING = frozenset({Tensor.requires_grad_, Tensor.requires_grad.__set__})  # type: ignore[attr-defined]
_SETTERS = frozenset({"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__set__"})

# Beside freezing a parameter that escaped, by whether the model is spread over ranks (as T5's position bias may).
_OTHER_WAY = {False: " or set strategy='loop'", True: ", or train without sharding"}


class _Rooted(torch.autograd.Function):
    """Gives an output that needs no gradient a place in the graph, so that its gradient arrives."""

    @staticmethod
    def forward(_ctx: Any, _anchor: Tensor, box: list[Tensor]) -> Tensor:
        return box[0]

    @staticmethod
    def backward(_ctx: Any, *_grads: Tensor) -> tuple[None, None]:
        return None, None


@dataclass(frozen=True, eq=False)
class _Record:
    derived: Derived
    form: Form
    aligned: bool


Use: TypeAlias = tuple[object, tuple[object, ...], str]
"""How a call used parameters: the function, the parameters, and where its data had the samples."""

Settle: TypeAlias = Callable[[str, Form], Form | None]


class Tape:
    """The forms recorded in one capture, and in ``uses`` how they came about.

    Args:
        parameters: Trainable parameters by name; a shared one stands once.
        batch_size: B, the number of samples in the micro-batch.
        settle: See ``capture``.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], batch_size: int, settle: Settle | None = None
    ) -> None:
        self.parameters = dict(parameters)
        self.batch_size = batch_size
        self.uses: set[Use] = set()
        self._settle = settle
        # How many gradients the forward pass lets expect for each parameter.
        self._expected: Counter[str] = Counter()
        self._records: list[_Record] = []
        self._are_gathered = False
        self._forms: dict[str, list[Form]] = {}

    def gathered(self, name: str, parameter: Tensor) -> None:
        """Takes a tensor for the whole of a parameter that is spread over ranks."""
        if name in self.parameters:
            self.parameters[name], self._are_gathered = parameter, True

    def expect(self, derived: Derived) -> None:
        """Announces in the forward pass that ``record`` will follow in the backward pass."""
        self._expected.update(derived.roots)

    def record(self, derived: Derived, form: Form, *, aligned: bool = False) -> None:
        """Adds one use of a parameter or of a tensor derived from some; refuses it as ``check_recorded`` does."""
        check_recorded(derived, form, self.batch_size)
        is_parameter = derived.base is None and derived.link is Link.SAME and not aligned
        if self._settle is not None and is_parameter and self._expected[derived.roots[0]] == 1:
            settled = self._settle(derived.roots[0], form)
            if settled is None:
                return
            form = settled
        if aligned:
            self.uses.add(("its first axis is the samples'", derived.roots, "first axis"))
        self._records.append(_Record(derived, form, aligned))
        if self._are_gathered:
            # Now, while FSDP holds the values that the way back may need.
            self.resolve()

    def resolve(self) -> None:
        """Carries all records back to parameters."""
        records, self._records = self._records, []
        self._resolve(records)

    def _resolve(self, records: Sequence[_Record]) -> None:
        """Carries records back to parameters; joins the uses of one parameter where that costs less."""
        stored: dict[str, Tensor] = {}
        slotted: dict[str, list[SlottedOuterProduct]] = {}
        for record in records:
            for name, form in to_parameters(
                record.derived, record.form, aligned=record.aligned, parameters=self.parameters
            ):
                if isinstance(form, Materialized):
                    gradients = form.dense()
                    stored[name] = stored[name] + gradients if name in stored else gradients
                elif isinstance(form, SlottedOuterProduct):
                    slotted.setdefault(name, []).append(form)
                else:
                    self._forms.setdefault(name, []).append(form)
        for name, uses in slotted.items():
            self._forms.setdefault(name, []).append(join(uses))
        for name, gradients in stored.items():
            self._forms.setdefault(name, []).append(Materialized(gradients))

    def take_forms(self) -> dict[str, list[Form]]:
        """Returns the forms of each used parameter, one a use, and forgets them."""
        forms, self._forms = self._forms, {}
        return forms


@contextlib.contextmanager
def capture(model: nn.Module, batch_size: int, *, settle: Settle | None = None) -> Iterator[Tape]:
    """Records all per-sample gradients of one forward and one backward pass inside it.

    Guarantee: on leaving, every use of a trainable parameter that the backward
    pass reached is on the tape, or an error was raised. No parameter's ``.grad``
    is changed.

    Args:
        model: The model; its trainable parameters are those with ``requires_grad``.
        batch_size: B. Tensors of sample data must begin with a sample-major axis.
        settle: Called with a parameter's name and a form as it arrives, if it belongs to the parameter's
            only use. Returns an equal form, or None to take it off the tape; what it replaces is freed.

    Yields:
        The tape; read it with ``take_forms`` after leaving.

    Raises:
        UnsupportedOperationError: If a parameter is used in a way without a rule.
    """
    sharded = put_to_rest(model)
    tensors = dict(model.named_parameters())
    parameters = {name: p for name, p in tensors.items() if p.requires_grad}
    for name, parameter in parameters.items():
        if parameter._backward_hooks or parameter.is_complex():
            raise UnsupportedOperationError(
                f"{name}: this trainable parameter is complex, or a hook changes its gradient, which no capture "
                "can follow. Freeze it, remove the hook, or set strategy='loop'."
            )
    kept_grads = {name: p.grad for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    tape = Tape(parameters, batch_size, settle)
    mode = CaptureMode(tape, (*tensors.values(), *model.buffers()))
    try:
        with recomputation_under(model, mode), gathered_parameters(model, mode), mode:
            yield tape
        # While the mode still knows its tensors: a checkpointed chain is recomputed here.
        tape.resolve()
        escaped = [name for name, parameter in parameters.items() if parameter.grad is not None]
        if escaped:
            raise UnsupportedOperationError(
                f"{', '.join(escaped[:3])}: used where the capture could not see it ({len(escaped)} in all), so "
                f"per-sample gradients would be incomplete. Freeze the parameter{_OTHER_WAY[sharded]}."
            )
    finally:
        mode.forget()
        for name, parameter in parameters.items():
            parameter.grad = kept_grads[name]


class CaptureMode(TorchFunctionMode):
    """The function mode behind ``capture``; it implements ``calls.Recorder``.

    Args:
        tape: Where records go.
        tensors: The model's parameters and buffers.
    """

    def __init__(self, tape: Tape, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.batch_size = tape.batch_size
        self.looks_away = False
        self._tape = tape
        # By identity, with the tensor kept alive so that its identity stays its own. Only tensors free of
        # sample data are here, so what is kept is small; whatever is not here is taken for sample data.
        self._known: dict[int, Derived] = {}
        names = {id(p): name for name, p in tape.parameters.items()}
        for tensor in tensors:
            name = names.get(id(tensor))
            self._known[id(tensor)] = Derived(tensor, () if name is None else (name,))
        self._from_model = set(self._known)
        # Sample data that the model itself made a leaf, as for checkpointing over frozen embeddings.
        self._opened: dict[int, Tensor] = {}
        # Leaves that the forward pass made of tensors without sample data, as nn.Parameter(weight.T) does.
        self._copied: list[Tensor] = []
        self._anchor = torch.zeros((), requires_grad=True)
        self._rows = RowFollower(self.batch_size, self._known)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Sorts a call: untouched, of parameters and constants alone, or by rule."""
        kwargs = kwargs or {}
        if func in _QUESTIONS or self.looks_away:
            return func(*args, **kwargs)
        rooted: list[Derived] = []
        has_data = self._sort(func, args, rooted)
        if kwargs:
            has_data |= self._sort(func, kwargs.values(), rooted)
        if func is torch.autograd.grad:
            raise refusal(func, rooted, "gradients taken inside the model have no per-sample form")
        if not has_data:
            return self._run_derived(func, args, kwargs, rooted)
        if rooted and torch.is_grad_enabled():
            result = self._run_by_rule(func, args, kwargs, rooted)
        else:
            if not rooted:
                if func in _CASTING and self._is_constant(args[0]):
                    # The data gives a dtype or a device, and no values.
                    return self._run_derived(func, args, kwargs, rooted)
                if func in _OPENING:
                    self._opened[id(args[0])] = args[0]
                if _is_in_place(func) or kwargs.get("out") is not None:
                    self._forget_target(args, kwargs)
            result = func(*args, **kwargs)
        self._rows.follow(func, args, kwargs, result)
        return result

    def learn(self, name: str, parameter: Tensor) -> None:
        """Takes a tensor for the parameter of that name, of which the model itself holds a shard."""
        self._tape.gathered(name, parameter)
        self._known[id(parameter)] = Derived(parameter, (name,) if name in self._tape.parameters else ())
        self._from_model.add(id(parameter))

    def forget(self) -> None:
        """Drops every tensor that the mode keeps alive."""
        self._known.clear()
        self._opened.clear()
        for leaf in self._copied:
            leaf.requires_grad_(True)
        self._copied.clear()
        self._rows = RowFollower(self.batch_size, self._known)

    # What a call asks of the capture.

    def record(self, derived: Derived, form: Form, *, aligned: bool = False) -> None:
        """Adds one use of a parameter or of a tensor derived from some."""
        self._tape.record(derived, form, aligned=aligned)

    def expect(self, derived: Derived) -> None:
        """Announces a use whose gradient the backward pass will record."""
        self._tape.expect(derived)

    def derive(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Runs a function of parameters and constants; its result stays tracked."""
        rooted: list[Derived] = []
        self._sort(function, args, rooted)
        return self._run_derived(function, args, {}, rooted)

    def anchored(self, output: Tensor) -> Tensor:
        """Gives an output that needs no gradient a place in the graph, so that its gradient arrives."""
        return _Rooted.apply(self._anchor, [output])  # type: ignore[no-untyped-call,no-any-return]

    # How calls are sorted.

    def _sort(self, func: Any, values: Any, rooted: list[Derived]) -> bool:
        """Collects derived arguments into ``rooted``; returns whether any argument is sample data."""
        has_data = False
        for value in values:
            if isinstance(value, Tensor):
                entry = self._known.get(id(value))
                if entry is None and value.requires_grad and value.is_leaf and id(value) not in self._opened:
                    entry = self._copied_leaf(value)
                    if entry is None and torch.is_grad_enabled():
                        reason = (
                            "a tensor among its arguments needs a gradient but is no parameter of the model"
                        )
                        raise refusal(func, rooted, reason)
                # A constant that needs a gradient was written to with sample data.
                if entry is None or (not entry.roots and value.requires_grad):
                    has_data = True
                elif entry.roots:
                    rooted.append(entry)
            elif isinstance(value, list | tuple):
                has_data |= self._sort(func, value, rooted)
        return has_data

    def _copied_leaf(self, value: Tensor) -> Derived | None:
        """Takes a leaf with the values of a parameter or constant, as ``nn.Parameter(weight.T)``, for a constant.

        No gradient passes from it to the parameter, with or without the capture.
        """
        storage = value.untyped_storage()._cdata
        if all(entry.tensor.untyped_storage()._cdata != storage for entry in self._known.values()):
            return None
        self._copied.append(value.requires_grad_(False))
        self._known[id(value)] = Derived(value, ())
        return self._known[id(value)]

    def _run_by_rule(self, func: Any, args: Any, kwargs: Any, rooted: list[Derived]) -> Any:
        rule = OPERATION_RULES.get(func)
        if rule is None:
            raise refusal(func, rooted, "no rule for this operation")
        rows = self._rows.layout((*args, *kwargs.values()))
        self._tape.uses.add((func, tuple(d.roots for d in rooted), describe_rows(rows)))
        return rule(CapturedCall(self, func, self._known, rooted, rows), *args, **kwargs)

    def _run_derived(self, func: Any, args: Any, kwargs: Any, rooted: list[Derived]) -> Any:
        versions = [derived.tensor._version for derived in rooted]
        result = func(*args, **kwargs)
        if versions != [derived.tensor._version for derived in rooted] and torch.is_grad_enabled():
            raise refusal(func, rooted, "it writes into a tensor made from parameters")
        outputs = result if isinstance(result, list | tuple) else (result,)
        for output in outputs:
            if isinstance(output, Tensor) and id(output) not in self._known:
                batched = bool(rooted) and self._meets_batch(output, (*args, *kwargs.values()))
                self._known[id(output)] = describe(func, args, kwargs, output, rooted, batch_first=batched)
        return result

    def _meets_batch(self, output: Tensor, values: Any) -> bool:
        """Whether a constant that the forward pass made gives the output its first axis.

        Position ids or tables repeated for every sample; a buffer's axes are the same for any batch.
        """
        for value in values:
            if isinstance(value, list | tuple):
                if self._meets_batch(output, value):
                    return True
            elif isinstance(value, Tensor) and value.ndim and output.ndim:
                entry = self._known.get(id(value))
                made = entry is not None and not entry.roots and id(value) not in self._from_model
                if made and value.shape[0] == output.shape[0] > 1:
                    return True
        return False

    def _is_constant(self, value: object) -> bool:
        entry = self._known.get(id(value))
        return entry is not None and not entry.roots and not entry.tensor.requires_grad

    def _forget_target(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A constant that sample data is written into is sample data from here on."""
        targets = kwargs.get("out", args[0] if args else None)
        for target in targets if isinstance(targets, list | tuple) else (targets,):
            self._known.pop(id(target), None)


@functools.lru_cache(maxsize=1024)
def _is_in_place(func: Any) -> bool:
    """Whether a torch function writes into its first argument, by its name."""
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in _SETTERS
