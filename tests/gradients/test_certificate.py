"""The certificate passes what is exact and refuses, by name, what is not."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
import transformers
from cases import MODEL_CASES
from torch import nn

from dp_trainer import AutomaticClipping, CertificateError, FlatClipping, certify
from dp_trainer.gradients import book_keeping, forms, planner
from dp_trainer.gradients.certificate import without_padding
from dp_trainer.losses import per_sample_loss_for

CASES = {case.name: case for case in MODEL_CASES}


def _certify(case_name, **changes):
    case = CASES[case_name]
    model = case.build()
    settings = {"per_sample_loss": per_sample_loss_for(model), "clipping": AutomaticClipping(), **changes}
    return certify(model, case.micro_batch(), **settings)


@pytest.mark.parametrize("strategy", ["book_keeping", "two_pass", "direct", "loop"])
@pytest.mark.parametrize("case", MODEL_CASES, ids=str)
def test_exact_models_pass(case, strategy):
    certificate = _certify(case.name, strategy=strategy)
    assert certificate.norm_error < 1e-3
    assert certificate.sum_error < 1e-3
    assert certificate.largest_contribution <= 1 + 1e-5
    assert certificate.rounding_margin < 2e-4


def test_dropout_is_off_while_comparing_and_the_generator_untouched():
    case = CASES["roberta-classifier"]
    config = {**case.config, "hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    noisy = type(case)(case.name, case.model_class, config, case.head)
    model = noisy.build()
    state = torch.random.get_rng_state()
    certificate = certify(
        model, case.micro_batch(), per_sample_loss=per_sample_loss_for(model), clipping=AutomaticClipping()
    )
    assert certificate.norm_error < 1e-4
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training


# Planted faults, one a row: what is changed, and what the refusal must say.


def _drop_cross_terms(monkeypatch):
    monkeypatch.setattr(forms, "inner_products", lambda first, second: torch.zeros(first.dense().shape[0]))


def _halve_norms(monkeypatch):
    plain = book_keeping.squared_norms
    halved = lambda forms: {name: squares * 0.25 for name, squares in plain(forms).items()}  # noqa: E731
    monkeypatch.setattr(book_keeping, "squared_norms", halved)


@pytest.mark.parametrize("way", ["long samples", "gradient checkpointing"])
def test_automatic_is_certified_where_it_is_not_the_reference(way, monkeypatch):
    """The planner may give these two samples to plain autograd, and the next ones to book-keeping."""
    case = CASES["gpt2-tied"]
    model, micro_batch = case.build(), case.micro_batch()
    if way == "long samples":
        monkeypatch.setattr(planner, "_LONG", 2)
    else:
        enable = (
            getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    assert planner.choose_strategy(model, micro_batch) == "direct"
    settings = {"per_sample_loss": per_sample_loss_for(model), "clipping": AutomaticClipping()}
    assert certify(model, micro_batch, strategy="automatic", **settings).strategy == "book_keeping"
    _halve_norms(monkeypatch)
    with pytest.raises(CertificateError, match="not exact"):
        certify(model, micro_batch, strategy="automatic", **settings)


def _no_clipping(monkeypatch):
    monkeypatch.setattr(FlatClipping, "__call__", lambda self, norms: torch.ones_like(norms))


FAULTS = {
    "tied cross terms dropped": (_drop_cross_terms, "gpt2-tied", "not exact"),
    "norms halved": (_halve_norms, "bert-classifier", "not exact"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_inexact_norms_are_refused(fault, monkeypatch):
    plant, case_name, fragment = FAULTS[fault]
    plant(monkeypatch)
    with pytest.raises(CertificateError, match=fragment):
        _certify(case_name)


def test_clipping_that_does_not_clip_is_refused(monkeypatch):
    _no_clipping(monkeypatch)
    with pytest.raises(CertificateError, match="times the sensitivity"):
        _certify("gpt2-tied", clipping=FlatClipping(1e-3))


def _token_mean(model, micro_batch):
    inputs = {k: v for k, v in micro_batch.items() if k != "labels"}
    logits, labels = model(**inputs).logits[:, :-1], micro_batch["labels"][:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(len(labels), -1).sum(1) / (labels != -100).sum()


def _without_mask(model, micro_batch):
    losses = model(input_ids=micro_batch["input_ids"]).logits
    return losses.pow(2).flatten(1).mean(1)


COUPLED = {"a mean over the batch's tokens": _token_mean, "padding that is attended to": _without_mask}


@pytest.mark.parametrize("name", COUPLED)
def test_samples_that_feel_their_neighbours_are_refused(name):
    with pytest.raises(CertificateError, match="neighbours"):
        _certify("gpt2-tied", per_sample_loss=COUPLED[name])


def test_a_buffer_that_remembers_samples_is_refused():
    class Remembering(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.register_buffer("seen", torch.zeros(3))

        def forward(self, x):
            self.seen.add_(x.detach().sum(0))
            return self.layer(x)

    model = Remembering()
    with pytest.raises(CertificateError, match=r"seen: this buffer"):
        certify(
            model,
            {"x": torch.randn(4, 3)},
            per_sample_loss=lambda m, b: m(b["x"]).pow(2).sum(1),
            clipping=AutomaticClipping(),
        )
    assert not model.seen.any()


def test_samples_with_nan_are_not_compared():
    model = nn.Linear(3, 2)
    data = torch.randn(4, 3)
    data[1] = float("nan")
    arguments = {"per_sample_loss": lambda m, b: m(b["x"]).pow(2).sum(1), "clipping": AutomaticClipping()}
    assert certify(model, {"x": data}, **arguments).samples == 3
    with pytest.raises(CertificateError, match="All 2 samples"):
        certify(model, {"x": torch.full((2, 3), float("nan"))}, **arguments)


def test_nothing_to_compare_is_no_certificate():
    model = nn.Linear(3, 2)
    with pytest.raises(CertificateError, match="nothing can be compared"):
        certify(
            model,
            {"x": torch.zeros(2, 3)},
            per_sample_loss=lambda m, b: 0 * m(b["x"]).sum(1),
            clipping=AutomaticClipping(),
        )
    with pytest.raises(CertificateError, match="too few"):
        certify(
            model,
            {"x": torch.ones(1, 3)},
            per_sample_loss=lambda m, b: m(b["x"]).sum(1),
            clipping=AutomaticClipping(),
        )


class _Layout(nn.Module):
    """A plain layer, and a second branch whose rows are not sample-major; it may start behind a zero."""

    def __init__(self, branch, down):
        super().__init__()
        self.layer, self.up = nn.Linear(4, 4), nn.Linear(4, 4)
        self.down = nn.Parameter(torch.full((4,), float(down)))
        self.branch = branch

    def forward(self, x):
        return self.layer(x) + self.down * self.branch(self, x)


LAYOUTS = {
    "positions first": lambda m, x: torch.tanh(m.up(torch.stack(x.unbind(), 1))).transpose(0, 1),
    "two views joined": lambda m, x: torch.tanh(m.up(torch.cat((x, x.sin())))).chunk(2)[1],
    "reversed rows": lambda m, x: torch.tanh(m.up(x.flip(0))).flip(0),
    "a constant table": lambda m, x: x * torch.tanh(m.up(_TABLE)),
    "one sample at a time": lambda m, x: torch.stack([torch.tanh(m.up(row)) for row in x]),
    "the batch's mean": lambda m, x: torch.tanh(m.up(x)) - x.mean(0),
}
_TABLE = torch.randn(8, 4)


@pytest.mark.parametrize("down", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("name", LAYOUTS)
def test_foreign_layouts_are_refused_however_small_their_share(name, down):
    torch.manual_seed(0)
    model = _Layout(LAYOUTS[name], down)
    with pytest.raises(CertificateError, match="neighbours"):
        certify(
            model,
            {"x": torch.randn(4, 8, 4)},
            per_sample_loss=lambda m, b: m(b["x"]).pow(2).sum((1, 2)),
            clipping=AutomaticClipping(),
        )
    assert (model.down == down).all()


def test_padding_is_cut_only_where_its_meaning_is_known():
    mask = torch.tensor([[1, 1, 0]])
    ids = torch.tensor([[5, 6, 0]])
    cut = without_padding({"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([[5, 6, -100]])})
    assert [v.shape for v in cut.values()] == [(1, 2)] * 3
    in_step = {"input_features": torch.zeros(1, 4, 24)}
    under_padding = {"start_positions": torch.tensor([0]), "end_positions": torch.tensor([2])}
    for extra in (
        {"labels": torch.tensor([[5, 6, 7]])},
        {"speeds": torch.zeros(1, 3)},
        in_step,
        under_padding,
    ):
        whole = {"input_ids": ids, "attention_mask": mask, **extra}
        assert without_padding(whole)["input_ids"].shape == (1, 3)


def test_sound_with_a_length_of_its_own_stays_and_the_text_is_cut():
    sample = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    for sound in (
        {"input_features": torch.zeros(1, 4, 25)},
        {"input_features": torch.zeros(1, 4, 24), "input_features_mask": torch.ones(1, 24)},
    ):
        cut = without_padding({**sample, **sound})
        assert cut["input_ids"].tolist() == [[5, 6]]
        assert cut["input_features"].shape == sound["input_features"].shape


@pytest.mark.parametrize(("name", "shape"), [("input_values", (1, 3)), ("input_features", (1, 3, 5))])
def test_sound_is_cut_with_its_mask(name, shape):
    sample = {
        name: torch.ones(shape),
        "attention_mask": torch.tensor([[1, 1, 0]]),
        "labels": torch.ones(1, 7),
    }
    cut = without_padding(sample)
    assert cut[name].shape == (1, 2, *shape[2:])
    assert cut["labels"].shape == (1, 7)


class _Hearing(nn.Module):
    """Sound through a convolution, normalized over time or not, and averaged over its own frames."""

    def __init__(self, *, over_time):
        super().__init__()
        self.convolution, self.norm = nn.Conv1d(1, 4, 3), nn.GroupNorm(4, 4) if over_time else nn.Identity()

    def forward(self, input_values, attention_mask):
        hidden = self.norm(self.convolution(input_values[:, None])).square()
        frames = attention_mask[:, None, 2:]
        return (hidden * frames).sum((1, 2)) / frames.sum((1, 2))


@pytest.mark.parametrize("over_time", [False, True])
def test_sound_normalized_over_its_padding_is_refused(over_time):
    mask = (torch.arange(20) < torch.tensor([20, 11, 14, 8])[:, None]).long()
    batch = {"input_values": torch.randn(4, 20) * mask, "attention_mask": mask}
    expected = pytest.raises(CertificateError, match="padding") if over_time else contextlib.nullcontext()
    with expected:
        certify(
            _Hearing(over_time=over_time),
            batch,
            per_sample_loss=lambda m, b: m(**b),
            clipping=FlatClipping(1.0),
        )


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_positions_are_counted_anew_without_padding(shape):
    sample = {
        "input_ids": torch.tensor([[0, 0, 5, 6, 7]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1]]),
        "start_positions": torch.full(shape, 2),
        "end_positions": torch.full(shape, 4),
    }
    cut = without_padding(sample)
    assert cut["input_ids"].tolist() == [[5, 6, 7]]
    assert cut["start_positions"].tolist() == torch.full(shape, 0).tolist()
    assert cut["end_positions"].tolist() == torch.full(shape, 2).tolist()


def _swin_with_drop_path():
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4,
        num_labels=3, drop_path_rate=0.5,
    )  # fmt: skip
    batch = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.tensor([0, 1, 2, 1])}
    return transformers.SwinForImageClassification(config), batch


def _wav2vec2_with_masking_and_dropped_layers():
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, conv_dim=(8, 8),
        conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        num_feat_extract_layers=2, feat_extract_norm="layer", layerdrop=0.5, mask_time_prob=0.5,
        mask_time_length=2, vocab_size=12, ctc_loss_reduction="mean",
    )  # fmt: skip
    batch = {
        "input_values": torch.randn(4, 600),
        "attention_mask": torch.ones(4, 600, dtype=torch.long),
        "labels": torch.randint(1, 12, (4, 3)),
    }
    return transformers.Wav2Vec2ForCTC(config), batch


@pytest.mark.parametrize("build", [_swin_with_drop_path, _wav2vec2_with_masking_and_dropped_layers])
def test_paths_and_layers_dropped_by_chance_are_no_coupling(build):
    torch.manual_seed(0)
    model, batch = build()
    settings = {name: value for name, value in vars(model.config).items() if not name.startswith("_")}
    certify(model.train(), batch, per_sample_loss=per_sample_loss_for(model), clipping=AutomaticClipping())
    assert {name: getattr(model.config, name) for name in settings} == settings
    paths = [m.drop_prob for m in model.modules() if type(m).__name__.endswith("DropPath")]
    assert not paths or max(paths) == 0.5
