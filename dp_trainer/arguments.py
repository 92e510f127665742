"""The privacy settings of a run, as a user writes them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from dp_trainer.errors import ConfigurationError
from dp_trainer.privacy.accounting import ACCOUNTANTS
from dp_trainer.privacy.clipping import CLIPPING_FUNCTIONS, AutomaticClipping, ClippingFunction
from dp_trainer.privacy.mechanism import NEIGHBOURING_RELATIONS
from dp_trainer.privacy.sampling import SAMPLINGS

PRIVACY_UNITS = ("sample", "user")
STRATEGIES = ("automatic", "book_keeping", "two_pass", "direct", "loop")


def _setting(help_text: str, *, choices: tuple[str, ...] | None = None) -> dict[str, Any]:
    """What HfArgumentParser reads: help, and the choices of a text."""
    return {"help": help_text} if choices is None else {"help": help_text, "choices": list(choices)}


@dataclass(frozen=True, kw_only=True)
class PrivacyArguments:
    """What shapes the guarantee, and below it what only costs time or memory.

    Guarantee: an instance is consistent. Every value was checked on construction, so a
    plan made from it has no hidden default that weakens privacy. Works
    with ``HfArgumentParser``, from the command line as from YAML.

    Give ``target_epsilon`` to have the noise calibrated, ``noise_multiplier`` to
    set it, or both to train until the budget is spent and stop there.

    Raises:
        ConfigurationError: If a value is out of range or contradicts another.
    """

    target_delta: float = field(
        metadata=_setting("δ of the guarantee; well below one over the number of samples. Required.")
    )
    target_epsilon: float | None = field(
        default=None, metadata=_setting("ε that the whole run may spend; the noise is calibrated to it.")
    )
    noise_multiplier: float | None = field(
        default=None,
        metadata=_setting(
            "Noise std over sensitivity. With target_epsilon: train until the budget is spent."
        ),
    )
    clipping: str = field(
        default="automatic",
        metadata=_setting("How each sample's gradient is bounded.", choices=tuple(CLIPPING_FUNCTIONS)),
    )
    clipping_norm: float | None = field(
        default=None,
        metadata=_setting(
            "Bound R on one sample's contribution. 1 for automatic and normalizing clipping; the others need one."
        ),
    )
    gamma: float | None = field(
        default=None, metadata=_setting("Stability constant of automatic clipping; 0.01 if not given.")
    )
    cutoff: float | None = field(
        default=None, metadata=_setting("Norm above which global clipping drops a sample; it needs one.")
    )
    sampling: str = field(
        default="poisson", metadata=_setting("How each logical batch is drawn.", choices=SAMPLINGS)
    )
    privacy_unit: str = field(
        default="sample",
        metadata=_setting(
            "Who is protected: each sample, one row of the training set; or each user with all rows. "
            "expected_batch_size, dataset_size and batch_cap count units.",
            choices=PRIVACY_UNITS,
        ),
    )
    user_column: str | None = field(
        default=None, metadata=_setting("Column that says whose row it is; privacy_unit user needs it.")
    )
    samples_per_user: int | None = field(
        default=None,
        metadata=_setting(
            "Most rows of one user in one logical batch; the noise grows with it. privacy_unit user needs it."
        ),
    )
    neighbouring_relation: str = field(
        default="add_or_remove_one",
        metadata=_setting(
            "How datasets that must look alike may differ; replace_one makes ε larger for the same noise.",
            choices=NEIGHBOURING_RELATIONS,
        ),
    )
    expected_batch_size: int | None = field(
        default=None,
        metadata=_setting("Expected logical batch; per-device size × accumulation × ranks if not given."),
    )
    dataset_size: int | None = field(
        default=None,
        metadata=_setting(
            "Public number of samples; the training set's length, then taken as public, if not given."
        ),
    )
    batch_cap: int | None = field(
        default=None,
        metadata=_setting("Largest logical batch; the expected size plus six times its root if not given."),
    )
    accountant: str = field(
        default="pld", metadata=_setting("Which accountant decides about ε.", choices=ACCOUNTANTS)
    )
    insecure_noise_seed: int | None = field(
        default=None,
        metadata=_setting(
            "For debugging only: fixes the noise, so that whoever knows the seed can remove it."
        ),
    )
    secure_noise: bool = field(
        default=False,
        metadata=_setting(
            "Noise that withstands a look at its last digits too, from a cipher on every device; slower."
        ),
    )
    release_training_metrics: bool = field(
        default=False,
        metadata=_setting(
            "Let pushed models and model cards carry losses and evaluation results, which no noise protects."
        ),
    )
    certificate_samples: int = field(
        default=8,
        metadata=_setting(
            "Samples whose gradients are checked against plain autograd first; 0 turns the check off."
        ),
    )
    strategy: str = field(
        default="automatic",
        metadata=_setting(
            "How per-sample gradients are computed; costs only time and memory.", choices=STRATEGIES
        ),
    )
    micro_batch_tokens: int | None = field(
        default=None,
        metadata=_setting("Padded tokens that fit in one micro-batch; costs only time and memory."),
    )

    def __post_init__(self) -> None:
        self._check_types()
        if not 0.0 < self.target_delta < 1.0:
            raise _wrong("target_delta", self.target_delta, "must lie strictly between 0 and 1, e.g. 1e-6")
        if self.target_epsilon is None and self.noise_multiplier is None:
            raise ConfigurationError(
                "PrivacyArguments: neither target_epsilon nor noise_multiplier is given. Set target_epsilon=8, "
                "say, to have the noise calibrated."
            )
        if self.target_epsilon is not None and self.target_epsilon <= 0.0:
            raise _wrong("target_epsilon", self.target_epsilon, "must be positive")
        if self.noise_multiplier is not None and self.noise_multiplier < 0.0:
            raise _wrong("noise_multiplier", self.noise_multiplier, "must not be negative")
        for name in (
            "expected_batch_size",
            "dataset_size",
            "batch_cap",
            "micro_batch_tokens",
            "samples_per_user",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise _wrong(name, value, "must be at least 1")
        if self.certificate_samples < 0 or self.certificate_samples == 1:
            raise _wrong(
                "certificate_samples", self.certificate_samples, "must be 0, or at least 2 to see neighbours"
            )
        for name, allowed in (
            ("clipping", tuple(CLIPPING_FUNCTIONS)),
            ("privacy_unit", PRIVACY_UNITS),
            ("sampling", SAMPLINGS),
            ("neighbouring_relation", NEIGHBOURING_RELATIONS),
            ("accountant", ACCOUNTANTS),
            ("strategy", STRATEGIES),
        ):
            if getattr(self, name) not in allowed:
                raise _wrong(name, getattr(self, name), f"must be one of {', '.join(allowed)}")
        for name in ("user_column", "samples_per_user"):
            value = getattr(self, name)
            if self.privacy_unit == "user" and value in (None, ""):
                raise _wrong(name, value, "is needed with privacy_unit='user'; set it")
            if self.privacy_unit == "sample" and value is not None:
                raise _wrong(
                    name, value, "has no meaning with privacy_unit='sample'; set privacy_unit='user'"
                )
        if self.sampling == "full_batch" and self.batch_cap is not None:
            raise _wrong(
                "batch_cap", self.batch_cap, "has no meaning with sampling='full_batch'; leave it out"
            )
        if self.secure_noise and self.insecure_noise_seed is not None:
            raise _wrong(
                "insecure_noise_seed",
                self.insecure_noise_seed,
                "contradicts secure_noise; leave one of them out",
            )
        self.clipping_function()

    def clipping_function(self) -> ClippingFunction:
        """Returns the clipping function that these settings describe.

        Raises:
            ConfigurationError: If it needs a setting that is missing, or one is given that it does not have.
        """
        kind = CLIPPING_FUNCTIONS[self.clipping]
        wanted: dict[str, dict[str, float | None]] = {
            "automatic": {"clipping_norm": 1.0, "gamma": AutomaticClipping.gamma},
            "normalizing": {"clipping_norm": 1.0},
            "flat": {"clipping_norm": None},
            "global": {"clipping_norm": None, "cutoff": None},
        }
        settings: dict[str, float] = {}
        for name in ("clipping_norm", "gamma", "cutoff"):
            given = getattr(self, name)
            if name not in wanted[self.clipping]:
                if given is not None:
                    raise _wrong(name, given, f"has no meaning with clipping='{self.clipping}'; leave it out")
                continue
            value = wanted[self.clipping][name] if given is None else given
            if value is None:
                raise _wrong(name, given, f"is needed with clipping='{self.clipping}'; set it")
            settings[name] = value
        return kind(**settings)

    def _check_types(self) -> None:
        for name in (
            "target_delta",
            "target_epsilon",
            "noise_multiplier",
            "clipping_norm",
            "gamma",
            "cutoff",
        ):
            value = getattr(self, name)
            if value is None and name != "target_delta":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise _wrong(
                    name, value, "must be a finite number; in YAML write 1.0e-5, since 1e-5 is a text there"
                )
        for name in (
            "expected_batch_size",
            "dataset_size",
            "batch_cap",
            "micro_batch_tokens",
            "samples_per_user",
            "certificate_samples",
            "insecure_noise_seed",
        ):
            value = getattr(self, name)
            if value is None and name != "certificate_samples":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise _wrong(name, value, "must be a whole number")
        if self.user_column is not None and not isinstance(self.user_column, str):
            raise _wrong("user_column", self.user_column, "must be a column's name")
        for name in ("secure_noise", "release_training_metrics"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, getattr(self, name), "must be true or false")


def _wrong(name: str, value: object, fact: str) -> ConfigurationError:
    return ConfigurationError(f"PrivacyArguments.{name} is {value!r}: it {fact}.")
