"""Generation: the model's texts, the same whatever the batches are, and a model left as it was."""

import subprocess
import sys

import datasets
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from dp_trainer.errors import ConfigurationError, UnsupportedOperationError
from dp_trainer.tasks import generation
from dp_trainer.tasks.e2e import E2E, encode_pairs, encode_prompts
from dp_trainer.tasks.generation import Decoding, evaluate_generation, generate_texts, group_references

PUB, CLOWNS, COTTO = "name Blue Spice , pub", "name Clowns , French food , near the river", "name Cotto"
TEXTS = {
    PUB: "Blue Spice is a pub",
    CLOWNS: "Clowns has French food near the river",
    COTTO: "you find Cotto near the river",
}
ROWS = datasets.Dataset.from_list(
    [{"meaning_representation": meaning, "human_reference": TEXTS[meaning]} for meaning in (PUB, CLOWNS)]
    + [
        {"meaning_representation": PUB, "human_reference": "a pub is Blue Spice"},
        {"meaning_representation": COTTO, "human_reference": TEXTS[COTTO]},
    ]
)
FEW = Decoding(num_beams=3, min_new_tokens=2, max_new_tokens=12, batch_size=2)


def words_of(*texts):
    return sorted({word for text in texts for word in text.split()})


@pytest.fixture(scope="module")
def tokenizer():
    """One token a word and, as GPT-2's, no token for padding."""
    vocabulary = ["<end>", "<unk>", "||", *words_of(*TEXTS, *TEXTS.values())]
    model = models.WordLevel(vocab={word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    words = Tokenizer(model)
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unk>")


def tiny(tokenizer, **settings):
    torch.manual_seed(0)
    # GPT2Config's own end token would lie outside the vocabulary.
    sizes = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **{**sizes, **settings}))


@pytest.fixture(scope="module")
def trained_weights(tokenizer):
    """Of a model that learned the texts by heart, from inputs as training makes them."""
    model = tiny(tokenizer)
    samples = encode_pairs(list(TEXTS), list(TEXTS.values()), tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = [{name: column[i] for name, column in samples.items()} for i in range(len(TEXTS))]
    length = max(len(row["input_ids"]) for row in rows)
    batch = {
        name: torch.tensor([row[name] + [fill] * (length - len(row[name])) for row in rows])
        for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100))
    }
    for _ in range(60):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.fixture
def model(tokenizer, trained_weights):
    model = tiny(tokenizer)
    model.load_state_dict(trained_weights)
    return model


def written(model, tokenizer, decoding=FEW):
    prompts = encode_prompts(list(TEXTS), tokenizer)
    return generate_texts(model=model, tokenizer=tokenizer, prompts=prompts, decoding=decoding)


def test_what_was_learned_is_written(model, tokenizer):
    found = evaluate_generation(
        model=model, tokenizer=tokenizer, rows=ROWS, writing=E2E.writing, decoding=FEW
    )
    assert [sample.prompt for sample in found.samples] == [PUB, CLOWNS, COTTO]
    assert [sample.prediction for sample in found.samples] == [TEXTS[PUB], TEXTS[CLOWNS], TEXTS[COTTO]]
    assert [sample.references for sample in found.samples] == [
        (TEXTS[PUB], "a pub is Blue Spice"), (TEXTS[CLOWNS],), (TEXTS[COTTO],)
    ]  # fmt: skip
    assert [found.metrics[name] for name in ("bleu", "rouge_l")] == pytest.approx([100, 100])
    assert found.metrics["cider"] > 5
    assert found.records()[1] == {
        "prompt": CLOWNS, "prediction": TEXTS[CLOWNS], "references": (TEXTS[CLOWNS],)
    }  # fmt: skip


def test_an_untrained_model_does_not_know_the_texts(tokenizer):
    found = evaluate_generation(
        model=tiny(tokenizer), tokenizer=tokenizer, rows=ROWS, writing=E2E.writing, decoding=FEW
    )
    assert found.metrics["bleu"] < 50


def test_the_first_groups_are_kept(model, tokenizer):
    found = evaluate_generation(
        model=model, tokenizer=tokenizer, rows=ROWS, writing=E2E.writing, decoding=FEW, max_groups=2
    )
    assert [sample.prediction for sample in found.samples] == [TEXTS[PUB], TEXTS[CLOWNS]]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("num_beams", [1, 4])
def test_batch_size_changes_no_text(tokenizer, batch_size, num_beams):
    """Of an untrained model, whose texts are long and of no pattern; prompts are of three lengths."""
    together = Decoding(num_beams=num_beams, max_new_tokens=12, batch_size=3)
    apart = Decoding(num_beams=num_beams, max_new_tokens=12, batch_size=batch_size)
    model = tiny(tokenizer, initializer_range=0.5)
    texts = written(model, tokenizer, together)
    assert len(set(texts)) == len(TEXTS)
    assert written(model, tokenizer, apart) == texts


def slow_greedy(model, prompt, tokenizer, decoding):
    """One token at a time, the whole text anew each time."""
    ids = list(prompt)
    for step in range(decoding.max_new_tokens):
        logits = model.eval()(input_ids=torch.tensor([ids])).logits[0, -1]
        if step < decoding.min_new_tokens:
            logits[tokenizer.eos_token_id] = -torch.inf
        ids.append(int(logits.argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            return tokenizer.decode(ids[len(prompt) : -1], skip_special_tokens=True).strip()
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()


def test_one_beam_is_the_likeliest_token_each_time(tokenizer):
    decoding = Decoding(num_beams=1, min_new_tokens=3, max_new_tokens=10, batch_size=3)
    model = tiny(tokenizer, initializer_range=0.5)
    prompts = encode_prompts(list(TEXTS), tokenizer)
    expected = [slow_greedy(model, prompt, tokenizer, decoding) for prompt in prompts]
    assert written(model, tokenizer, decoding) == expected


def test_as_many_beams_as_words_find_the_best_pair(tokenizer):
    """Slow twin: every pair of tokens, none of them the end. Greedy search misses some of the best."""
    model = tiny(tokenizer, initializer_range=0.5).eval()
    size, expected = len(tokenizer), []
    prompts = [[word, 2] for word in range(3, size)]
    for prompt in prompts:
        ids = torch.tensor([[*prompt, first] for first in range(1, size)])
        scores = model(input_ids=ids).logits[:, -2:].log_softmax(-1)
        pairs = scores[:, 0].diagonal(1)[:, None] + scores[:, 1, 1:]
        first, second = divmod(int(pairs.argmax()), size - 1)
        expected.append(tokenizer.decode([first + 1, second + 1], skip_special_tokens=True).strip())

    def found(num_beams):
        decoding = Decoding(num_beams=num_beams, min_new_tokens=2, max_new_tokens=2)
        return generate_texts(model=model, tokenizer=tokenizer, prompts=prompts, decoding=decoding)

    assert found(size) == expected
    assert found(1) != expected


@pytest.mark.parametrize("name", ["byte_tokenizer", "tokenizer"])
def test_prompts_are_what_training_puts_before_the_references(name, request):
    tokenizer = request.getfixturevalue(name)
    samples = encode_pairs(list(TEXTS), list(TEXTS.values()), tokenizer)
    for prompt, ids, labels in zip(
        encode_prompts(list(TEXTS), tokenizer), samples["input_ids"], samples["labels"], strict=True
    ):
        border = labels.count(-100)
        assert prompt == ids[:border]
        assert labels[border:] == ids[border:]


def test_least_and_most_tokens(model, tokenizer):
    longer = written(model, tokenizer, Decoding(num_beams=1, min_new_tokens=10, max_new_tokens=12))
    assert min(len(text.split()) for text in longer) >= 10
    shorter = written(model, tokenizer, Decoding(num_beams=1, min_new_tokens=0, max_new_tokens=3))
    assert shorter == [" ".join(text.split()[:3]) for text in TEXTS.values()]


def test_the_models_own_settings_do_not_count(model, tokenizer):
    expected = written(model, tokenizer)
    model.generation_config.update(repetition_penalty=50.0, do_sample=True, temperature=9.0, max_length=3)
    model.generation_config.no_repeat_ngram_size = 1
    assert written(model, tokenizer) == expected == list(TEXTS.values())


def state_of(model):
    return (
        {name: part.training for name, part in model.named_modules()},
        {name: vars(part).get("generation_config") for name, part in model.named_modules()},
    )


def test_the_model_is_left_as_it_was(model, tokenizer):
    model.train()
    model.transformer.h[0].eval()
    before = state_of(model)
    seen = []
    model.transformer.h[1].register_forward_hook(lambda part, *_: seen.append(part.training))
    written(model, tokenizer)
    assert seen
    assert not any(seen)
    assert state_of(model) == before


def test_the_model_is_left_as_it_was_by_a_failure(model, tokenizer):
    model.train()
    before = state_of(model)

    def fail(*arguments):
        raise RuntimeError("out of memory")

    model.transformer.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        written(model, tokenizer)
    assert state_of(model) == before


def test_parameters_spread_by_anything_but_fsdp_around_the_model_are_refused(tokenizer):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = tiny(tokenizer)
        fully_shard(model.transformer.h[1], mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        with pytest.raises(
            UnsupportedOperationError, match=r"h\.1\.\S+: this parameter is spread over ranks"
        ):
            written(model, tokenizer)
    finally:
        dist.destroy_process_group()


def test_the_cache_is_on(model, tokenizer):
    """Whatever training set: after the prompt each pass takes one token."""
    model.config.use_cache = False
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    model.train()
    lengths = []
    model.transformer.wte.register_forward_hook(lambda part, inputs, _: lengths.append(inputs[0].shape[1]))
    assert written(model, tokenizer, Decoding(num_beams=2, max_new_tokens=12)) == list(TEXTS.values())
    assert lengths[0] > 1
    assert set(lengths[1:]) == {1}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_count(model, tokenizer):
    adapted = get_peft_model(
        model, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
    )
    assert written(adapted, tokenizer) == list(TEXTS.values())
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    before = state_of(adapted)
    assert written(adapted, tokenizer) != list(TEXTS.values())
    assert state_of(adapted) == before


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_prompt_tuning_leaves_the_model_as_it_was(tokenizer):
    """peft hands generation settings on to the decoder inside, where none were."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    tuned = get_peft_model(llama, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    before = state_of(tuned)
    assert all(written(tuned, tokenizer))
    assert state_of(tuned) == before


def test_wrapped_for_data_parallelism(model, tokenizer, tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert written(wrapped, tokenizer) == list(TEXTS.values())
    finally:
        torch.distributed.destroy_process_group()


def test_another_architecture(byte_tokenizer):
    """Rotary positions, a padding token that is the end token, byte tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=257, max_position_embeddings=128, initializer_range=1.0, **sizes)
    )
    prompts = encode_prompts(list(TEXTS), byte_tokenizer)
    texts = [
        generate_texts(
            model=llama,
            tokenizer=byte_tokenizer,
            prompts=prompts,
            decoding=Decoding(num_beams=2, max_new_tokens=8, batch_size=batch_size),
        )
        for batch_size in (1, 3)
    ]
    assert texts[0] == texts[1]
    assert all(texts[0])


def test_references_are_grouped_in_order():
    assert group_references(ROWS, E2E.writing) == {
        PUB: [TEXTS[PUB], "a pub is Blue Spice"], CLOWNS: [TEXTS[CLOWNS]], COTTO: [TEXTS[COTTO]]
    }  # fmt: skip
    assert list(group_references(ROWS, E2E.writing, max_groups=1)) == [PUB]
    assert len(group_references(ROWS, E2E.writing, max_groups=99)) == 3


def test_unfit_rows_are_refused():
    with pytest.raises(ConfigurationError, match="max_groups=0"):
        group_references(ROWS, E2E.writing, max_groups=0)
    with pytest.raises(ConfigurationError, match="there are none to generate for"):
        group_references(ROWS.select([]), E2E.writing)
    with pytest.raises(ConfigurationError, match="row 1, column 'human_reference': not a text"):
        group_references(
            datasets.Dataset.from_dict(
                {"meaning_representation": ["a", "b"], "human_reference": ["a", None]}
            ),
            E2E.writing,
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0}, "num_beams=0: must be at least 1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"min_new_tokens": -1}, "min_new_tokens=-1"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens=9: above max_new_tokens=8"),
        ({"num_beams": 1, "length_penalty": 2.0}, "length_penalty=2.0: means nothing with one beam"),
    ],
)
def test_contradictory_decoding_is_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        Decoding(**settings)


def test_unfit_models_and_tokenizers_are_refused(model, tokenizer, word_tokenizer):
    with pytest.raises(ConfigurationError, match=r"positions\. Set it to 22 or less"):
        written(model, tokenizer, Decoding(max_new_tokens=100))
    classifier = BertForSequenceClassification(
        BertConfig(
            vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
        )
    )
    with pytest.raises(ConfigurationError, match="BertForSequenceClassification: does not continue a text"):
        written(classifier, tokenizer)
    with pytest.raises(ConfigurationError, match="no end-of-sequence token"):
        written(model, word_tokenizer)
    for prompts in ([], [[1], []]):
        with pytest.raises(ConfigurationError, match="there are none, or an empty one"):
            generate_texts(model=model, tokenizer=tokenizer, prompts=prompts, decoding=FEW)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(generation.importlib.util, "find_spec", lambda name: None if name == "nltk" else name)
    with pytest.raises(ConfigurationError, match=r"'nltk' not installed.*dp_trainer\[tasks\]"):
        generation.require_metrics()


def test_listing_tasks_needs_no_metric_packages():
    """They come with an extra; the quickstart does without."""
    code = "import sys, dp_trainer.tasks.generation; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"sacrebleu", "rouge_score", "nltk"} & set(loaded.stdout.split())
