import math

import datasets
import numpy as np
import pytest
import torch
from transformers import EvalPrediction, GPT2Config, GPT2LMHeadModel

from dp_trainer.errors import ConfigurationError
from dp_trainer.tasks import TASKS
from dp_trainer.tasks.base import refuse_empty
from dp_trainer.tasks.e2e import SEPARATOR, encode_pairs, perplexity, prepare, token_losses

MEANING, REFERENCE = "name[Blue Spice], area[riverside]", "Blue Spice is by the river."
ROWS = datasets.Dataset.from_list(
    [
        {"meaning_representation": MEANING, "human_reference": REFERENCE},
        {"meaning_representation": MEANING, "human_reference": "Blue Spice."},
    ]
)


def encode(meaning, reference, tokenizer):
    return {name: values[0] for name, values in encode_pairs([meaning], [reference], tokenizer).items()}


def test_only_reference_and_end_carry_labels(byte_tokenizer):
    sample = encode(MEANING, REFERENCE, byte_tokenizer)
    ids, labels = sample["input_ids"], sample["labels"]
    border = len(MEANING + SEPARATOR)
    assert byte_tokenizer.decode(ids[:border]) == MEANING + SEPARATOR
    assert labels[:border] == [-100] * border
    assert labels[border:] == ids[border:]
    assert byte_tokenizer.decode(labels[border:-1]) == " " + REFERENCE
    assert labels[-1] == byte_tokenizer.eos_token_id
    assert len(sample["attention_mask"]) == len(ids)


def test_long_rows_are_dropped_and_counted(byte_tokenizer):
    length = len(encode(MEANING, "Blue Spice.", byte_tokenizer)["input_ids"])
    split = prepare(ROWS, byte_tokenizer, length)
    assert (len(split.dataset), split.dropped) == (1, 1)
    assert prepare(ROWS, byte_tokenizer, length - 1).dropped == 2
    assert prepare(ROWS, byte_tokenizer, 1000).dropped == 0


def test_a_split_without_short_rows_is_refused(byte_tokenizer):
    with pytest.raises(ConfigurationError, match="split 'train': all 2 rows are longer than max_length=5"):
        refuse_empty({"train": prepare(ROWS, byte_tokenizer, 5)}, max_length=5)


def test_a_tokenizer_without_end_is_refused(word_tokenizer):
    with pytest.raises(ConfigurationError, match="no end-of-sequence token"):
        prepare(ROWS, word_tokenizer, 100)


def test_perplexity_is_that_of_all_target_tokens(byte_tokenizer):
    """Slow twin: one sample at a time, the model's own loss weighted by its number of targets."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=257, n_positions=128, n_embd=16, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    train = prepare(ROWS, byte_tokenizer, 128).dataset
    samples = [train[i] for i in range(2)]
    loss = tokens = 0.0
    with torch.no_grad():
        for sample in samples:
            count = sum(label != -100 for label in sample["labels"])
            loss += count * model(**{k: torch.tensor([v]) for k, v in sample.items()}).loss.item()
            tokens += count
        batch = TASKS["e2e"].collator(byte_tokenizer)(samples)
        assert batch["labels"][1, -1] == -100  # the shorter sample is padded, without a label
        reduced = token_losses(model(**batch).logits, batch["labels"])
    metrics = perplexity(EvalPrediction(predictions=reduced.numpy(), label_ids=np.zeros(2)))
    assert metrics["token_loss"] == pytest.approx(loss / tokens, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-4)
    # Averaging the two samples' means would be another number: the check can fail.
    assert metrics["token_loss"] != pytest.approx((reduced[:, 0] / reduced[:, 1]).mean().item(), rel=1e-5)


def test_a_diverged_model_has_infinite_perplexity():
    prediction = EvalPrediction(predictions=np.array([[1e6, 10.0]]), label_ids=np.zeros(1))
    assert perplexity(prediction)["perplexity"] == math.inf


def test_missing_text_is_refused(byte_tokenizer):
    rows = datasets.Dataset.from_list([{"meaning_representation": MEANING, "human_reference": None}])
    with pytest.raises(ConfigurationError, match="row 0, column 'human_reference': not a text"):
        prepare(rows, byte_tokenizer, 100)
