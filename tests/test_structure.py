"""The package's layers: who may import whom, what is public, what a light import leaves unloaded."""

import ast
import importlib
import subprocess
import sys
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import dp_trainer

PACKAGE = Path(dp_trainer.__file__).parent
LINES = 400

# Each module, by pattern, and what it may import of the package: always something below it. The most
# specific pattern of a module decides, and a module without one fails the test: place it here first.
NUMBERS = ("errors", "privacy.*")
SAMPLES = ("errors", "terms", "ctc", "heads", "losses", "batches")
FORMS = (
    *("errors", "gradients.measures", "gradients.kernels", "gradients.fused", "gradients.slots"),
    *("gradients.stored", "gradients.forms"),
)
RULES = (*FORMS, "gradients.derived", "gradients.rules.*")
CAPTURE = (
    *(*RULES, "gradients.layouts", "gradients.rows", "gradients.calls", "gradients.links"),
    *("gradients.capture", "gradients.checkpointing", "gradients.sharding"),
)
ENGINE = (*CAPTURE, *SAMPLES, "gradients.*", "privacy.clipping")
RELEASE = (*ENGINE, *NUMBERS, "release", "distributed")
TRAINER = (
    *(*RELEASE, "batch_norm", "arguments", "records", "checkpoints", "workers", "preemption", "refusals"),
    *("planning", "publication", "searching", "trainer"),
)
MAY_IMPORT = {
    "__init__": ("*",),  # for type checkers only; a test below holds it to loading nothing
    "errors": (),
    "privacy": NUMBERS,
    "privacy.*": NUMBERS,
    "arguments": NUMBERS,
    "terms": ("errors",),
    "ctc": ("errors", "terms"),
    "heads": ("errors", "terms", "ctc"),
    "losses": ("errors", "terms", "heads"),
    "batches": ("errors",),
    "batch_norm": ("errors",),
    "gradients": (),
    "gradients.measures": ("errors",),
    "gradients.kernels": (),
    "gradients.fused": ("gradients.kernels", "gradients.measures"),
    "gradients.slots": ("errors", "gradients.measures"),
    "gradients.stored": ("errors", "gradients.measures"),
    "gradients.forms": FORMS,
    "gradients.layouts": ("errors",),
    "gradients.rows": ("errors", "gradients.layouts"),
    "gradients.derived": FORMS,
    "gradients.rules": RULES,
    "gradients.rules.*": RULES,
    "gradients.links": (*FORMS, "gradients.derived"),
    "gradients.calls": (*RULES, "gradients.layouts"),
    "gradients.capture": CAPTURE,
    "gradients.checkpointing": CAPTURE,
    "gradients.sharding": ("errors", "gradients.measures"),
    "gradients.heap": (),
    "gradients.parts": (*CAPTURE, *NUMBERS),
    "gradients.planner": ENGINE,
    "gradients.book_keeping": ENGINE,
    "gradients.one_sample": ENGINE,
    "gradients.two_pass": ENGINE,
    "gradients.explain": ENGINE,
    "gradients.halving": ENGINE,
    "gradients.strategies": ENGINE,
    "gradients.certificate": ENGINE,
    "gradients.independence": ENGINE,
    "release": RELEASE,
    "distributed": (*RELEASE, "batches"),
    "records": NUMBERS,
    "checkpoints": (*NUMBERS, "records"),
    "workers": ("errors",),
    "preemption": ("errors", "distributed"),
    "refusals": TRAINER,
    "planning": (*NUMBERS, "arguments"),
    "searching": NUMBERS,
    "publication": (*NUMBERS, "arguments", "records", "checkpoints"),
    "trainer": TRAINER,
    "audit": (),
    "audit.*": (*TRAINER, "audit.*"),
    "optim": ("errors",),
    "optim.*": ("errors", "optim.*"),
    "tasks.metrics": ("errors", "tasks.metrics.*"),
    "tasks.metrics.*": ("errors", "tasks.metrics.*"),
    "tasks": (*TRAINER, "tasks.*"),
    "tasks.*": (*TRAINER, "tasks.*"),
}

# Upward names that a module may say in annotations, under TYPE_CHECKING, but not load.
MAY_NAME = {"privacy.plan": ("arguments",)}

# Other libraries that only some modules may import.
ONLY_IN = {
    "dp_accounting": ("privacy.accounting", "privacy.mechanism", "privacy.loss_distribution"),
    "opacus": ("privacy.accounting",),
    "datasets": ("tasks.*",),
    "evaluate": ("tasks.metrics.*",),
    "nltk": ("tasks.metrics.*",),
    "peft": ("tasks.*",),
    "rouge_score": ("tasks.metrics.*",),
    "sacrebleu": ("tasks.metrics.*",),
    "triton": ("gradients.kernels",),
    "transformers": ("heads", "losses", "gradients.*", "trainer", "checkpoints", "workers", "preemption", "refusals", "planning", "publication", "searching", "distributed", "audit.canaries", "audit.noise", "audit.one_run", "optim.*", "tasks.*"),
}  # fmt: skip


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported_names(source, *, executed_only=False):
    """Absolute names of all imported modules, wherever in the source; relative ones are not in use here."""
    tree = ast.parse(source)
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if executed_only and id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield node.module
            # "from package import module" reads a module as well.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def siblings_in(source, *, executed_only=False):
    """The package's own modules that a source imports; a public name counts as the module it comes from."""
    names = set(imported_names(source, executed_only=executed_only))
    siblings = {name.removeprefix("dp_trainer.") for name in names if name.startswith("dp_trainer.")}
    homes = {
        dp_trainer._HOMES[name].removeprefix("dp_trainer.") for name in siblings & set(dp_trainer._HOMES)
    }
    bare = {"__init__"} if "dp_trainer" in names and not siblings else set()
    return {name for name in siblings if name in MODULES} | homes | bare


def matches(name, patterns):
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def faults_of(name, source):
    """What a module imports against the tables."""
    row = name if name in MAY_IMPORT else name.rpartition(".")[0] + ".*"
    if row not in MAY_IMPORT:
        return {f"{name} has no row in MAY_IMPORT"}
    named_only = siblings_in(source) - siblings_in(source, executed_only=True)
    allowed = {s for s in named_only if s in MAY_NAME.get(name, ())} | {name}
    # A package's own __init__ is loaded along with its modules.
    allowed |= {s for s in siblings_in(source) if name.startswith(f"{s}.")}
    up = {s for s in siblings_in(source) - allowed
          if not matches(s, MAY_IMPORT[row]) and not matches(f"{s}.", MAY_IMPORT[row])}  # fmt: skip
    libraries = {imported.partition(".")[0] for imported in imported_names(source)}
    return up | {lib for lib, homes in ONLY_IN.items() if lib in libraries and not matches(name, homes)}


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downward(name):
    assert faults_of(name, MODULES[name].read_text()) == set()


@pytest.mark.parametrize(("name", "source", "fault"), [
    ("privacy.noise", "from dp_trainer.gradients.forms import Form", "gradients.forms"),
    ("privacy.noise", "from dp_trainer.gradients import forms", "gradients.forms"),
    ("privacy.plan", "def f():\n    import transformers", "transformers"),
    ("batches", "import datasets.arrow_dataset", "datasets"),
    ("gradients.rules.linear", "from dp_trainer.gradients.capture import capture", "gradients.capture"),
    ("losses", "from dp_trainer import trainer", "trainer"),
    ("release", "import dp_accounting", "dp_accounting"),
    ("batches", "from dp_trainer import DPTrainer", "trainer"),
    ("batches", "import dp_trainer", "__init__"),
    ("privacy.plan", "from dp_trainer.arguments import PrivacyArguments", "arguments"),
    ("privacy.noise", "if TYPE_CHECKING:\n    from dp_trainer.trainer import DPTrainer", "trainer"),
    ("surprise", "", "surprise has no row in MAY_IMPORT"),
])  # fmt: skip
def test_an_upward_import_is_seen(name, source, fault):
    assert fault in faults_of(name, source)


def test_an_upward_name_may_stand_in_an_annotation():
    source = "if TYPE_CHECKING:\n    from dp_trainer.arguments import PrivacyArguments"
    assert faults_of("privacy.plan", source) == set()
    assert faults_of("privacy.sampling", source) == {"arguments"}


def test_no_module_imports_itself_by_a_detour():
    graph = {
        name: siblings_in(path.read_text(), executed_only=True)
        for name, path in MODULES.items()
        if name != "__init__"
    }
    try:
        TopologicalSorter({name: found - {name} for name, found in graph.items()}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("name", MODULES)
def test_modules_stay_readable(name):
    assert len(MODULES[name].read_text().splitlines()) <= LINES


def names_for_type_checkers():
    tree = ast.parse(MODULES["__init__"].read_text())
    guarded = [node for node in tree.body if isinstance(node, ast.If)]
    return {
        alias.name: node.module
        for block in guarded
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_public_names_are_listed_once_and_alike():
    assert dp_trainer.__all__ == sorted(set(dp_trainer.__all__))
    assert names_for_type_checkers() == dp_trainer._HOMES
    assert set(dp_trainer.__all__) == set(dp_trainer._HOMES)


@pytest.mark.parametrize("name", dp_trainer.__all__)
def test_public_names_are_importable_from_their_home(name):
    public = getattr(dp_trainer, name)
    assert public is getattr(importlib.import_module(dp_trainer._HOMES[name]), name)
    assert public.__doc__


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="DPTrainr"):
        dp_trainer.DPTrainr  # noqa: B018


def loaded_by(*modules):
    code = f"import sys, {', '.join(modules)}; print(*{{n.partition('.')[0] for n in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_numbers_load_no_models():
    numbers = [f"dp_trainer.{name}" for name in MODULES if name.startswith("privacy") or name == "arguments"]
    assert len(numbers) > 5
    assert not {"transformers", "datasets", "accelerate", "opacus", "peft"} & loaded_by(
        "dp_trainer", *numbers
    )


def test_the_bare_package_loads_nothing():
    assert not {"torch", "transformers", "numpy"} & loaded_by("dp_trainer")
