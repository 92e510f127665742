"""Measures what privacy costs: dp_trainer against the plain step, and against Opacus.

    python scripts/benchmark.py                                # steps of true size: time and peak memory
    python scripts/benchmark.py --cases roberta-base --rounds 20
    python scripts/benchmark.py --micro-batches 1 8 --rounds 10 4
    python scripts/benchmark.py --scaling                      # over length, micro-batch and model size
    python scripts/benchmark.py --overhead                     # calls, and what each costs
    python scripts/benchmark.py --throughput --gpt2-tokenizer DIR --roberta-tokenizer DIR --sst2-data DIR

A step is forward, backward, clipping, noise and fused AdamW on fixed random
micro-batches, models of the true size with random weights, float32, one thread.
Each contender takes turns with the plain step, and each time is divided by the
plain step's of the same round; reported are the median ratio and its quartiles.
Peak memory is that of a process that runs one contender and nothing else,
libraries and optimizer state included. docs/performance.md says more.

Results go to standard output (markdown) and, as JSON and PNG, to --output;
``--write docs/performance.md`` also replaces the mode's section of that page.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

# Thread counts are read when torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from bench import overhead, scaling, steps
from bench.cases import CASES, DEFAULT_CASES
from bench.contenders import CONTENDERS
from bench.device import Device
from bench.report import Report, environment, has_section, in_words
from bench.texts import RUNS, Shape

MODES = ("steps", "scaling", "throughput", "overhead")
CHILD_TASKS = {
    "step-memory": steps.memory_task,
    "step-time": steps.time_task,
    "scaling": scaling.point_task,
    "overhead": overhead.model_task,
    "bare-calls": overhead.bare_calls_task,
}


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; unknown flags and names are refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    mode = parser.add_mutually_exclusive_group()
    for name in MODES[1:]:
        mode.add_argument(f"--{name}", dest="mode", action="store_const", const=name, default="steps")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(DEFAULT_CASES))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument(
        "--micro-batches",
        nargs="+",
        type=int,
        default=[1],
        metavar="K",
        help="micro-batches of a step; Opacus runs with 1 only",
    )
    parser.add_argument(
        "--rounds",
        nargs="+",
        type=int,
        default=[10],
        metavar="N",
        help="steps timed for each contender, at least 2; one number, or one for each of --micro-batches",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--bf16", action="store_true", help="forward passes under bfloat16 autocast")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the mode's section of this page")
    parser.add_argument(
        "--add-to", type=Path, metavar="JSON", help="a steps.json; what it has and this run does not is kept"
    )
    parser.add_argument("--steps", type=int, default=10, help="with --throughput: optimizer steps of a run")
    parser.add_argument(
        "--accumulation", type=int, default=16, help="with --throughput: micro-batches of a step"
    )
    parser.add_argument("--width", type=int, default=128, help="with --throughput: of the models")
    parser.add_argument("--layers", type=int, default=4, help="with --throughput: of the models")
    parser.add_argument("--tasks", nargs="+", choices=RUNS, default=list(RUNS), help="with --throughput")
    parser.add_argument("--gpt2-tokenizer", type=Path, help="with --throughput: folder; runs E2E")
    parser.add_argument("--roberta-tokenizer", type=Path, help="with --throughput: folder; runs SST-2")
    parser.add_argument("--sst2-data", help="with --throughput: SST-2 as a folder or hub name")
    parser.add_argument("--tiny", action="store_true", help="with --scaling: two points a curve")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    check(parser, arguments)
    return arguments


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuses, before anything is measured, what would fail afterwards."""
    if min(arguments.rounds) < 2:
        parser.error("--rounds must be at least 2, for quartiles")
    if len(set(arguments.micro_batches)) != len(arguments.micro_batches) or min(arguments.micro_batches) < 1:
        parser.error("--micro-batches must be different positive numbers")
    if arguments.mode == "steps" and len(arguments.rounds) == 1:
        arguments.rounds *= len(arguments.micro_batches)
    if len(arguments.rounds) != (len(arguments.micro_batches) if arguments.mode == "steps" else 1):
        parser.error("--rounds must be one number, or one for each of --micro-batches")
    if arguments.steps < 2:
        parser.error("--steps must be at least 2: rates after the first step need a second")
    if arguments.accumulation < 1:
        parser.error("--accumulation must be at least 1")
    if arguments.width < 32 or arguments.width % 32 or arguments.layers < 1:
        parser.error("--width must be a multiple of 32, and --layers at least 1")
    if arguments.mode == "throughput" and arguments.device != "cpu":
        parser.error("--throughput runs on the CPU only")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU. Install a build of torch for it, or leave it out")
    arguments.earlier = None
    if arguments.add_to:
        if arguments.mode != "steps" or not arguments.add_to.is_file():
            parser.error(f"--add-to {arguments.add_to}: needs the steps.json of an earlier run of this mode")
        saved = json.loads(arguments.add_to.read_text("utf-8"))
        here = environment(Device(name=arguments.device, bf16=arguments.bf16))
        if saved["environment"] != {**here, "threads": 1}:
            parser.error(
                f"--add-to {arguments.add_to}: was measured elsewhere: {in_words(saved['environment'])}"
            )
        arguments.earlier = saved["steps"]
    page = arguments.write
    if page is not None and not (page.is_file() and has_section(page.read_text("utf-8"), arguments.mode)):
        parser.error(
            f"--write {page}: the page needs <!-- {arguments.mode} --> and <!-- /{arguments.mode} -->, each once"
        )


def measure(arguments: argparse.Namespace, device: Device) -> Report:
    """Runs the mode."""
    if arguments.mode == "scaling":
        sweeps = scaling.TINY_SWEEPS if arguments.tiny else scaling.SWEEPS
        return scaling.measure(sweeps=sweeps, rounds=arguments.rounds[0], device=device)
    if arguments.mode == "overhead":
        return overhead.measure(rounds=arguments.rounds[0], device=device)
    if arguments.mode == "throughput":
        # The Trainer takes seconds to load, which the children of the other modes would pay one by one.
        from bench import throughput

        return throughput.measure(
            tasks=arguments.tasks,
            gpt2_tokenizer=arguments.gpt2_tokenizer,
            roberta_tokenizer=arguments.roberta_tokenizer,
            sst2_data=arguments.sst2_data,
            rounds=arguments.rounds[0],
            steps=arguments.steps,
            accumulation=arguments.accumulation,
            shape=Shape(width=arguments.width, layers=arguments.layers),
        )
    return steps.measure(
        cases=arguments.cases,
        contenders=arguments.contenders,
        micro_batches=arguments.micro_batches,
        rounds=arguments.rounds,
        device=device,
        earlier=arguments.earlier,
    )


def main() -> None:
    """Parses, measures, reports."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    if arguments.child:
        print(json.dumps(CHILD_TASKS[arguments.child["task"]](**arguments.child["settings"])))
        return
    device = Device(name=arguments.device, bf16=arguments.bf16)
    print(in_words(environment(device)), flush=True)
    report = measure(arguments, device)
    print(f"\n## {report.name}\n\n{report.text}\n")
    for path in report.save(arguments.output, arguments.write, device):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
