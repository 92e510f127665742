"""Run folders beside published numbers."""

import importlib.util
import json
from pathlib import Path

import pytest
from config_plans import CONFIGS, header

from dp_trainer.errors import ConfigurationError
from dp_trainer.tasks.comparison import as_html, as_markdown, read_published, read_run, table

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "scripts" / "report.py"
STATEMENT = {"epsilon": 2.9871, "delta": 4e-6, "plan": {"noise_multiplier": 0.6543}}
PUBLISHED = {
    "mine": {"splits": {"validation": {"accuracy": 92.3}}, "source": "somebody", "verified": False},
    "other": {"splits": {"validation": {"accuracy": 94.5}, "test": {"bleu": 61.25}}, "source": "somebody"},
}


def write(folder, **changes):
    metrics = {
        "task": "sst2",
        "metric": "accuracy",
        "splits": {
            "validation": {"loss": 1.5, "accuracy": 0.87654, "runtime": 3.0, "baseline": 0.5092, "f1": 0.5}
        },
        "private": True,
        "epsilon": STATEMENT["epsilon"],
        "delta": STATEMENT["delta"],
        "steps": 80,
        "training_seconds": 1234.0,
        "peak_memory_gib": 2.34,
        **changes,
    }
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    if metrics["private"]:
        (folder / "privacy_statement.json").write_text(json.dumps(STATEMENT), encoding="utf-8")
        (folder / "privacy_statement.md").write_text("ε < 3 <script>", encoding="utf-8")
    return folder


@pytest.fixture
def published(tmp_path):
    path = tmp_path / "published.json"
    path.write_text(json.dumps(PUBLISHED), encoding="utf-8")
    return read_published(path)


def test_a_run_stands_beside_the_row_of_its_name(tmp_path, published):
    first, second = table([read_run(write(tmp_path / "mine"))], published)
    assert first == {
        "run": "mine",
        "split": "validation",
        "metric": "accuracy",
        "here": "87.65",
        "least to most": "",
        "best constant answer": "50.92",
        "published": "92.3 (not verified)",
        "ε": "2.988",
        "δ": "4e-06",
        "σ": "0.654",
        "steps": "80",
        "time": "21 min",
        "memory": "2.3 GiB",
    }
    assert (second["metric"], second["here"], second["ε"], second["best constant answer"]) == (
        "f1",
        "50.00",
        "",
        "",
    )


def test_beside_another_row_with_what_was_not_measured(tmp_path, published):
    splits = {"validation": {"accuracy": 0.5}, "test": {"nist": 7.25}}
    rows = table([read_run(write(tmp_path / "x", splits=splits))], published, beside={"x": "other"})
    assert [(row["split"], row["metric"], row["here"], row["published"]) for row in rows] == [
        ("validation", "accuracy", "50.00", "94.5"),
        ("test", "nist", "7.250", ""),
        ("test", "bleu", "", "61.25"),
    ]
    with pytest.raises(ConfigurationError, match="Did you mean 'other'"):
        table([read_run(tmp_path / "x")], published, beside={"x": "othr"})
    with pytest.raises(ConfigurationError, match="no such run"):
        table([read_run(tmp_path / "x")], published, beside={"y": "other"})


def test_a_run_without_privacy_is_not_given_a_statement_that_lies_about(tmp_path, published):
    folder = write(tmp_path / "plain", private=False, epsilon=None)
    (folder / "privacy_statement.json").write_text(json.dumps(STATEMENT), encoding="utf-8")
    (row, _) = table([read_run(folder)], published)
    assert (row["ε"], row["σ"], row["δ"]) == ("none", "", "")
    assert "ε &lt; 3" not in as_html([read_run(folder)], [row])


def test_repeated_runs_share_a_row(tmp_path, published):
    """Folders NAME.seed1 …: the mean, what lies between, and the time of one."""
    for place, (name, accuracy) in enumerate([("mine", 0.75), ("mine.seed1", 0.5), ("mine.seed12", 0.55)]):
        splits = {"validation": {"loss": 1.0, "accuracy": accuracy, "baseline": 0.5}}
        settings = {"learning_rate": 0.1, "seed": place}
        write(tmp_path / name, splits=splits, settings=settings, training_seconds=600.0 * (place + 1))
    write(tmp_path / "mine.seeds")
    runs = [read_run(folder) for folder in sorted(tmp_path.iterdir()) if folder.is_dir()]
    first, *others = table(runs, published)
    assert (first["run"], first["here"], first["least to most"]) == (
        "mine",
        "60.00",
        "50.00 to 75.00 (3 runs)",
    )
    assert (first["ε"], first["time"], first["published"]) == ("2.988", "20 min", "92.3 (not verified)")
    assert {row["run"] for row in others} == {"mine.seeds"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"settings": {"learning_rate": 0.2}}, "'learning_rate'"),
        ({"settings": {"learning_rate": 0.1, "gamma": 1}}, "'gamma'"),
        ({"steps": 40}, "'steps'"),
        ({"private": False}, "'private'"),
        ({"splits": {"test": {"accuracy": 0.5}}}, "'splits'"),
    ],
)
def test_runs_of_different_settings_are_not_averaged(tmp_path, published, changes, said):
    settings = {"settings": {"learning_rate": 0.1}}
    runs = [
        read_run(write(tmp_path / "mine", **settings)),
        read_run(write(tmp_path / "mine.seed1", **settings | changes)),
    ]
    with pytest.raises(ConfigurationError, match=f"mine.seed1 differ in {said}"):
        table(runs, published)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "metrics.json").unlink(), "no metrics.json"),
        (lambda f: (f / "metrics.json").write_text("{"), "not JSON"),
        (lambda f: (f / "metrics.json").write_text("[]"), "no JSON object"),
        (lambda f: (f / "privacy_statement.json").unlink(), "missing, although the run calls itself private"),
        (
            lambda f: (f / "privacy_statement.json").write_text(json.dumps({**STATEMENT, "epsilon": 1.0})),
            "different runs",
        ),
    ],
)
def test_folders_that_say_nothing_clear_are_refused(tmp_path, harm, message):
    folder = write(tmp_path / "mine")
    harm(folder)
    with pytest.raises(ConfigurationError, match=message):
        read_run(folder)


def test_the_page_shows_curves_and_escapes_texts(tmp_path, published):
    folder = write(tmp_path / "mine")
    (folder / "training.png").write_bytes(b"\x89PNG")
    run = read_run(folder)
    page = as_html([run], table([run], published))
    assert "data:image/png;base64,iVBORw" in page
    assert "ε &lt; 3 &lt;script&gt;" in page
    assert "<script>" not in page


def test_the_script_writes_its_section_and_refuses_a_page_without(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("report_script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    folder, page = write(tmp_path / "sst2_roberta-large_eps8"), tmp_path / "page.md"
    page.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n", encoding="utf-8")
    script.main([str(folder), "--write", str(page), "--html", str(tmp_path / "page.html")])
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- results -->\n| run |")
    assert text.endswith("<!-- /results -->\nafter\n")
    assert "| 94.61 |" in text
    assert "old" not in text
    assert (tmp_path / "page.html").stat().st_size > 500
    page.write_text("no section", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="each once"):
        script.main([str(folder), "--write", str(page)])
    capsys.readouterr()
    script.main([str(folder)])
    assert capsys.readouterr().out == as_markdown(table([read_run(folder)], read_published(script.PUBLISHED)))
    with pytest.raises(ConfigurationError, match="not of the form"):
        script.main([str(folder), "--beside", "x"])


def test_published_numbers_belong_to_configs_and_are_in_their_headers():
    texts = {path.stem: header(path) for path in CONFIGS}
    for name, row in read_published(ROOT / "configs" / "published.json").items():
        assert row.source.split(" (")[0] in texts[name] or not row.verified
        for metrics in row.splits.values():
            for metric, value in metrics.items():
                # As printed in the source: with all its digits, and no zero before the point in METEOR.
                printed = {f"{value:g}", f"{value:.2f}", f"{value:.3f}", f"{value:.3f}".lstrip("0")}
                assert any(number in texts[name] for number in printed), (name, metric, value)
        assert ("not verified" in texts[name]) == (not row.verified)
