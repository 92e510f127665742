"""What leaves the house: model cards, pushed folders, searches; and which secrets never do."""

from __future__ import annotations

import concurrent.futures
import json
import math
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from test_trainer import CASES, arguments, pad, toy_data, trainer, weights
from transformers import Trainer, TrainerCallback
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.trainer_utils import BestRun, HPSearchBackend

from dp_trainer import ConfigurationError, DPTrainer, PrivacyArguments, checkpoints
from dp_trainer.privacy.search import RandomTrials
from dp_trainer.privacy.verification import read_statement, verify_statement
from dp_trainer.publication import put_section

# Full batches have a closed form, so that statements take no time.
QUICK = {"noise_multiplier": 4.0, "target_delta": 1e-3, "sampling": "full_batch"}
EVALUATED = {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
# What a log of such a run holds; none of it may be in what is pushed.
MEASURED = ("log_history", "eval_loss", "grad_norm", "dropped_samples", "Training Loss", "Validation Loss")


class Hub:
    """Stands in for the hub: keeps a copy of what is uploaded to it, as the hub's client picks it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.uploads = folder, []

    def create_repo(self, name, **_):
        self.name = name
        return type("Url", (), {"repo_id": f"someone/{name}"})()

    def upload_folder(self, *, folder_path, ignore_patterns=(), path_in_repo="", run_as_future=False, **_):
        kept = self.folder / f"{len(self.uploads)}"
        shutil.copytree(folder_path, kept / path_in_repo, ignore=shutil.ignore_patterns(*ignore_patterns))
        self.uploads.append(kept)
        if not run_as_future:
            return "done"
        future = concurrent.futures.Future()
        future.set_result("done")
        return future


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    return hub


def text_of(folder: Path) -> str:
    return "\n".join(
        path.read_bytes().decode("utf-8", errors="ignore")
        for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix in (".json", ".md", ".txt", "")
    )  # fmt: skip


def measured_numbers(run) -> set[str]:
    """The losses and evaluation results of a run, as they are written."""
    return {
        repr(value)
        for entry in run.state.log_history
        for key, value in entry.items()
        if ("loss" in key or key == "grad_norm") and isinstance(value, float) and value
    }


def private_leaks(folder: Path, run) -> set[str]:
    text = text_of(folder).replace('"log_history": []', "")
    return {word for word in MEASURED if word in text} | {n for n in measured_numbers(run) if n in text}


def pushed(path, hub, **changes):
    privacy = changes.pop("privacy", QUICK)
    run = trainer(path / "run", privacy=privacy, **EVALUATED, **changes)
    run.train()
    (path / "run" / "notes.txt").write_text("eval_loss 0.5", encoding="utf-8")
    run.push_to_hub()
    return run


def test_a_push_holds_the_model_and_its_statement_and_nothing_measured(tmp_path, hub):
    run = pushed(tmp_path, hub)
    folder = hub.uploads[-1]
    assert len(measured_numbers(run)) >= 6
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "privacy_statement.json", "privacy_statement.md",
        "training_args.bin",
    }  # fmt: skip
    assert private_leaks(folder, run) == set()
    assert "differentially private" in (folder / "README.md").read_text()
    assert verify_statement(read_statement(folder / "privacy_statement.json")).steps == 3
    assert hub.name == "run"
    assert not list((tmp_path / "run").glob("_publication-*"))
    assert run.args.output_dir == str(tmp_path / "run")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(weights(again), weights(run.model))


def test_plain_trainer_would_publish_all_of_it_and_so_does_ours_if_asked(tmp_path, hub, monkeypatch):
    """That the check above sees a leak."""
    privacy = {**QUICK, "release_training_metrics": True}
    run = pushed(tmp_path, hub, privacy=privacy)
    leaks = private_leaks(hub.uploads[-1], run)
    assert "Validation Loss" in leaks
    assert (hub.uploads[-1] / "notes.txt").exists()
    assert "norm_error" in (hub.uploads[-1] / "privacy_statement.json").read_text()


@pytest.mark.parametrize("leak", ["card", "folder"])
def test_a_planted_leak_is_seen(tmp_path, hub, monkeypatch, leak):
    from dp_trainer import publication

    if leak == "card":
        monkeypatch.setattr(
            publication, "_without_history", lambda state, kept: publication.contextlib.nullcontext()
        )
    else:
        monkeypatch.setattr(publication.PublishingTrainer, "push_to_hub", Trainer.push_to_hub)
    run = pushed(tmp_path, hub)
    assert private_leaks(hub.uploads[-1], run)


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_pushes_while_training_hold_complete_checkpoints_without_history(tmp_path, hub, strategy):
    changes = {
        "push_to_hub": True,
        "hub_strategy": strategy,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
    }
    run = trainer(tmp_path / "run", privacy=QUICK, **EVALUATED, **changes)
    run.train()
    for folder in hub.uploads:
        assert private_leaks(folder, run) == set()
    places = {p.parent.relative_to(f).as_posix() for f in hub.uploads for p in f.rglob("model.safetensors")}
    checkpoint = {"every_save": set(), "checkpoint": {"last-checkpoint"}}.get(
        strategy, {"checkpoint-2", "checkpoint-4"}
    )
    assert places == {".", *checkpoint}
    assert all((f / "README.md").is_file() for f in hub.uploads if (f / "model.safetensors").is_file())
    assert not list((tmp_path / "run").glob("_publication-*"))
    # On the own disk the history stays, and the files are as they were written.
    own = tmp_path / "run" / "checkpoint-2"
    checkpoints.check(own)
    assert json.loads((own / "trainer_state.json").read_text())["log_history"]
    if strategy == "all_checkpoints":
        copy = tmp_path / "again" / "checkpoint-2"
        found = next(f / "checkpoint-2" for f in hub.uploads if (f / "checkpoint-2").is_dir())
        shutil.copytree(found, copy)
        state = json.loads((copy / "trainer_state.json").read_text())
        assert (state["global_step"], state["log_history"], state["total_flos"]) == (2, [], 0)
        resumed = trainer(tmp_path / "again", privacy=QUICK, max_steps=4)
        resumed.train(resume_from_checkpoint=str(copy))
        assert resumed.accountant.steps_spent == resumed.state.global_step == 4


def test_a_schedule_that_remembers_results_is_not_pushed(tmp_path):
    with pytest.raises(ConfigurationError, match="reduce_lr_on_plateau"):
        trainer(
            tmp_path, push_to_hub=True, hub_strategy="checkpoint", lr_scheduler_type="reduce_lr_on_plateau",
            eval_strategy="steps", eval_steps=1,
        )  # fmt: skip


# Model cards.


def test_the_saved_models_card_has_one_privacy_section(tmp_path):
    run = trainer(tmp_path, privacy=QUICK)
    run.train()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n\nText before.\n", encoding="utf-8")
    for _ in range(2):
        run.save_model(str(folder))
    text = (folder / "README.md").read_text()
    assert text.count("## Privacy") == 1
    assert "Text before." in text
    assert ModelCard.load(folder / "README.md").data.license == "mit"
    run.save_model(str(tmp_path / "new"))
    assert ModelCard.load(tmp_path / "new" / "README.md").data.tags == ["differential-privacy"]


def test_text_after_the_section_stays(tmp_path):
    run = trainer(tmp_path, privacy=QUICK)
    run.train()
    card = tmp_path / "card.md"
    put_section(card, run.published_statement())
    card.write_text(card.read_text() + "\n## More\n", encoding="utf-8")
    put_section(card, run.published_statement())
    assert card.read_text().count("## Privacy") == card.read_text().count("## More") == 1


def test_without_a_release_there_is_nothing_to_state(tmp_path):
    run = trainer(tmp_path, privacy=QUICK)
    run.save_model(str(tmp_path / "model"))
    assert not list((tmp_path / "model").glob("privacy*"))
    assert not (tmp_path / "model" / "README.md").exists()


# Searches.


class FixedSearch:
    """A search library without the library: tries learning rates in order and takes the best."""

    broken_after: int | None = None

    def ensure_available(self):
        pass

    default_hp_space = None

    def run(self, trainer, n_trials, direction, **_):
        results = []
        for number in range(n_trials):
            if number == self.broken_after:
                raise RuntimeError("the search broke off")
            trial = type("Trial", (), {"params": {"learning_rate": 1e-3 * (number + 1)}, "number": number})()
            trainer.train(trial=trial)
            results.append(trainer.evaluate()["eval_loss"])
        return BestRun(str(results.index(min(results))), min(results), {})


class RandomSampler:
    pass


class NopPruner:
    pass


INDEPENDENT = {"sampler": RandomSampler(), "pruner": NopPruner()}


def searched(tmp_path, monkeypatch, n_trials, *, broken_after=None, runs=None, **settings):
    runs = [] if runs is None else runs
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, FixedSearch)
    monkeypatch.setattr(FixedSearch, "broken_after", broken_after)
    # It asks the installed library what a trial is.
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    run = DPTrainer(
        args=arguments(tmp_path, max_steps=1),
        train_dataset=toy_data(),
        eval_dataset=toy_data(8, seed=1),
        data_collator=pad,
        model_init=lambda: CASES["bert-classifier"].build(),
        privacy=PrivacyArguments(**QUICK),
    )
    runs.append(run)
    best = run.hyperparameter_search(
        hp_space=lambda trial: trial.params, n_trials=n_trials, backend="optuna", **settings
    )
    return run, best


@pytest.fixture
def heard(caplog):
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_propagation()
    yield caplog
    transformers.logging.disable_propagation()
    transformers.logging.set_verbosity_error()


def test_a_search_says_what_all_trials_cost(tmp_path, monkeypatch, heard):
    run, best = searched(tmp_path, monkeypatch, 2)
    assert best.run_id in ("0", "1")
    assert run.search_cost.trials == 2
    assert run.search_cost.epsilon > 1.3 * run.plan.epsilon
    assert run.search_cost.epsilon == pytest.approx(_gaussian(2, 4.0))
    assert "spends its own ε" in heard.text
    assert "search of 2 trials" in heard.text
    assert any("search of 2 trials" in item for item in run.privacy_statement().not_covered)


def _gaussian(steps, noise):
    from dp_trainer.privacy.gaussian import gaussian_epsilon

    return gaussian_epsilon(math.sqrt(steps) / noise, 1e-3)


def test_the_best_of_a_random_number_of_trials_costs_less(tmp_path, monkeypatch):
    monkeypatch.setattr(RandomTrials, "draw", lambda self: 2)
    run, _ = searched(tmp_path, monkeypatch, RandomTrials(20.0), **INDEPENDENT)
    assert run.search_cost.trials == 2
    assert run.search_cost.released == "the best trial alone"
    assert run.plan.epsilon < run.search_cost.epsilon


def test_a_search_that_breaks_off_counts_all_that_was_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(RandomTrials, "draw", lambda self: 2)
    kept = []
    with pytest.raises(RuntimeError, match="broke off"):
        searched(tmp_path, monkeypatch, RandomTrials(20.0), broken_after=1, runs=kept, **INDEPENDENT)
    assert kept[0].search_cost.trials == 1
    assert kept[0].search_cost.released == "all its trials together"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sampler": RandomSampler()},
        {"sampler": NopPruner(), "pruner": NopPruner()},
        {**INDEPENDENT, "timeout": 5},
    ],
    ids=["default, which learns", "default pruner", "another sampler", "timeout"],
)
def test_random_trials_need_independence(tmp_path, monkeypatch, settings):
    with pytest.raises(ConfigurationError, match="independent"):
        searched(tmp_path, monkeypatch, RandomTrials(3.0), **settings)


# Secrets.


class Keep(TrainerCallback):
    def __init__(self):
        self.grads = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))


@pytest.mark.parametrize("secure", [False, True])
def test_equal_seeds_have_different_noise(tmp_path, secure):
    drawn = []
    for _ in range(2):
        keep = Keep()
        privacy = {**QUICK, "noise_multiplier": 1e3, "secure_noise": secure}
        trainer(
            tmp_path, privacy=privacy, extra={"callbacks": [keep]}, seed=42, data_seed=42, max_steps=1
        ).train()
        drawn.append(keep.grads[0])
    assert abs(float(torch.corrcoef(torch.stack(drawn))[0, 1])) < 0.1
    assert float(drawn[0].std()) == pytest.approx(float(drawn[1].std()), rel=0.1)


@pytest.mark.parametrize("secure", [False, True])
def test_no_file_log_or_argument_of_a_run_holds_a_key(tmp_path, monkeypatch, hub, heard, secure):
    import secrets

    keys, randbits = [], secrets.randbits
    monkeypatch.setattr(secrets, "randbits", lambda bits: keys.append((randbits(bits), bits)) or keys[-1][0])
    privacy = {"noise_multiplier": 1.0, "target_delta": 1e-3, "secure_noise": secure}
    run = trainer(
        tmp_path / "run", privacy=privacy, **EVALUATED, save_strategy="steps", save_steps=1, push_to_hub=True,
        hub_strategy="all_checkpoints",
    )  # fmt: skip
    run.train()
    run.push_to_hub()
    assert sorted(bits for _, bits in keys) == [128, 256]
    pickled = [pickle.dumps(thing) for thing in (run.args, run.privacy, run.state, run.plan)]
    said = [heard.text.encode(), repr((run._noise, run.plan, run.privacy, run.state.log_history)).encode()]
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 30
    for key, bits in keys:
        forms = (
            key.to_bytes(bits // 8, "big"),
            key.to_bytes(bits // 8, "little"),
            str(key).encode(),
            b"%x" % key,
        )
        assert not [form for form in forms for text in (*pickled, *said, *written) if form in text]
    # The check sees a key where there is one.
    assert keys[0][0].to_bytes(keys[0][1] // 8, "big") in pickle.dumps(
        {"key": keys[0][0].to_bytes(keys[0][1] // 8, "big")}
    )
