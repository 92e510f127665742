"""The benchmark's parts: what it measures is the product, and its arithmetic is right."""

import dataclasses
import json
import math
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers
from reference import per_sample_gradients
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import benchmark
from bench import contenders, overhead, report, scaling, steps, throughput
from bench.cases import CASES, DEFAULT_CASES, Case, small_gpt2, small_llama, tokens
from bench.device import Device
from bench.figures import Bar, draw_bars
from bench.measure import in_turns, repeats_for

from dp_trainer import AutomaticClipping
from dp_trainer.losses import per_sample_loss_for
from dp_trainer.release import release

CPU = Device()
PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
PARAMETERS = {
    "gpt2": 124e6, "gpt2-lora": 124e6, "gpt2-long": 68e6, "gpt2-1024-b1": 68e6, "gpt2-1024-b4": 68e6,
    "roberta-base": 125e6, "vit-small": 22e6, "llama": 135e6, "wide-head": 162e6,
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_cases_have_the_size_they_say(name):
    case = CASES[name]
    with torch.device("meta"):
        model, batch = case.model(), case.batch()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(PARAMETERS[name], rel=0.02)
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (trains < 0.5e6) == (name == "gpt2-lora")
    inputs = batch.get("input_ids", batch.get("pixel_values"))
    assert f"{len(inputs)} " in case.title.rpartition(", ")[2]
    assert all(len(column) == len(inputs) for column in batch.values())
    assert per_sample_loss_for(model)


def test_default_cases_leave_out_the_largest_alone():
    assert set(CASES) - set(DEFAULT_CASES) == {"gpt2-1024-b4", "wide-head"}


def test_a_case_without_its_package_is_left_out(monkeypatch, capsys):
    missing = dataclasses.replace(CASES["gpt2-lora"], needs="no_such_package")
    monkeypatch.setitem(CASES, "gpt2-lora", missing)
    found = steps.measure(
        cases=["gpt2-lora"], contenders=["plain"], micro_batches=[1], rounds=[2], device=CPU
    )
    assert found.data == {}
    assert found.figure is None
    assert "no_such_package is not installed" in capsys.readouterr().out


# The command line.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cases", "gpt3"], "gpt3"),
        (["--contenders", "opacus"], "opacus"),
        (["--tasks", "sst3"], "sst3"),
        (["--round", "3"], "--round"),
        (["--rounds", "1"], "at least 2"),
        (["--rounds", "3", "2"], "one for each"),
        (["--micro-batches", "1", "1"], "different"),
        (["--micro-batches", "0"], "positive"),
        (["--scaling", "--rounds", "3", "2"], "one for each"),
        (["--scaling", "--overhead"], "not allowed"),
        (["--throughput", "--steps", "1"], "--steps"),
        (["--throughput", "--width", "100"], "multiple of 32"),
        (["--write", "no/such/page.md"], "each once"),
        (["--device", "tpu"], "tpu"),
        (["--add-to", "no/such.json"], "needs the steps.json"),
    ],
)
def test_the_parser_refuses(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        benchmark.parse_arguments(words)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_one_number_of_rounds_serves_all_micro_batches():
    assert benchmark.parse_arguments(["--micro-batches", "1", "8", "--rounds", "4"]).rounds == [4, 4]
    assert benchmark.parse_arguments(["--micro-batches", "1", "8", "--rounds", "4", "2"]).rounds == [4, 2]


def test_the_page_has_every_mode_and_a_page_without_is_refused(tmp_path, capsys):
    for mode in benchmark.MODES:
        assert report.has_section(PAGE.read_text(encoding="utf-8"), mode)
        words = ["--write", str(PAGE)] + ([] if mode == "steps" else [f"--{mode}"])
        assert benchmark.parse_arguments(words).mode == mode
    (tmp_path / "page.md").write_text("<!-- steps -->", encoding="utf-8")
    with pytest.raises(SystemExit):
        benchmark.parse_arguments(["--write", str(tmp_path / "page.md")])
    assert "<!-- /steps -->" in capsys.readouterr().err


# Steps.


def tiny_case(*, frozen=False):
    def model():
        config = transformers.GPT2Config(
            vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        built = transformers.GPT2LMHeadModel(config)
        if frozen:
            for name, parameter in built.named_parameters():
                parameter.requires_grad = "bias" in name
        return built

    return Case(model=model, batch=lambda: tokens(3, 6, 20), title="tiny")


def built(contender, case, **settings):
    torch.manual_seed(0)
    return contender(case, CPU, **settings)


def expected_gradients(case, micro_batches):
    """What a release without noise leaves, one sample at a time."""
    torch.manual_seed(0)
    # In the order of the contender's own building.
    batch, model = case.batch(), case.model().train()
    clip, samples = AutomaticClipping(), len(batch["labels"])
    total: dict[str, torch.Tensor] = {}
    for gradients in per_sample_gradients(model, batch, per_sample_loss_for(model)):
        norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
        for name, gradient in gradients.items():
            total[name] = total.get(name, 0) + gradient * clip(norm[None])
    # Equal micro-batches: their number cancels between sum and divisor.
    return {name: micro_batches * g / (samples * micro_batches) for name, g in total.items()}


def private_gradients(case, micro_batches):
    contender = built(contenders.private, case, noise_multiplier=0.0)
    contender.gradients(micro_batches)
    return {name: p.grad for name, p in contender.model.named_parameters() if p.requires_grad}


def agree(found, expected):
    return found.keys() == expected.keys() and all(
        torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-7) for name in expected
    )


@pytest.mark.filterwarnings("ignore:noise_multiplier 0 gives no privacy")
@pytest.mark.parametrize("frozen", [False, True], ids=["all", "biases"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_private_step_is_a_release(micro_batches, frozen):
    case = tiny_case(frozen=frozen)
    assert agree(private_gradients(case, micro_batches), expected_gradients(case, micro_batches))


def loses_a_micro_batch(model, micro_batches, **settings):
    return release(model, list(micro_batches)[1:], **settings)


def clips_harder(model, micro_batches, *, plan, **settings):
    plan = dataclasses.replace(plan, clipping=AutomaticClipping(clipping_norm=0.5))
    return release(model, micro_batches, plan=plan, **settings)


def divides_by_one_micro_batch(model, micro_batches, *, plan, **settings):
    plan = dataclasses.replace(plan, expected_batch_size=3)
    return release(model, micro_batches, plan=plan, **settings)


@pytest.mark.filterwarnings("ignore:noise_multiplier 0 gives no privacy")
@pytest.mark.parametrize("fault", [loses_a_micro_batch, clips_harder, divides_by_one_micro_batch])
def test_a_planted_fault_is_seen(fault, monkeypatch):
    monkeypatch.setattr(contenders, "release", fault)
    case = tiny_case()
    assert not agree(private_gradients(case, 3), expected_gradients(case, 3))


def test_the_private_step_adds_the_noise_it_says():
    case = small_gpt2(width=64, layers=2, samples=2, length=16)
    noisy, quiet = (built(contenders.private, case) for _ in range(2))
    for contender in (noisy, quiet):
        contender.gradients(2)
    pairs = zip(noisy.model.parameters(), quiet.model.parameters(), strict=True)
    difference = torch.cat([(a.grad - b.grad).flatten() for a, b in pairs])
    # Two independent draws, divided by the samples of two micro-batches.
    expected = math.sqrt(2) * contenders.NOISE_MULTIPLIER / 4
    assert float(difference.std()) == pytest.approx(expected, rel=0.02)


def test_every_new_use_is_checked_in_the_private_step(monkeypatch):
    seen = []
    monkeypatch.setattr(contenders, "release", lambda *_args, **settings: seen.append(settings["verified"]))
    contender = built(contenders.private, tiny_case())
    contender.gradients(1)
    contender.gradients(1)
    assert seen[0] == set()
    assert seen[0] is seen[1]


def test_plain_accumulation_is_the_mean_of_micro_batches():
    one, many = (built(contenders.plain, tiny_case()) for _ in range(2))
    one.gradients(1)
    many.gradients(4)
    for a, b in zip(one.model.parameters(), many.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("contender", ["plain", "dp_trainer"])
def test_a_step_moves_what_trains_and_nothing_else(contender):
    made = built(contenders.CONTENDERS[contender], tiny_case(frozen=True))
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.step(2)
    moved = {name for name, p in made.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "bias" in name}
    assert sum(len(group["params"]) for group in made.optimizer.param_groups) == len(moved)
    assert all(p.grad is None for p in made.model.parameters())


# The clock.


def test_contenders_take_turns_to_begin():
    order = []
    taken = in_turns(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, device=CPU, repeats=2
    )
    assert "".join(order) == "bbaa" + "aabb" + "bbaa"
    assert {name: len(seconds) for name, seconds in taken.items()} == {"a": 3, "b": 3}


def test_short_steps_are_repeated(monkeypatch):
    clock = iter((0.0, 0.03, 0.0, 5.0))
    monkeypatch.setattr("bench.measure.time.perf_counter", lambda: next(clock))
    assert repeats_for(lambda: None, 0.2, CPU) == 7
    assert repeats_for(lambda: None, 0.2, CPU) == 1


def test_the_cpu_has_a_peak_and_a_name():
    assert 0.05 < CPU.peak_gib() < 1000
    assert CPU.describe().endswith("float32")
    assert Device(bf16=True).describe().endswith("bfloat16 autocast")


# Numbers to text.


def test_medians_and_quartiles():
    assert report.spread([5, 1, 2, 3, 4]) == report.Spread(low=2, middle=3, high=4)
    assert report.spread([1, 2]) == report.Spread(low=1.25, middle=1.5, high=1.75)
    with pytest.raises(ValueError, match="1 values"):
        report.spread([1])
    # Each round by itself: the quotient of medians would be 3.
    assert report.ratios([2, 3, 30], [1, 3, 1]) == report.Spread(low=1.5, middle=2, high=16)
    assert str(report.Spread(low=1, middle=1.25, high=2)) == "1.250 (1.000 to 2.000)"
    assert f"{report.Spread(low=1, middle=1.25, high=2)}" == "1.250 (1.000 to 2.000)"
    assert f"{report.Spread(low=1, middle=1.25, high=2):.1f}" == "1.2 (1.0 to 2.0)"
    with pytest.raises(ValueError, match=r"shorter|longer"):
        report.ratios([1, 2], [1, 2, 3])


def test_tables_have_equal_rows():
    assert report.table(["a", "b"], [(1, 2)]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    with pytest.raises(ValueError, match="3 cells"):
        report.table(["a", "b"], [(1, 2, 3)])


def test_only_the_marked_section_is_replaced():
    page = (
        "before\n<!-- steps -->\nold\n<!-- /steps -->\nbetween\n<!-- scaling -->\nkept\n<!-- /scaling -->\n"
    )
    changed = report.with_section(page, "steps", r"new \1")
    assert changed == page.replace("old", r"new \1")
    assert report.with_section(changed, "steps", "old") == page
    for broken in ("", "<!-- steps -->", "<!-- /steps --><!-- steps -->", page + page):
        with pytest.raises(ValueError, match="each once"):
            report.with_section(broken, "steps", "new")


MADE_UP = {
    "gpt2": [
        steps.Result(contender="plain", micro_batches=1, seconds=[1, 1, 1], plain_seconds=[1, 1, 1], peak_gib=2.0),
        steps.Result(contender="dp_trainer", micro_batches=1, seconds=[1, 2, 3], plain_seconds=[1, 1, 1], peak_gib=3.0),
        steps.Result(contender="dp_trainer", micro_batches=8, seconds=[8, 9], plain_seconds=[8, 8], peak_gib=4.0),
    ],
    "llama": [
        steps.Result(contender="plain", micro_batches=1, seconds=[2, 2], plain_seconds=[2, 2], peak_gib=1.0)
    ],
}  # fmt: skip


def test_the_overall_table_of_steps():
    text = steps.page(MADE_UP)
    assert "3 rounds with 1 micro-batch a step; 2 rounds with 8 micro-batches a step." in text
    assert "| gpt2 | 1.00 / 2.00 | 2.000 (1.500 to 2.500) / 1.50 | 1.062 (1.031 to 1.094) / – |" in text
    assert "| llama | 2.00 / 1.00 | – | – |" in text
    assert "| dp_trainer ×8 | 8.500 | 8.000 | 1.062 (1.031 to 1.094) | 4.00 | – |" in text


def test_a_failed_contender_leaves_the_others(monkeypatch):
    def child(task, settings, *, label, keeps_memory=True):
        if settings["contender"] == "opacus-hooks":
            return None
        if task == "step-memory":
            return 1.0 + settings["micro_batches"]
        own = {"plain": [1.0, 1.0], settings["contender"]: [2.0, 2.0]}
        return [[count, own] for count, _ in settings["rounds"]]

    monkeypatch.setattr(steps, "in_child", child)
    found = steps.measure_case("gpt2", list(contenders.CONTENDERS), {1: 2, 8: 2}, CPU)
    assert [(r.contender, r.micro_batches, r.peak_gib, r.ratio.middle) for r in found] == [
        ("plain", 1, 2.0, 1.0),
        ("dp_trainer", 1, 2.0, 2.0),
        ("opacus-ghost", 1, 2.0, 2.0),
        ("plain", 8, 9.0, 1.0),
        ("dp_trainer", 8, 9.0, 2.0),
    ]


def test_what_an_earlier_run_measured_is_kept_and_the_newer_wins(monkeypatch, tmp_path, capsys):
    (tmp_path / "steps.json").write_text(
        json.dumps(
            {
                "environment": {**report.environment(CPU), "threads": 1},
                "steps": {
                    case: [dataclasses.asdict(result) for result in found] for case, found in MADE_UP.items()
                },
            }
        )
    )
    again = steps.Result(
        contender="dp_trainer", micro_batches=1, seconds=[5, 5], plain_seconds=[1, 1], peak_gib=9.0
    )
    monkeypatch.setattr(steps, "measure_case", lambda *arguments: [again])
    words = ["--cases", "gpt2", "--add-to", str(tmp_path / "steps.json")]
    found = benchmark.measure(benchmark.parse_arguments(words), CPU)
    ours = {(made["contender"], made["micro_batches"]): made["peak_gib"] for made in found.data["gpt2"]}
    assert ours == {("plain", 1): 2.0, ("dp_trainer", 1): 9.0, ("dp_trainer", 8): 4.0}
    assert "2 or 3 rounds with 1 micro-batch a step; 2 rounds with 8" in found.text
    assert "| llama | 2.00 / 1.00 | – | – |" in found.text
    changed = json.loads((tmp_path / "steps.json").read_text())
    changed["environment"]["torch"] = "0.1"
    (tmp_path / "steps.json").write_text(json.dumps(changed))
    with pytest.raises(SystemExit):
        benchmark.parse_arguments(words)
    assert "measured elsewhere" in capsys.readouterr().err


def test_a_report_is_saved_whole(tmp_path):
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("# Title\n<!-- steps -->\n<!-- /steps -->\n", encoding="utf-8")
    spread = report.Spread(low=1, middle=2, high=3)
    figure = draw_bars([Bar(label="gpt2", kind="plain", spread=spread, peak=1.0)], kinds=("plain",))
    found = report.Report(name="steps", text="| table |", data=[1], figure=figure)
    written = found.save(tmp_path / "runs", page, CPU)
    assert {path.relative_to(tmp_path).as_posix() for path in written} == {
        "runs/steps.json", "runs/steps.png", "docs/page.md", "docs/figures/steps.png",
    }  # fmt: skip
    assert (tmp_path / "docs/figures/steps.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / "runs/steps.json").read_text(encoding="utf-8"))
    assert saved["steps"] == [1]
    assert saved["environment"]["torch"] == version("torch")
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Title\n<!-- steps -->\n*device ")
    assert text.endswith("| table |\n\n![steps](figures/steps.png)\n<!-- /steps -->\n")


# Sweeps and overhead.


def test_sweeps_change_one_thing_along_each_curve():
    for sweep in scaling.SWEEPS:
        for points in sweep.curves.values():
            others = {dataclasses.replace(point, **{sweep.field: 1}) for point in points}
            assert len(others) == 1
            values = [getattr(point, sweep.field) for point in points]
            assert values == sorted(set(values))


def test_scaling_reports_what_its_points_measured(monkeypatch):
    def child(task, settings, *, label, keeps_memory=True):
        if settings["length"] == 64:
            return None
        return {"plain": [1.0, 1.0], "private": [1.5, 1.5], "parameters": 2_000_000}

    monkeypatch.setattr(scaling, "in_child", child)
    found = scaling.measure(sweeps=scaling.TINY_SWEEPS, rounds=2, device=CPU)
    assert "T 128 | 2.00M | 1000.0 | 1.500 (1.500 to 1.500) |" in found.text
    assert "T 64 " not in found.text
    assert found.figure.startswith(b"\x89PNG")
    assert all(point["length"] == 128 for point in found.data)


def test_a_point_measures_both_steps():
    found = scaling.point_task(width=16, layers=1, samples=2, length=8, rounds=2, name="cpu", bf16=False)
    assert len(found["plain"]) == len(found["private"]) == 2
    assert found["parameters"] == sum(
        p.numel() for p in small_gpt2(width=16, layers=1, samples=2, length=8).model().parameters()
    )


class TwoCalls(nn.Module):
    """A forward pass whose calls can be counted by hand."""

    config = transformers.GPT2Config()

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 2))

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight).exp()


def test_calls_are_counted_one_by_one(monkeypatch):
    case = Case(
        model=TwoCalls,
        batch=lambda: {"x": torch.ones(3, 2), "labels": torch.zeros(3)},
        title="two calls",
    )
    monkeypatch.setattr(overhead, "per_sample_loss_for", lambda _model: lambda m, b: m(b["x"]).flatten())
    # linear, exp, flatten; then sum and backward on the losses. Reading self.weight is no torch call.
    assert overhead.count_calls(case, CPU) == 5


@pytest.mark.parametrize("build", [small_gpt2, small_llama])
def test_calls_grow_with_layers(build):
    one, two, three = (
        overhead.count_calls(build(width=32, layers=n, samples=2, length=8), CPU) for n in (1, 2, 3)
    )
    assert three - two == two - one > 10


def test_operations_are_counted_without_views():
    x = torch.ones(4, 6)
    # A product, its sum over an axis and an addition; transposing and picking compute nothing.
    assert overhead.count_operations(lambda: (x.T @ x)[0].sum() + x[1, 2]) == 3


def test_the_overhead_of_a_call():
    found = overhead.Overhead(
        model="m",
        calls=100,
        operations={"plain": 40, "private": 90},
        seconds={"private": [0.003, 0.004], "plain": [0.001, 0.002]},
    )
    assert found.microseconds_a_call.middle == pytest.approx(20)
    text = overhead.page([found], {"x.shape, plain": [1e-6, 1e-6], "x.shape, watched": [3e-6, 3e-6]})
    assert "| m | 100 | 40 | 90 | 1.50 | 3.50 |" in text
    assert "| `x.shape` | 1.00 (1.00 to 1.00) | 3.00 (3.00 to 3.00) |" in text


# Whole runs.


def text(length, label):
    return {"input_ids": [1 + label] * length, "attention_mask": [1] * length, "labels": label}


# Every other sample is long.
TEXTS = [text(12, 1) if index % 2 else text(2, 0) for index in range(64)]


def collate(samples):
    longest = max(len(sample["input_ids"]) for sample in samples)
    padded = {key: torch.tensor([s[key] + [0] * (longest - len(s[key])) for s in samples]) for key in
              ("input_ids", "attention_mask")}  # fmt: skip
    return {**padded, "labels": torch.tensor([sample["labels"] for sample in samples])}


def tiny_bert():
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
            max_position_embeddings=16,
        )
    )  # fmt: skip


def test_what_runs_compute_is_counted(capsys):
    size = throughput.Size(steps=3, accumulation=2)
    runs = {
        name: throughput.train(name, tiny_bert(), TEXTS, collate, size=size, seed=1)
        for name in throughput.CONTENDERS
    }
    for name, run in runs.items():
        assert run.whole_samples == 96
        assert 0 < run.seconds < run.whole_seconds
        # Two steps of 32; a Poisson draw may differ, by six standard deviations and more hardly ever.
        assert run.samples == 64 if name.startswith("plain") else 20 < run.samples < 108
        # Long samples have 12 tokens and short ones 2.
        assert 2 * run.samples <= run.real_tokens <= run.computed_tokens <= 12 * run.samples
    # Sorted, at most one micro-batch of each step mixes long and short; unsorted, every one does, but that the few
    # samples of a Poisson draw's last micro-batch may all be short by chance.
    assert runs["plain"].computed_tokens == 12 * runs["plain"].samples
    unsorted = runs[throughput.UNSORTED]
    assert 12 * unsorted.samples - 160 <= unsorted.computed_tokens <= 12 * unsorted.samples
    for name in (throughput.GROUPED, "dp_trainer"):
        assert runs[name].padding < runs["plain"].padding


def made_up_run(*, seconds, computed):
    return throughput.Run(
        whole_samples=300, whole_seconds=30.0, seconds=seconds, samples=200, real_tokens=1000, computed_tokens=computed
    )  # fmt: skip


def test_the_page_of_runs_tells_sorting_from_capture():
    runs = {
        "plain": [made_up_run(seconds=10.0, computed=2000)] * 2,
        "dp_trainer": [made_up_run(seconds=8.0, computed=1000)] * 2,
    }
    text = throughput.page("sst2", runs, throughput.Size(steps=3, accumulation=4))
    assert "2 rounds of 3 steps of 16 × 4 samples, 4 layers of width 128; samples a second" in text
    assert "| dp_trainer | 10.0 | 1.000 (1.000 to 1.000) | 25.0 | 1.250 (1.250 to 1.250) |" in text
    assert "| plain | 2.000 | 5000.0 | 1.000 (1.000 to 1.000) |" in text
    assert "| dp_trainer | 1.000 | 8000.0 | 1.600 (1.600 to 1.600) |" in text


def test_tasks_without_a_tokenizer_are_left_out(capsys):
    found = throughput.measure(
        tasks=["e2e", "sst2"], gpt2_tokenizer=None, roberta_tokenizer=None, sst2_data=None, rounds=2, steps=2,
        accumulation=1, shape=throughput.Shape(),
    )  # fmt: skip
    assert found.data == {}
    assert capsys.readouterr().out.count("no tokenizer was given") == 2
