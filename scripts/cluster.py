"""What a logical batch takes on clusters of 8 to 512 GPUs, by a model of computing and sending.

    python scripts/cluster.py                           # the models and network below
    python scripts/cluster.py --private-over-plain 1.05 --between-machines 25e9
    python scripts/cluster.py --write docs/scaling.md   # the page's table and figure

Nothing here was timed on a cluster: the page says which numbers are measured and which are assumed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.figures import Curve, Panel, draw_panels
from bench.report import Spread, table, with_section

SUM_BYTES = 4  # clipped sums are reduced in float32
RANKS = (8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is trained.

    Args:
        name: Its name.
        parameters: P.
        tokens: T of a sample.
        batch: B, samples of a logical batch.
        micro_batch: Samples of a micro-batch.
    """

    name: str
    parameters: float
    tokens: int
    batch: int
    micro_batch: int


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What it is trained on.

    Args:
        flops: Multiplications and additions a second of one GPU, as training reaches them.
        within_machine: Bytes a second and GPU between the GPUs of a machine.
        between_machines: The same between machines.
        latency: Seconds a step of a collective call.
        gpus_per_machine: Number of GPUs.
        noise_seconds: Seconds an entry, for drawing and adding noise.
        weight_bytes: Bytes of a gathered weight.
        private_over_plain: Seconds of a private micro-batch over those of a plain one.
        imbalance: Work of the busiest rank over the mean.
    """

    flops: float = 4e14
    within_machine: float = 3e11
    between_machines: float = 5e10
    latency: float = 1e-5
    gpus_per_machine: int = 8
    noise_seconds: float = 2e-11
    weight_bytes: int = 2
    private_over_plain: float = 1.1
    imbalance: float = 1.01


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of one logical batch, and bytes that each GPU sends."""

    computing: float
    sending: float
    noise: float
    sent: float

    @property
    def seconds(self) -> float:
        """All together; ours sends when it has computed."""
        return self.computing + self.sending + self.noise


MODELS = (
    Model(name="GPT-2, 124M", parameters=124e6, tokens=100, batch=1024, micro_batch=16),
    Model(name="RoBERTa-large, 355M", parameters=355e6, tokens=128, batch=2048, micro_batch=16),
    Model(name="Llama, 8B", parameters=8e9, tokens=512, batch=4096, micro_batch=4),
)


def bytes_sent(model: Model, cluster: Cluster, ranks: int, *, sharded: bool) -> float:
    """Bytes that each GPU sends for one logical batch, ours and plain alike, in rings."""
    return sum_bytes(model, ranks, sharded=sharded) + weight_bytes(model, cluster, ranks, sharded=sharded)


def sum_bytes(model: Model, ranks: int, *, sharded: bool) -> float:
    """Of these for sums: scattered and gathered once, or, sharded, scattered for each micro-batch."""
    times = micro_batches(model, ranks) if sharded else 2
    return times * (ranks - 1) / ranks * SUM_BYTES * model.parameters


def weight_bytes(model: Model, cluster: Cluster, ranks: int, *, sharded: bool) -> float:
    """Of these for weights: sharded ones are gathered for each forward and each backward pass."""
    times = 2 * micro_batches(model, ranks) if sharded else 0
    return times * (ranks - 1) / ranks * cluster.weight_bytes * model.parameters


def micro_batches(model: Model, ranks: int) -> int:
    """Micro-batches of the rank that has most."""
    samples = -(-model.batch // ranks)
    return -(-samples // model.micro_batch)


def private_step(model: Model, cluster: Cluster, ranks: int, *, sharded: bool) -> Step:
    """One release: all micro-batches, then what must be sent, noise on a slice of the entries."""
    plain = model.batch * 6 * model.parameters * model.tokens / cluster.flops / ranks
    computing = plain * cluster.private_over_plain * cluster.imbalance
    speed = bandwidth(cluster, ranks)
    # FSDP2 gathers the next block's weights while it computes.
    gathering = weight_bytes(model, cluster, ranks, sharded=sharded) / speed
    calls = 3 * micro_batches(model, ranks) if sharded else 2
    return Step(
        computing=computing,
        sending=max(0.0, gathering - computing)
        + sum_bytes(model, ranks, sharded=sharded) / speed
        + calls * cluster.latency * (ranks - 1),
        noise=cluster.noise_seconds * model.parameters / ranks,
        sent=bytes_sent(model, cluster, ranks, sharded=sharded),
    )


def plain_seconds(model: Model, cluster: Cluster, ranks: int, *, sharded: bool) -> float:
    """The ordinary step, whose sending hides behind computing where there is enough of it.

    Replicated, only the last micro-batch's backward pass, two thirds of its computing, can hide any.
    """
    own = private_step(model, replace(cluster, private_over_plain=1.0), ranks, sharded=sharded)
    sending = own.sent / bandwidth(cluster, ranks)
    hidden = own.computing if sharded else own.computing * 2 / 3 / micro_batches(model, ranks)
    return own.computing + max(0.0, sending - hidden)


def bandwidth(cluster: Cluster, ranks: int) -> float:
    """A ring is as fast as its slowest link."""
    return cluster.within_machine if ranks <= cluster.gpus_per_machine else cluster.between_machines


def page(models: Sequence[Model], cluster: Cluster) -> tuple[str, bytes]:
    """The table and the figure."""
    rows, panels = [], []
    for sharded in (False, True):
        curves = []
        for model in models:
            ratios = []
            for ranks in RANKS:
                step = private_step(model, cluster, ranks, sharded=sharded)
                ratio = step.seconds / plain_seconds(model, cluster, ranks, sharded=sharded)
                efficiency = (
                    private_step(model, cluster, 8, sharded=sharded).seconds * 8 / (step.seconds * ranks)
                )
                ratios.append(Spread(low=ratio, middle=ratio, high=ratio))
                if ranks in (8, 64, 512):
                    rows.append((
                        model.name, "FSDP2" if sharded else "DDP", ranks, f"{step.computing:.3f}",
                        f"{step.sending:.3f}", f"{step.noise * 1e3:.2f}", f"{step.sent / 1e9:.2f}",
                        f"{ratio:.2f}", f"{efficiency:.2f}",
                    ))  # fmt: skip
            curves.append(Curve(label=model.name, positions=[float(r) for r in RANKS], spreads=ratios))
        panels.append(Panel(axis="GPUs", fixed="FSDP2" if sharded else "DDP", curves=curves))
    header = (
        *("model", "way", "GPUs", "computing s", "sending s", "noise ms", "GB sent a GPU"),
        *("time / plain", "use of a GPU / on 8"),
    )
    return table(header, rows), draw_panels(panels)


def main() -> None:
    """Parses, prints, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in vars(Cluster()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument(
        "--write", type=Path, help="a page with the marks <!-- cluster --> and <!-- /cluster -->"
    )
    arguments = vars(parser.parse_args())
    target = arguments.pop("write")
    cluster = Cluster(**arguments)
    text, figure = page(MODELS, cluster)
    print(text)
    if target is not None:
        settings = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in vars(cluster).items())
        picture = target.parent / "figures" / "cluster.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(figure)
        text = f"*{settings}*\n\n{text}\n\n![time over plain](figures/cluster.png)"
        target.write_text(with_section(target.read_text(encoding="utf-8"), "cluster", text), encoding="utf-8")


if __name__ == "__main__":
    main()
