"""``scripts/privacy.py`` answers before a run, without loading any model."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "privacy.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("privacy_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FULL = ["--dataset-size", "500", "--sampling", "full_batch", "--delta", "1e-5"]
POISSON = ["--dataset-size", "2000", "--expected-batch-size", "100", "--delta", "1e-5"]


def report(script, capsys, *words):
    assert script.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_epsilon_of_a_sampled_run(script, capsys):
    found = report(script, capsys, "epsilon", *POISSON, "--epochs", "1.5", "--noise-multiplier", "1.0")
    assert (found["steps"], found["batch_cap"], found["sampling_probability"]) == (30, 160, 0.05)
    losses = found["epsilon"]
    assert losses["pld"] < losses["rdp"]
    assert losses["prv"] == pytest.approx(losses["pld"], rel=0.05)
    assert list(found["true_positive_rate_bounds"]) == ["0.001", "0.01", "0.1"]


def test_noise_for_full_batches_and_back(script, capsys):
    noise = report(script, capsys, "noise", *FULL, "--steps", "40", "--target-epsilon", "3")[
        "noise_multiplier"
    ]
    found = report(script, capsys, "epsilon", *FULL, "--steps", "40", "--noise-multiplier", str(noise))
    assert found["epsilon"]["closed_form"] == pytest.approx(3.0, rel=1e-6)
    assert found["epsilon"]["rdp"] > 3.0


def test_text(script, capsys):
    assert script.main(["noise", *FULL, "--steps", "40", "--target-epsilon", "3"]) == 0
    printed = capsys.readouterr().out
    for part in ("noise multiplier", "full_batch", "CLOSED FORM", "RDP", "best attack", "0.1%", "10.0%"):
        assert part in printed


def test_noise_and_steps_are_each_other_s_inverse(script, capsys):
    noise = report(script, capsys, "noise", *POISSON, "--steps", "200", "--target-epsilon", "3")[
        "noise_multiplier"
    ]
    found = report(
        script, capsys, "steps", *POISSON, "--target-epsilon", "3", "--noise-multiplier", str(noise)
    )
    assert 200 <= found["steps"] <= 203
    assert found["epsilon"]["pld"] <= 3.0


def test_batch_size(script, capsys):
    words = ["--dataset-size", "2000", "--delta", "1e-5", "--epochs", "2", "--noise-multiplier", "1.2"]
    found = report(script, capsys, "batch-size", *words, "--target-epsilon", "2")
    assert 2.0 * 0.97 < found["epsilon"]["pld"] <= 2.0
    assert found["sampling_probability"] == found["expected_batch_size"] / 2000
    assert found["steps"] == -(-2 * -(-2000 // found["expected_batch_size"]))


def test_shuffled_and_replaced(script, capsys):
    words = ["epsilon", *POISSON, "--steps", "20", "--noise-multiplier", "2"]
    plain = report(script, capsys, *words)["epsilon"]
    replaced = report(script, capsys, *words, "--neighbouring-relation", "replace_one")["epsilon"]
    shuffled = report(
        script, capsys, *words, "--sampling", "shuffle", "--neighbouring-relation", "replace_one"
    )["epsilon"]
    assert list(replaced) == ["pld"]
    assert plain["pld"] < replaced["pld"]
    assert shuffled["closed_form"] > replaced["pld"]
    assert script.main([*words, "--sampling", "shuffle"]) == 2
    assert "replace_one" in capsys.readouterr().err


@pytest.mark.parametrize("over", ["steps", "noise"])
def test_curves_are_monotone_and_drawn(script, capsys, tmp_path, over):
    place = tmp_path / "curve.png"
    words = [
        "curve",
        *POISSON,
        "--steps",
        "100",
        "--noise-multiplier",
        "1",
        "--over",
        over,
        "--write",
        str(place),
    ]
    points = report(script, capsys, *words)["points"]
    values = [value for _, value in points]
    assert len(points) > 10
    assert values == sorted(values, reverse=over == "noise")
    assert values[0] != values[-1]
    assert place.read_bytes().startswith(b"\x89PNG")
    place.unlink()
    assert script.main([*words[:-2], "--write", str(tmp_path / "missing" / "curve.png")]) == 2
    assert "no folder" in capsys.readouterr().err


def test_what_if(script, capsys):
    rows = report(script, capsys, "what-if", *POISSON, "--steps", "100", "--noise-multiplier", "1")["rows"]
    found = {row["change"]: row["epsilon"] for row in rows}
    same = found["as it is"]
    assert "added or removed samples" not in found
    for worse in ("half the noise", "twice the steps", "twice the batch", "a tenth of δ", "replaced samples",
                  "shuffled batches, replaced samples", "every sample, every step"):  # fmt: skip
        assert found[worse] > same
    for better in ("twice the noise", "half the steps", "half the batch"):
        assert found[better] < same
    assert script.main(["what-if", *FULL, "--steps", "10", "--noise-multiplier", "5"]) == 0
    assert "twice the batch" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["epsilon", *FULL, "--steps", "4"],
        ["epsilon", *FULL, "--steps", "4", "--noise-multiplier", "1", "--sigma", "2"],
        ["epsilon", *FULL, "--steps", "4", "--noise-mult", "1"],
        ["epsilon", *FULL, "--steps", "4", "--epochs", "1", "--noise-multiplier", "1"],
        ["epsilon", *FULL, "--noise-multiplier", "1"],
        ["noise", *FULL, "--steps", "4", "--target-epsilon", "3", "--sampling", "bootstrap"],
        ["steps", *FULL, "--steps", "4", "--target-epsilon", "3", "--noise-multiplier", "1"],
        ["batch-size", *POISSON, "--steps", "4", "--target-epsilon", "3", "--noise-multiplier", "1"],
    ],
    ids=" ".join,
)
def test_unknown_and_missing_flags_are_refused(script, capsys, words):
    with pytest.raises(SystemExit) as stopped:
        script.main(words)
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["epsilon", *FULL, "--steps", "0", "--noise-multiplier", "1"], "positive"),
        (["epsilon", *FULL, "--steps", "4", "--noise-multiplier", "-1"], "noise_multiplier"),
        (["epsilon", *FULL, "--epochs", "-1", "--noise-multiplier", "1"], "--epochs"),
        (["noise", *FULL, "--steps", "4", "--target-epsilon", "0"], "target_epsilon"),
        (
            ["noise", *FULL, "--steps", "4", "--target-epsilon", "3", "--expected-batch-size", "5"],
            "full batches have 500 samples",
        ),
        (["epsilon", *POISSON, "--steps", "4", "--noise-multiplier", "1", "--batch-cap", "9"], "batch_cap"),
        (["steps", *POISSON, "--noise-multiplier", "0.1", "--target-epsilon", "0.1"], "Not one step"),
        (
            ["noise", *POISSON[:2], *POISSON[4:], "--steps", "4", "--target-epsilon", "3"],
            "--expected-batch-size",
        ),
    ],
    ids=str,
)
def test_wrong_values_are_explained(script, capsys, words, message):
    assert script.main(words) == 2
    assert message in capsys.readouterr().err


def test_it_starts_without_models():
    code = (
        f"import runpy, sys; sys.argv = ['privacy.py', 'noise', *{FULL!r}, '--steps', '4', '--target-epsilon', '3']\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'transformers', 'datasets', 'opacus'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
