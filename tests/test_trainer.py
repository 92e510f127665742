"""DPTrainer as a user meets it: the same run as Trainer's, with a guarantee; and the faults of others."""

from __future__ import annotations

import json
import logging
import math
import secrets
import shutil

import pytest
import torch
import transformers
from cases import MODEL_CASES, VOCABULARY
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from dp_trainer import (
    CertificateError,
    ConfigurationError,
    DPTrainer,
    PrivacyArguments,
    PrivacyBudgetError,
    UnsupportedOperationError,
    freeze_batch_norm,
)
from dp_trainer.gradients import book_keeping

CASES = {case.name: case for case in MODEL_CASES}
SAMPLES = 24
NO_NOISE = {"noise_multiplier": 0.0, "target_delta": 1e-3}


def toy_data(samples: int = SAMPLES, lengths: tuple[int, int] = (3, 12), seed: int = 0) -> list[dict]:
    """Classification by which half of the vocabulary the tokens come from."""
    generator = torch.Generator().manual_seed(seed)

    def one() -> dict:
        length = int(torch.randint(lengths[0], lengths[1] + 1, (1,), generator=generator))
        label = int(torch.randint(0, 2, (1,), generator=generator))
        ids = torch.randint(3, VOCABULARY // 2, (length,), generator=generator) + label * (VOCABULARY // 2)
        return {"input_ids": ids.tolist(), "attention_mask": [1] * length, "labels": label}

    return [one() for _ in range(samples)]


def pad(samples: list[dict]) -> dict[str, torch.Tensor]:
    longest = max(len(sample["input_ids"]) for sample in samples)
    padded = {
        key: torch.tensor([sample[key] + [0] * (longest - len(sample[key])) for sample in samples])
        for key in ("input_ids", "attention_mask")
    }
    return {**padded, "labels": torch.tensor([sample["labels"] for sample in samples])}


def arguments(path, **changes) -> TrainingArguments:
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    return TrainingArguments(str(path), **settings)


def trainer(path, *, model=None, data=None, privacy=None, collator=pad, extra=None, **changes) -> DPTrainer:
    return DPTrainer(
        model=CASES["bert-classifier"].build() if model is None else model,
        args=arguments(path, **changes),
        train_dataset=toy_data() if data is None else data,
        eval_dataset=toy_data(8, seed=1),
        data_collator=collator,
        privacy=PrivacyArguments(**(privacy or {"noise_multiplier": 1.0, "target_delta": 1e-3})),
        **(extra or {}),
    )


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


# The same run as Trainer's.


@pytest.mark.filterwarnings("ignore:noise_multiplier 0")
@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize("name", ["bert-classifier", "gpt2-tied"])
def test_without_noise_and_clipping_it_is_the_plain_trainer(tmp_path, name, optim):
    data = toy_data(lengths=(6, 6))  # of one length, so that a token mean and a mean of means agree
    if name == "gpt2-tied":
        # The first label predicts nothing, yet the plain Trainer counts it when it divides.
        data = [{**sample, "labels": [-100, *sample["input_ids"][1:]]} for sample in data]
    settings = {
        "optim": optim,
        "learning_rate": 1e-3,
        "max_steps": 5,
        "lr_scheduler_type": "linear",
        "adam_epsilon": 1e-4,
    }
    plain = Trainer(
        model=CASES[name].build(),
        args=arguments(
            tmp_path,
            **settings,
            per_device_train_batch_size=SAMPLES,
            gradient_accumulation_steps=1,
            max_grad_norm=0.0,
        ),
        train_dataset=data,
        data_collator=pad,
    )
    private = trainer(
        tmp_path,
        model=CASES[name].build(),
        data=data,
        privacy={**NO_NOISE, "sampling": "full_batch", "clipping": "flat", "clipping_norm": 1e6},
        **settings,
    )
    start = weights(plain.model)
    assert torch.equal(start, weights(private.model))
    plain.train()
    private.train()
    assert (weights(plain.model) - start).norm() > 1e-4
    assert (weights(plain.model) - weights(private.model)).abs().max() < 1e-6


def test_any_micro_batch_size_gives_the_same_weights(tmp_path):
    """Accumulation that keeps only the last micro-batch, or half of the data, was published."""
    privacy = {
        "noise_multiplier": 1.0,
        "target_delta": 1e-3,
        "sampling": "full_batch",
        "insecure_noise_seed": 7,
    }
    runs = []
    for micro, accumulation, tokens in ((24, 1, None), (4, 6, None), (1, 24, None), (4, 6, 40)):
        run = trainer(
            tmp_path,
            privacy={**privacy, "micro_batch_tokens": tokens},
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
        )
        run.train()
        runs.append((weights(run.model), run.plan.epsilon, run.state.global_step, run.accountant.steps_spent))
    for other in runs[1:]:
        torch.testing.assert_close(other[0], runs[0][0], rtol=1e-5, atol=1e-6)
        assert other[1:] == runs[0][1:]
    assert runs[0][2] == runs[0][3] == 3


def test_everything_a_trainer_user_expects(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(state.global_step)

    def accuracy(prediction):
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    model = CASES["bert-classifier"].build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    run = trainer(
        tmp_path,
        model=model,
        extra={"callbacks": [Watch()], "compute_metrics": accuracy, "optimizers": (optimizer, scheduler)},
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=1,
        dataloader_num_workers=2,
        label_smoothing_factor=0.1,
        max_steps=4,
        include_num_input_tokens_seen="no",
    )
    result = run.train()
    assert seen == [1, 2, 3, 4]
    assert result.global_step == 4
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [1, 2, 3, 4]
    epsilons = [entry["epsilon"] for entry in logs]
    assert epsilons == sorted(epsilons)
    assert 0 < epsilons[0] < epsilons[-1]
    assert run.plan.epsilon <= epsilons[-1] <= run.plan.epsilon + 1e-4
    assert [e["step"] for e in run.state.log_history if "eval_accuracy" in e] == [2, 4]
    assert run.evaluate()["eval_accuracy"] >= 0
    assert run.predict(toy_data(5)).predictions.shape == (5, 2)
    run.save_model(str(tmp_path / "model"))
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert torch.equal(weights(again), weights(run.model))
    statement = json.loads((tmp_path / "model" / "privacy_statement.json").read_text())
    assert statement["steps"] == 4
    assert statement["epsilon"] == pytest.approx(run.accountant.epsilon)


def test_epochs_count_steps_as_the_trainer_does(tmp_path):
    run = trainer(tmp_path, max_steps=-1, num_train_epochs=2)
    assert run.plan.steps == 2 * math.ceil(SAMPLES / 8)
    run.train()
    assert run.state.global_step == run.accountant.steps_spent == run.plan.steps
    assert run.state.epoch == pytest.approx(2.0)


def test_epochs_of_full_batches_are_single_steps(tmp_path):
    run = trainer(
        tmp_path,
        max_steps=-1,
        num_train_epochs=2,
        privacy={"noise_multiplier": 1.0, "target_delta": 1e-3, "sampling": "full_batch"},
    )
    assert (run.plan.steps, run.plan.sampling_probability, run.plan.divisor) == (2, 1.0, SAMPLES)
    run.train()
    assert run.state.global_step == 2


def test_low_rank_adapters_and_bfloat16(tmp_path):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        model = peft.get_peft_model(
            CASES["bert-classifier"].build(),
            peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear"),
        )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = trainer(tmp_path, model=model, bf16=True)
    run.train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
    assert run.certificate.tolerance > 0.01


# The guarantee.


def _grads_of_one_step(run: DPTrainer) -> dict[str, torch.Tensor]:
    grads = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            grads.update({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})

    run.add_callback(Keep())
    run.train()
    return grads


@pytest.mark.filterwarnings("ignore:noise_multiplier 0")
@pytest.mark.parametrize("bound", [1e-3, 0.1, 10.0])
def test_the_clipped_sum_is_bounded_and_follows_the_bound(tmp_path, bound):
    """Clipping silently off gave a sum of 8287 where 64 was legal."""
    privacy = {**NO_NOISE, "sampling": "full_batch", "clipping": "flat", "clipping_norm": bound}
    grads = _grads_of_one_step(trainer(tmp_path, privacy=privacy, max_steps=1))
    size = float(torch.cat([g.flatten() for g in grads.values()]).norm())
    assert 0 < size <= bound * (1 + 1e-5)
    if bound < 0.01:
        assert size > 0.1 * bound


def _noise_only(tmp_path, **changes) -> tuple[DPTrainer, torch.Tensor]:
    """One release whose samples contribute nothing visible: clipped to a billionth of the noise."""
    model = CASES["bert-classifier"].build()
    model.unused = nn.Parameter(torch.zeros(200_000))
    privacy = {
        "noise_multiplier": 2.0,
        "target_delta": 1e-3,
        "clipping": "flat",
        "clipping_norm": 3.0,
        **changes,
    }
    run = trainer(tmp_path, model=model, privacy=privacy, max_steps=1, learning_rate=0.0)
    return run, _grads_of_one_step(run)["unused"]


def test_noise_has_the_stated_std_also_where_no_sample_contributes(tmp_path):
    run, noise = _noise_only(tmp_path)
    stated = run.plan.noise_multiplier * 3.0 / run.plan.divisor
    assert noise.std() == pytest.approx(stated, rel=0.01)
    assert abs(float(noise.mean())) < 5 * stated / math.sqrt(noise.numel())
    # The check would notice half of the noise.
    assert (noise / 2).std() != pytest.approx(stated, rel=0.01)


def test_an_empty_draw_still_releases_noise_and_still_counts(tmp_path):
    """With q = 1 / 3000 nearly every draw of three is empty."""
    model = CASES["bert-classifier"].build()
    run = trainer(
        tmp_path,
        model=model,
        data=toy_data(3),
        privacy={
            "noise_multiplier": 1.0,
            "target_delta": 1e-4,
            "dataset_size": 3000,
            "expected_batch_size": 1,
        },
        max_steps=6,
    )
    before = weights(model)
    run.train()
    assert run.accountant.steps_spent == run.state.global_step == 6
    assert not torch.equal(before, weights(model))


def test_the_trainers_seed_does_not_make_noise_predictable(tmp_path):
    """Noise from seed 42 let the private gradient be recovered from one-step weights."""
    first, second = (_noise_only(tmp_path)[1] for _ in range(2))
    assert abs(float(torch.corrcoef(torch.stack((first, second)))[0, 1])) < 0.02
    same = [_noise_only(tmp_path, insecure_noise_seed=3)[1] for _ in range(2)]
    assert torch.equal(same[0], same[1])


def test_noise_differs_from_step_to_step(tmp_path):
    kept = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            kept.append(model.unused.grad.clone())

    model = CASES["bert-classifier"].build()
    model.unused = nn.Parameter(torch.zeros(50_000))
    trainer(tmp_path, model=model, extra={"callbacks": [Keep()]}, max_steps=3).train()
    assert torch.corrcoef(torch.stack(kept)).fill_diagonal_(0).abs().max() < 0.03


def test_a_sample_with_nan_is_left_out_and_reported(tmp_path, caplog):
    class Poisoned(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = transformers.BertConfig()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            return {"logits": self.layer(x)}

    data = [{"x": [float(i), 1.0, 0.5, 2.0], "labels": i % 2} for i in range(SAMPLES)]
    data[-1]["x"] = [float("nan")] * 4

    def collate(samples):
        return {key: torch.tensor([sample[key] for sample in samples]) for key in ("x", "labels")}

    def loss(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(outputs["logits"], labels, reduction="none")

    run = trainer(
        tmp_path,
        model=Poisoned(),
        data=data,
        collator=collate,
        extra={"compute_loss_func": loss},
        privacy={"noise_multiplier": 1.0, "target_delta": 1e-3, "sampling": "full_batch"},
        logging_steps=1,
        remove_unused_columns=False,
    )
    run.train()
    assert torch.isfinite(weights(run.model)).all()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["dropped_samples"] for entry in logs] == [1, 2, 3]
    assert all(math.isfinite(entry["loss"]) for entry in logs)


# The budget.


def test_a_target_is_met_and_not_exceeded(tmp_path):
    run = trainer(tmp_path, privacy={"target_epsilon": 3.0, "target_delta": 1e-3})
    assert run.plan.epsilon <= 3.0
    assert run.plan.epsilon > 2.9
    run.train()
    assert run.accountant.epsilon <= 3.0
    with pytest.raises(PrivacyBudgetError, match="spent"):
        run.train()
    assert run.accountant.steps_spent == 3


def test_noise_and_target_together_train_until_the_budget_is_spent(tmp_path):
    run = trainer(
        tmp_path,
        privacy={"target_epsilon": 4.0, "noise_multiplier": 1.0, "target_delta": 1e-3},
        max_steps=1000,
    )
    steps = run.plan.steps
    assert 1 <= steps < 1000
    run.train()
    assert run.state.global_step == steps
    assert run.accountant.epsilon <= 4.0


def test_a_run_that_stopped_early_may_go_on_with_what_is_left(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    run = trainer(tmp_path, max_steps=3)
    stop = Stop()
    run.add_callback(stop)
    run.train()
    assert run.accountant.steps_spent == 1
    run.remove_callback(stop)
    with pytest.raises(PrivacyBudgetError):
        run.train()  # three more steps would make four
    assert run.accountant.steps_spent == 3


# Checkpoints.


def _checkpointed(tmp_path, **changes) -> DPTrainer:
    run = trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=4, **changes)
    run.train()
    return run


def test_resume_continues_the_count_with_fresh_noise(tmp_path):
    full = _checkpointed(tmp_path)
    resumed = trainer(tmp_path, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == resumed.accountant.steps_spent == 4
    assert resumed.accountant.epsilon == full.accountant.epsilon
    assert not torch.equal(weights(resumed.model), weights(full.model))


def test_no_secret_reaches_a_checkpoint(tmp_path, monkeypatch):
    keys = []
    randbits = secrets.randbits
    monkeypatch.setattr(secrets, "randbits", lambda bits: keys.append((randbits(bits), bits)) or keys[-1][0])
    _checkpointed(tmp_path)
    assert sorted(bits for _, bits in keys) == [128, 256]  # the sampler's and the noise's
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"steps_spent" in written
    for key, bits in keys:
        for form in (key.to_bytes(bits // 8, "big"), key.to_bytes(bits // 8, "little"), str(key).encode()):
            assert form not in written
        assert f"{key:x}".encode() not in written


def test_the_same_trainer_does_not_forget_steps_after_a_checkpoint(tmp_path):
    """What was released after the checkpoint was released, whatever weights training goes on from."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    run = trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, extra={"callbacks": [Stop()]})
    run.train()
    assert run.accountant.steps_spent == 3
    shutil.rmtree(tmp_path / "checkpoint-3", ignore_errors=True)
    with pytest.raises(ConfigurationError, match="counted 3 steps, the checkpoint 2"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert run.accountant.steps_spent == 3


def test_resume_from_the_last_checkpoint(tmp_path):
    _checkpointed(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = trainer(tmp_path, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.accountant.steps_spent == 4


CHANGES = {
    "noise": ({"noise_multiplier": 1.1, "target_delta": 1e-3}, {}, "noise_multiplier"),
    "delta": ({"noise_multiplier": 1.0, "target_delta": 1e-4}, {}, "target_delta"),
    "clipping": ({"noise_multiplier": 1.0, "target_delta": 1e-3, "gamma": 0.1}, {}, "clipping"),
    "batch": (
        {"noise_multiplier": 1.0, "target_delta": 1e-3},
        {"per_device_train_batch_size": 5},
        "batch|sampling",
    ),
    "data": (
        {"noise_multiplier": 1.0, "target_delta": 1e-3},
        {"data": toy_data(25)},
        "dataset_size|sampling",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_resume_refuses_another_mechanism(tmp_path, change):
    privacy, settings, fragment = CHANGES[change]
    _checkpointed(tmp_path)
    run = trainer(tmp_path, privacy=privacy, max_steps=4, **settings)
    with pytest.raises(ConfigurationError, match=fragment):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert run.accountant.steps_spent == 0


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "truncated": lambda path: path.write_text(path.read_text()[:40]),
    "edited": lambda path: path.write_text(path.read_text().replace('"steps_spent": 2', '"steps_spent": 1')),
    "not a record": lambda path: path.write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_resume_refuses_a_damaged_record(tmp_path, damage):
    _checkpointed(tmp_path)
    DAMAGES[damage](tmp_path / "checkpoint-2" / "privacy_record.json")
    run = trainer(tmp_path, max_steps=4)
    with pytest.raises(ConfigurationError, match=r"record|damaged"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_resume_refuses_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ConfigurationError, match="no such checkpoint"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


# What is refused, before any noise is spent.

REFUSED_ARGUMENTS = {
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "neftune": {"neftune_noise_alpha": 5.0},
    "torch_compile": {"torch_compile": True},
    "group_by_length": {"train_sampling_strategy": "group_by_length"},
    "lomo": {"optim": "lomo"},
    "layerwise": {"optim": "galore_adamw_layerwise", "optim_target_modules": ["attn"]},
}


@pytest.mark.parametrize("name", REFUSED_ARGUMENTS)
def test_unsupported_arguments_are_refused(tmp_path, name):
    with pytest.raises(UnsupportedOperationError, match="TrainingArguments"):
        trainer(tmp_path, **REFUSED_ARGUMENTS[name])


@pytest.mark.parametrize(("name", "value"), [("fp16", True), ("_n_gpu", 2), ("use_liger_kernel", True)])
def test_settings_that_this_machine_cannot_make_are_refused(tmp_path, name, value):
    args = arguments(tmp_path)
    setattr(args, name, value)
    with pytest.raises(UnsupportedOperationError):
        DPTrainer(
            model=CASES["bert-classifier"].build(),
            args=args,
            train_dataset=toy_data(),
            data_collator=pad,
            privacy=PrivacyArguments(noise_multiplier=1.0, target_delta=1e-3),
        )


def test_optimizers_that_look_at_the_loss_again_are_refused(tmp_path):
    model = CASES["bert-classifier"].build()
    with pytest.raises(UnsupportedOperationError, match="LBFGS"):
        trainer(tmp_path, model=model, extra={"optimizers": (torch.optim.LBFGS(model.parameters()), None)})


def test_a_trained_tensor_outside_the_model_is_refused(tmp_path):
    """It would be stepped with its raw gradient."""
    model, temperature = CASES["bert-classifier"].build(), nn.Parameter(torch.ones(1))

    def loss(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(outputs.logits * temperature, labels, reduction="none")

    optimizer = torch.optim.SGD([*model.parameters(), temperature], lr=0.1)
    run = trainer(tmp_path, model=model, extra={"compute_loss_func": loss, "optimizers": (optimizer, None)})
    with pytest.raises(UnsupportedOperationError, match="no parameter of the model"):
        run.train()
    alone = trainer(tmp_path, extra={"compute_loss_func": loss})
    with pytest.raises(UnsupportedOperationError, match="no parameter of the model"):
        alone.train()
    assert temperature.item() == 1.0
    assert run.accountant.steps_spent == alone.accountant.steps_spent == 0


def test_unfreezing_a_parameter_certifies_again(tmp_path):
    certificates = []

    class Unfreeze(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            certificates.append(run.certificate)
            model.requires_grad_(True)

    model = CASES["bert-classifier"].build()
    model.bert.requires_grad_(False)
    run = trainer(tmp_path, model=model, extra={"callbacks": [Unfreeze()]}, max_steps=3)
    run.train()
    assert certificates[0] is not certificates[1]
    assert certificates[1] is certificates[2]


def test_a_layout_that_goes_wrong_on_real_batches_is_stopped(tmp_path):
    """Rows without padding look sample-major where all samples are of one length, as the first 64 are."""

    class Unpadding(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = transformers.BertConfig()
            self.table, self.layer = nn.Embedding(VOCABULARY, 4), nn.Linear(4, 2)

        def forward(self, input_ids, attention_mask):
            mask = attention_mask.bool()
            hidden = torch.zeros(*mask.shape, 2)
            # Unlike a pick by index, this one is not followed.
            picked = torch.masked_select(self.table(input_ids), mask[..., None]).view(-1, 4)
            hidden[mask] = torch.tanh(self.layer(picked))
            return {"logits": hidden.sum(1)}

    def loss(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(outputs["logits"], labels, reduction="none")

    data = toy_data(64, lengths=(6, 6)) + toy_data(64, lengths=(2, 10))
    run = trainer(
        tmp_path,
        model=Unpadding(),
        data=data,
        extra={"compute_loss_func": loss},
        privacy={"noise_multiplier": 1.0, "target_delta": 1e-3, "sampling": "full_batch"},
        per_device_train_batch_size=32,
        remove_unused_columns=False,
    )
    with pytest.raises((CertificateError, UnsupportedOperationError), match=r"neighbours|sample axis"):
        run.train()
    assert run.accountant.steps_spent == 0


def test_what_the_mechanism_fixes_is_said_in_the_log(tmp_path, caplog):
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            run = trainer(tmp_path)
    finally:
        transformers.logging.disable_propagation()
        transformers.logging.set_verbosity_error()
    assert run.args.max_grad_norm == 0.0
    assert run.args.gradient_accumulation_steps == 1
    assert "max_grad_norm: 1.0" in caplog.text
    assert "gradient_accumulation_steps: 2" in caplog.text


class _WithBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = CASES["bert-classifier"].build()
        self.config = self.model.config
        self.norm = nn.BatchNorm1d(2)

    def forward(self, input_ids, attention_mask, labels=None):
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return {"logits": self.norm(outputs.logits)}


def test_batch_normalization_is_refused_by_name(tmp_path):
    with pytest.raises(UnsupportedOperationError, match=r"norm: BatchNorm1d"):
        trainer(tmp_path, model=_WithBatchNorm())


def test_frozen_batch_normalization_trains_and_keeps_its_statistics(tmp_path):
    model = _WithBatchNorm()
    model.norm.running_mean.normal_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert freeze_batch_norm(model) == 1
    assert freeze_batch_norm(model) == 0
    per_sample = lambda outputs, labels, **_: nn.functional.cross_entropy(  # noqa: E731
        outputs["logits"], labels, reduction="none"
    )
    run = trainer(tmp_path, model=model, extra={"compute_loss_func": per_sample}, max_steps=2)
    run.train()
    after = model.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"norm.weight", "norm.bias"} <= changed
    assert not {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"} & changed
    model.train()
    assert not model.norm.training


def test_frozen_batch_normalization_of_a_single_sample_is_right_whatever_the_gradients_strides():
    """torch 2.13's own backward of it is not, on a CPU."""
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(16).double()
    layer.running_mean.normal_()
    freeze_batch_norm(layer)
    image, tokens = torch.randn(1, 16, 4, 4).double(), torch.randn(1, 16, 16).double()
    output = layer(image)
    (output.flatten(2).transpose(1, 2) @ torch.eye(16).double() * tokens).sum().backward()
    normalized = (image - layer.running_mean[:, None, None]) / (layer.running_var + layer.eps).sqrt()[
        :, None, None
    ]
    expected = (normalized.flatten(2).transpose(1, 2) * tokens).sum((0, 1))
    torch.testing.assert_close(layer.weight.grad, expected)
    torch.testing.assert_close(layer.bias.grad, tokens.sum((0, 1)))


def test_every_micro_batch_is_held_against_the_verified_uses(tmp_path, monkeypatch):
    """A use that is new is looked at before it counts, and once."""
    looks, branch = [], []
    plain = book_keeping.check_independence
    monkeypatch.setattr(
        book_keeping, "check_independence", lambda *a: looks.append(run.state.global_step) or plain(*a)
    )

    class Branch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            branch.append(state.global_step)

    class Model(_WithBatchNorm):
        def forward(self, input_ids, attention_mask, labels=None):
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
            return {"logits": logits * self.norm.weight if len(branch) >= 2 else logits}

    model = Model()
    freeze_batch_norm(model)
    per_sample = lambda outputs, labels, **_: nn.functional.cross_entropy(  # noqa: E731
        outputs["logits"], labels, reduction="none"
    )
    run = trainer(
        tmp_path,
        model=model,
        extra={"compute_loss_func": per_sample, "callbacks": [Branch()]},
        max_steps=4,
    )
    run.train()
    assert looks == [0, 2]


def test_a_new_certificate_verifies_every_use_anew(tmp_path, monkeypatch):
    """What remains trainable was verified before, beside other parameters."""
    looks, plain = [], book_keeping.check_independence
    monkeypatch.setattr(
        book_keeping, "check_independence", lambda *a: looks.append(run.state.global_step) or plain(*a)
    )

    class Freeze(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.bert.requires_grad_(False)

    model = CASES["bert-classifier"].build()
    run = trainer(tmp_path, model=model, extra={"callbacks": [Freeze()]}, max_steps=3)
    run.train()
    assert sorted(set(looks)) == [0, 1]


def test_foreign_batch_normalization_cannot_be_frozen():
    class Own(nn.BatchNorm2d):
        pass

    for layer in (Own(3), nn.BatchNorm2d(3, track_running_stats=False)):
        with pytest.raises(UnsupportedOperationError, match=r"^0: "):
            freeze_batch_norm(nn.Sequential(layer))


def test_bad_datasets_are_refused(tmp_path):
    class Unsized(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(toy_data())

    with pytest.raises(ConfigurationError, match="no length"):
        trainer(tmp_path, data=Unsized())
    with pytest.raises(ConfigurationError, match="0 samples"):
        trainer(tmp_path, data=[])
    with pytest.raises(ConfigurationError, match="does not fit"):
        trainer(tmp_path, data=toy_data(5))
    with pytest.warns(UserWarning, match="target_delta"):
        trainer(tmp_path, privacy={"noise_multiplier": 1.0, "target_delta": 0.1})


def test_missing_labels_are_named_before_any_step(tmp_path):
    data = [{k: v for k, v in sample.items() if k != "labels"} for sample in toy_data()]

    def collate(samples):
        return {k: v for k, v in pad([{**s, "labels": 0} for s in samples]).items() if k != "labels"}

    run = trainer(tmp_path, data=data, collator=collate)
    with pytest.raises(ConfigurationError, match="labels"):
        run.train()
    assert run.accountant.steps_spent == 0


BAD_LOSSES = {
    "mean over the batch": lambda o, y, num_items_in_batch=None: nn.functional.cross_entropy(o.logits, y),
    "divided by the batch": lambda o, y, num_items_in_batch=None: (
        nn.functional.cross_entropy(o.logits, y, reduction="none") / len(y)
    ),
    "contrast within the batch": lambda o, y, num_items_in_batch=None: (o.logits @ o.logits.T).logsumexp(1),
}


@pytest.mark.parametrize("name", BAD_LOSSES)
def test_losses_that_couple_samples_are_refused_before_any_step(tmp_path, name):
    run = trainer(tmp_path, extra={"compute_loss_func": BAD_LOSSES[name]})
    with pytest.raises((CertificateError, ConfigurationError), match=r"neighbours|couples|one loss a sample"):
        run.train()
    assert run.accountant.steps_spent == 0


def test_a_mean_over_the_batchs_tokens_is_refused(tmp_path):
    """It hides where every sample is clipped, and let one sample contribute 6.8 times the bound."""

    def token_mean(outputs, labels, num_items_in_batch=None):
        losses = nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
        )
        return losses.view(len(labels), -1).sum(1) / (labels[:, 1:] != -100).sum()

    def collate(samples):
        batch = pad([{**s, "labels": 0} for s in samples])
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    run = trainer(
        tmp_path, model=CASES["gpt2-tied"].build(), collator=collate, extra={"compute_loss_func": token_mean}
    )
    with pytest.raises(CertificateError, match="neighbours"):
        run.train()
    assert run.accountant.steps_spent == 0


def test_misspelt_settings_fail(tmp_path):
    with pytest.raises(TypeError, match="clipping_norn"):
        PrivacyArguments(target_epsilon=8.0, target_delta=1e-5, clipping_norn=1.0)
    with pytest.raises(TypeError, match="privcy"):
        DPTrainer(model=None, privcy=None)


def test_without_training_data_it_evaluates_and_says_there_is_no_plan(tmp_path):
    run = DPTrainer(
        model=CASES["bert-classifier"].build(),
        args=arguments(tmp_path),
        eval_dataset=toy_data(8),
        data_collator=pad,
        privacy=PrivacyArguments(noise_multiplier=1.0, target_delta=1e-3),
    )
    assert "eval_loss" in run.evaluate()
    with pytest.raises(ConfigurationError, match="train_dataset"):
        run.train()


def test_a_run_goes_on_where_memory_runs_out(tmp_path):
    """With smaller micro-batches: the same samples, count, noise and ε."""
    largest = []

    def per_sample(outputs, labels, **_):
        largest.append(len(labels))
        if len(labels) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return nn.functional.cross_entropy(outputs["logits"], labels, reduction="none")

    privacy = {"noise_multiplier": 1.0, "target_delta": 1e-3, "certificate_samples": 2}
    changes = {"max_steps": 4, "per_device_train_batch_size": 8}
    run = trainer(tmp_path, extra={"compute_loss_func": per_sample}, privacy=privacy, **changes)
    expected = trainer(tmp_path, privacy=privacy, **changes).plan
    run.train()
    assert run.accountant.steps_spent == run.state.global_step == 4
    assert run.plan == expected
    assert run.accountant.epsilon == run.plan.epsilon
    # Each failure halves for good, and four bring the largest micro-batch possible, 4 · 8 samples, to 2. Which
    # step needs the last one is chance.
    assert 1 <= sum(size > 3 for size in largest) <= 4
