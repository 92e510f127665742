"""Finds what a misspelt name was meant to be, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, valid: Iterable[str], *, count: int = 1) -> list[str]:
    """Returns up to ``count`` valid names, the closest first; never empty while ``valid`` is not.

    Unlike a bare ``difflib`` search there is no similarity threshold: a reader who
    sees a far-off suggestion still learns what kind of name is expected.
    """
    return difflib.get_close_matches(name, sorted(set(valid)), n=count, cutoff=0.0)


def quoted(names: Iterable[str]) -> str:
    """Joins names for a message: ``'a', 'b'``, or ``none`` when there are none."""
    return ", ".join(f"'{name}'" for name in names) or "none"
