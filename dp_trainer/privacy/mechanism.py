"""One release, as far as privacy is concerned: what ε depends on but for the steps and δ.

Neighbouring datasets differ in one sample, or in one user with all their
samples; "sample" below means whichever is protected. Two relations:

- ``add_or_remove_one``: one of them has a sample more. The clipped sum moves by up to R.
- ``replace_one``: both have equally many, and one sample differs. The sum moves by up to 2R. The
  noise multiplier stays noise std over R, so the same noise gives a larger ε.

**Shuffling.** Each epoch puts every sample into exactly one of its ceil(N / B) releases, in an order that
whoever attacks may know: nothing is claimed for the order being random. So one sample is in at most
``ceil(steps / ceil(N / B))`` of all releases, and the run is that many Gaussian releases without sampling.
That holds for replaced samples only: one that is taken away lets all that follow move up, so that
every later batch of the pass changes by two samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import dp_accounting
from scipy import stats  # type: ignore[import-untyped]

from dp_trainer.errors import ConfigurationError

SAMPLINGS = ("poisson", "full_batch", "shuffle")
NEIGHBOURING_RELATIONS = ("add_or_remove_one", "replace_one")
SMALLEST_DELTA = 1e-10


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """One release: everything ε depends on but the steps and δ.

    Args:
        dataset_size: Public number N of samples. At most this many may be at hand.
        sampling: ``"poisson"``, ``"full_batch"`` or ``"shuffle"``.
        sampling_probability: q, in (0, 1]; 1 for full batches and for shuffling, which claims no amplification.
        batch_cap: Largest logical batch that is processed; above N it never acts, not even with the sample
            that a neighbour has more. With shuffling the logical batch itself.
        noise_multiplier: Noise std over sensitivity R; 0 means no privacy.
        neighbouring_relation: ``"add_or_remove_one"`` or ``"replace_one"``.

    Raises:
        ConfigurationError: If a value is out of range.
    """

    dataset_size: int
    sampling: str
    sampling_probability: float
    batch_cap: int
    noise_multiplier: float
    neighbouring_relation: str = "add_or_remove_one"

    def __post_init__(self) -> None:
        for name in ("dataset_size", "batch_cap"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigurationError(
                    f"Mechanism.{name} is {value!r}. It must be a positive whole number."
                )
        for name, choices in (("sampling", SAMPLINGS), ("neighbouring_relation", NEIGHBOURING_RELATIONS)):
            if getattr(self, name) not in choices:
                raise ConfigurationError(
                    f"Mechanism.{name} is {getattr(self, name)!r}. Choose one of {', '.join(choices)}."
                )
        if not 0.0 < self.sampling_probability <= 1.0:
            raise ConfigurationError(
                f"Mechanism.sampling_probability is {self.sampling_probability!r}. It must be in (0, 1]: "
                "the expected batch size over the dataset size."
            )
        if self.sampling != "poisson" and self.sampling_probability != 1.0:
            kind = (
                "full batches have"
                if self.sampling == "full_batch"
                else "shuffled batches are accounted with"
            )
            raise ConfigurationError(
                f"Mechanism: {kind} sampling_probability 1, not {self.sampling_probability!r}."
            )
        if self.sampling == "shuffle" and not self.replaces:
            raise ConfigurationError(
                "Mechanism: with sampling 'shuffle' a sample that is added or removed moves others between batches. "
                "Use neighbouring_relation 'replace_one', or Poisson sampling."
            )
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0.0):
            raise ConfigurationError(
                f"Mechanism.noise_multiplier is {self.noise_multiplier!r}. It must be finite and not negative."
            )

    @property
    def cap_probability(self) -> float:
        """w: probability that the other samples alone reach the cap; neighbours have at most N + 1, or N if replaced."""
        # Neighbours by replacement have N samples both: one, and N - 1 others.
        others = self.dataset_size - 1 if self.replaces else self.dataset_size
        if self.sampling != "poisson" or self.batch_cap > others:
            return 0.0
        return float(stats.binom.sf(self.batch_cap - 1, others, self.sampling_probability))

    @property
    def is_unsampled(self) -> bool:
        """Whether no amplification by sampling is claimed, so that the closed form applies."""
        return self.sampling_probability == 1.0 and self.cap_probability == 0.0

    @property
    def replaces(self) -> bool:
        """Whether neighbours differ by replacing a sample."""
        return self.neighbouring_relation == "replace_one"

    @property
    def shift(self) -> float:
        """How far one sample can move the clipped sum, in units of R."""
        return 2.0 if self.replaces else 1.0

    def releases_with_one_sample(self, steps: int) -> int:
        """In how many of so many releases one sample can take part at most."""
        if self.sampling != "shuffle":
            return steps
        return math.ceil(steps / steps_of_one_pass(self.dataset_size, self.batch_cap))

    def distance(self, steps: int) -> float:
        """Distance of the means of the two outputs in standard deviations, if unsampled; infinite without noise."""
        if steps == 0:
            return 0.0
        if self.noise_multiplier == 0.0:
            return math.inf
        return self.shift * math.sqrt(self.releases_with_one_sample(steps)) / self.noise_multiplier

    def event(self, steps: int) -> dp_accounting.DpEvent:
        """The run in dp_accounting's vocabulary, for records and other accountants.

        It names the larger of the two datasets that are compared. The relation is
        not part of an event: hand it to the accountant.
        """
        if self.is_unsampled:
            release = dp_accounting.GaussianDpEvent(self.noise_multiplier)
        elif self.cap_probability == 0.0:
            release = dp_accounting.PoissonSampledDpEvent(
                self.sampling_probability, dp_accounting.GaussianDpEvent(self.noise_multiplier)
            )
        else:
            release = dp_accounting.TruncatedSubsampledGaussianDpEvent(
                dataset_size=self.dataset_size + (0 if self.replaces else 1),
                sampling_probability=self.sampling_probability,
                truncated_batch_size=self.batch_cap,
                noise_multiplier=self.noise_multiplier,
            )
        return dp_accounting.SelfComposedDpEvent(release, self.releases_with_one_sample(steps))


def mechanism_of(
    *,
    dataset_size: int,
    sampling: str,
    expected_batch_size: int,
    noise_multiplier: float,
    batch_cap: int | None = None,
    neighbouring_relation: str = "add_or_remove_one",
) -> Mechanism:
    """The mechanism of a logical batch size: settles q and the cap.

    Args:
        dataset_size: N.
        sampling: As in :class:`Mechanism`.
        expected_batch_size: B; N for full batches.
        noise_multiplier: Noise std over sensitivity.
        batch_cap: Largest logical batch under Poisson sampling; B + 6√B if not given.
        neighbouring_relation: As in :class:`Mechanism`.

    Raises:
        ConfigurationError: If the numbers contradict each other.
    """
    size, batch = dataset_size, expected_batch_size
    if isinstance(batch, bool) or not isinstance(batch, int) or not 1 <= batch <= size:
        raise ConfigurationError(
            f"an expected logical batch of {batch!r} does not fit a training set of {size}. Lower "
            "expected_batch_size (or per_device_train_batch_size × gradient_accumulation_steps)."
        )
    if sampling == "full_batch" and batch != size:
        raise ConfigurationError(
            f"expected_batch_size is {batch}, but full batches have {size} samples. Leave it out, or set "
            "sampling='poisson'."
        )
    if sampling != "poisson" and batch_cap is not None:
        raise ConfigurationError(
            f"batch_cap {batch_cap} has no meaning with sampling='{sampling}'. Leave it out."
        )
    cap = batch
    if sampling == "poisson":
        cap = batch_cap or default_batch_cap(dataset_size=size, expected_batch_size=batch)
        if cap < batch:
            raise ConfigurationError(
                f"batch_cap is {cap}, below the expected logical batch of {batch}: most draws would be cut, and "
                "each cut costs privacy. Raise it, or leave it out."
            )
    return Mechanism(
        dataset_size=size,
        sampling=sampling,
        sampling_probability=batch / size if sampling == "poisson" else 1.0,
        batch_cap=cap,
        noise_multiplier=noise_multiplier,
        neighbouring_relation=neighbouring_relation,
    )


def default_batch_cap(*, dataset_size: int, expected_batch_size: int) -> int:
    """Six standard deviations above the expected batch size: rarely reached, so it costs almost no ε."""
    # One more than all there are: the cap must not act either where a neighbour has a sample more.
    return min(dataset_size + 1, math.ceil(expected_batch_size + 6.0 * math.sqrt(expected_batch_size)))


def steps_of_one_pass(dataset_size: int, batch_size: int) -> int:
    """How many logical batches show each sample once or, drawn at random, about once."""
    return -(-dataset_size // batch_size)


def check_delta(delta: float, place: str) -> None:
    """Checks that δ is one that double precision can account for.

    Raises:
        ConfigurationError: If it is not in [1e-10, 1).
    """
    if not (math.isfinite(delta) and SMALLEST_DELTA <= delta < 1.0):
        raise ConfigurationError(
            f"{place}: delta is {delta!r}. It must be in [{SMALLEST_DELTA:g}, 1), well below one over the dataset "
            "size; smaller values drown in the rounding of the accounting."
        )
