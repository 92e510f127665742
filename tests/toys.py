"""Tiny models, tokenizers and rows for the tests of tasks."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

SHARED = Path(__file__).parents[2] / "shared" / "data"
WORDS = ("terrible", "great", "yes", "maybe", "no")
TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
# Without dropout, a pass can be repeated and compared.
CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

CLASSES = ("cat", "dog", "eel")
COLUMNS = {
    "sst2": ("sentence",),
    "sentiment": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
}


def roberta_like_tokenizer():
    """RoBERTa's way with bytes, spaces and the mask; merged are the label words and their spaces alone."""
    specials = ("<s>", "<pad>", "</s>", "<unk>")
    pieces = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = []
    for word in (" It", " was", *(f" {word}" for word in WORDS)):
        left = "Ġ"
        for letter in word[1:]:
            if (left, letter) not in merges:
                merges.append((left, letter))
                pieces.append(left + letter)
            left += letter
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "<mask>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", vocabulary["</s>"]), ("<s>", vocabulary["<s>"]), add_prefix_space=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token=AddedToken("<mask>", lstrip=True),
    )


def bert_like_tokenizer(*, words=WORDS):
    """BERT's way: small letters, no spaces; unknown words are spelt in letters."""
    letters = "abcdefghijklmnopqrstuvwxyz?.,"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, "it", "was", *letters]
    pieces += [f"##{letter}" for letter in letters]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        pad_token="[PAD]",
        mask_token="[MASK]",
    )


def masked_model(kind, tokenizer):
    """A masked language model without dropout; its head is tied to the embeddings."""
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 80, **TINY, **CALM}
    if kind == "bert":
        return BertForMaskedLM(BertConfig(pad_token_id=tokenizer.pad_token_id, **sizes))
    return RobertaForMaskedLM(RobertaConfig(pad_token_id=tokenizer.pad_token_id, **sizes))


def rows_of(task, count, *, classes=2):
    """Rows with texts of unequal lengths and labels in turn."""
    texts = ["a film.", "Very, very good?", "It was so bad that it went on and on.", "No.", "Men Sleep."]
    return [
        {
            **{column: texts[(i + 2 * place) % len(texts)] for place, column in enumerate(COLUMNS[task])},
            "label": i % classes,
        }
        for i in range(count)
    ]


def write_rows(folder, split, rows):
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def draw(folder, split, *, count=4, classes=CLASSES, mode="RGB"):
    """Tiny pictures, bright in another channel for each class."""
    generator = np.random.default_rng(len(split))
    for place, name in enumerate(classes):
        (folder / split / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 120, (6 + i, 9, 3), dtype=np.uint8)
            pixels[..., place % 3] += 120
            Image.fromarray(pixels).convert(mode).save(folder / split / name / f"{i}.png")
