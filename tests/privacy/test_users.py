"""Users as the unit: whose rows are whose, and what a draw of users holds."""

import copy
import pickle

import datasets
import numpy as np
import pytest
import torch
from scipy import stats

from dp_trainer.errors import ConfigurationError
from dp_trainer.privacy.sampling import FullBatchSampler, PoissonSampler, fresh_key, insecure_key
from dp_trainer.privacy.users import UserSampler, rows_by_user

NAMES = ["a", "b", "a", "c", "a", "b", "a", "d"]
GROUPS = [[0, 2, 4, 6], [1, 5], [3], [7]]


def sampler(probability=0.5, most=2, key=None, cap=4):
    users = PoissonSampler(
        dataset_size=4, sampling_probability=probability, batch_cap=cap, steps=3, key=key or fresh_key()
    )
    rows = tuple(np.array(group) for group in GROUPS)
    return UserSampler(users, rows=rows, samples_per_user=most, key=key or fresh_key())


@pytest.mark.parametrize("kind", ["list", "table", "formatted table", "numbers"])
def test_every_row_belongs_to_its_user(kind):
    rows = [{"x": i, "patient": name} for i, name in enumerate(NAMES)]
    data = rows
    if "table" in kind:
        data = datasets.Dataset.from_list(rows)
    if kind == "formatted table":
        data = data.with_format("torch", columns=["x"])
    if kind == "numbers":
        data = [{**row, "patient": ord(row["patient"])} for row in rows]
    assert [list(group) for group in rows_by_user(data, "patient")] == GROUPS


@pytest.mark.parametrize("table", [True, False])
def test_a_missing_column_is_named(table):
    rows = [{"x": 1, "patient": "a"}, {"x": 2}]
    data = datasets.Dataset.from_list([{"x": 1}, {"x": 2}]) if table else rows
    with pytest.raises(ConfigurationError, match=r"'patient'.*user_column"):
        rows_by_user(data, "patient")


@pytest.mark.parametrize("number", [torch.tensor, np.int64, float])
def test_numbers_of_any_kind_are_the_same_user_s(number):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, row):
            return {"patient": number([1, 1, 2, 2][row])}

    assert [list(group) for group in rows_by_user(Rows(), "patient")] == [[0, 1], [2, 3]]
    part = torch.utils.data.Subset(
        datasets.Dataset.from_dict({"patient": [7, 8, 7, 8]}).with_format("torch"), [0, 1, 2]
    )
    assert [list(group) for group in rows_by_user(part, "patient")] == [[0, 2], [1]]


def test_texts_beside_numbers_are_refused():
    with pytest.raises(ConfigurationError, match=r"int and str.*Convert"):
        rows_by_user([{"patient": 1}, {"patient": "1"}], "patient")


@pytest.mark.parametrize(
    "user",
    [None, float("nan"), ["a"], (1.0, 2), object(), torch.ones(2), torch.tensor(float("nan"))],
    ids=["none", "nan", "list", "tuple", "object", "two numbers", "tensor of nan"],
)
def test_a_row_of_nobody_is_refused(user):
    with pytest.raises(ConfigurationError, match=r"row 1, column 'patient'.*names no user"):
        rows_by_user([{"patient": "a"}, {"patient": user}], "patient")


def test_a_draw_holds_some_rows_of_the_users_drawn_and_no_others():
    drawn = sampler()
    for _ in range(300):
        rows = drawn.draw()
        assert rows == sorted(set(rows))
        by_user = [len(set(rows) & set(group)) for group in GROUPS]
        # All of a user's rows, or two of them, or none: never a part that hangs on other users.
        assert all(count in (0, min(2, len(group))) for count, group in zip(by_user, GROUPS, strict=True))


def test_users_are_drawn_independently_and_their_rows_evenly():
    draws = [sampler.draw() for sampler in [sampler(0.3)] for _ in range(20_000)]
    seen = np.array([[bool(set(rows) & set(group)) for group in GROUPS] for rows in draws])
    for share in seen.mean(axis=0):
        assert stats.binomtest(round(share * len(draws)), len(draws), 0.3).pvalue > 1e-6
    # Each pair of users together as often as independence has it.
    together = (seen[:, 0] & seen[:, 1]).sum()
    assert stats.binomtest(int(together), len(draws), 0.09).pvalue > 1e-6
    counts = np.bincount([row for rows in draws for row in rows if row in GROUPS[0]], minlength=8)[GROUPS[0]]
    assert stats.chisquare(counts).pvalue > 1e-6


def test_the_cap_counts_users():
    drawn = sampler(probability=1.0, cap=2, most=10)
    for _ in range(50):
        rows = set(drawn.draw())
        present = [group for group in GROUPS if rows & set(group)]
        assert len(present) == 2
        assert rows == set().union(*present)


def test_full_batches_hold_every_user_each_time():
    users = FullBatchSampler(dataset_size=4, steps=5)
    drawn = UserSampler(users, rows=tuple(np.array(g) for g in GROUPS), samples_per_user=1, key=fresh_key())
    draws = list(drawn)
    assert len(draws) == len(drawn) == 5
    assert all([sum(row in group for row in rows) for group in GROUPS] == [1, 1, 1, 1] for rows in draws)
    assert len({tuple(rows) for rows in draws}) > 1


def test_the_same_keys_draw_the_same_and_fresh_ones_do_not():
    one, two = (list(sampler(key=insecure_key(3))) for _ in range(2))
    assert one == two
    assert [sampler().draw() for _ in range(30)] != [sampler().draw() for _ in range(30)]


def test_wrong_settings_are_refused():
    users = FullBatchSampler(dataset_size=4, steps=5)
    with pytest.raises(ConfigurationError, match="samples_per_user"):
        UserSampler(users, rows=(np.array([0]),) * 4, samples_per_user=0, key=fresh_key())
    with pytest.raises(ConfigurationError, match="4 users"):
        UserSampler(users, rows=(np.array([0]),) * 3, samples_per_user=1, key=fresh_key())


@pytest.mark.parametrize("copied", [pickle.dumps, copy.deepcopy])
def test_its_randomness_cannot_be_stored(copied):
    with pytest.raises(ConfigurationError, match="UserSampler"):
        copied(sampler())
    assert "key" not in repr(sampler())
