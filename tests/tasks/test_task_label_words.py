"""Text infilling: templates, words, and the exactness of what a model answers at its mask."""

import datasets
import pytest
import reference
import torch
import torch.nn.functional as F
from toys import (
    COLUMNS,
    SHARED,
    WORDS,
    bert_like_tokenizer,
    masked_model,
    roberta_like_tokenizer,
    rows_of,
)
from transformers import (
    AddedToken,
    BertForMaskedLM,
    RobertaTokenizerFast,
    Trainer,
    TrainingArguments,
)

from dp_trainer import DPTrainer, FlatClipping, PrivacyArguments, clipped_gradient_sum
from dp_trainer.batches import select
from dp_trainer.errors import ConfigurationError
from dp_trainer.losses import custom_loss
from dp_trainer.tasks import find_task
from dp_trainer.tasks.arguments import ModelArguments
from dp_trainer.tasks.infilling import label_word_ids, shortened
from dp_trainer.tasks.label_words import answer_at_mask, class_losses
from dp_trainer.tasks.models import load_model, load_tokenizer

TOKENIZERS = {"roberta": roberta_like_tokenizer, "bert": bert_like_tokenizer}
TEXTS = {
    "sst2": {"sentence": " A fine film. "},
    "sentiment": {"sentence": "A fine film."},
    "mnli": {"premise": "Men sleep.", "hypothesis": "They Rest."},
    "qnli": {"question": "Who sleeps?", "sentence": "Men sleep."},
    "qqp": {"question1": "Who sleeps?", "question2": "Who Rests?"},
}
FILLED = {
    "sst2": "<s>A fine film. It was<mask>.</s>",
    "sentiment": "<s>A fine film. It was<mask>.</s>",
    "mnli": "<s>Men sleep?<mask>, they Rest.</s>",
    "qnli": "<s>Who sleeps?<mask>, men sleep.</s>",
    "qqp": "<s>Who sleeps?<mask>, who Rests?</s>",
}


def prepared(name, rows, tokenizer, length=64):
    return (
        find_task(name, head="label_words")
        .prepare(datasets.Dataset.from_list(rows), tokenizer, length)
        .dataset
    )


def real_roberta_tokenizer():
    folder = SHARED / "tokenizers" / "roberta-base"
    if not folder.is_dir():
        pytest.skip("the shared tokenizers are not here")
    return RobertaTokenizerFast(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        mask_token=AddedToken("<mask>", lstrip=True),
    )


@pytest.mark.parametrize("make", [roberta_like_tokenizer, real_roberta_tokenizer])
@pytest.mark.parametrize("name", FILLED)
def test_the_templates_are_those_of_the_source(name, make):
    tokenizer = make()
    sample = prepared(name, [{**TEXTS[name], "label": 1}], tokenizer)[0]
    assert tokenizer.decode(sample["input_ids"]) == FILLED[name]
    assert sample["attention_mask"] == [1] * len(sample["input_ids"])
    assert sample["labels"] == 1
    assert sample["input_ids"] == tokenizer(FILLED[name][3:-4])["input_ids"]


@pytest.mark.parametrize("name", FILLED)
def test_berts_template_has_berts_special_tokens(name):
    tokenizer = bert_like_tokenizer()
    ids = prepared(name, [{**TEXTS[name], "label": 0}], tokenizer)[0]["input_ids"]
    text = FILLED[name][3:-4].replace("<mask>", "[MASK]")
    assert ids == tokenizer(text)["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)


@pytest.mark.parametrize("make", [roberta_like_tokenizer, bert_like_tokenizer, real_roberta_tokenizer])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sst2", ["terrible", "great"]),
        ("sentiment", ["terrible", "great"]),
        # In the order of GLUE's ids: entailment, neutral, contradiction.
        ("mnli", ["yes", "maybe", "no"]),
        ("qnli", ["yes", "no"]),
        ("qqp", ["no", "yes"]),
    ],
)
def test_the_classes_have_these_words(tmp_path, name, words, make):
    tokenizer = make()
    kind = "bert" if make is bert_like_tokenizer else "roberta"
    model = masked_model(kind, tokenizer).eval()
    sample = prepared(name, [{**TEXTS[name], "label": 0}], tokenizer)[0]
    ids = torch.tensor([sample["input_ids"]])
    place = sample["input_ids"].index(tokenizer.mask_token_id)
    with torch.no_grad():
        logits = model(ids).logits[0, place]
        find_task(name, head="label_words").adapt_model(model, tokenizer)
        answers = model(ids).logits
    expected = logits[[tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in words]]
    assert len(set(expected.tolist())) == len(words)
    torch.testing.assert_close(answers, expected[None])


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("name", FILLED)
def test_long_texts_are_cut_and_the_template_never(name, make):
    tokenizer = make()
    row = dict.fromkeys(COLUMNS[name], "very long words " * 30) | {"label": 0}
    short = dict.fromkeys(COLUMNS[name], ".") | {"label": 0}
    frame = prepared(name, [dict.fromkeys(COLUMNS[name], "") | {"label": 0}], tokenizer)[0]["input_ids"]
    for length in (len(frame) + len(COLUMNS[name]), 24, 40):
        for ids in prepared(name, [row], tokenizer, length)["input_ids"]:
            assert len(ids) == length
            assert ids.count(tokenizer.mask_token_id) == 1
            left = iter(ids)
            assert all(token in left for token in frame), "a token of the template is lost"
    whole = prepared(name, [short], tokenizer, 24)["input_ids"][0]
    assert len(whole) <= 24


def test_a_limit_that_the_template_fills_alone_is_refused():
    with pytest.raises(
        ConfigurationError, match=r"max_length=6: the template of task 'mnli' takes 5 .* at least 7"
    ):
        prepared("mnli", rows_of("mnli", 2), bert_like_tokenizer(), 6)
    assert len(prepared("mnli", rows_of("mnli", 2), bert_like_tokenizer(), 7)) == 2


@pytest.mark.parametrize(
    ("lengths", "room", "kept"),
    [((3, 4), 7, [3, 4]), ((3, 9), 7, [3, 4]), ((9, 3), 7, [4, 3]), ((9, 9), 7, [4, 3]), ((5,), 2, [2]), ((0, 9), 3, [0, 3])],
)  # fmt: skip
def test_the_longest_text_gives_first(lengths, room, kept):
    assert shortened(lengths, room) == kept


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_mask_spelt_out_in_a_text_is_left_out(make):
    tokenizer = make()
    mask = tokenizer.mask_token
    rows = [{"sentence": f"it {mask} was {mask}", "label": 0}, {"sentence": mask, "label": 0}]
    for ids in prepared("sst2", rows, tokenizer)["input_ids"]:
        assert ids.count(tokenizer.mask_token_id) == 1
        assert tokenizer.decode(ids[ids.index(tokenizer.mask_token_id) + 1 :]).strip().startswith(".")


def test_each_word_must_be_one_token_of_its_own():
    lacking = bert_like_tokenizer(words=("terrible", "great", "yes", "no"))
    with pytest.raises(
        ConfigurationError, match=r"'maybe' must be one token, and \S+ '' makes it 'm', '##a'"
    ):
        prepared("mnli", rows_of("mnli", 2), lacking)
    with pytest.raises(ConfigurationError, match="the same token of 'yes' and 'Yes'"):
        label_word_ids(("yes", "Yes"), lacking)
    with pytest.raises(ConfigurationError, match=r"'☃' must be one token, and .* makes it '\[UNK\]'"):
        label_word_ids(("☃",), lacking)
    assert len(set(label_word_ids(WORDS, roberta_like_tokenizer()))) == len(WORDS)


def test_a_tokenizer_without_mask_is_refused(byte_tokenizer):
    with pytest.raises(ConfigurationError, match=r"has no mask token.*head: classification"):
        prepared("sst2", rows_of("sst2", 2), byte_tokenizer)


def adapted(kind, name="mnli", count=5):
    """A model in float64 that answers with label words, and a micro-batch of unequal lengths."""
    tokenizer = TOKENIZERS[kind]()
    task = find_task(name, head="label_words")
    model = masked_model(kind, tokenizer).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    task.adapt_model(model, tokenizer)
    split = prepared(name, rows_of(name, count, classes=len(task.labels)), tokenizer)
    micro_batch = dict(task.collator(tokenizer)([split[i] for i in range(count)]))
    assert len(set(micro_batch["attention_mask"].sum(1).tolist())) > 2
    return model, micro_batch, task, tokenizer


def plain_losses(model, micro_batch, tokenizer, task):
    """Slow twin: the whole vocabulary at all positions, by a model without hooks, a sample at a time."""
    twin = type(model)(model.config).double()
    twin.load_state_dict(model.state_dict())
    words = label_word_ids({"mnli": ("yes", "maybe", "no")}[task.name], tokenizer)
    losses = []
    for ids, mask, label in zip(
        *(micro_batch[key] for key in ("input_ids", "attention_mask", "labels")), strict=True
    ):
        logits = twin(ids[mask == 1][None]).logits[0]
        place = ids.tolist().index(tokenizer.mask_token_id)
        losses.append(F.cross_entropy(logits[place, list(words)][None], label[None]))
    return twin, torch.stack(losses)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_losses_and_gradients_are_those_of_the_whole_model(kind):
    model, micro_batch, task, tokenizer = adapted(kind)
    losses = custom_loss(task.loss_function(label_smoothing=0.0))(model, micro_batch)
    twin, expected = plain_losses(model, micro_batch, tokenizer, task)
    torch.testing.assert_close(losses, expected)
    losses.sum().backward()
    expected.sum().backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    theirs = {name: p.grad for name, p in twin.named_parameters()}
    assert reference.distance(ours, theirs) < 1e-12


@pytest.mark.parametrize("strategy", ["book_keeping", "two_pass", "direct", "loop"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_norms_and_clipped_sum_agree_with_one_sample_at_a_time(kind, strategy):
    model, micro_batch, task, _ = adapted(kind)
    table = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is table
    loss = custom_loss(task.loss_function(label_smoothing=0.0))
    expected = reference.per_sample_gradients(model, micro_batch, loss)
    norms = reference.norms(expected)
    # The tied table is used twice by every sample: neither use may be missing.
    name = next(name for name, p in model.named_parameters() if p is table)
    assert all(sample[name].abs().sum(1).count_nonzero() > 3 for sample in expected)
    clipping = FlatClipping(float(norms.median()) * 1.01)
    pieces = [select(micro_batch, [0, 1, 2]), select(micro_batch, [3, 4])]
    actual = clipped_gradient_sum(model, pieces, per_sample_loss=loss, clipping=clipping, strategy=strategy)
    torch.testing.assert_close(actual.norms.double(), norms, rtol=1e-10, atol=0)
    assert 0 < int((actual.factors < 0.999).sum()) < len(expected)
    assert reference.distance(actual.gradients, reference.clipped_sum(expected, actual.factors)) < 1e-10


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_head_runs_at_the_mask_alone(kind):
    model, micro_batch, _, _ = adapted(kind)
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape))
    inputs = {key: value for key, value in micro_batch.items() if key != "labels"}
    assert model(**inputs).logits.shape == (5, 3)
    assert seen == [(5, 1, 8)]


def test_the_models_own_answers_come_back():
    tokenizer = bert_like_tokenizer()
    model = masked_model("bert", tokenizer).eval()
    ids = torch.tensor([tokenizer("it was [MASK].")["input_ids"]])
    with torch.no_grad():
        own = model(ids).logits
        words = {"mask_token_id": tokenizer.mask_token_id, "word_ids": (5, 7)}
        with answer_at_mask(model, **words):
            place = ids[0].tolist().index(tokenizer.mask_token_id)
            torch.testing.assert_close(model(ids).logits, own[:, place, [5, 7]])
            torch.testing.assert_close(model(ids, return_dict=False)[0], own[:, place, [5, 7]])
        torch.testing.assert_close(model(ids).logits, own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b, t: {**b, "labels": b["labels"]}, "Pass compute_loss_func"),
        (lambda b, t: {"input_ids": torch.full((2, 3), t.mask_token_id)}, r"have \[3, 3\]"),
        (lambda b, t: {"input_ids": torch.ones(2, 3, dtype=torch.long)}, r"have \[0, 0\]"),
        (lambda b, t: {"inputs_embeds": torch.zeros(2, 3, 8).double()}, "without input_ids"),
    ],
    ids=["labels", "three masks", "no mask", "no ids"],
)
def test_wrong_calls_are_refused(change, message):
    model, micro_batch, _, tokenizer = adapted("bert")
    with pytest.raises(ConfigurationError, match=message):
        model(**change(micro_batch, tokenizer))


def test_losses_of_another_shape_are_refused():
    losses = class_losses(0.0)
    for logits, labels in [((2, 3, 9), (2,)), ((2, 3), (2, 1)), ((2, 3), (3,))]:
        with pytest.raises(ConfigurationError, match="answer_at_mask"):
            losses({"logits": torch.zeros(logits)}, torch.zeros(labels, dtype=torch.long))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_one_loss_function_serves_both_trainers(smoothing):
    logits, labels = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    losses = class_losses(smoothing)
    expected = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(losses({"logits": logits}, labels), expected)
    total = losses({"logits": logits}, labels, num_items_in_batch=torch.tensor(8))
    torch.testing.assert_close(total, expected.sum() / 8)


def arguments(tmp_path, **settings):
    return TrainingArguments(
        output_dir=str(tmp_path / "out"), use_cpu=True, report_to=[], save_strategy="no", dataloader_pin_memory=False,
        per_device_train_batch_size=4, max_steps=2, learning_rate=0.1, disable_tqdm=True, optim="sgd", **settings,
    )  # fmt: skip


def trained(tmp_path, trainer_class, **settings):
    model, _, task, tokenizer = adapted("bert", count=8)
    before = model.bert.embeddings.word_embeddings.weight.detach().clone()
    split = prepared("mnli", rows_of("mnli", 8, classes=3), tokenizer)
    trainer = trainer_class(
        model=model,
        args=arguments(tmp_path),
        train_dataset=split,
        eval_dataset=split,
        data_collator=task.collator(tokenizer),
        compute_loss_func=task.loss_function(label_smoothing=0.0),
        compute_metrics=task.compute_metrics,
        **settings,
    )
    trainer.train()
    return trainer, before


def test_a_private_run_certifies_and_trains_both_uses_of_the_tied_table(tmp_path):
    privacy = PrivacyArguments(noise_multiplier=1.0, target_delta=1e-3)
    trainer, before = trained(tmp_path, DPTrainer, privacy=privacy)
    assert trainer.certificate is not None
    weight = trainer.model.bert.embeddings.word_embeddings.weight
    assert weight is trainer.model.get_output_embeddings().weight
    assert not weight.equal(before)
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] * 8 == round(metrics["eval_accuracy"] * 8)
    prediction = trainer.predict(trainer.eval_dataset)
    assert prediction.predictions.shape == (8, 3)


def test_the_plain_trainer_minimises_the_same_loss(tmp_path):
    trainer, _ = trained(tmp_path, Trainer)
    assert 0 < trainer.evaluate()["eval_loss"] < 3


# peft 0.21 asks transformers 5.23 by a deprecated name
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_answer_at_the_mask_too(tmp_path):
    pytest.importorskip("peft")
    tokenizer = bert_like_tokenizer()
    masked_model("bert", tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = ModelArguments(model_name_or_path=str(tmp_path / "model"), lora_rank=2, head="label_words")
    task = find_task("qnli", head=settings.head)
    model = load_model(task, settings, load_tokenizer(settings))
    assert isinstance(model.get_base_model(), BertForMaskedLM)
    assert {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    split = prepared("qnli", rows_of("qnli", 4), tokenizer)
    micro_batch = dict(task.collator(tokenizer)([split[i] for i in range(4)]))
    losses = custom_loss(task.loss_function(label_smoothing=0.0))(model, micro_batch)
    assert losses.shape == (4,)
    losses.sum().backward()
    assert any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lora_B" in n)


def test_a_model_without_a_body_is_refused():
    with pytest.raises(ConfigurationError, match="Linear: has no body"):
        answer_at_mask(torch.nn.Linear(2, 2), mask_token_id=4, word_ids=(5, 6))
