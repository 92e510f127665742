"""Writes docs/peft.md from what became of every cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import transformers

from .compare import TOLERANCE, Outcome
from .methods import ASKED, MODELS, OTHERS, Method, peft

Outcomes = Mapping[tuple[str, str], Outcome]

_INTRODUCTION = f"""# Parameter-efficient fine-tuning

`DPTrainer` takes a PEFT model, or any model with some parameters frozen, as it takes a full one:

```python
model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
trainer = DPTrainer(model=model, args=args, train_dataset=data, privacy=privacy)
```

In a task's YAML, `lora_rank` (with `lora_alpha`, `lora_target_modules`) adds LoRA, and `trainable` trains the
parameters whose names match a list of regular expressions, any subset of the model. `trainable: ["bias$"]` is BitFit,
and `trainable: ["bias$", "classifier"]` is BitFit with a classification head. A pattern that matches nothing is an
error.

Per-sample clipping covers exactly the parameters that train. The tables say on which toy models that was measured,
with every adapter moved off its start, in float64, against one sample at a time by plain autograd:

- **exact**: every norm, the clipped sum, and each parameter's part of it agree to {TOLERANCE:g}, with some samples
  clipped and some not.
- **refused**: training stops before the first release with an error that says where and why (listed below).
- **refused, but for `loop`**: as before, and `strategy="loop"`, which takes one sample at a time, trains it.
- –: PEFT itself does not do it on that model.
"""

_NOTES = """
## What the guarantee needs from you

- **Starts made from data.** EVA, CorDA and LoRA-GA compute an adapter's start from activations or gradients of
  samples, and CPT puts samples into the prompt. Neither clipping nor noise covers what they take. Compute such a
  start on public data only. PiSSA and OLoRA use the weights alone.
- **AdaLoRA.** Its loss adds a regulariser that holds no data; the per-sample losses leave it out, and the comparison
  with the model's own loss refuses the mismatch. Set `orth_reg_weight=0`. Ranks are allocated by
  `update_and_allocate`, which reads `.grad`. Call it from a callback's `on_optimizer_step`, as below: there `.grad` is
  the noised mean, so the allocation is post-processing. Never feed it gradients computed by yourself. A test checks
  what it sees.

  ```python
  class Allocate(TrainerCallback):
      def on_optimizer_step(self, args, state, control, model=None, **kwargs):
          model.base_model.update_and_allocate(state.global_step)
  ```
- **Dropout** of adapters (`lora_dropout`) is drawn once for a sample's forward and backward pass, so its norm is that
  of the very gradient that is added.
- **DoRA** takes the norm of the adapted weight as a constant, in PEFT as in its paper. So does the per-sample gradient.
- **New heads** that PEFT adds to `modules_to_save` for a task type train, are clipped and get noise with the adapters.
- **Adapters that are not active** do not train and get no noise. PEFT freezes them.
- **The base model's weights** are not protected by training an adapter. They are as private as their own training was.
"""


def peft_page(outcomes: Outcomes) -> str:
    """The page in Markdown: the tables, why something is refused, and what is left to the user."""
    lines = [_INTRODUCTION]
    lines += _table("Methods", ASKED, outcomes)
    lines += _table("Other methods of PEFT", OTHERS, outcomes)
    lines += _refusals(outcomes)
    lines += [_NOTES]
    lines += [
        f"PEFT {peft.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__.split('+')[0]}, CPU. Written by "
        "`PYTHONPATH=tests python -m adapters --write docs/peft.md`; do not edit.",
    ]
    return "\n".join(lines) + "\n"


def _table(title: str, methods: Sequence[Method], outcomes: Outcomes) -> list[str]:
    return [
        f"## {title}",
        "",
        "| method | " + " | ".join(MODELS) + " |",
        "| --- |" + " --- |" * len(MODELS),
        *(table_row(method, [outcomes[method.name, title] for title in MODELS]) for method in methods),
        "",
    ]


def table_row(method: Method, outcomes: Sequence[Outcome]) -> str:
    return " | ".join((f"| {method.name}", *(_cell(outcome) for outcome in outcomes))) + " |"


def _cell(outcome: Outcome) -> str:
    if outcome.verdict == "not in PEFT":
        return f"– {outcome.reason}"
    return outcome.verdict + (", but for `loop`" if outcome.by_loop else "")


def _refusals(outcomes: Outcomes) -> list[str]:
    """Each method's first refusal in the words of its error."""
    lines = ["## Why refused", "", "| method | first of its errors |", "| --- | --- |"]
    seen = set()
    for (method, _), outcome in outcomes.items():
        if outcome.verdict == "refused" and method not in seen:
            seen.add(method)
            lines.append(f"| {method} | {outcome.reason.replace('|', chr(92) + '|')} |")
    return lines
