"""Writes a classification as text infilling: a template with one mask, and a word for each class.

Guarantee: a prepared sample holds the tokenizer's mask exactly once, its own
special tokens and every token of the template, whatever the texts and however
short the limit; only the texts are cut. Each sample comes from its own row alone.

Source: Gao, Fisch, Chen 2021 (arXiv 2012.15723) for the templates; Li et al.
2021 (arXiv 2110.05679) for these words and for using them in private fine-tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dp_trainer.errors import ConfigurationError
from dp_trainer.tasks.base import Dataset, PreparedSplit, Tokenizer
from dp_trainer.tasks.names import quoted


def whole(text: str) -> str:
    """Returns the text as it is."""
    return text


def without_last_character(text: str) -> str:
    """Drops the mark that ends a sentence, which the template replaces by its own."""
    return text[:-1]


def continued(text: str) -> str:
    """Lets the text go on after a comma: a space before it, its first letter small."""
    return f" {text[:1].lower()}{text[1:]}"


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A place in a template that a row's text fills.

    Attributes:
        column: The column of the text, whose outer whitespace is dropped.
        change: How the text is fitted in.
    """

    column: str
    change: Callable[[str], str] = whole


@dataclass(frozen=True, kw_only=True)
class Infilling:
    """A template around one mask, and the words that answer it.

    Attributes:
        before: Slots and fixed texts before the mask; texts carry their own leading space.
        after: The same after the mask.
        words: One a class, in the order of their ids; each is used with a space before it.
    """

    before: tuple[str | Slot, ...]
    after: tuple[str | Slot, ...]
    words: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of text that the template takes, in its order."""
        return tuple(part.column for part in (*self.before, *self.after) if isinstance(part, Slot))


# "{sentence} It was <mask>."
SENTIMENT_INFILLING = Infilling(
    before=(Slot(column="sentence"), " It was"), after=(".",), words=("terrible", "great")
)


def label_word_ids(words: Sequence[str], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the token of each word as it stands inside a text, with a space before it.

    Raises:
        ConfigurationError: If a word is not one token of its own, or the tokenizer has no mask.
    """
    name = _name_of(tokenizer)
    if tokenizer.mask_token_id is None:
        raise ConfigurationError(
            f"head=label_words: {name} has no mask token. Use an encoder that was pretrained with one, "
            "such as RoBERTa or BERT, or set head: classification."
        )
    found: dict[int, str] = {}
    for word in words:
        ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            tokens = quoted(tokenizer.convert_ids_to_tokens(ids))
            raise ConfigurationError(
                f"head=label_words: '{word}' must be one token, and {name} makes it {tokens}. "
                "Use a model whose vocabulary has the word, or set head: classification."
            )
        if ids[0] in found:
            raise ConfigurationError(
                f"head=label_words: {name} makes the same token of '{found[ids[0]]}' and '{word}'. "
                "Use a model that tells them apart, or set head: classification."
            )
        found[ids[0]] = word
    return tuple(found)


def prepare_infilling(
    rows: Dataset,
    tokenizer: Tokenizer,
    max_length: int,
    *,
    infilling: Infilling,
    label_column: str,
    name: str,
) -> PreparedSplit:
    """Fills every row's texts into the template, cut so that all of it fits.

    Args:
        rows: Rows whose texts and labels have been checked.
        tokenizer: The model's; it must have a mask token.
        max_length: Longest sample in tokens, template and special tokens included.
        infilling: The template.
        label_column: The column of class ids.
        name: The task's, for the progress bar and messages.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, the class ids.

    Raises:
        ConfigurationError: If the words do not fit the tokenizer or the template alone fills ``max_length``.
    """
    label_word_ids(infilling.words, tokenizer)
    template = _Template(infilling, tokenizer)
    room = max_length - template.fixed_length
    if room < len(infilling.columns):
        raise ConfigurationError(
            f"max_length={max_length}: the template of task '{name}' takes {template.fixed_length} tokens itself. "
            f"Set it to at least {template.fixed_length + len(infilling.columns)}."
        )

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = [batch[column] for column in infilling.columns]
        ids = template.fill(texts, room)
        return {
            "input_ids": ids,
            "attention_mask": [[1] * len(sample) for sample in ids],
            "labels": batch[label_column],
        }

    read = [*infilling.columns, label_column]
    dataset = rows.map(encode, batched=True, remove_columns=read, desc=f"Tokenising {name}")
    return PreparedSplit(dataset=dataset)


def shortened(lengths: Sequence[int], room: int) -> list[int]:
    """Returns how much of each text stays so that their sum is within ``room``: the longest gives first."""
    kept = list(lengths)
    while sum(kept) > room:
        # Of two that are equally long the later one.
        longest = max(range(len(kept)), key=lambda i: (kept[i], i))
        kept[longest] -= 1
    return kept


class _Template:
    """A template in tokens: fixed pieces, and slots that texts fill."""

    def __init__(self, infilling: Infilling, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._mask: int = tokenizer.mask_token_id
        start, end = self._special_tokens()
        self._parts: list[list[int] | Slot] = [
            start,
            *(self._part(part) for part in infilling.before),
            [self._mask],
            *(self._part(part) for part in infilling.after),
            end,
        ]
        self.fixed_length = sum(len(part) for part in self._parts if not isinstance(part, Slot))

    def _part(self, part: str | Slot) -> list[int] | Slot:
        return part if isinstance(part, Slot) else self._ids([part])[0]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        encoded = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        # A text may spell the mask out; the template's must stay the only one.
        return [[token for token in ids if token != self._mask] for ids in encoded]

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """What the tokenizer itself puts before and after one text."""
        around = self._tokenizer(self._tokenizer.mask_token)["input_ids"]
        if around.count(self._mask) != 1:
            raise ConfigurationError(
                f"head=label_words: {_name_of(self._tokenizer)} does not read its own mask "
                f"'{self._tokenizer.mask_token}' as one token. Add it to the tokenizer's special tokens."
            )
        place = around.index(self._mask)
        # Some tokenizers put a token for a space beside the mask, too.
        special = set(self._tokenizer.all_special_ids)
        return [i for i in around[:place] if i in special], [i for i in around[place + 1 :] if i in special]

    def fill(self, texts: Sequence[Sequence[str]], room: int) -> list[list[int]]:
        """Returns each row's token ids; ``texts`` holds one list a slot, in the template's order."""
        slots = [part for part in self._parts if isinstance(part, Slot)]
        filled = [
            self._ids([slot.change(text.strip()) for text in column])
            for slot, column in zip(slots, texts, strict=True)
        ]
        return [self._assembled(row, room) for row in zip(*filled, strict=True)]

    def _assembled(self, row: Sequence[list[int]], room: int) -> list[int]:
        lengths = shortened([min(len(ids), room) for ids in row], room)
        pieces = iter([ids[:length] for ids, length in zip(row, lengths, strict=True)])
        parts = [next(pieces) if isinstance(part, Slot) else part for part in self._parts]
        return [token for part in parts for token in part]


def _name_of(tokenizer: Tokenizer) -> str:
    return f"{type(tokenizer).__name__} '{tokenizer.name_or_path}'"
