"""What a user may choose about an audit."""

from dataclasses import dataclass, field

from dp_trainer.errors import ConfigurationError

LAYERS = ("exact", "step", "one_run")


@dataclass(frozen=True, kw_only=True)
class AuditArguments:
    """How hard the audit tries; nothing here changes what is audited.

    More releases, canaries and steps cost time in proportion and let it see smaller faults.

    Raises:
        ConfigurationError: If a value is out of range.
    """

    audit_layers: list[str] = field(
        default_factory=lambda: list(LAYERS), metadata={"help": f"Which of {', '.join(LAYERS)} to run."}
    )
    audit_samples: int = field(
        default=6, metadata={"help": "Real samples whose contributions are measured one by one."}
    )
    audit_noise_entries: int = field(
        default=400_000,
        metadata={"help": "Entries of noise to collect, over as many releases as that takes."},
    )
    audit_draws: int = field(default=1_000, metadata={"help": "Logical batches to draw from the sampler."})
    audit_releases: int = field(
        default=600,
        metadata={
            "help": "Releases of the step layer with one canary; a quarter as many have many canaries."
        },
    )
    audit_step_canaries: int = field(
        default=32,
        metadata={"help": "Canaries that share a release, in the second setting of the step layer."},
    )
    audit_canaries: int = field(
        default=500, metadata={"help": "Canaries of the one-run layer; at most the public number of samples."}
    )
    audit_steps: int | None = field(
        default=None, metadata={"help": "Steps of the one-run layer; the run's own, at most 20, if left out."}
    )
    audit_false_alarm: float = field(
        default=1e-3, metadata={"help": "Chance that an audit of a correct run reports a contradiction."}
    )

    def __post_init__(self) -> None:
        if not self.audit_layers or not set(self.audit_layers) <= set(LAYERS):
            raise _wrong("audit_layers", self.audit_layers, f"must name some of {', '.join(LAYERS)}")
        for name, least in (
            *(("audit_samples", 2), ("audit_noise_entries", 10_000), ("audit_draws", 50)),
            *(("audit_releases", 60), ("audit_step_canaries", 2), ("audit_canaries", 20), ("audit_steps", 1)),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise _wrong(name, value, f"must be at least {least}, or there is too little to judge by")
        if not 1e-9 <= self.audit_false_alarm <= 0.05:
            raise _wrong("audit_false_alarm", self.audit_false_alarm, "must lie in [1e-9, 0.05]")


def _wrong(name: str, value: object, fact: str) -> ConfigurationError:
    return ConfigurationError(f"AuditArguments.{name} is {value!r}: it {fact}.")
