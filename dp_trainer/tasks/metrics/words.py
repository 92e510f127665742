"""How texts are cut into words, in the two ways that the E2E challenge's scorer does it.

Both lower the case. BLEU and NIST see punctuation as words of its own; METEOR,
ROUGE-L and CIDEr do not see it at all.

Source: the README and scripts of github.com/tuetschek/e2e-metrics, which runs
NIST's mteval-v13a for BLEU and NIST, and github.com/tylin/coco-caption for the others.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache

from nltk.tokenize import NLTKWordTokenizer
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

NGram = tuple[str, ...]

_mteval = Tokenizer13a()
_treebank = NLTKWordTokenizer()
# coco-caption's list of what is no word: quotes, brackets by their Treebank names, marks and dashes.
_PUNCTUATION = frozenset(
    [
        *("''", "'", "``", "`", '"', "(", ")", "{", "}", "-lrb-", "-rrb-", "-lcb-", "-rcb-"),
        *(".", "?", "!", ",", ":", "-", "--", "...", ";"),
    ]
)
_CURRENCY = re.compile("([£€$])")
# A full stop stays on a word in nltk's tokenizer, after it unless the text ends there, and before it.
_FULL_STOP = re.compile(r"(?<=[^\s.])\.(?=\s|$)|(?<!\S)\.(?=[A-Za-z])")


@lru_cache(maxsize=2**16)
def mteval_words(text: str) -> tuple[str, ...]:
    """Returns the lowercased words of mteval-v13a's tokenization, punctuation among them."""
    return tuple(_mteval(text.lower()).split())


@lru_cache(maxsize=2**16)
def caption_words(text: str) -> tuple[str, ...]:
    """Returns lowercased Penn Treebank words without punctuation, as coco-caption has them.

    Its tokenizer is a Java program (Stanford CoreNLP 3.4.1); this one is nltk's, which
    follows the same treebank. On the samples that tests hold against the challenge's
    scorer both give the same scores; they may differ on abbreviations with full stops.
    """
    spaced = _FULL_STOP.sub(" . ", _CURRENCY.sub(r" \1 ", text))
    return tuple(word.lower() for word in _treebank.tokenize(spaced) if word.lower() not in _PUNCTUATION)


def ngram_counts(words: tuple[str, ...], length: int) -> Counter[NGram]:
    """Returns how often each sequence of ``length`` words occurs; empty for a shorter text."""
    return Counter(zip(*(words[start:] for start in range(length)), strict=False))
