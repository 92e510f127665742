"""Times a whole private training step against the plain step and against Opacus.

    python scripts/benchmark.py                                # steps: time and peak memory
    python scripts/benchmark.py --cases roberta-base --rounds 20
    python scripts/benchmark.py --micro-batches 8              # a logical batch of eight micro-batches
    python scripts/benchmark.py --throughput --gpt2-tokenizer DIR --roberta-tokenizer DIR --sst2-data DIR

A step is forward, backward, clipping, noise and fused AdamW on fixed random
micro-batches, models of the true size with random weights, float32, one thread.
Each contender takes turns with the plain step, and each time is divided by the
plain step's of the same round, so that a busy machine slows both alike; reported
are the median ratio and its quartiles (plain is 1 by construction).
Peak memory is that of a process that runs one contender and nothing else,
libraries and optimizer state included.

Results go to standard output (markdown) and, as JSON and PNG, to --output.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

# Thread counts are read when torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Batch = dict[str, Tensor]
Step = Callable[[], None]

NOISE_MULTIPLIER = 0.6
LEARNING_RATE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model of true size, a micro-batch, and what Opacus needs changed to take the model."""

    model: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    for_opacus: Callable[[nn.Module, Batch], tuple[nn.Module, Batch]] = lambda model, batch: (model, batch)
    opacus_note: str = ""


def gpt2() -> nn.Module:
    """GPT-2, 124M parameters."""
    return transformers.GPT2LMHeadModel(transformers.GPT2Config())


def gpt2_batch() -> Batch:
    """4 samples of 100 tokens, as long as the E2E task allows."""
    input_ids_BT = torch.randint(0, 50257, (4, 100))
    return {"input_ids": input_ids_BT, "labels": input_ids_BT}


def gpt2_for_opacus(model: nn.Module, batch: Batch) -> tuple[nn.Module, Batch]:
    """Replaces Conv1D by Linear, unties the head, and repeats the position ids for each sample."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape)
            linear.weight, linear.bias = nn.Parameter(module.weight.detach().T.contiguous()), module.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    positions_BT = torch.arange(100).expand(4, -1).contiguous()
    return model, {**batch, "position_ids": positions_BT}


def roberta() -> nn.Module:
    """RoBERTa base with a classification head, 125M parameters."""
    config = transformers.RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=2
    )
    return transformers.RobertaForSequenceClassification(config)


def roberta_batch() -> Batch:
    """8 samples of 128 tokens."""
    return {
        "input_ids": torch.randint(3, 50265, (8, 128)),
        "attention_mask": torch.ones(8, 128, dtype=torch.long),
        "labels": torch.randint(0, 2, (8,)),
    }


def vit() -> nn.Module:
    """ViT small, 22M parameters."""
    config = transformers.ViTConfig(
        hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=10
    )
    return transformers.ViTForImageClassification(config)


def vit_batch() -> Batch:
    """4 images of 224 × 224 pixels."""
    return {"pixel_values": torch.randn(4, 3, 224, 224), "labels": torch.randint(0, 10, (4,))}


CASES = {
    "gpt2": Case(
        model=gpt2,
        batch=gpt2_batch,
        for_opacus=gpt2_for_opacus,
        opacus_note="for Opacus: Conv1D replaced by Linear, head untied (39M more parameters), position ids repeated",
    ),
    "roberta-base": Case(model=roberta, batch=roberta_batch),
    "vit-small": Case(model=vit, batch=vit_batch),
}
DEFAULT_CASES = ("gpt2", "roberta-base")


def plain_step(case: Case, micro_batches: int) -> Step:
    """The ordinary step: the model's own loss, averaged over each micro-batch and accumulated."""
    model, batch = case.model().train(), case.batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def step() -> None:
        for _ in range(micro_batches):
            (model(**batch).loss / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def private_step(case: Case, micro_batches: int) -> Step:
    """This package: automatic clipping, one forward and one backward."""
    from dp_trainer import AutomaticClipping, clipped_gradient_sum
    from dp_trainer.losses import per_sample_loss_for
    from dp_trainer.privacy.noise import NoiseGenerator

    model, batch = case.model().train(), case.batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    parameters, loss = dict(model.named_parameters()), per_sample_loss_for(model)
    clipping, noise, samples = AutomaticClipping(), NoiseGenerator(device="cpu"), len(batch["labels"])

    def step() -> None:
        clipped = clipped_gradient_sum(
            model, [batch] * micro_batches, per_sample_loss=loss, clipping=clipping, strategy="automatic"
        )
        noise_std = NOISE_MULTIPLIER * clipping.sensitivity
        for name, gradient in clipped.gradients.items():
            parameters[name].grad = noise.add_noise_(gradient, noise_std, divisor=samples * micro_batches)
        optimizer.step()
        optimizer.zero_grad()

    return step


def opacus_step(case: Case, grad_sample_mode: str) -> Step:
    """Opacus, flat clipping: "ghost" runs two backward passes, "hooks" stores per-sample gradients."""
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    model, batch = case.for_opacus(case.model().train(), case.batch())
    labels = batch.pop("labels")
    samples = len(labels)
    if labels.dim() == 2:
        labels = F.pad(labels[:, 1:], (0, 1), value=-100)
    made = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True),
        criterion=nn.CrossEntropyLoss(),
        # Only its length is read: it tells Opacus the expected batch size.
        data_loader=DataLoader(TensorDataset(torch.zeros(10 * samples)), batch_size=samples),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=grad_sample_mode,
    )
    module, optimizer = made[0], made[1]
    criterion = made[2] if grad_sample_mode == "ghost" else nn.CrossEntropyLoss()

    def step() -> None:
        logits = module(**batch).logits
        shape = {"shape": logits.shape} if grad_sample_mode == "ghost" and logits.dim() == 3 else {}
        criterion(logits.flatten(0, -2), labels.flatten(), **shape).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


CONTENDERS: dict[str, Callable[[Case, int], Step]] = {
    "plain": plain_step,
    "dp_trainer": private_step,
    "opacus-ghost": lambda case, _: opacus_step(case, "ghost"),
    "opacus-hooks": lambda case, _: opacus_step(case, "hooks"),
}


def child(task: str, case: str, contender: str, rounds: int, micro_batches: int) -> object:
    """Runs one measurement in a process of its own; returns its result, or None and the reason on paper.

    Own processes, since memory is a matter of the whole process, and since a
    contender that cannot take a model must not end the others.
    """
    command = [sys.executable, __file__, "--child", task, case, contender, "--rounds", str(rounds)]
    command += ["--micro-batches", str(micro_batches)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1][:200]
        print(f"\n{case}: {contender} ended with code {result.returncode}: {reason}", flush=True)
        return None
    return json.loads(result.stdout.splitlines()[-1])


def measure_memory(case: Case, contender: str, micro_batches: int) -> float:
    """Returns the peak of this process in GiB, after three steps."""
    torch.manual_seed(0)
    step = CONTENDERS[contender](case, micro_batches)
    for _ in range(3):
        step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, others KiB.
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def measure_time(case: Case, contender: str, rounds: int, micro_batches: int) -> dict[str, list[float]]:
    """Returns seconds of the plain step and of the contender, one a round; they take turns to begin."""
    steps = {}
    for name in dict.fromkeys(("plain", contender)):
        torch.manual_seed(0)
        steps[name] = CONTENDERS[name](case, micro_batches)
        steps[name]()  # the first step allocates optimizer state
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        for name in steps if turn % 2 else reversed(steps):
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def benchmark_case(
    name: str, contenders: list[str], rounds: int, micro_batches: int
) -> dict[str, dict[str, object]]:
    """Measures one case, prints its table and returns everything measured, by contender."""
    results: dict[str, dict[str, object]] = {}
    for contender in contenders:
        memory = child("memory", name, contender, rounds, micro_batches)
        seconds = None if memory is None else child("time", name, contender, rounds, micro_batches)
        if seconds is not None:
            ratios = [own / plain for own, plain in zip(seconds[contender], seconds["plain"], strict=True)]
            results[contender] = {"seconds": seconds, "ratios": ratios, "peak_gib": memory}
    print(f"\n### {name}: {CASES[name].model.__doc__} {micro_batches} × {CASES[name].batch.__doc__}\n")
    print("| step | median s | plain s beside it | time / plain (quartiles) | peak GiB | of plain |")
    print("| --- | --- | --- | --- | --- | --- |")
    for contender, result in results.items():
        low, middle, high = statistics.quantiles(result["ratios"], n=4)
        own, plain = (statistics.median(result["seconds"][key]) for key in (contender, "plain"))
        memory, plain_memory = result["peak_gib"], results.get("plain", {}).get("peak_gib", float("nan"))
        print(
            f"| {contender} | {own:.3f} | {plain:.3f} | {middle:.3f} ({low:.3f} to {high:.3f}) "
            f"| {memory:.2f} | {memory / plain_memory:.2f} |"
        )
    if CASES[name].opacus_note and any(contender.startswith("opacus") for contender in results):
        print(f"\n{CASES[name].opacus_note}", flush=True)
    return results


def plot(results: dict[str, dict[str, dict[str, object]]], path: Path) -> None:
    """Draws median ratios with quartiles, and peak memory, one group of bars a case."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 1.2 + 1.5 * len(results)), sharey=True)
    ticks: list[tuple[int, str]] = []
    for case, result in results.items():
        for contender, measured in result.items():
            row, color = -len(ticks), f"C{list(CONTENDERS).index(contender)}"
            low, middle, high = statistics.quantiles(measured["ratios"], n=4)
            left.barh(row, middle, xerr=[[middle - low], [high - middle]], color=color, capsize=3)
            left.text(high + 0.02, row, f"{middle:.2f}", va="center")
            right.barh(row, measured["peak_gib"], color=color)
            ticks.append((row, f"{case}: {contender}"))
    left.set_yticks([row for row, _ in ticks], [label for _, label in ticks])
    left.axvline(1, color="black", linewidth=0.8)
    left.set_xlabel("step time / plain step, median with quartiles")
    right.set_xlabel("peak memory of the process, GiB")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def environment(rounds: int) -> dict[str, object]:
    """What the figures depend on."""
    libraries = ("torch", "transformers", *(("opacus",) if find_spec("opacus") else ()))
    return {
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        **{library: version(library) for library in libraries},
    }


def parse_arguments() -> argparse.Namespace:
    """Reads the command line; unknown flags and names are refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(DEFAULT_CASES))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=10, help="steps timed for each contender, at least 2")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"))
    parser.add_argument(
        "--micro-batches",
        type=int,
        default=1,
        help="micro-batches of a step; more than one leaves Opacus out",
    )
    parser.add_argument("--throughput", action="store_true", help="whole runs on real text instead of steps")
    parser.add_argument("--steps", type=int, default=10, help="with --throughput: optimizer steps of a run")
    parser.add_argument("--gpt2-tokenizer", type=Path, help="with --throughput: folder; runs E2E")
    parser.add_argument("--roberta-tokenizer", type=Path, help="with --throughput: folder; runs SST-2")
    parser.add_argument("--sst2-data", help="with --throughput: SST-2 as a folder or hub name")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2, for quartiles")
    return arguments


def main() -> None:
    """Parses, measures, reports."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    if arguments.child:
        task, case, contender = arguments.child
        if task == "memory":
            print(json.dumps(measure_memory(CASES[case], contender, arguments.micro_batches)))
        else:
            print(json.dumps(measure_time(CASES[case], contender, arguments.rounds, arguments.micro_batches)))
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    report: dict[str, object] = {"environment": environment(arguments.rounds)}
    print(", ".join(f"{key} {value}" for key, value in report["environment"].items()), flush=True)
    if arguments.throughput:
        import throughput

        report["runs"] = throughput.measure(
            gpt2_tokenizer=arguments.gpt2_tokenizer,
            roberta_tokenizer=arguments.roberta_tokenizer,
            sst2_data=arguments.sst2_data,
            rounds=arguments.rounds,
            steps=arguments.steps,
        )
        (arguments.output / "throughput.json").write_text(json.dumps(report, indent=2, default=vars))
        return
    contenders = list(arguments.contenders)
    if not find_spec("opacus"):
        contenders = [name for name in contenders if not name.startswith("opacus")]
        print("opacus is not installed: left out")
    if arguments.micro_batches > 1:
        contenders = [name for name in contenders if not name.startswith("opacus")]
    cases = {
        name: benchmark_case(name, contenders, arguments.rounds, arguments.micro_batches)
        for name in arguments.cases
    }
    report["cases"] = cases
    (arguments.output / "steps.json").write_text(json.dumps(report, indent=2))
    plot(cases, arguments.output / "steps.png")
    print(f"\nwrote steps.json and steps.png to {arguments.output}")


if __name__ == "__main__":
    main()
