"""Checks plain data against a JSON schema: the part of the language that this package's schemas use.

Keywords outside that part are refused, not passed over: a check that silently
does nothing would be worse than none. ``tests/privacy/test_verification.py`` holds every keyword
to accepting and refusing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dp_trainer.errors import ConfigurationError

Schema = Mapping[str, Any]

# In Python True is an int, in JSON it is not a number.
_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
}
_WORDS = ("$schema", "title", "description")


def schema_faults(value: Any, schema: Schema, place: str = "") -> list[str]:
    """Returns what is wrong with the value, a line for each fault that begins with its place; none if it fits.

    Args:
        value: What ``json.loads`` returns.
        schema: The schema, likewise.
        place: The value's name in messages, such as ``plan.steps``.

    Raises:
        ConfigurationError: If the schema has a keyword that is unknown here.
    """
    unknown = set(schema) - set(_KEYWORDS) - set(_WORDS)
    if unknown:
        raise ConfigurationError(
            f"schema of {place or 'the file'}: {', '.join(sorted(unknown))} is no keyword that schema.py knows. Add it."
        )
    # For a value of another type, the other keywords mean nothing.
    return list(_type(value, schema, place)) or [
        fault
        for name in schema
        if name not in ("type", *_WORDS)
        for fault in _KEYWORDS[name](value, schema, place)
    ]


def _named(place: str) -> str:
    return place or "the file"


def _type(value: Any, schema: Schema, place: str) -> Iterator[str]:
    wanted = schema.get("type", [])
    names = [wanted] if isinstance(wanted, str) else wanted
    if names and not any(_TYPES[name](value) for name in names):
        yield f"{_named(place)}: is {value!r:.60}, and must be of type {' or '.join(names)}"


def _const(value: Any, schema: Schema, place: str) -> Iterator[str]:
    if type(value) is not type(schema["const"]) or value != schema["const"]:
        yield f"{_named(place)}: is {value!r:.60}, and must be {schema['const']!r}"


def _enum(value: Any, schema: Schema, place: str) -> Iterator[str]:
    if value not in schema["enum"]:
        yield f"{_named(place)}: is {value!r:.60}, and must be one of {', '.join(map(repr, schema['enum']))}"


def _bound(keyword: str, fits: Callable[[float, float], bool], words: str) -> Callable[..., Iterator[str]]:
    def check(value: Any, schema: Schema, place: str) -> Iterator[str]:
        bound = schema[keyword]
        if _TYPES["number"](value) and not (math.isfinite(value) and fits(value, bound)):
            yield f"{_named(place)}: is {value!r}, and must be {words} {bound}"

    return check


def _length(keyword: str, kind: str) -> Callable[..., Iterator[str]]:
    def check(value: Any, schema: Schema, place: str) -> Iterator[str]:
        if _TYPES[kind](value) and len(value) < schema[keyword]:
            yield f"{_named(place)}: has {len(value)} entries, and must have at least {schema[keyword]}"

    return check


def _items(value: Any, schema: Schema, place: str) -> Iterator[str]:
    for index, item in enumerate(value if isinstance(value, list) else []):
        yield from schema_faults(item, schema["items"], f"{place}[{index}]")


def _required(value: Any, schema: Schema, place: str) -> Iterator[str]:
    for name in schema["required"]:
        if isinstance(value, dict) and name not in value:
            yield f"{_inside(place, name)}: is missing"


def _properties(value: Any, schema: Schema, place: str) -> Iterator[str]:
    for name, inner in schema["properties"].items():
        if isinstance(value, dict) and name in value:
            yield from schema_faults(value[name], inner, _inside(place, name))


def _additional_properties(value: Any, schema: Schema, place: str) -> Iterator[str]:
    allowed = schema["additionalProperties"]
    for name in sorted(value.keys() - schema.get("properties", {}).keys()) if isinstance(value, dict) else []:
        if allowed is False:
            yield f"{_inside(place, name)}: is no field of this format"
        else:
            yield from schema_faults(value[name], allowed, _inside(place, name))


def _inside(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


_KEYWORDS: Mapping[str, Callable[[Any, Schema, str], Iterator[str]]] = {
    "type": _type,
    "const": _const,
    "enum": _enum,
    "minimum": _bound("minimum", lambda value, bound: value >= bound, "at least"),
    "maximum": _bound("maximum", lambda value, bound: value <= bound, "at most"),
    "exclusiveMinimum": _bound("exclusiveMinimum", lambda value, bound: value > bound, "above"),
    "exclusiveMaximum": _bound("exclusiveMaximum", lambda value, bound: value < bound, "below"),
    "minItems": _length("minItems", "array"),
    "minLength": _length("minLength", "string"),
    "items": _items,
    "required": _required,
    "properties": _properties,
    "additionalProperties": _additional_properties,
}
