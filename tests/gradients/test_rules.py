"""Each operation rule against one sample at a time, on the smallest module that uses it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_trainer import FlatClipping, UnsupportedOperationError, clipped_gradient_sum
from dp_trainer.gradients import planner
from dp_trainer.gradients.capture import Tape
from dp_trainer.gradients.derived import Derived
from dp_trainer.gradients.forms import OuterProduct
from dp_trainer.gradients.rows import RowFollower
from dp_trainer.gradients.stored import Materialized

B, T, D, V = 4, 6, 8, 10


class Toy(nn.Module):
    """Parameters by name and a forward function; data is (B, T, D), ids are (B, T)."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], function: Callable[..., Tensor]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, dtype=torch.float64)))
        self.function = function

    def forward(self, data: Tensor, ids: Tensor) -> Tensor:
        return self.function(self, data, ids)


@dataclass(frozen=True)
class RuleCase:
    name: str
    shapes: dict[str, tuple[int, ...]]
    function: Callable[..., Tensor]

    def __str__(self) -> str:
        return self.name


def _constant_ids() -> Tensor:
    return torch.arange(T).unsqueeze(0)


def _in_place(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    hidden = F.linear(x, m.w)
    hidden += m.b
    hidden.mul_(m.s)
    return F.relu_(hidden)


def _twice(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(x, m.w)), m.w)


def _tied(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.embedding(ids, m.w) + x), m.w)


def _class_token(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    return torch.cat((m.c.expand(x.shape[0], -1, -1), x), dim=1) * m.s


def _relative_bias(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    distances = (torch.arange(T)[:, None] - torch.arange(T)[None]).abs()
    bias = F.embedding(distances, m.w).permute(2, 0, 1).unsqueeze(0)
    scores = (x @ x.mT).unsqueeze(1) + bias
    return torch.softmax(scores, -1) @ x.unsqueeze(1)


def _attention_bias(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    q = x.unsqueeze(1)
    return F.scaled_dot_product_attention(q, q, q, attn_mask=m.a[None] * 2)


def _learned_queries(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    queries = F.linear(F.layer_norm(m.q.expand(x.shape[0], -1, -1), (D,), m.s), m.w)
    return torch.softmax(queries @ x.mT, -1) @ x


EXPERTS, CHOSEN = 3, 2


def _routing(m: Toy, x: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's experts and their weights, (tokens, CHOSEN)."""
    return torch.topk(torch.softmax(F.linear(x.reshape(-1, D), m.router), -1), CHOSEN)


def _experts_one_by_one(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    tokens, (weights, chosen) = x.reshape(-1, D), _routing(m, x)
    result = torch.zeros_like(tokens)
    hit = F.one_hot(chosen, EXPERTS).permute(2, 1, 0)
    for expert in torch.greater(hit.sum((-1, -2)), 0).nonzero():
        position, token = torch.where(hit[expert[0]])
        hidden = torch.tanh(F.linear(tokens[token], m.w[expert[0]], m.b[expert[0]]))
        hidden = F.layer_norm(hidden, (D,), m.s) * m.g
        hidden = F.linear(hidden, m.v[int(expert[0])]) * weights[token, position, None]
        result.index_add_(0, token, hidden)
    return result.view_as(x)


def _experts_grouped(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    tokens, (weights, chosen) = x.reshape(-1, D).float(), _routing(m, x)
    experts, order = torch.sort(chosen.reshape(-1))
    ends = torch.cumsum(torch.histc(experts.float(), EXPERTS, 0, EXPERTS - 1), 0, dtype=torch.int32)
    hidden = F.grouped_mm(tokens[order // CHOSEN], m.w.float().transpose(-2, -1), offs=ends) + m.b[experts]
    hidden = (
        F.grouped_mm(torch.tanh(hidden).float(), m.v.float(), offs=ends) * weights.reshape(-1)[order][:, None]
    )
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    return hidden[inverse].view(len(tokens), CHOSEN, D).sum(1).view_as(x).to(x.dtype)


def _experts_in_pieces(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    tokens, (weights, chosen) = x.reshape(-1, D), _routing(m, x)
    _, order = chosen.flatten().sort(0)
    counts = torch.bincount(chosen.flatten(), minlength=EXPERTS + 1).tolist()  # the last piece is empty
    token = order.div(CHOSEN, rounding_mode="trunc")
    pieces = tokens[token].split(counts, dim=0)
    hidden = torch.cat([F.linear(p, m.w[e % EXPERTS], m.b[e % EXPERTS]) for e, p in enumerate(pieces)], 0)
    hidden = hidden.tanh() * weights.flatten()[order][:, None] * m.g
    return torch.zeros_like(tokens).index_add(0, token, hidden).view_as(x)


def _experts_all_at_once(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    tokens = x.reshape(-1, D)
    hidden = tokens.repeat(EXPERTS, 1).view(EXPERTS, -1, D)
    hidden = torch.bmm(torch.tanh(torch.bmm(hidden, m.w.transpose(1, 2))), m.v)
    shares = torch.softmax(F.linear(tokens, m.router), -1)
    return (hidden * shares.T[:, :, None]).sum(0).view_as(x)


def _first_tokens(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    """Rows picked by number and by mask: uneven numbers a sample, and one sample without any."""
    mask = ids > 8
    picked = F.linear(x[mask], m.w, m.b)
    result = torch.zeros_like(x)
    result[mask] = torch.tanh(picked)
    return result + x[torch.arange(len(x)), 2][:, None] * m.b


def _in_place_on_a_biased_output(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    """Such an output may be a view, and a view written to loses its hooks."""
    hidden = F.linear(x, m.w, m.b)
    hidden += x
    second = torch.addmm(m.b, x.reshape(-1, D), m.v).view_as(x)
    second[ids > 6] = 0
    return hidden + F.relu_(F.linear(second, m.w, m.b))


def _mask_token(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    hidden = x * 2
    hidden[ids > 6] = m.w
    return hidden


def _experts_with_bias(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    tokens = x.reshape(-1, D).expand(EXPERTS, -1, -1)
    return torch.baddbmm(m.b[:, None, :], tokens, m.w).square().sum(0).view_as(x)


def _relative_keys(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    """A table of positions, made for every sample, goes through a layer before it meets the samples."""
    positions = torch.linspace(0, 1, T * D, dtype=x.dtype).view(1, T, D).expand(len(x), -1, -1)
    return x @ F.linear(positions, m.w).transpose(1, 2)


def _time_first(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    """Layers on (T, B, D), with as many positions as samples in one of the tests."""
    hidden = F.embedding(ids.transpose(0, 1), m.e) + x.permute(1, 0, 2)
    hidden = F.layer_norm(hidden, (D,), m.s) + m.p[:, None]
    hidden = torch.tanh(F.linear(hidden, m.w, m.b) * m.s)
    heads = hidden.view(T, len(x), 2, D // 2) + m.q
    scores = torch.einsum("ibnd,jbnd->bnij", heads, hidden.view(T, len(x), 2, D // 2))
    mixed = torch.einsum("bnij,jbnd->ibnd", torch.softmax(scores, -1), heads)
    return torch.einsum("ibnd,hnd->ibh", mixed, m.o).transpose(0, 1) + F.linear(hidden, m.w).transpose(1, 0)


def _heads_first(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    heads = x.reshape(len(x), T, 2, D // 2).permute(2, 0, 3, 1)
    return (m.w[:, None] @ heads).transpose(0, 1).reshape(len(x), -1)


def _tokens_of_time_first(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    """Rows picked out of (T, B, D) by one index for each axis."""
    hidden, (position, sample) = x.transpose(0, 1), torch.where((ids > 6).transpose(0, 1))
    picked = F.linear(hidden[position, sample], m.w, m.b).tanh()
    return torch.zeros_like(x).index_put((sample, position), picked) + x * m.b


def _positions_by_all_samples_at_once(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    """(T, B, D) times a table for each position, made of parameters."""
    return torch.matmul(x.transpose(0, 1), (m.w * 2).transpose(-2, -1)).transpose(0, 1)


def _positions_for_every_sample(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    """A table of positions, repeated for every sample on the second axis, meets data on (T, B, D)."""
    positions = torch.linspace(-1, 1, 3 * D, dtype=x.dtype).view(3, 1, D).expand(-1, len(x), -1)
    keys = torch.einsum("ibh,hnd->ibnd", positions, m.w)
    heads = x.transpose(0, 1).view(T, len(x), 2, D // 2)
    return torch.einsum("ibnd,jbnd->bnij", heads, keys)


def _merged_heads_of_time_first(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    heads = x.transpose(0, 1).contiguous().view(T, len(x) * 2, D // 2)
    mixed = torch.softmax(heads.transpose(0, 1) @ heads.permute(1, 2, 0), -1) @ heads.transpose(0, 1)
    return F.linear(mixed.transpose(0, 1).reshape(T, len(x), D), m.w, m.b).transpose(0, 1)


def _rows_put_into_time_first(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    sample, position = torch.where(ids > 6)
    chosen = x.new_zeros(T, len(x), D)
    chosen[position, sample] = x[sample, position]
    return F.linear(chosen, m.w, m.b).transpose(0, 1) + x


def _repeated_keys(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    heads = x.view(len(x), T, 2, D // 2).transpose(1, 2).reshape(-1, T, D // 2)
    return torch.bmm(heads, m.w.repeat(len(x), 1, 1).transpose(-1, -2)).reshape(len(x), -1)


def _recurrent(layer: nn.Module) -> Callable[..., Tensor]:
    """A layer whose weights are the toy's parameters, by position."""

    def run(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
        parameters = {name: getattr(m, f"p{i}") for i, (name, _) in enumerate(layer.named_parameters())}
        return torch.func.functional_call(layer, parameters, (x,))[0]

    return run


def _attention_layer(m: Toy, x: Tensor, ids: Tensor) -> Tensor:
    mask = torch.zeros(len(x), T, dtype=torch.bool)
    mask[:, -1] = True
    probe = m.probe.expand(len(x), -1, -1)
    x = x.transpose(0, 1)
    settings = {"training": False, "key_padding_mask": mask, "need_weights": True}
    for query in (x, probe.transpose(0, 1)):
        x, shares = F.multi_head_attention_forward(
            query, x, x, D, 2, m.w, m.b, None, None, False, 0.0, m.o, m.ob, **settings
        )
        settings["key_padding_mask"] = None
    return x.transpose(0, 1) + shares.square().sum((1, 2))[:, None, None]


def _shapes_of(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    return {f"p{i}": tuple(p.shape) for i, p in enumerate(layer.parameters())}


MEANS = torch.linspace(-1, 1, T, dtype=torch.float64)
LSTM = nn.LSTM(D, 4, num_layers=2, bidirectional=True, batch_first=True).double().requires_grad_(False)
GRU = nn.GRU(D, 4, batch_first=True).double().requires_grad_(False)
MIXTURE = {"router": (EXPERTS, D), "w": (EXPERTS, D, D), "v": (EXPERTS, D, D)}
W, VECTOR = {"w": (D, D)}, {"w": (D,)}
RULE_CASES = (
    RuleCase("linear", {"w": (5, D), "b": (5,)}, lambda m, x, i: F.linear(x, m.w, m.b)),
    RuleCase("linear-two-axes", {"w": (5, D), "b": (5,)}, lambda m, x, i: F.linear(x[:, 0], m.w, m.b)),
    RuleCase("linear-flattened", {"w": (5, D), "b": (5,)}, lambda m, x, i: F.linear(x.reshape(-1, D), m.w, m.b).view(B_of(x), T, 5)),
    RuleCase("linear-four-axes", {"w": (5, D)}, lambda m, x, i: F.linear(x.unsqueeze(2), m.w)),
    RuleCase("linear-one-row-weight", {"w": (1, D)}, lambda m, x, i: F.linear(x, m.w)),
    RuleCase("linear-derived-weight", {"w": (D, D), "g": (D, 1)}, lambda m, x, i: F.linear(x, m.g * m.w / m.w.norm(dim=1, keepdim=True))),
    RuleCase("linear-merged-adapter", {"a": (2, D), "c": (5, 2)}, lambda m, x, i: F.linear(x, m.c @ m.a * 0.5)),
    RuleCase("linear-slices", {"w": (3 * D, D)}, lambda m, x, i: F.linear(x, m.w[:D]) * F.linear(x, m.w.chunk(3)[1])),
    RuleCase("linear-transposed", W, lambda m, x, i: F.linear(x, m.w.t()) + F.linear(x.sin(), m.w)),
    RuleCase("linear-on-buffer-only-data", W, lambda m, x, i: F.linear(torch.ones(T, D, dtype=x.dtype), m.w) + x),
    RuleCase("addmm", {"w": (D, 5), "b": (5,)}, lambda m, x, i: torch.addmm(m.b, x.reshape(-1, D), m.w).view(B_of(x), T, 5)),
    RuleCase("addmm-scaled", {"w": (D, 5), "b": (5,)}, lambda m, x, i: torch.addmm(m.b, x.reshape(-1, D), m.w, beta=0.5, alpha=2.0).view(B_of(x), T, 5)),
    RuleCase("matmul-right", {"w": (D, 5)}, lambda m, x, i: x @ m.w),
    RuleCase("matmul-transposed", {"w": (5, D)}, lambda m, x, i: x @ m.w.T),
    RuleCase("matmul-left", {"w": (5, T)}, lambda m, x, i: m.w @ x),
    RuleCase("matmul-three-axes", {"w": (1, D, 5)}, lambda m, x, i: torch.matmul(x, m.w)),
    RuleCase("embedding", {"w": (V, D)}, lambda m, x, i: F.embedding(i, m.w) * x),
    RuleCase("embedding-padding", {"w": (V, D)}, lambda m, x, i: F.embedding(i, m.w, padding_idx=3) * x),
    RuleCase("embedding-last-padding", {"w": (V, D)}, lambda m, x, i: F.embedding(i, m.w, padding_idx=-1) * x),
    RuleCase("embedding-scaled-table", {"w": (V, D)}, lambda m, x, i: F.embedding(i, m.w.to(x.dtype)) * x * 3),
    RuleCase("positions-one-row", {"w": (V, D)}, lambda m, x, i: x * (F.embedding(_constant_ids(), m.w) + x)),
    RuleCase("positions-no-batch-axis", {"w": (V, D)}, lambda m, x, i: x * (F.embedding(_constant_ids()[0], m.w) + x)),
    RuleCase("positions-padding", {"w": (V, D)}, lambda m, x, i: x * (F.embedding(_constant_ids(), m.w, padding_idx=2) + x)),
    RuleCase("types-of-zeros", {"w": (2, D)}, lambda m, x, i: x * (F.embedding(torch.zeros(B_of(x), T, dtype=torch.long), m.w) + x)),
    RuleCase("positions-expanded-ids", {"w": (V, D)}, lambda m, x, i: x * (F.embedding(_constant_ids().expand(B_of(x), -1), m.w) + x)),
    RuleCase("two-constant-embeddings", {"w": (V, D), "u": (2, D)}, lambda m, x, i: x * (F.embedding(_constant_ids(), m.w) + F.embedding(torch.zeros(B_of(x), T, dtype=torch.long), m.u) + x)),
    RuleCase("position-table-picked", {"w": (V, D)}, lambda m, x, i: x * (x + m.w[_constant_ids().expand(len(x), -1) - V])),
    RuleCase("position-table-slice", {"w": (V, D)}, lambda m, x, i: x * (x + m.w[:T])),
    RuleCase("layer-norm", {"w": (D,), "b": (D,)}, lambda m, x, i: F.layer_norm(x, (D,), m.w, m.b)),
    RuleCase("layer-norm-no-bias", VECTOR, lambda m, x, i: F.layer_norm(x, (D,), m.w)),
    RuleCase("layer-norm-two-axes", {"w": (T, D), "b": (T, D)}, lambda m, x, i: F.layer_norm(x, (T, D), m.w, m.b)),
    RuleCase("rms-norm", VECTOR, lambda m, x, i: F.rms_norm(x, (D,), m.w, 1e-6)),
    RuleCase("hand-written-norm", VECTOR, lambda m, x, i: (1 + m.w.float()) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)))),
    RuleCase("power-and-exp", {"w": (D,), "s": ()}, lambda m, x, i: x * m.w.exp() * m.s.pow(2)),
    RuleCase("reversed-operators", {"w": (D,)}, lambda m, x, i: (2.0 - m.w) / (3 + x.abs()) - m.w),
    RuleCase("where", VECTOR, lambda m, x, i: torch.where(x > 0, x, m.w)),
    RuleCase("conv1d", {"w": (5, T, 3), "b": (5,)}, lambda m, x, i: F.conv1d(x, m.w, m.b, padding=1)),
    RuleCase("conv1d-groups", {"w": (T, 2, 3)}, lambda m, x, i: F.conv1d(x, m.w, stride=2, dilation=2, groups=3)),
    RuleCase("conv2d", {"w": (5, 1, 2, 2), "b": (5,)}, lambda m, x, i: F.conv2d(x.unsqueeze(1), m.w, m.b, stride=2)),
    RuleCase("conv2d-same", {"w": (5, 1, 3, 3)}, lambda m, x, i: F.conv2d(x.unsqueeze(1), m.w, padding="same")),
    RuleCase("conv-transposed", {"w": (T, 4, 3), "b": (4,)}, lambda m, x, i: F.conv_transpose1d(x, m.w, m.b, stride=2)),
    RuleCase("group-norm", {"w": (T,), "b": (T,)}, lambda m, x, i: F.group_norm(x, 2, m.w, m.b) + x),
    RuleCase("instance-norm", {"w": (T,), "b": (T,)}, lambda m, x, i: F.instance_norm(x, weight=m.w, bias=m.b) + x),
    RuleCase("prelu", {"w": (T,)}, lambda m, x, i: F.prelu(x, m.w)),
    RuleCase("bilinear", {"w": (3, D, D), "b": (3,)}, lambda m, x, i: F.bilinear(x, x.sin(), m.w, m.b)),
    RuleCase("einsum", {"w": (D, 2, 3)}, lambda m, x, i: torch.einsum("btd,dhe->bthe", x, m.w)),
    RuleCase("einsum-two-data", {"w": (2, D)}, lambda m, x, i: torch.einsum("bid,hd,bjd->bhij", x, m.w, x.sin())),
    RuleCase("table-at-own-indices", {"w": (V, D), "v": (V,)}, lambda m, x, i: m.w[i] * x + m.v[i][..., None]),
    RuleCase("experts-one-by-one", {**MIXTURE, "b": (EXPERTS, D), "s": (D,), "g": ()}, _experts_one_by_one),
    RuleCase("experts-in-pieces", {**MIXTURE, "b": (EXPERTS, D), "g": (D,)}, _experts_in_pieces),
    RuleCase("experts-all-at-once", MIXTURE, _experts_all_at_once),
    RuleCase("rows-picked", {"w": (D, D), "b": (D,)}, _first_tokens),
    RuleCase("attention-sinks", {"w": (3,)}, lambda m, x, i: torch.softmax(torch.cat((x[:, None].expand(-1, 3, -1, -1), m.w.reshape(1, -1, 1, 1).expand(len(x), -1, T, -1)), -1), -1)),
    RuleCase("bias-expanded-like-data", {"w": (D,)}, lambda m, x, i: x.tanh() * m.w.expand_as(x)),
    RuleCase("einsum-two-rows-a-sample", {"w": (D, 3)}, lambda m, x, i: torch.einsum("btd,de->bte", x.reshape(-1, T // 2, D), m.w).reshape(len(x), -1)),
    RuleCase("in-place-on-a-biased-output", {"w": (D, D), "v": (D, D), "b": (D,)}, _in_place_on_a_biased_output),
    RuleCase("mask-token", VECTOR, _mask_token),
    RuleCase("experts-with-bias", {"w": (EXPERTS, D, D), "b": (EXPERTS, D)}, _experts_with_bias),
    RuleCase("relative-keys", W, _relative_keys),
    RuleCase("batch-norm-with-stored-statistics", {"w": (T,), "b": (T,)}, lambda m, x, i: F.batch_norm(x, MEANS, MEANS.exp(), m.w, m.b)),
    RuleCase("batch-norm-two-axes", {"w": (D,), "b": (D,)}, lambda m, x, i: F.batch_norm(x[:, 0], torch.zeros(D).double(), torch.ones(D).double(), m.w, m.b)),
    RuleCase("time-first", {"e": (V, D), "s": (D,), "p": (T, D), "w": (D, D), "b": (D,), "q": (2, D // 2), "o": (D, 2, D // 2)}, _time_first),
    RuleCase("heads-first", {"w": (2, 3, D // 2)}, _heads_first),
    RuleCase("tokens-of-time-first", {"w": (D, D), "b": (D,)}, _tokens_of_time_first),
    RuleCase("positions-by-all-samples-at-once", {"w": (T, 3, D)}, _positions_by_all_samples_at_once),
    RuleCase("positions-for-every-sample", {"w": (D, 2, D // 2)}, _positions_for_every_sample),
    RuleCase("merged-heads-of-time-first", {"w": (D, D), "b": (D,)}, _merged_heads_of_time_first),
    RuleCase("rows-put-into-time-first", {"w": (D, D), "b": (D,)}, _rows_put_into_time_first),
    RuleCase("repeated-keys", {"w": (2, 5, D // 2)}, _repeated_keys),
    RuleCase("embedding-bag", {"w": (V, D)}, lambda m, x, i: F.embedding_bag(i, m.w, mode="mean")[:, None] * x),
    RuleCase("lstm", _shapes_of(LSTM), _recurrent(LSTM)),
    RuleCase("gru", _shapes_of(GRU), _recurrent(GRU)),
    RuleCase("multi-head-attention", {"w": (3 * D, D), "b": (3 * D,), "o": (D, D), "ob": (D,), "probe": (1, 2, D)}, _attention_layer),
    RuleCase("class-token", {"c": (1, 1, D), "s": (D,)}, _class_token),
    RuleCase("relative-bias", {"w": (T, 3)}, _relative_bias),
    RuleCase("attention-bias", {"a": (T, T)}, _attention_bias),
    RuleCase("learned-queries", {"q": (1, 3, D), "s": (D,), "w": (D, D)}, _learned_queries),
    RuleCase("in-place-on-outputs", {"w": (D, D), "b": (D,), "s": (D,)}, _in_place),
    RuleCase("used-twice", W, _twice),
    RuleCase("tied-table-and-head", {"w": (V, D)}, _tied),
    RuleCase("never-used", {"w": (D,), "unused": (3, 3)}, lambda m, x, i: x * m.w),
    RuleCase("not-reached-by-the-loss", {"w": (D,), "u": (D, D)}, lambda m, x, i: (F.linear(x, m.u), x * m.w)[1]),
    RuleCase("batch-size-one-of-the-axes", {"w": (B, T, D)}, lambda m, x, i: x.unsqueeze(1) * m.w),
)  # fmt: skip


def B_of(x: Tensor) -> int:
    return x.shape[0]


def _loss(model: nn.Module, micro_batch) -> Tensor:
    output = model(micro_batch["data"], micro_batch["ids"])
    return torch.tanh(output).pow(2).flatten(1).sum(1) * micro_batch["weight"]


def _micro_batch(batch: int = B) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "data": torch.randn(batch, T, D, generator=generator, dtype=torch.float64),
        "ids": torch.randint(0, V, (batch, T), generator=generator),
        "weight": torch.tensor([1.0, 0.1, 3.0, 0.5, 2.0, 0.7], dtype=torch.float64)[:batch],
    }


def _compare(model: nn.Module, micro_batch: dict[str, Tensor], tolerance: float) -> None:
    """Norms and sum against one sample at a time, some samples clipped and some not."""
    expected = reference.per_sample_gradients(model, micro_batch, _loss)
    norms = reference.norms(expected)
    clipping = FlatClipping(float(norms.median()) * 1.01)
    actual = clipped_gradient_sum(model, [micro_batch], per_sample_loss=_loss, clipping=clipping)
    torch.testing.assert_close(actual.norms, norms, rtol=tolerance, atol=0)
    assert reference.distance(actual.gradients, reference.clipped_sum(expected, actual.factors)) < tolerance


# A parameter whose own first axis is the number of samples is told apart by its neighbours' axes only.
PAIRS = [(c, b) for c in RULE_CASES for b in (B, T, 1) if (c.name, b) != ("batch-size-one-of-the-axes", T)]


@pytest.mark.parametrize(("case", "batch"), PAIRS, ids=str)
def test_rule_agrees_with_one_sample_at_a_time(case, batch):
    """Also with as many samples as positions, where a sample axis could be mistaken."""
    _compare(Toy(case.shapes, case.function), _micro_batch(batch), tolerance=1e-6)


@pytest.mark.parametrize("batch", [B, 1])
def test_experts_in_groups(batch):
    """The grouped product is known in float32 and narrower only."""
    _compare(Toy({**MIXTURE, "b": (EXPERTS, D)}, _experts_grouped), _micro_batch(batch), tolerance=1e-4)


@pytest.mark.parametrize("function", [_experts_one_by_one, _experts_grouped])
def test_without_following_rows_experts_would_be_refused_or_wrong(function, monkeypatch):
    """The rows of one expert are no sample's: this is what following them prevents."""
    monkeypatch.setattr(RowFollower, "follow", lambda *_, **__: None)
    shapes = {**MIXTURE, "b": (EXPERTS, D), "s": (D,), "g": ()}
    model, micro_batch = Toy(shapes, function), _micro_batch()
    norms = reference.norms(reference.per_sample_gradients(model, micro_batch, _loss))
    try:
        actual = clipped_gradient_sum(model, [micro_batch], per_sample_loss=_loss, clipping=FlatClipping(1.0))
    except UnsupportedOperationError:
        return
    assert ((actual.norms / norms - 1).abs() > 1e-3).any()


REFUSED = {
    "no-rule": ({"w": (D, D)}, lambda m, x, i: torch.cdist(x, m.w), "no rule"),
    "einsum-samples-behind": (
        {"w": (D, D)},
        lambda m, x, i: torch.einsum("btd,de->tbe", x, m.w).transpose(0, 1),
        "does not begin",
    ),
    "rows-lost": (
        {"w": (D, D)},
        lambda m, x, i: F.linear(
            x.reshape(-1, D)[torch.randperm(len(x) * T)].roll(1, 0).view(-1, 2, D), m.w
        ).view_as(x),
        "could not be followed",
    ),
    "batch-norm": (
        {"w": (T,)},
        lambda m, x, i: F.batch_norm(x, MEANS.clone(), MEANS.exp(), m.w, training=True),
        "couples samples",
    ),
    "running-statistics": (
        {"w": (T,)},
        lambda m, x, i: F.instance_norm(x, torch.zeros(T).double(), torch.ones(T).double(), m.w),
        "running statistics",
    ),
    "write-into-parameter-copy": ({"w": (T, D)}, lambda m, x, i: m.w.clone().add_(x[0]) * x, "w"),
    "renormalized-embedding": ({"w": (V, D)}, lambda m, x, i: F.embedding(i, m.w, max_norm=1.0), "max_norm"),
    "frequency-scaled": (
        {"w": (V, D)},
        lambda m, x, i: F.embedding(i, m.w, scale_grad_by_freq=True),
        "couples",
    ),
    "positions-first": (
        {"w": (D, D)},
        lambda m, x, i: F.linear(torch.stack(x.unbind(), 1)[:5], m.w).mean(0)[:, None] + x,
        "axis",
    ),
    "join-along-samples": ({"w": (1, T, D)}, lambda m, x, i: torch.cat((x, m.w))[:-1], "sample axis"),
    "experts-without-samples": ({"w": (B, D, D)}, lambda m, x, i: torch.bmm(x[:, :3], m.w), "second axis"),
    "scalar-of-all-samples": ({"w": (D,)}, lambda m, x, i: (m.w * x.abs().max()) + x, "axis"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_exact_rule_is_refused_by_name(name):
    shapes, function, fragment = REFUSED[name]
    with pytest.raises(UnsupportedOperationError, match=fragment) as error:
        clipped_gradient_sum(
            Toy(shapes, function), [_micro_batch()], per_sample_loss=_loss, clipping=FlatClipping(1.0)
        )
    assert "w" in str(error.value)
    assert "strategy='loop'" in str(error.value)


def test_a_use_outside_the_capture_trips():
    model = Toy(W, lambda m, x, i: F.linear(x, m.w))

    def escaping(model, micro_batch):
        with torch._C.DisableTorchFunction():
            hidden = model(micro_batch["data"], micro_batch["ids"])
        return hidden.pow(2).flatten(1).sum(1)

    with pytest.raises(UnsupportedOperationError, match=r"w: used where the capture could not see it"):
        clipped_gradient_sum(model, [_micro_batch()], per_sample_loss=escaping, clipping=FlatClipping(1.0))
    assert model.w.grad is None


def _spectrum(x: Tensor) -> Tensor:
    return torch.complex(x, 0.3 * x.roll(1, -1))


def _complex(tensor: Tensor) -> Tensor:
    return torch.view_as_complex(tensor)


def _parts(z: Tensor) -> Tensor:
    return torch.cat([z.real, 2 * z.imag], -1)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x, ids: _parts(torch.einsum("btd,dp->btp", _spectrum(x), _complex(m.w))),
        lambda m, x, ids: _parts(F.conv1d(_spectrum(x).mT, _complex(m.w)[:, :, None]).mT),
    ],
    ids=["einsum", "convolved"],
)
@pytest.mark.parametrize("strategy", ["book_keeping", "two_pass"])
def test_real_parameters_seen_as_complex_numbers(function, strategy):
    """Without its imaginary part a gradient of a stored form was measured a quarter too short."""
    model = Toy({"w": (V, V, 2), "s": (V, 2)}, function)
    data, ids = torch.randn(B, T, V, dtype=torch.float64), torch.randint(0, V, (B, T))
    loss = lambda m, b: m(b["data"], b["ids"]).pow(2).flatten(1).sum(1)  # noqa: E731
    batch = {"data": data, "ids": ids}
    expected = reference.per_sample_gradients(model, batch, loss)
    norms = reference.norms(expected)
    clipping = FlatClipping(float(norms.median()) * 1.01)
    result = clipped_gradient_sum(model, [batch], per_sample_loss=loss, clipping=clipping, strategy=strategy)
    torch.testing.assert_close(result.norms, norms)
    assert reference.distance(result.gradients, reference.clipped_sum(expected, result.factors)) < 1e-10


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x, ids: _parts(F.linear(_spectrum(x), _complex(m.w))),
        lambda m, x, ids: _parts(_spectrum(x) @ _complex(m.w)),
        lambda m, x, ids: _parts(_spectrum(x) @ m.s.to(torch.complex128)),
        lambda m, x, ids: _parts(F.embedding(ids, _complex(m.w)) * _spectrum(x)),
        lambda m, x, ids: _parts(_complex(m.w)[ids] * _spectrum(x)),
        lambda m, x, ids: _parts(_spectrum(x) * _complex(m.s)),
    ],
    ids=["linear", "product", "cast", "table", "picked", "scaled"],
)
def test_products_of_complex_numbers_are_refused(function):
    """Their gradients have a conjugate, which outer products have not: sums were wrong by half."""
    model = Toy({"w": (V, V, 2), "s": (V, 2)}, function)
    batch = {"data": torch.randn(B, T, V, dtype=torch.float64), "ids": torch.randint(0, V, (B, T))}
    with pytest.raises(UnsupportedOperationError, match="complex"):
        clipped_gradient_sum(
            model,
            [batch],
            per_sample_loss=lambda m, b: m(b["data"], b["ids"]).pow(2).flatten(1).sum(1),
            clipping=FlatClipping(1.0),
        )


@pytest.mark.parametrize("settled", [True, False])
def test_a_gradient_of_another_number_of_samples_is_refused(settled):
    """A rule of the user's own may get that wrong; blocks of samples would leave the surplus out."""
    tape = Tape({"w": torch.zeros(5, 3)}, 4, planner.settle if settled else None)
    derived = Derived(tape.parameters["w"], ("w",))
    for form in (
        OuterProduct(torch.ones(8, 2, 5), torch.ones(8, 2, 3)),
        OuterProduct(torch.ones(4, 2, 5), torch.ones(8, 2, 3)),
        OuterProduct(torch.ones(2, 2, 5), torch.ones(4, 2, 3)),
        Materialized(torch.ones(1, 5, 3)),
    ):
        with pytest.raises(UnsupportedOperationError, match=r"[128] samples instead of 4"):
            tape.record(derived, form)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_weights_without_elements():
    model = nn.Sequential(nn.Linear(D, 0), nn.Linear(0, 3)).double()
    batch = {"x": torch.randn(B, T, D, dtype=torch.float64)}
    run = lambda strategy: clipped_gradient_sum(  # noqa: E731
        model,
        [batch],
        per_sample_loss=lambda m, b: m(b["x"]).pow(2).sum((1, 2)),
        clipping=FlatClipping(1.0),
        strategy=strategy,
    )
    assert torch.equal(run("book_keeping").norms, run("loop").norms)
