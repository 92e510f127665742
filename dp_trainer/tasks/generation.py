"""Lets a trained model write, and holds what it wrote against all references.

A model that learned prompts followed by references is given a prompt and goes on
until the end. Each distinct prompt text counts once (in E2E a meaning
representation); its references are those of all rows that have it.

With several processes each generates the batches of its turn, and all return the
same result.

Neither texts nor scores are covered by the privacy guarantee: they are computed
on whatever rows are given, without noise.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig

from dp_trainer.distributed import Ranks
from dp_trainer.errors import ConfigurationError
from dp_trainer.gradients.sharding import put_to_rest
from dp_trainer.tasks.base import Dataset, Tokenizer, Writing, refuse_missing_texts
from dp_trainer.tasks.names import quoted

_METRIC_PACKAGES = {"sacrebleu": "sacrebleu", "rouge_score": "rouge-score", "nltk": "nltk"}


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How texts are chosen: beam search, no sampling.

    Args:
        num_beams: Candidates kept in parallel; 1 takes the likeliest token each time.
        min_new_tokens: The end is not allowed before so many tokens.
        max_new_tokens: A text is cut after so many tokens.
        length_penalty: Above 1 favours longer texts, below 1 shorter ones.
        batch_size: Prompts at a time. Costs memory and changes no text, up to ties by rounding.

    Raises:
        ConfigurationError: For settings that contradict each other.
    """

    num_beams: int = 5
    min_new_tokens: int = 5
    max_new_tokens: int = 100
    length_penalty: float = 1.0
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name, least in {
            "num_beams": 1,
            "min_new_tokens": 0,
            "max_new_tokens": 1,
            "batch_size": 1,
        }.items():
            if getattr(self, name) < least:
                raise ConfigurationError(f"{name}={getattr(self, name)}: must be at least {least}. Raise it.")
        if self.min_new_tokens > self.max_new_tokens:
            raise ConfigurationError(
                f"min_new_tokens={self.min_new_tokens}: above max_new_tokens={self.max_new_tokens}. "
                "Lower the one or raise the other."
            )
        if self.num_beams == 1 and self.length_penalty != 1.0:
            raise ConfigurationError(
                f"length_penalty={self.length_penalty}: means nothing with one beam. "
                "Raise num_beams or leave length_penalty out."
            )


@dataclass(frozen=True, kw_only=True)
class GeneratedSample:
    """One prompt, what the model made of it, and what people did."""

    prompt: str
    prediction: str
    references: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What a model wrote and how good it is.

    Attributes:
        metrics: As :func:`dp_trainer.tasks.metrics.generation_metrics` returns them.
        samples: In the order in which the rows first name each prompt.
    """

    metrics: Mapping[str, float]
    samples: tuple[GeneratedSample, ...]

    def records(self) -> list[dict[str, Any]]:
        """Returns the samples as plain dictionaries, for a JSON file."""
        return [asdict(sample) for sample in self.samples]


def require_metrics() -> None:
    """Refuses at the start of a run what would otherwise fail at its end."""
    missing = [name for module, name in _METRIC_PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigurationError(
            f"metrics of generated text: {quoted(missing)} not installed. "
            "Install them (pip install 'dp_trainer[tasks]') or do not generate."
        )


def evaluate_generation(
    *,
    model: nn.Module,
    tokenizer: Tokenizer,
    rows: Dataset,
    writing: Writing,
    decoding: Decoding,
    max_groups: int | None = None,
) -> Generation:
    """Generates a text for each distinct prompt and scores them.

    Guarantee: prompts are token for token what training put before the
    references, and every reference in ``rows`` counts, those too long for
    training among them. The model is left as it was found.

    Args:
        model: A causal language model, plain, with adapters, or wrapped for several processes.
        tokenizer: The one it was trained with; it need not have a padding token.
        rows: Untokenized rows; the same on all processes.
        writing: The task's: which columns hold prompts and references, and how prompts become tokens.
        decoding: How to choose texts.
        max_groups: Keep so many prompts, the first ones; all if None.

    Raises:
        ConfigurationError: If rows, tokenizer or model do not allow it, or the metrics' packages are missing.
    """
    require_metrics()
    # Here, because tasks are listed without the extra that the metrics need.
    from dp_trainer.tasks.metrics import generation_metrics

    groups = group_references(rows, writing, max_groups=max_groups)
    prompts = writing.encode(list(groups), tokenizer)
    predictions = generate_texts(model=model, tokenizer=tokenizer, prompts=prompts, decoding=decoding)
    samples = tuple(
        GeneratedSample(prompt=prompt, prediction=prediction, references=tuple(references))
        for (prompt, references), prediction in zip(groups.items(), predictions, strict=True)
    )
    return Generation(metrics=generation_metrics(predictions, list(groups.values())), samples=samples)


def group_references(
    rows: Dataset, writing: Writing, *, max_groups: int | None = None
) -> dict[str, list[str]]:
    """Returns prompt → its references, in order of first appearance.

    Raises:
        ConfigurationError: For no rows, a row without text, or ``max_groups`` below 1.
    """
    if max_groups is not None and max_groups < 1:
        raise ConfigurationError(f"max_groups={max_groups}: must be at least 1. Raise it or leave it out.")
    if len(rows) == 0:
        raise ConfigurationError("rows: there are none to generate for. Give at least one.")
    columns = (writing.prompt_column, writing.reference_column)
    refuse_missing_texts(rows, columns)
    groups: dict[str, list[str]] = {}
    for prompt, reference in zip(*(rows[column] for column in columns), strict=True):
        groups.setdefault(prompt, []).append(reference)
    return dict(list(groups.items())[:max_groups])


def generate_texts(
    *, model: nn.Module, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], decoding: Decoding
) -> list[str]:
    """Returns each prompt's continuation up to the end token, stripped; the same on all processes.

    Raises:
        ConfigurationError: If the model cannot generate, the tokenizer has no end
            token, a prompt is empty, or prompt and text exceed the model's positions.
    """
    model = extract_model_from_parallel(model)
    _check(model, tokenizer, prompts, decoding)
    device = next(model.parameters()).device
    ranks, sharded = Ranks.current(device), put_to_rest(model)
    # The longest first: prompts of a batch are of a length, and a too large batch fails at once.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batches = [order[i : i + decoding.batch_size] for i in range(0, len(order), decoding.batch_size)]
    turn = batches[ranks.rank :: ranks.size]
    if sharded and len(turn) < -(-len(batches) // ranks.size):
        # A sharded forward pass needs all ranks, so one without a batch repeats the last; the texts are the same.
        turn = [*turn, batches[-1]]
    config = _generation_config(tokenizer, decoding)
    texts: dict[int, str] = {}
    with _ready_to_generate(model, config, sharded=sharded):
        for batch in tqdm(turn, desc="Generating", unit="batch", disable=ranks.rank != 0):
            ids_BT, mask_BT = _left_padded([prompts[i] for i in batch], config.pad_token_id, device)
            out_BT = model.generate(  # type: ignore[operator]
                input_ids=ids_BT, attention_mask=mask_BT, generation_config=config, synced_gpus=sharded
            )
            texts |= zip(batch, _decoded(out_BT[:, ids_BT.shape[1] :], tokenizer), strict=True)
    everywhere = _from_all_ranks(texts, ranks)
    return [everywhere[i] for i in range(len(prompts))]


def _check(
    model: nn.Module, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], decoding: Decoding
) -> None:
    config: Any = model.config
    writes = hasattr(model, "can_generate") and model.can_generate()  # type: ignore[operator]
    if not writes or config.is_encoder_decoder:
        raise ConfigurationError(
            f"{type(model).__name__}: does not continue a text. Use a causal language model."
        )
    if tokenizer.eos_token_id is None:
        raise ConfigurationError(
            f"{type(tokenizer).__name__}: no end-of-sequence token, so no text would end. "
            "Use a tokenizer with an eos_token."
        )
    if not prompts or not all(prompts):
        raise ConfigurationError("prompts: there are none, or an empty one. Give each at least one token.")
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max(map(len, prompts))
    if positions is not None and longest + decoding.max_new_tokens > positions:
        raise ConfigurationError(
            f"max_new_tokens={decoding.max_new_tokens}: with a prompt of {longest} tokens more than the model's "
            f"{positions} positions. Set it to {positions - longest} or less, or give shorter prompts."
        )


def _generation_config(tokenizer: Tokenizer, decoding: Decoding) -> GenerationConfig:
    end = tokenizer.eos_token_id
    return GenerationConfig(
        do_sample=False,
        num_beams=decoding.num_beams,
        min_new_tokens=decoding.min_new_tokens,
        max_new_tokens=decoding.max_new_tokens,
        length_penalty=decoding.length_penalty,
        eos_token_id=end,
        # Padding is masked, so which token it is changes nothing.
        pad_token_id=end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        # Training may have switched the cache off, which would make each token cost the whole text.
        use_cache=True,
    )


@contextmanager
def _ready_to_generate(model: nn.Module, config: GenerationConfig, *, sharded: bool) -> Iterator[None]:
    """Evaluation mode and our settings alone; afterwards every module has its own mode and settings again."""
    # Module by module: some may be in evaluation mode while the model trains, as frozen batch normalization is.
    training = {module: module.training for module in model.modules()}
    # transformers fills what a generation config leaves open from the model's own, and
    # published models bring penalties and sampling settings there.
    settings = {m: vars(m)["generation_config"] for m in model.modules() if "generation_config" in vars(m)}
    try:
        model.eval()
        for module in settings:
            module.generation_config = config
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
            if module in settings:
                module.generation_config = settings[module]
            else:
                # peft hands the settings on to inner modules.
                vars(module).pop("generation_config", None)
        if sharded:
            put_to_rest(model)


def _left_padded(
    prompts: Sequence[Sequence[int]], padding: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns token ids and attention mask, (B, T): each prompt ends where its text begins."""
    length = max(map(len, prompts))
    ids_BT = torch.tensor([[padding] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    mask_BT = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids_BT.to(device), mask_BT.to(device)


def _decoded(written_BT: Tensor, tokenizer: Tokenizer) -> list[str]:
    # After the end comes nothing but padding, and both are special tokens.
    # Spaces stay as trained: the references were not cleaned up either.
    texts = tokenizer.batch_decode(
        written_BT.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return [text.strip() for text in texts]


def _from_all_ranks(texts: dict[int, str], ranks: Ranks) -> dict[int, str]:
    """Returns the ranks' shares together."""
    if ranks.size == 1:
        return texts
    shares: list[dict[int, str]] = [{} for _ in range(ranks.size)]
    dist.all_gather_object(shares, texts)
    return {i: text for share in shares for i, text in share.items()}
