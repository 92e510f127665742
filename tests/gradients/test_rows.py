"""Where samples are may depend on the sizes and values of a batch: what passed once need not pass again."""

from __future__ import annotations

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn

from dp_trainer import CertificateError, FlatClipping, UnsupportedOperationError
from dp_trainer.gradients import book_keeping
from dp_trainer.gradients.strategies import clipped_gradient_sum

D, E = 6, 4


class _Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer, self.scale = nn.Linear(D, 3), nn.Parameter(torch.randn(D))
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def _steps_then_time_first(m, x):
    """A hand-written recurrence: the stack is time first, and nothing says so."""
    return m.layer(torch.stack([torch.tanh(step) for step in x.unbind(1)]).transpose(0, 1))


def _every_expert_sees_all(m, x):
    """As some mixtures repeat all tokens: the first axis is the experts'."""
    tokens = x.reshape(-1, D)
    repeated = tokens.repeat(E, 1).view(E, len(tokens), D).transpose(0, 1) * m.scale
    return repeated.sum(1).view_as(x)


SHAPES = {
    "time-first": (_steps_then_time_first, (8, 15), (8, 16)),
    "experts-first": (_every_expert_sees_all, (8, 5), (4, 5)),
}


def _loss(model, micro_batch):
    x = micro_batch["x"]
    return model(x).tanh().flatten(1).mean(1) * (0.1 + x[:, 0, 0].abs())


def _compare(model, batch):
    """Norms and sum against one sample at a time, some samples clipped and some not."""
    expected = reference.per_sample_gradients(model, batch, _loss)
    norms = reference.norms(expected)
    clipping = FlatClipping(float(norms.median()) * 1.01)
    actual = clipped_gradient_sum(model, [batch], per_sample_loss=_loss, clipping=clipping)
    torch.testing.assert_close(actual.norms.double(), norms, rtol=1e-4, atol=0)
    assert reference.distance(actual.gradients, reference.clipped_sum(expected, actual.factors)) < 1e-4


@pytest.mark.parametrize("name", SHAPES)
def test_a_micro_batch_that_uses_parameters_in_a_new_way_is_checked_first(name):
    """Shown exact at one size; at the other, samples are mixed up, and the run stops."""
    torch.manual_seed(0)
    function, good, bad = SHAPES[name]
    model, verified = _Model(function), set()
    settings = {"per_sample_loss": _loss, "clipping": FlatClipping(0.1)}
    batch = {"x": torch.randn(*good, D)}
    first = clipped_gradient_sum(model, [batch], verified=verified, **settings)
    expected = reference.norms(reference.per_sample_gradients(model, batch, _loss))
    torch.testing.assert_close(first.norms.double(), expected, rtol=1e-4, atol=0)
    seen = set(verified)
    assert seen
    other = {"x": torch.randn(*bad, D)}
    wrong = clipped_gradient_sum(model, [other], **settings).norms.double()
    expected = reference.norms(reference.per_sample_gradients(model, other, _loss))
    assert (wrong / expected - 1).abs().max() > 0.01, "no longer wrong: this case shows nothing"
    with pytest.raises(CertificateError, match="neighbours"):
        clipped_gradient_sum(model, [other], verified=verified, **settings)
    assert verified == seen


@pytest.mark.parametrize("name", SHAPES)
def test_the_first_micro_batch_is_checked_before_anything_is_kept(name, monkeypatch):
    """Then once more only where a use is new."""
    torch.manual_seed(0)
    function, good, bad = SHAPES[name]
    model, verified, events = _Model(function), set(), []
    look, keep = book_keeping.check_independence, book_keeping.capture
    monkeypatch.setattr(book_keeping, "check_independence", lambda *a: events.append("look") or look(*a))
    monkeypatch.setattr(book_keeping, "capture", lambda *a, **k: events.append("keep") or keep(*a, **k))
    settings = {"per_sample_loss": _loss, "clipping": FlatClipping(0.1), "verified": verified}
    with pytest.raises(CertificateError, match="neighbours"):
        clipped_gradient_sum(model, [{"x": torch.randn(*bad, D)}], **settings)
    assert events == ["look"]
    assert not verified
    for _ in range(2):
        clipped_gradient_sum(model, [{"x": torch.randn(*good, D)}], **settings)
    with pytest.raises(CertificateError, match="neighbours"):
        clipped_gradient_sum(model, [{"x": torch.randn(*bad, D)}], **settings)
    assert events == ["look", *("look", "keep"), "keep", *("keep", "look")]


class _Turning(nn.Module):
    """Keeps samples first in its first calls, as many as a look makes, and time first afterwards."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(D, 3), 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x) if self.calls <= 3 else _steps_then_time_first(self, x)


def test_what_the_first_look_did_not_see_is_not_verified_by_it():
    torch.manual_seed(0)
    model, verified = _Turning(), set()
    bad = {"x": torch.randn(*SHAPES["time-first"][2], D)}
    with pytest.raises(CertificateError, match="neighbours"):
        clipped_gradient_sum(
            model, [bad], per_sample_loss=_loss, clipping=FlatClipping(0.1), verified=verified
        )


def test_one_sample_alone_proves_nothing():
    model, verified = _Model(lambda m, x: m.layer(x)), set()
    for size in (1, 2):
        clipped_gradient_sum(
            model,
            [{"x": torch.randn(size, 4, D)}],
            per_sample_loss=_loss,
            clipping=FlatClipping(1.0),
            verified=verified,
        )
        assert bool(verified) == (size > 1)


class _Sorted(nn.Module):
    """Sorts the batch for a recurrent layer, and back."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(D, 3, batch_first=True)

    def forward(self, x):
        order = torch.argsort(x.sum((1, 2)))
        sorted_output, _ = self.lstm(x[order])
        output = torch.zeros_like(sorted_output)
        output[order] = sorted_output
        return output


class _ChosenByExperts(nn.Module):
    """Each expert picks its tokens."""

    def __init__(self):
        super().__init__()
        self.router, self.weight = nn.Linear(D, E), nn.Parameter(torch.randn(E, D, D))

    def forward(self, x):
        tokens = x.reshape(-1, D)
        chosen = self.router(tokens).t().topk(8, 1).indices
        return torch.bmm(tokens[chosen.flatten()].view(E, 8, D), self.weight).mean() + x


class _SortedAttention(nn.Module):
    """Attention over the batch in another order."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x):
        x = x[torch.argsort(x.sum((1, 2)))]
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize("model", [_Sorted, _SortedAttention, _ChosenByExperts])
def test_picked_rows_in_whole_layers_are_refused(model):
    """They were once recorded by place: one sample's norm stood for another's."""
    with pytest.raises(UnsupportedOperationError):
        clipped_gradient_sum(
            model(), [{"x": torch.randn(4, 5, D)}], per_sample_loss=_loss, clipping=FlatClipping(1.0)
        )


class _OnAnotherAxis(nn.Module):
    """A layer that takes the samples from another axis than theirs, where each axis is as long."""

    def __init__(self, axes, layer):
        super().__init__()
        self.axes, self.layer = axes, layer

    def forward(self, x):
        moved = x.permute(self.axes)
        if isinstance(self.layer, nn.ParameterList):
            return torch.bmm(moved, self.layer[0])
        return self.layer(*[moved] * (3 if isinstance(self.layer, nn.MultiheadAttention) else 1))[0]


OTHER_AXES = {
    "recurrent": ((1, 0, 2), lambda: nn.LSTM(D, 3, batch_first=True), "from axis 0, and they are on axis 1"),
    "attention": ((1, 2, 0), lambda: nn.MultiheadAttention(D, 2), "from axis 1, and they are on axis 2"),
    "experts": ((1, 2, 0), lambda: nn.ParameterList([torch.randn(D, D, D)]), "no second axis"),
}


@pytest.mark.parametrize("name", OTHER_AXES)
def test_whole_layers_over_another_axis_are_refused(name):
    axes, layer, fragment = OTHER_AXES[name]
    with pytest.raises(UnsupportedOperationError, match=fragment):
        clipped_gradient_sum(
            _OnAnotherAxis(axes, layer()),
            [{"x": torch.randn(D, D, D)}],
            per_sample_loss=_loss,
            clipping=FlatClipping(1.0),
        )


def _two_orders(x, order):
    return x[order] + x[order.flip(0)]


def _a_known_and_an_unknown_order(x, order):
    rows = x[order]
    return rows + rows.view(2 * D, -1, D).exp().view_as(rows)


def _two_axes(x, order):
    return x.permute(1, 2, 0) + x.transpose(0, 1)


def _two_axes_turned(x, order):
    return x.transpose(0, 1) + x.permute(1, 2, 0)


def _one_axis_of_two_lengths(x, order):
    return torch.cat((x.transpose(0, 1), x.repeat_interleave(2, 0).transpose(0, 1)), 1)


@pytest.mark.parametrize(
    "meeting",
    [_two_orders, _a_known_and_an_unknown_order, _two_axes, _two_axes_turned, _one_axis_of_two_lengths],
)
def test_data_whose_samples_are_in_different_places_is_refused_where_it_meets(meeting):
    """Which sample a row of the result is then cannot be told, though every axis is as long as the batch."""
    model = _Model(lambda m, x: m.layer(meeting(x, torch.argsort(x.sum((1, 2))))))
    with pytest.raises(UnsupportedOperationError, match="could not be followed"):
        clipped_gradient_sum(
            model, [{"x": torch.randn(D, D, D)}], per_sample_loss=_loss, clipping=FlatClipping(1.0)
        )


def _put_into_the_samples(x, order):
    back = torch.empty_like(x)
    back[order] = x[order].tanh()
    return back


def _put_into_a_twin_of_the_sorted(x, order):
    sorted_x = x[order]
    back = torch.empty_like(sorted_x)
    back[order] = sorted_x.tanh()
    return back


def _copied_into_a_twin_of_the_sorted(x, order):
    sorted_x = x[order]
    return torch.zeros_like(sorted_x).index_copy(0, order, sorted_x.tanh())


@pytest.mark.parametrize(
    "unsort", [_put_into_the_samples, _put_into_a_twin_of_the_sorted, _copied_into_a_twin_of_the_sorted]
)
def test_unsorting_by_a_write_is_followed(unsort):
    """A tensor made in the shape of sorted data is not sorted."""
    torch.manual_seed(0)
    model = _Model(lambda m, x: m.layer(unsort(x, torch.argsort(x.sum((1, 2))))))
    _compare(model, {"x": torch.randn(4, 5, D)})


def _sorted_values(m, x, order):
    return torch.sort(input=x.sum((1, 2))).values[:, None] * m.scale


BY_KEYWORD = {
    "transpose": lambda m, x, _: m.layer(torch.transpose(input=x, dim0=0, dim1=1)).transpose(0, 1),
    "pick": lambda m, x, order: m.layer(torch.index_select(input=x, dim=0, index=order))[order.argsort()],
    "pick with NumPy's names": lambda m, x, order: m.layer(torch.index_select(x=x, axis=0, index=order))[
        order.argsort()
    ],
    "sort": lambda m, x, order: _sorted_values(m, x, order)[order.argsort()],
    "made of picked rows": lambda m, x, order: m.layer(torch.tanh(input=x[order]))[order.argsort()],
    "written into picked rows": lambda m, x, order: m.layer(
        torch.index_add(input=x[order], dim=0, index=torch.arange(len(x)), source=x[order].tanh())
    )[order.argsort()],
}


@pytest.mark.parametrize("name", BY_KEYWORD)
def test_calls_with_keywords_are_followed(name):
    """As those by place: a source that is not looked for under its name was once taken for the samples in order."""
    torch.manual_seed(0)
    function = BY_KEYWORD[name]
    model = _Model(lambda m, x: function(m, x, torch.argsort(x.sum((1, 2)))))
    _compare(model, {"x": torch.randn(4, 8, D)})


def test_a_constant_table_in_the_datas_dtype_stays_a_constant():
    """Its rows are no samples', though their number may be divisible by B."""
    torch.manual_seed(0)
    model = _Model(lambda m, x: m.layer(x + m.table.to(x)[(x[:, 0, 0] > 0).long()][:, None]))
    model.register_buffer("table", torch.randn(8, D, dtype=torch.float64))
    batch = {"x": torch.randn(4, 5, D)}
    _compare(model, batch)


def test_reordered_rows_that_meet_the_samples_in_their_order_are_refused():
    table = torch.randn(8, D)  # no buffer, so its rows might be samples
    model = _Model(lambda m, x: m.layer(x + table[(x[:, 0, 0] > 0).long()][:, None]))
    with pytest.raises(UnsupportedOperationError, match="could not be followed"):
        clipped_gradient_sum(
            model, [{"x": torch.randn(4, 5, D)}], per_sample_loss=_loss, clipping=FlatClipping(1.0)
        )


@pytest.mark.parametrize("length", [4, 5, 8])
def test_reordered_samples_behind_a_transpose_are_refused(length):
    """Also with as many positions as samples, where the first axis still has the right length."""

    def time_first(model, x):
        order = torch.argsort(x.sum((1, 2)))
        made = model.layer(x[order].transpose(0, 1)).transpose(0, 1)
        return torch.empty_like(made).index_copy(0, order, made)

    with pytest.raises(UnsupportedOperationError):
        clipped_gradient_sum(
            _Model(time_first),
            [{"x": torch.randn(4, length, D)}],
            per_sample_loss=_loss,
            clipping=FlatClipping(1.0),
        )


def test_cross_attention_of_time_first_data():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.layer = nn.MultiheadAttention(D, 2), nn.Linear(D, D)

        def forward(self, x):
            queries, keys = x[:, :3].transpose(0, 1), x.transpose(0, 1)
            return self.layer(self.attention(queries, keys, keys)[0]).transpose(0, 1)

    torch.manual_seed(0)
    model, batch = Cross(), {"x": torch.randn(4, 5, D)}
    _compare(model, batch)


@pytest.mark.parametrize("behind", [1.0, float("nan")])
def test_rows_behind_the_last_expert_hold_nothing(behind):
    """Neither they nor their gradients count, whatever they are."""

    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(E, 8, 8))

        def forward(self, x):
            rows = F.pad(x, (0, 2)).reshape(-1, 8)
            ends = torch.tensor([3, 8, 8, len(rows) - 4], dtype=torch.int32)
            used = (torch.arange(len(rows)) < ends[-1])[:, None]
            filling = torch.where(used, 1.0, behind)
            product = F.grouped_mm(rows * filling, self.weight, offs=ends) * filling
            return torch.where(used, product, 0).view(len(x), -1)

    torch.manual_seed(0)
    model, batch = Grouped(), {"x": torch.randn(4, 5, D)}
    actual = clipped_gradient_sum(model, [batch], per_sample_loss=_loss, clipping=FlatClipping(1e9))
    _loss(model, batch).sum().backward()
    torch.testing.assert_close(actual.gradients["weight"], model.weight.grad)
    assert actual.norms[3] > 0
