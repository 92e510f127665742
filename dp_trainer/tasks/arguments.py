"""What a run's YAML says about the model, the data and the run itself.

Frozen, keyword-only dataclasses that ``transformers.HfArgumentParser`` reads.
They check themselves on construction; what needs the data or the model is
checked where those are loaded.
"""

# No postponed annotations trickery is needed by HfArgumentParser: it resolves the
# hints itself, so the plain module-level types below suffice.
from dataclasses import dataclass, field

from dp_trainer.errors import ConfigurationError

DTYPES = ("float32", "bfloat16")
HEADS = ("classification", "label_words")


def _positive(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ConfigurationError(
            f"{name}={value}: must be at least 1. Give a positive number or leave it out."
        )


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """Which model, and which of its parameters train.

    Raises:
        ConfigurationError: For settings that contradict each other.
    """

    model_name_or_path: str = field(
        metadata={
            "help": "A hub name, a local folder, or package:<module>/<folder> for a model inside a package."
        }
    )
    model_revision: str = field(default="main", metadata={"help": "The hub commit, branch or tag."})
    head: str = field(
        default=HEADS[0],
        metadata={
            "help": "classification: the task's ordinary head. label_words: a masked language model "
            "fills one word for each class into a template.",
            "choices": HEADS,
        },
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "The type of the weights: float32 or bfloat16.", "choices": DTYPES},
    )
    trainable: list[str] | None = field(
        default=None,
        metadata={"help": "Regular expressions over parameter names; what none of them finds is frozen."},
    )
    lora_rank: int | None = field(
        default=None, metadata={"help": "Train LoRA adapters of this rank (needs peft)."}
    )
    lora_alpha: int | None = field(default=None, metadata={"help": "LoRA's alpha; lora_rank if left out."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Modules that get an adapter; peft's choice for the model if left out."},
    )

    def __post_init__(self) -> None:
        _positive("lora_rank", self.lora_rank)
        _positive("lora_alpha", self.lora_alpha)
        if self.head not in HEADS:
            raise ConfigurationError(f"head={self.head}: must be one of {', '.join(HEADS)}. Choose one.")
        if self.dtype not in DTYPES:
            raise ConfigurationError(
                f"dtype={self.dtype}: must be one of {', '.join(DTYPES)}. "
                "float16 needs a loss scaler, which private training cannot have."
            )
        if self.lora_rank is None and (self.lora_alpha is not None or self.lora_target_modules is not None):
            raise ConfigurationError(
                "lora_alpha, lora_target_modules: mean nothing without lora_rank. Set lora_rank or leave them out."
            )
        if self.lora_rank is not None and self.trainable is not None:
            raise ConfigurationError(
                "trainable and lora_rank: a saved adapter would lack the other trained parameters. Use one of the two."
            )


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """Which task, where its rows lie, and how many of them to use."""

    task: str = field(metadata={"help": "A name from dp_trainer.tasks.TASKS."})
    data: str | None = field(
        default=None,
        metadata={
            "help": "A folder with one JSON-lines file a split (or with train/<class>/ images), or a hub name."
        },
    )
    data_config: str | None = field(default=None, metadata={"help": "The configuration of a hub data set."})
    data_revision: str = field(
        default="main", metadata={"help": "The hub commit, branch or tag of the data."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longest input in tokens; the task's own limit if left out."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Keep the first rows of the train split."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Keep the first rows of other splits."}
    )

    def __post_init__(self) -> None:
        _positive("max_length", self.max_length)
        _positive("max_train_samples", self.max_train_samples)
        _positive("max_eval_samples", self.max_eval_samples)
        if self.data is None and self.data_config is not None:
            raise ConfigurationError(
                "data_config: means nothing without data. Give data=<hub name> or leave it out."
            )


@dataclass(frozen=True, kw_only=True)
class GenerationArguments:
    """How a task whose answers are texts is evaluated after training; other tasks take no notice."""

    generate: bool = field(
        default=True, metadata={"help": "Let the trained model write, and score it against all references."}
    )
    num_beams: int = field(default=5, metadata={"help": "Candidates that beam search keeps."})
    min_new_tokens: int = field(default=5, metadata={"help": "A text does not end before so many tokens."})
    max_new_tokens: int = field(default=100, metadata={"help": "A text is cut after so many tokens."})
    length_penalty: float = field(default=1.0, metadata={"help": "Above 1 favours longer texts."})
    max_generated: int | None = field(
        default=None,
        metadata={"help": "Write for the first so many prompts of the split; for all if left out."},
    )

    def __post_init__(self) -> None:
        _positive("max_generated", self.max_generated)


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """What the run does beside training."""

    private: bool = field(
        default=True,
        metadata={"help": "False trains with the ordinary Trainer, without any privacy, for comparison."},
    )
    plots: bool = field(default=True, metadata={"help": "Draw training.png (needs matplotlib)."})
