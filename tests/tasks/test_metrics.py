"""Metrics of generated text: against other implementations, against numbers worked by hand, at the edges."""

import gzip
import json
import math
import socket
from importlib.resources import files
from types import SimpleNamespace

import evaluate
import nltk.corpus
import pytest
import sacrebleu
from nltk.translate.meteor_score import meteor_score
from nltk.translate.nist_score import corpus_nist
from rouge_score.rouge_scorer import RougeScorer

from dp_trainer.errors import ConfigurationError
from dp_trainer.tasks import metrics
from dp_trainer.tasks.metrics import METRICS, MetricUnavailableError, generation_metrics
from dp_trainer.tasks.metrics.cider import sample_scores
from dp_trainer.tasks.metrics.words import caption_words, mteval_words

# One, three and two references.
PREDICTIONS = [
    "The Blue Spice is a family-friendly pub near the river.",
    "Clowns serves cheap French food. It isn't child friendly",
    "Near Café Sicilia you find Cotto, for £20-25.",
]
REFERENCES = [
    ["Blue Spice is a pub near the river that is family-friendly."],
    [
        "Clowns has cheap French food.",
        "Cheap French food is served at Clowns, which is not child friendly!",
        "You get French food at Clowns. It isn't for children.",
    ],
    ["Cotto is near Café Sicilia.", "Find Cotto near Café Sicilia for £20-25, a cheap place to eat at."],
]
ALWAYS = set(METRICS) - {"meteor_nltk"}

# What the E2E challenge's own scorer said of single outputs for the test set: number of the meaning
# representation, output, BLEU, NIST, ROUGE-L, CIDEr. Their references number 2, 20, 1, 1, 37, 7 and 2.
# Source: github.com/tuetschek/e2e-eval, system_outputs/all/tnt/System 1/Primary-Sys1.segscores.tsv.
SCORED = [
    (0, "The city centre is a coffee shop called Blue Spice.", 0.5774, 3.9433, 0.5666, 4.1544),
    (13, "Blue Spice is a family friendly chinese pub near Rainbow Vegetarian Café in the riverside area.",
     0.9084, 6.1092, 0.8051, 3.0795),
    (9, "Blue Spice is a pub near Crowne Plaza Hotel with an average customer rating.",
     0.3735, 3.4063, 0.5483, 3.5541),
    (18, "Blue Spice is a non-family-friendly chinese restaurant in the city centre near Rainbow Vegetarian Café.",
     0.5569, 0.9960, 0.6049, 0.6522),
    (17, "Blue Spice is a family friendly english pub near Rainbow Vegetarian Café in the riverside area.",
     0.9457, 6.3687, 0.8772, 2.5383),
    (34, "With a low customer rating, Cocum is a coffee shop near Café Sicilia.", 0.5598, 3.8742, 0.6923, 4.1401),
    (36, "Near The Rice Boat is Cocum. It is a coffee shop.", 0.4250, 3.0874, 0.4803, 3.7094),
]  # fmt: skip


def score(name, predictions, references):
    return METRICS[name].score(predictions, references)


@pytest.fixture(scope="module")
def challenge():
    """References of the bundled E2E test set, by meaning representation in order of first appearance."""
    groups = {}
    path = files("dp_trainer.tasks").joinpath("data", "e2e_nlg", "test.jsonl.gz")
    for line in gzip.decompress(path.read_bytes()).decode().splitlines():
        row = json.loads(line)
        groups.setdefault(row["meaning_representation"], []).append(row["human_reference"])
    return list(groups.values())


@pytest.mark.parametrize(
    ("number", "output", "bleu", "nist", "rouge_l", "cider"), SCORED, ids=[str(row[0]) for row in SCORED]
)
def test_single_outputs_score_as_in_the_challenge(challenge, number, output, bleu, nist, rouge_l, cider):
    references = [challenge[number]]
    assert score("bleu", [output], references) == pytest.approx(100 * bleu, abs=5.1e-3)
    assert score("nist", [output], references) == pytest.approx(nist, abs=5.1e-5)
    assert score("rouge_l", [output], references) == pytest.approx(100 * rouge_l, abs=5.1e-3)


def test_cider_is_that_of_the_challenge(challenge):
    """Document frequencies are those of all 630 samples' references, whatever the other predictions are."""
    predictions = ["x"] * len(challenge)
    for number, output, *_ in SCORED:
        predictions[number] = output
    found = sample_scores(predictions, challenge)
    assert [found[row[0]] for row in SCORED] == pytest.approx([row[-1] for row in SCORED], abs=5.1e-5)


def test_bleu_is_sacrebleus():
    lower = [text.lower() for text in PREDICTIONS]
    most = max(map(len, REFERENCES))
    streams = [[texts[k].lower() if k < len(texts) else None for texts in REFERENCES] for k in range(most)]
    expected = sacrebleu.corpus_bleu(lower, streams).score
    assert 5 < expected < 95
    assert score("bleu", PREDICTIONS, REFERENCES) == pytest.approx(expected, rel=1e-12)
    assert score("bleu", [text.upper() for text in PREDICTIONS], REFERENCES) == pytest.approx(expected)


def test_nist_is_nltks_for_one_reference():
    """nltk counts several references in another way; with one, of five words or more, there is one way."""
    single = [texts[-1] for texts in REFERENCES]
    expected = corpus_nist(
        [[mteval_words(text)] for text in single], [mteval_words(text) for text in PREDICTIONS]
    )
    assert expected > 1
    assert score("nist", PREDICTIONS, [[text] for text in single]) == pytest.approx(expected, rel=1e-12)


def test_nist_by_hand_with_a_length_penalty():
    # References hold 3 words: a twice, b once. info(a) = log2 3/2, info(b) = log2 3/1, info(a b) = log2 2/1.
    # Of "a b": both words (mean 1.0849625), the one pair (1), nothing longer. Two words for three: penalty 1/2.
    assert score("nist", ["a b"], [["a b a"]]) == pytest.approx((1.0849625 + 1) / 2, abs=1e-6)


def test_nist_by_hand_with_two_references():
    # 4 words: a three times, b once. info(a) = log2 4/3, info(b) = 2, info(a a) = info(a b) = log2 3/1.
    # "a a b" has a twice as one reference does, and b from the other; both its pairs; lengths 3 and 2: no penalty.
    words, pairs = (2 * 0.4150375 + 2) / 3, (1.5849625 + 1.5849625) / 2
    assert score("nist", ["a a b"], [["a b", "a a"]]) == pytest.approx(words + pairs, abs=1e-6)


def test_rouge_l_f1_is_that_of_rouge_score():
    scorer = RougeScorer(["rougeL"])
    pairs = zip(PREDICTIONS, REFERENCES, strict=True)
    expected = [scorer.score_multi(texts, prediction)["rougeL"].fmeasure for prediction, texts in pairs]
    assert score("rouge_l_f1", PREDICTIONS, REFERENCES) == pytest.approx(100 * sum(expected) / 3)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        # P = 1, R = 2/5: (1 + 1.44) · 0.4 / (0.4 + 1.44).
        ("The cat", ["The cat sat here now."], 53.043478),
        # P = 1 from the second reference, R = 1 from the first.
        ("the cat sat", ["The cat!", "the cat sat on the mat all day"], 100.0),
        ("a dog", ["The cat"], 0.0),
    ],
)
def test_rouge_l_by_hand(prediction, references, expected):
    assert score("rouge_l", [prediction], [references]) == pytest.approx(expected, abs=1e-5)


def test_cider_by_hand():
    # "red" is in both samples and weighs nothing; every other n-gram weighs ln 2, which cancels.
    # n = 1: fox against fox, runs: 1/√2. n = 2: one pair of two shared: 1/2. n = 3: nothing. n = 4: none there.
    first, second = sample_scores(["red red fox", "dog"], [["red fox runs"], ["red cat"]])
    assert first == pytest.approx(10 * (1 / math.sqrt(2) + 1 / 2) / 4)
    assert second == 0


def test_cider_by_hand_with_repetition_length_and_two_references():
    # The threefold fox counts once: 1/3 against "fox", 1/(3·√2) against "fox runs"; nothing longer is shared.
    # Lengths in pairs: 2 against 0 and 1, so exp(−4/72) and exp(−1/72).
    found = sample_scores(["fox fox fox", "cat"], [["fox", "fox runs"], ["cat sleeps"]])
    assert found[0] == pytest.approx(0.6847135, abs=1e-6)
    assert score("cider", ["fox fox fox", "cat"], [["fox", "fox runs"], ["cat sleeps"]]) == pytest.approx(
        sum(found) / 2
    )


def test_cider_of_one_sample_is_refused_not_zero():
    with pytest.raises(MetricUnavailableError, match="undefined for one sample"):
        score("cider", ["a b c d"], [["a b c d"]])


class Synonyms:
    """A WordNet of one entry: cheap and bargain mean the same."""

    @staticmethod
    def ensure_loaded():
        pass

    @staticmethod
    def synsets(word):
        names = ("cheap", "bargain") if word in ("cheap", "bargain") else ()
        lemmas = [SimpleNamespace(name=lambda name=name: name) for name in names]
        return [SimpleNamespace(lemmas=lambda: lemmas)] if names else []


class Absent:
    @staticmethod
    def ensure_loaded():
        raise LookupError("Resource wordnet not found.")


def test_meteor_without_synonyms_is_nltks_with_an_empty_wordnet():
    nothing = SimpleNamespace(synsets=lambda word: [])
    expected = [
        meteor_score([caption_words(text) for text in texts], caption_words(prediction), wordnet=nothing)
        for prediction, texts in zip(PREDICTIONS, REFERENCES, strict=True)
    ]
    found = score("meteor_nltk_exact_stem", PREDICTIONS, REFERENCES)
    assert found == pytest.approx(sum(expected) / 3)
    # A stem matches: serving, served.
    assert score("meteor_nltk_exact_stem", ["serving food"], [["served food"]]) == pytest.approx(1 - 0.5 / 8)


def test_meteor_uses_wordnet(monkeypatch):
    monkeypatch.setattr(nltk.corpus, "wordnet", Synonyms)
    pair = (["bargain food"], [["cheap food"]])
    # Two words of two match, in one chunk: F = 1, less 0.5 · (1/2)³.
    assert score("meteor_nltk", *pair) == pytest.approx(1 - 0.5 / 8)
    assert score("meteor_nltk_exact_stem", *pair) == pytest.approx((1 / 2) * (1 - 0.5))
    assert set(generation_metrics(PREDICTIONS, REFERENCES)) == set(METRICS)


def test_meteor_without_wordnet_is_left_out_and_said(monkeypatch):
    said = []
    monkeypatch.setattr(nltk.corpus, "wordnet", Absent)
    monkeypatch.setattr(metrics, "logger", SimpleNamespace(warning_once=said.append))
    with pytest.raises(MetricUnavailableError, match=r"WordNet is not installed.*nltk.downloader wordnet"):
        score("meteor_nltk", PREDICTIONS, REFERENCES)
    found = generation_metrics(PREDICTIONS, REFERENCES)
    assert set(found) == ALWAYS
    assert found == {name: score(name, PREDICTIONS, REFERENCES) for name in ALWAYS}
    assert len(said) == 1
    assert "meteor_nltk" in said[0]


@pytest.fixture
def no_wordnet(monkeypatch):
    monkeypatch.setattr(nltk.corpus, "wordnet", Absent)


@pytest.mark.usefixtures("no_wordnet")
def test_perfect_predictions():
    texts = ["Blue Spice is a pub near the river.", "Clowns serves French food to adults."]
    found = generation_metrics(texts, [[text] for text in texts])
    assert [found[name] for name in ("bleu", "rouge_l", "rouge_l_f1")] == pytest.approx([100] * 3)
    assert found["cider"] == pytest.approx(10)
    # Only the penalty for one chunk is left: 8 and 6 words that match.
    expected = 1 - 0.5 * (8**-3 + 6**-3) / 2
    assert found["meteor_nltk_exact_stem"] == pytest.approx(expected)
    assert found["nist"] > score("nist", [texts[0], texts[0]], [[text] for text in texts])


@pytest.mark.usefixtures("no_wordnet")
@pytest.mark.parametrize("nothing", ["", "   ", "...", "zzz"])
def test_predictions_without_a_word_in_common_score_nothing(nothing):
    references = [["Blue Spice is a pub"], ["Clowns has food", "French food"]]
    assert generation_metrics([nothing, nothing], references) == dict.fromkeys(ALWAYS, 0.0)


@pytest.mark.usefixtures("no_wordnet")
def test_single_words_score_without_fault():
    found = generation_metrics(["Clowns", "pub"], [["Clowns is a pub."], ["It is a pub!", "Pub."]])
    assert set(found) == ALWAYS
    assert all(math.isfinite(value) and value >= 0 for value in found.values())
    assert found["rouge_l"] > 0
    assert found["nist"] > 0


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "there are none"),
        (["a"], [["a"], ["b"]], "2 lists for 1 predictions"),
        (["a", "b"], [["a"], []], "references of sample 1: none"),
        (["a", "b"], [["a"], ["b", " "]], "references of sample 1: an empty text"),
        (["a", "b"], ["a", "b"], "references of sample 0: not a list"),
        (["a", None], [["a"], ["b"]], "prediction 1: NoneType"),
    ],
)
def test_bad_shapes_are_refused(monkeypatch, name, predictions, references, message):
    monkeypatch.setattr(nltk.corpus, "wordnet", Synonyms)
    with pytest.raises(ConfigurationError, match=message):
        score(name, predictions, references)
    with pytest.raises(ConfigurationError, match=message):
        generation_metrics(predictions, references)


@pytest.mark.parametrize("name", METRICS)
def test_metrics_are_evaluates_and_need_no_network(name, monkeypatch, tmp_path):
    def refuse(*arguments):
        raise AssertionError("a metric asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))
    monkeypatch.setattr(nltk.corpus, "wordnet", Synonyms)
    metric = METRICS[name]()
    assert isinstance(metric, evaluate.Metric)
    found = metric.compute(predictions=PREDICTIONS, references=REFERENCES)
    assert found == {name: score(name, PREDICTIONS, REFERENCES)}
    assert metric.info.description
    assert metric.info.citation
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "texts were written to disk"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's a pub. It isn't cheap!", "it 's a pub it is n't cheap"),
        ("Kid friendly, .Blue Spice (5 out of 5)...", "kid friendly blue spice 5 out of 5"),
        ("family-friendly, £20-25; Café", "family-friendly £ 20-25 café"),
    ],
)
def test_caption_words(text, expected):
    assert caption_words(text) == tuple(expected.split())
