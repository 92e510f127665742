"""Users as the unit of privacy: whose rows are whose, and draws of users instead of rows.

Each user comes into a logical batch as a whole, with at most ``samples_per_user`` rows. Each row's
contribution is clipped to R as always, so all that a user adds to the sum is at most
``samples_per_user`` · R long. With noise scaled to that and N and B counted in users, the
accounting of samples holds for users word for word: a user who joins or leaves changes one of N draws.

Which rows a user is drawn with depends on that user's rows and on fresh randomness alone; nobody else's draw does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dp_trainer.errors import ConfigurationError
from dp_trainer.privacy.sampling import FullBatchSampler, PoissonSampler, SecretKey, refuse_to_store

Rows: TypeAlias = NDArray[np.int64]
_Name: TypeAlias = str | bytes | int | float


def rows_by_user(dataset: Any, column: str) -> tuple[Rows, ...]:
    """Returns each user's row numbers, users in the order in which they first appear.

    Guarantee: every row belongs to exactly one user, and rows with equal names to the same one.

    Args:
        dataset: The training set; a table of the ``datasets`` library is read by column, others row by row.
        column: Where each row names its user.

    Raises:
        ConfigurationError: If a row names no user, names one by something else than a text or a number, or
            some rows use texts and others numbers.
    """
    users: dict[_Name, list[int]] = {}
    for row, value in enumerate(_column(dataset, column)):
        users.setdefault(_name(value, f"row {row}, column '{column}' of the training set"), []).append(row)
    kinds = {type(user).__name__ for user in users}
    if len(kinds) > 1:
        raise ConfigurationError(
            f"column '{column}' of the training set names users by {' and '.join(sorted(kinds))}: one user might pass for "
            "two. Convert all names to text."
        )
    return tuple(np.asarray(rows, dtype=np.int64) for rows in users.values())


def _name(value: Any, place: str) -> _Name:
    """The plain text or number that a value is; equal values, and no others, have equal names."""
    # Tensors are equal to themselves only, so that each row would pass for another user's; NaN is not even that.
    plain = value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value
    if not isinstance(plain, str | bytes | int | float) or plain != plain:
        raise ConfigurationError(
            f"{place}: {value!r} names no user. Give every row the text or number of its user, or leave the row out."
        )
    return plain


def _column(dataset: Any, column: str) -> Iterator[Any]:
    names = getattr(dataset, "column_names", None)
    if names is not None and column not in names:
        raise ConfigurationError(
            f"the training set has no column '{column}' (privacy.user_column); it has {', '.join(names)}. Name the "
            "column that says whose row it is, and keep it when preparing the data."
        )
    if names is not None and hasattr(dataset, "with_format"):
        yield from dataset.with_format(None)[column]
        return
    for row in range(len(dataset)):
        sample = dataset[row]
        if column not in sample:
            raise ConfigurationError(
                f"row {row} of the training set has no '{column}' (privacy.user_column). Every row must say whose it is."
            )
        yield sample[column]


class UserSampler:
    """Draws users as another sampler says, and for each of them some rows.

    Guarantee: a draw holds at most ``samples_per_user`` rows of each user whom ``users_drawn`` drew, all
    different and uniformly chosen if there are more, and no row of anybody else.

    It is a batch sampler, as the one it wraps.

    Args:
        users_drawn: Draws logical batches of users, numbered as in ``rows``.
        rows: What ``rows_by_user`` returned.
        samples_per_user: Most rows of one user in one logical batch.
        key: The secret behind the choice of rows; not the one behind the draw of users.

    Raises:
        ConfigurationError: If ``samples_per_user`` is not positive, or users are counted differently.
    """

    def __init__(
        self,
        users_drawn: PoissonSampler | FullBatchSampler,
        *,
        rows: tuple[Rows, ...],
        samples_per_user: int,
        key: SecretKey,
    ) -> None:
        if isinstance(samples_per_user, bool) or samples_per_user < 1:
            raise ConfigurationError(
                f"UserSampler: samples_per_user is {samples_per_user!r}. It must be at least 1."
            )
        if users_drawn.dataset_size != len(rows):
            raise ConfigurationError(
                f"UserSampler: draws of {users_drawn.dataset_size} users do not fit the rows of {len(rows)}."
            )
        self.users_drawn = users_drawn
        self.samples_per_user = samples_per_user
        self._rows = rows
        self._generator = np.random.Generator(np.random.Philox(key=key.reveal()))

    def draw(self) -> list[int]:
        """Returns the sorted row numbers of one new logical batch."""
        chosen = [self._some(self._rows[user]) for user in self.users_drawn.draw()]
        return [int(row) for row in np.sort(np.concatenate(chosen))] if chosen else []

    def _some(self, rows: Rows) -> Rows:
        if len(rows) <= self.samples_per_user:
            return rows
        return self._generator.choice(rows, size=self.samples_per_user, replace=False, shuffle=False)

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(len(self)):
            yield self.draw()

    def __len__(self) -> int:
        return len(self.users_drawn)

    def __repr__(self) -> str:
        return f"UserSampler({self.users_drawn!r}, samples_per_user={self.samples_per_user})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_to_store("UserSampler")
