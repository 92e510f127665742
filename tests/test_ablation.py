"""The ablation's parts: its steps are the product's, and each verdict can come out either way."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from reference import clipped_sum, per_sample_gradients
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import ablation
from ablations import batch, checks, clipped, convergence, features, gamma, heatmap, training, weight_decay
from ablations.checks import REFUTED, SHOWN, UNDECIDED
from ablations.pages import SUMMARY
from bench.report import has_section

from dp_trainer import AutomaticClipping, ConfigurationError, FlatClipping, NormalizingClipping

PAGE = Path(__file__).parent.parent / "docs" / "findings.md"
DATA = features.synthetic(rows=200, width=6)
ROWS = len(DATA.train)
# Full batches have a closed form for ε, so that these plans cost nothing.
FULL = training.plan_for(rows=ROWS, batch=ROWS, steps=4, epsilon=3.0)
HEATMAP = heatmap.Grid(
    batch=ROWS,
    steps=4,
    norms=(-5, -4, 1),
    rates={name: (2, 3) if trades else (-3, -2) for name, trades in heatmap.TRADES.items()},
)
DECAY = weight_decay.Grid(batch=ROWS, steps=4, norms=(-1, 0, 1), decays=(0, 1, 2))


def head(seed=0, hidden=0):
    return training.Head(width=DATA.width, classes=DATA.classes, hidden=hidden, seed=seed)


def one_step(clipping, *, noise=True, seed=0):
    """Weights after one step of SGD with rate 1 from zero: minus the released gradient."""
    plan = training.with_clipping(FULL, clipping)
    recipe = training.Recipe(optimizer="SGD", learning_rate=1.0)
    plan = plan if noise else training.without_noise(plan)
    return training.train(DATA.train, head(), plan=plan, recipe=recipe, seed=seed, steps=1)


def verdicts(report):
    return {check["claim"]: check["verdict"] for check in report.data["checks"]}


# A step.


@pytest.mark.parametrize(
    "clipping", [AutomaticClipping(), FlatClipping(0.7), NormalizingClipping(2.0)], ids=str
)
def test_an_update_is_the_mean_of_gradients_clipped_one_at_a_time(clipping):
    run = one_step(clipping, noise=False)
    alone = per_sample_gradients(
        head(), {"features": DATA.train.features, "labels": DATA.train.labels}, training.per_sample_loss
    )
    norms_B = torch.stack([torch.cat([g.flatten() for g in sample.values()]).norm() for sample in alone])
    total = clipped_sum(alone, clipping(norms_B))
    expected = -torch.cat([total[name].flatten() for name in total]) / ROWS
    torch.testing.assert_close(run.weights, expected, rtol=1e-5, atol=1e-7)
    assert run.clipped == [pytest.approx(float((clipping(norms_B) < 1).double().mean()))]
    assert training.distance(one_step(AutomaticClipping(gamma=0.5), noise=False).weights, expected) > 0.01


def test_noise_has_the_plans_size_and_follows_the_seed():
    clipping = FlatClipping(0.5)
    first, again, other = (one_step(clipping, seed=seed).weights for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    bare = one_step(clipping, noise=False).weights
    noise = torch.cat([one_step(clipping, seed=seed).weights - bare for seed in range(40)])
    std = training.with_clipping(FULL, clipping).noise_std / ROWS
    assert float(noise.std()) == pytest.approx(std, rel=0.12)


def test_poisson_draws_follow_the_seed_and_the_plan():
    plan = training.plan_for(rows=ROWS, batch=20, steps=4, epsilon=3.0)
    assert plan.sampling == "poisson"
    assert not plan.noise_is_secure
    sizes = [len(labels) for seed in range(30) for _, labels in training._draws(DATA.train, plan, 4, seed)]
    assert sum(sizes) / len(sizes) == pytest.approx(20, rel=0.15)
    assert len(set(sizes)) > 3
    first, again = ([y.tolist() for _, y in training._draws(DATA.train, plan, 4, 3)] for _ in range(2))
    assert first == again


def test_the_loop_refuses_what_does_not_fit():
    recipe = training.Recipe(optimizer="SGD", learning_rate=1.0)
    with pytest.raises(ConfigurationError, match="the plan is for"):
        training.train(DATA.validation, head(), plan=FULL, recipe=recipe, seed=0)
    with pytest.raises(ConfigurationError, match="AdaGrad"):
        training.train(DATA.train, head(), plan=FULL, seed=0,
                       recipe=training.Recipe(optimizer="sgd", learning_rate=1.0))  # fmt: skip


def test_the_loop_learns_what_dptrainer_learns(monkeypatch):
    few = DATA.train.part(0, 40)
    apart = batch.trainer_distance(few, 2, steps=2, epsilon=3.0)
    assert batch.same_as_trainer(apart, 2).verdict == SHOWN
    train = batch.train
    monkeypatch.setattr(batch, "train", lambda *parts, **settings: train(*parts, **{**settings, "seed": 1}))
    apart = batch.trainer_distance(few, 2, steps=2, epsilon=3.0)
    assert batch.same_as_trainer(apart, 2).verdict == REFUTED


def test_gradient_norm_and_accuracy():
    model = head(hidden=3)
    alone = per_sample_gradients(
        model, {"features": DATA.train.features, "labels": DATA.train.labels}, training.per_sample_loss
    )
    mean = [sum(sample[name] for sample in alone) / ROWS for name in alone[0]]
    expected = float(torch.cat([entry.flatten() for entry in mean]).norm())
    assert training.gradient_norm(model, DATA.train) == pytest.approx(expected, rel=1e-5)
    right = sum(
        int(model(DATA.train.features[i : i + 1])["logits"].argmax()) == int(DATA.train.labels[i])
        for i in range(ROWS)
    )
    assert training.accuracy(model, DATA.train) == pytest.approx(right / ROWS)


# Features.


def test_synthetic_splits_are_disjoint_and_repeatable():
    again = features.synthetic(rows=200, width=6)
    assert torch.equal(DATA.train.features, again.train.features)
    rows = torch.cat([DATA.train.features, DATA.tuning.features, DATA.validation.features])
    assert len(rows.unique(dim=0)) == len(rows) == 200
    assert DATA.validation.majority >= 0.5
    with pytest.raises(ConfigurationError, match="at least 10"):
        features.synthetic(rows=9, width=2)
    with pytest.raises(ConfigurationError, match="do not"):
        features.Split(features=torch.zeros(3, 2), labels=torch.zeros(2))


def test_embedding_is_the_mean_over_tokens_whatever_stands_beside():
    ids = [[101, 2307, 3185, 102], [101, 9202, 102], [101, 2009, 2001, 1037, 2204, 2154, 102]]
    together = features.encode(ids, 0, label="three")
    for row, one in zip(together, ids, strict=True):
        torch.testing.assert_close(row, features.encode([one], 0, label="one")[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))


def test_embeddings_are_computed_once_for_the_same_text(tmp_path, monkeypatch):
    asked = []

    def encode(ids, padding, *, label):
        asked.append(len(ids))
        return torch.arange(float(len(ids)))[:, None].repeat(1, 2)

    monkeypatch.setattr(features, "encode", encode)
    first = features.sentiment(cache=tmp_path, rows=100)
    assert asked == [100, 100]
    second = features.sentiment(cache=tmp_path, rows=100)
    assert asked == [100, 100]
    features.sentiment(cache=tmp_path, rows=110)
    assert asked == [100, 100, 110, 110]
    assert torch.equal(first.train.features, second.train.features)
    assert [len(first.train), len(first.tuning), len(first.validation)] == [90, 10, 100]
    assert not set(first.train.features[:, 0].tolist()) & set(first.tuning.features[:, 0].tolist())
    with pytest.raises(ConfigurationError, match="at least 100"):
        features.sentiment(cache=tmp_path, rows=99)


# Verdicts.


@pytest.mark.parametrize(
    ("same", "other", "verdict"),
    [
        ([0.0, 0.01], [0.5], SHOWN),
        ([0.0, 0.03], [0.5], REFUTED),
        ([math.nan], [0.5], REFUTED),
        ([0.0], [0.05], UNDECIDED),
        ([0.0], [], UNDECIDED),
        ([], [0.5], UNDECIDED),
    ],
)
def test_alike(same, other, verdict):
    check = checks.alike("c", same=same, other=other, tolerance=0.02, contrast=0.1, what="d")
    assert check.verdict == verdict
    json.dumps(check.describe(), allow_nan=False)


@pytest.mark.parametrize(
    ("limits", "verdict"),
    [
        ((0.1, 0.9), SHOWN),
        ((-0.1, 0.5), UNDECIDED),
        ((0.5, 1.1), UNDECIDED),
        ((1.1, 2), REFUTED),
        ((-2, -1), REFUTED),
    ],
)
def test_bounded(limits, verdict):
    found = checks.Interval(mean=sum(limits) / 2, low=limits[0], high=limits[1])
    assert checks.bounded("c", found, low=0.0, high=1.0, what="d").verdict == verdict


@pytest.mark.parametrize(
    ("rows", "verdict"), [([[3, 2, 1], [5, 4]], SHOWN), ([[3, 2], [1, 1]], REFUTED), ([[1]], UNDECIDED)]
)
def test_falling(rows, verdict):
    assert checks.falling("c", rows, what="d").verdict == verdict


def test_intervals_are_students_and_welchs():
    first, second = [1.0, 2.0, 4.0, 3.5], [0.5, 0.7, 0.9]
    expected = stats.ttest_1samp(first, 0).confidence_interval(0.95)
    found = checks.interval(first)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    expected = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    found = checks.unpaired_difference(first, second)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    paired = checks.paired_difference([1.0, 2.0, 3.5], [0.0, 1.0, 2.0])
    assert (paired.mean, paired.low) == pytest.approx((7 / 6, 7 / 6 - 4.302653 / 6), rel=1e-5)
    assert checks.unpaired_difference([1.0, 1.0], [0.5, 0.5]).low == 0.5
    for values in ([1.0], []):
        with pytest.raises(ValueError, match="seeds"):
            checks.interval(values)
        with pytest.raises(ValueError, match="seeds"):
            checks.unpaired_difference(values, first)


# Findings, and planted counter-examples.


def by_weights(report, optimizer):
    return [v for c, v in verdicts(report).items() if c.startswith(f"DP-{optimizer},") and "weights" in c]


@pytest.fixture(scope="module")
def swept():
    return heatmap.measure(DATA, HEATMAP)


def test_heat_map_shows_what_holds(swept):
    for name, trades in heatmap.TRADES.items():
        assert by_weights(swept, name) == [SHOWN] * (2 if trades else 3)
    # Where R was no mere factor, flat clipping's runs must have been left out.
    flat = [cell for cell in swept.data["numbers"] if cell["clipping"] == "flat"]
    assert {cell["norm"] for cell in flat if cell["least_clipped"] < 1} == {1}


def test_heat_map_refutes_swapped_optimizers():
    known = training.OPTIMIZERS
    swapped = {"SGD": known["Adam"], "Adam": known["SGD"]}
    # With Adam, SGD's large rates would end where no gradient is clipped.
    grid = dataclasses.replace(HEATMAP, norms=(-5, -4), rates=dict.fromkeys(swapped, (-3, -2)))
    report = heatmap.measure(DATA, grid, optimizers=swapped)
    assert set(by_weights(report, "SGD") + by_weights(report, "Adam")) == {REFUTED}


def test_heat_map_refutes_noise_that_ignores_the_clipping_norm():
    class Unscaled(AutomaticClipping):
        """Its noise stays while its gradients shrink."""

        sensitivity = 1.0

    grid = dataclasses.replace(HEATMAP, rates={"SGD": HEATMAP.rates["SGD"]})
    kinds = {"automatic": lambda norm: Unscaled(clipping_norm=norm)}
    assert by_weights(heatmap.measure(DATA, grid, clipping=kinds), "SGD") == [REFUTED]


def test_heat_map_decides_nothing_where_nothing_moves():
    def still(parameters, recipe):
        return torch.optim.SGD(parameters, lr=0.0)

    grid = dataclasses.replace(HEATMAP, rates={"SGD": HEATMAP.rates["SGD"]})
    assert set(verdicts(heatmap.measure(DATA, grid, optimizers={"SGD": still})).values()) == {UNDECIDED}


def test_weight_decay_shows_what_holds_and_refutes_the_reverse():
    assert set(verdicts(weight_decay.measure(DATA, DECAY)).values()) == {SHOWN}
    known = training.OPTIMIZERS
    reverse = {"Adam": known["AdamW"], "AdamW": known["Adam"], "SGD": known["Adam"]}
    assert set(verdicts(weight_decay.measure(DATA, DECAY, optimizers=reverse)).values()) == {REFUTED}


def arms(usual, **others):
    known = {
        "usual": AutomaticClipping(),
        "small": AutomaticClipping(gamma=0.001),
        "tiny": AutomaticClipping(gamma=1e-4),
        "AUTO-V": NormalizingClipping(),
    }
    given = {"usual": usual, **others}
    return {
        name: gamma.Arm(clipping=known[name], rate=1.0, tuning=[], validation=given[name]) for name in given
    }


@pytest.mark.parametrize(
    ("small", "normalizing", "wanted"),
    [
        ([0.801, 0.811, 0.822], [0.800, 0.809, 0.820], [SHOWN, SHOWN]),
        ([0.770, 0.781, 0.789], [0.820, 0.831, 0.839], [REFUTED, REFUTED]),
        ([0.700, 0.810, 0.900], [0.700, 0.810, 0.950], [UNDECIDED, UNDECIDED]),
    ],
)
def test_gamma_verdicts(small, normalizing, wanted):
    usual = [0.80, 0.81, 0.82]
    found = gamma.judge(arms(usual, small=small, tiny=[0.5, 0.5, 0.5], **{"AUTO-V": normalizing}))
    # γ = 1e-4 lies outside the claimed range, so nothing is said about it.
    assert [check.verdict for check in found] == wanted


def test_gamma_chooses_the_rate_by_the_tuning_split():
    grid = gamma.Grid(batch=ROWS, steps=4, seeds=2, rates=(0.0, 0.1))
    report = gamma.measure(DATA, grid, arms={"AUTO-S": AutomaticClipping(), "AUTO-V": NormalizingClipping()})
    assert {arm["rate"] for arm in report.data["numbers"].values()} == {0.1}
    reversed_labels = features.Split(features=DATA.tuning.features, labels=1 - DATA.tuning.labels)
    turned = dataclasses.replace(DATA, tuning=reversed_labels)
    found = gamma.sweep(turned, grid, {"AUTO-S": AutomaticClipping()})
    assert found["AUTO-S"].rate == 0.0


def test_clipped_shows_what_holds_and_refutes_another_clipping():
    # A head of zeros has gradients of length 1, so R = 1 would lie on the edge.
    grid = clipped.Grid(batch=ROWS, steps=4, rate=0.03, norms=(0.01, 0.1, 1.1))
    report = clipped.measure(DATA, grid)
    assert set(verdicts(report).values()) == {SHOWN}
    assert report.data["numbers"]["1.1"]["clipped"][0] < 1
    other = (FlatClipping, lambda norm: AutomaticClipping(gamma=1.0, clipping_norm=norm))
    equality, _ = verdicts(clipped.measure(DATA, grid, pair=other)).values()
    assert equality == REFUTED


def test_clipped_says_so_where_the_papers_norm_leaves_gradients_alone():
    grid = clipped.Grid(batch=ROWS, steps=30, rate=3.0, norms=(0.1, 1.0))
    _, papers = verdicts(clipped.measure(DATA, grid)).values()
    assert papers == REFUTED


def cells(noises, accuracies):
    settings = {"noise_multiplier": 1.0, "epsilon": 3.0, "rate": 0.1, "tuning": 0.5}
    places = [(10, 8), (40, 8), (10, 32), (40, 32)]
    return [
        batch.Cell(batch=size, steps=steps, noise=noise, accuracies=scores, **settings)
        for (size, steps), noise, scores in zip(places, noises, accuracies, strict=True)
    ]


LOW, HIGH, WIDE = [0.70, 0.71, 0.72], [0.80, 0.81, 0.82], [0.5, 0.8, 0.9]


@pytest.mark.parametrize(
    ("noises", "scores", "wanted"),
    [
        ([4, 1, 6, 2], [LOW, HIGH, HIGH, [0.9, 0.91, 0.92]], [SHOWN] * 6),
        ([1, 4, 1, 8], [HIGH, LOW, LOW, [0.6, 0.61, 0.62]], [REFUTED] * 6),
        ([4, 1, 6, 2], [WIDE, WIDE, WIDE, WIDE], [SHOWN, SHOWN] + [UNDECIDED] * 4),
    ],
)
def test_batch_verdicts(noises, scores, wanted):
    assert [check.verdict for check in batch.judge(cells(noises, scores))] == wanted


def test_batch_takes_its_noise_from_the_package(monkeypatch):
    monkeypatch.setattr(batch, "trainer_distance", lambda *parts, **settings: 0.0)
    grid = batch.Grid(batches=(20, 0), steps=(4,), rates=(0.1,), seeds=2)
    report = batch.measure(DATA, grid)
    few, full = report.data["numbers"]["cells"]
    assert (few["batch"], full["batch"]) == (20, ROWS)
    assert full["noise"] == pytest.approx(FULL.noise_multiplier / ROWS)
    claim = next(iter(verdicts(report)))
    assert verdicts(report)[claim] == SHOWN

    def loud(*, rows, batch, steps, epsilon):
        """Noise that grows with the batch faster than the batch."""
        plan = training.plan_for(rows=rows, batch=batch, steps=steps, epsilon=epsilon)
        return dataclasses.replace(plan, noise_multiplier=plan.noise_multiplier * batch**2)

    assert verdicts(batch.measure(DATA, grid, planner=loud))[claim] == REFUTED


def test_slopes_of_powers():
    steps = [4, 16, 64]
    assert convergence.slope(steps, [3 * t**-0.4 for t in steps]) == pytest.approx(-0.4)


@pytest.mark.parametrize(
    ("plain", "private", "wanted"),
    [
        ([-0.5, -0.51, -0.49], [-0.5, -0.5, -0.5], [SHOWN, SHOWN, SHOWN]),
        ([-0.5, -0.51, -0.49], [-0.1, -0.11, -0.09], [SHOWN, REFUTED, REFUTED]),
        ([-0.5, -0.51, -0.49], [-0.9, -0.4, -0.1], [SHOWN, UNDECIDED, UNDECIDED]),
    ],
)
def test_convergence_verdicts(plain, private, wanted):
    found = convergence.judge({convergence.PLAIN: plain, "AUTO-S": private})
    assert [check.verdict for check in found] == wanted


def test_convergence_refutes_an_arm_that_stands_still():
    grid = convergence.Grid(batch=ROWS, hidden=2, steps=(2, 4, 8), constants=(1e-9, 1e-8), seeds=2, looks=2)
    report = convergence.measure(DATA, grid)
    rate = [v for claim, v in verdicts(report).items() if "T^(-1/4)" in claim]
    assert rate == [REFUTED] * 3


def test_plain_descent_through_the_engine_is_plain_descent():
    run = training.train(
        DATA.train,
        head(hidden=2),
        plan=convergence.ARMS[convergence.PLAIN](FULL),
        recipe=training.Recipe(optimizer="SGD", learning_rate=0.5),
        seed=0,
    )
    model = head(hidden=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(FULL.steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(DATA.train.features)["logits"], DATA.train.labels).backward()
        optimizer.step()
    expected = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).double()
    assert training.distance(run.weights, expected) < 1e-5
    assert set(run.clipped) == {0.0}


# The command.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "heat"], "heat"),
        (["--row", "300"], "--row"),
        (["--rows", "99"], "at least 100"),
        (["--write", "no/such/page.md"], "each once"),
    ],
)
def test_the_parser_refuses(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        ablation.parse_arguments(words)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_the_page_has_every_mode_and_a_summary():
    page = PAGE.read_text(encoding="utf-8")
    assert all(has_section(page, name) for name in (SUMMARY, *ablation.MODES))
    assert len(ablation.MODES) == 6


def test_figures_of_the_page_are_small():
    for path in (PAGE.parent / "figures").glob("*.png"):
        if path.stem in ablation.MODES:
            assert path.stat().st_size < 100_000


def test_a_run_writes_page_figures_and_summary(tmp_path, capsys):
    page = tmp_path / "page.md"
    marks = [f"<!-- {name} -->\n<!-- /{name} -->" for name in (SUMMARY, "weight_decay")]
    page.write_text("\n".join(["before", *marks, "after"]), encoding="utf-8")
    ablation.main([*("--quick", "--synthetic", "--rows", "100", "--only", "weight_decay"),
                   *("--output", str(tmp_path / "out"), "--write", str(page))])  # fmt: skip
    printed = capsys.readouterr().out
    written = page.read_text(encoding="utf-8")
    stored = json.loads((tmp_path / "out" / "weight_decay.json").read_text())["weight_decay"]
    figure = tmp_path / "figures" / "weight_decay.png"
    assert figure.read_bytes()[:4] == b"\x89PNG"
    assert figure.stat().st_size < 100_000
    assert stored["caption"] in written
    for check in stored["checks"]:
        assert f"| weight_decay | {check['claim']} | **{check['verdict']}** |" in written
        assert check["claim"] in printed
    assert written.startswith("before\n")
    assert written.endswith("after")
    assert len(stored["numbers"]) == 2 * 9 + 5
