"""Hyper-parameter search with its cost: every trial reads the training set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import Trainer
from transformers.utils import logging

from dp_trainer.errors import ConfigurationError
from dp_trainer.privacy.accountant import PrivacyAccountant
from dp_trainer.privacy.accounting import is_supported
from dp_trainer.privacy.mechanism import Mechanism
from dp_trainer.privacy.search import RandomTrials, SearchCost, search_cost

logger = logging.get_logger(__name__)


class SearchingTrainer(Trainer):  # type: ignore[misc]
    """A ``Trainer`` whose hyper-parameter search says what it cost.

    Guarantee: after a search, also one that failed, ``search_cost`` bounds the ε of what may be released for it.
    A class, because scripts call ``trainer.hyperparameter_search``.
    """

    search_cost: SearchCost | None = None
    # The accountant of each trial of the search under way.
    _trials: tuple[PrivacyAccountant, ...] = ()

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], Any] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int | RandomTrials = 20,
        direction: str | list[str] = "minimize",
        backend: Any = None,
        hp_name: Callable[[Any], str] | None = None,
        **backend_settings: Any,  # the search library's own, as in Trainer
    ) -> Any:
        """Searches as ``Trainer``; ``search_cost`` and the privacy statement then say what it cost.

        Args:
            hp_space: As in ``Trainer``.
            compute_objective: As in ``Trainer``.
            n_trials: How many trials to make. With ``RandomTrials(mean)`` the number is drawn by chance, and
                the best trial alone costs much less than all together.
            direction: As in ``Trainer``.
            backend: As in ``Trainer``.
            hp_name: As in ``Trainer``.
            backend_settings: As in ``Trainer``.

        Raises:
            ConfigurationError: With ``RandomTrials``, if one trial could look at another, or its cost is not known.
        """
        number = number_of_trials(n_trials, backend, backend_settings, self.plan.mechanism)
        self._trials = ()
        try:
            return super().hyperparameter_search(
                hp_space, compute_objective, number, direction, backend, hp_name, **backend_settings
            )
        finally:
            self.search_cost = cost_of_trials(self._trials, n_trials, number=number)


def number_of_trials(
    wanted: int | RandomTrials, backend: Any, settings: Mapping[str, Any], mechanism: Mechanism
) -> int:
    """Returns how many trials to make, and warns of what they cost.

    Args:
        wanted: As ``hyperparameter_search`` was asked.
        backend: The search library asked for; None for the installed one.
        settings: Its settings.
        mechanism: One release of a trial.

    Raises:
        ConfigurationError: If the number is random, and the search would let one trial look at another, or no
            bound on its cost is known.
    """
    if not isinstance(wanted, RandomTrials):
        logger.warning(
            f"hyperparameter_search: each of the {wanted} trials spends its own ε on the same data, and choosing among "
            "them does not undo that. trainer.search_cost says the sum; n_trials=RandomTrials(...) makes it smaller."
        )
        return wanted
    if not is_supported(mechanism, "rdp"):
        raise ConfigurationError(
            "RandomTrials: its cost is known by Rényi divergences only, which bound no run with "
            "neighbouring_relation='replace_one' and Poisson sampling. Give a fixed n_trials, or search with "
            "neighbouring_relation='add_or_remove_one'."
        )
    name = str(getattr(backend, "value", backend or "optuna"))
    made = {key: type(settings.get(key)).__name__ for key in ("sampler", "pruner")}
    if (
        name != "optuna"
        or made != {"sampler": "RandomSampler", "pruner": "NopPruner"}
        or settings.get("timeout")
    ):
        raise ConfigurationError(
            "RandomTrials: trials must be independent and run to their end. Search with backend='optuna', "
            "sampler=optuna.samplers.RandomSampler(), pruner=optuna.pruners.NopPruner() and without timeout; "
            "or give a fixed n_trials."
        )
    return wanted.draw()


def cost_of_trials(
    trials: Sequence[PrivacyAccountant], wanted: int | RandomTrials, *, number: int
) -> SearchCost | None:
    """Returns what the trials of a search have spent, and says it in the log; None if none was begun.

    Args:
        trials: The accountant of each trial.
        wanted: As ``hyperparameter_search`` was asked.
        number: How many trials were to be made.
    """
    spent = [(trial.plan, trial.steps_spent) for trial in trials]
    if not spent:
        return None
    # A search that broke off has looked at results: only the sum of all holds for it.
    whole = len(spent) == number
    cost = search_cost(spent, number=wanted if isinstance(wanted, RandomTrials) and whole else None)
    logger.warning(f"{cost}.")
    return cost
