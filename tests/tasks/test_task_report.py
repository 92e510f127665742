import json
import math

import pytest

from dp_trainer.errors import ConfigurationError
from dp_trainer.tasks import TASKS
from dp_trainer.tasks.report import (
    PrivacySpent,
    draw_training,
    evaluation_at,
    metrics_record,
    require_plotting,
    round_up,
    series,
    summary_lines,
    write_json,
)

SPENT = PrivacySpent(epsilon_after=lambda steps: math.sqrt(steps), delta=1e-5, steps=3, target_epsilon=2.0)
HISTORY = [
    {"eval_accuracy": 0.5, "step": 0},
    {"loss": 0.7, "step": 2},
    {"eval_accuracy": 0.6, "step": 2},
    {"eval_accuracy": 0.7, "step": 2},
    {"train_runtime": 1.0, "step": 2},
]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(7.9991, 8.0), (7.99901, 8.0), (8.0, 8.0), (0.1 + 0.2, 0.3), (1e-9, 0.001), (math.inf, math.inf)],
)
def test_privacy_losses_are_never_rounded_down(value, shown):
    assert round_up(value) == shown


def test_record_and_summary_name_baseline_and_privacy():
    record = metrics_record(
        task=TASKS["sentiment"],
        evaluations={"validation": {"accuracy": 0.75, "loss": 0.5}},
        baselines={"validation": 0.52},
        privacy=SPENT,
        steps=3,
        seconds=1.5,
        settings={"task": "sentiment"},
    )
    assert record["splits"]["validation"] == {"accuracy": 0.75, "loss": 0.5, "baseline": 0.52}
    assert record["epsilon"] == math.sqrt(3)
    assert record["settings"] == {"task": "sentiment"}
    # The interpreter with torch alone takes more than this, and no test machine holds so much.
    assert 0.05 < record["peak_memory_gib"] < 1000
    assert summary_lines(record, "accuracy") == [
        "validation: accuracy 0.7500 (best constant answer 0.5200)",
        "privacy: ε = 1.733 at δ = 1e-05 after 3 steps",
    ]


def test_a_run_without_privacy_says_so():
    record = metrics_record(
        task=TASKS["e2e"],
        evaluations={"test": {"perplexity": 9.0}},
        baselines={},
        privacy=None,
        steps=7,
        seconds=1.0,
        settings={},
    )
    assert record["private"] is False
    assert record["epsilon"] is None
    assert record["steps"] == 7
    assert "privacy: none" in summary_lines(record, "perplexity")[-1]


def test_json_stays_readable_when_a_number_is_not(tmp_path):
    write_json(tmp_path / "a.json", {"loss": math.nan, "log": [{"perplexity": math.inf, "step": 1}]})
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "loss": None,
        "log": [{"perplexity": None, "step": 1}],
    }


def test_series_keep_the_last_entry_of_a_step():
    assert series(HISTORY, "eval_accuracy") == [(0, 0.5), (2, 0.7)]
    assert series(HISTORY, "grad_norm") == []


def test_an_evaluation_counts_for_its_own_step_alone():
    assert evaluation_at(HISTORY, 2) == {"accuracy": 0.7}
    assert evaluation_at(HISTORY, 0) == {"accuracy": 0.5}
    assert evaluation_at(HISTORY, 3) is None


@pytest.mark.parametrize("privacy", [SPENT, None], ids=["private", "ordinary"])
@pytest.mark.parametrize("history", [HISTORY, []], ids=["logged", "empty"])
def test_the_plot_is_drawn(tmp_path, history, privacy):
    path = tmp_path / "training.png"
    draw_training(path, history=history, task=TASKS["sentiment"], baseline=0.52, privacy=privacy)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_missing_matplotlib_is_found_before_training(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="plots: false"):
        require_plotting()
