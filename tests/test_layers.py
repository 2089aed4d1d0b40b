"""An import points only downward: the layout of the design, walked and enforced."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lbaccel"

# The rooms, from the ground up: each imports only from those before it (shared/layout.md).
ROOMS = (
    *("errors", "documents", "torch_files", "text", "launch", "host_memory"),
    "network_arguments",
    *("networks", "network_build", "models"),
    *("batch", "optim", "noise", "randomness", "data", "runs", "update"),
    *("hyperparameters", "planning", "verification", "configs", "doctor"),
    *(
        "recipe",
        "stability",
        "replication",
        "export",
        "product",
        "landscape",
        "train",
        "finetuning",
        "studies",
        "report",
        "commands",
        "cli",
        "__main__",
    ),
)
NO_TORCH = (  # those without numpy first
    "optim.scaling",
    "optim.schedules",
    "errors",
    "documents",
    "torch_files",
    "text",
    "host_memory",
    "network_arguments",
    "batch.stream",
    "batch.duration",
    "batch.plan",
    "batch.growth",
    "batch.rules",
    "batch.phases",
    "optim.rule",
    "optim.defaults",
    "optim.adascale",
    "noise.arithmetic",
    "noise.auto_batch",
    "noise.advice",
    "randomness.keys",
    "randomness.permutation",
    "hyperparameters.values",
    "hyperparameters.transfer",
    "update.loss_dropout",
    "recipe.growth",
    "recipe.values",
    "recipe.bounds",
    "recipe.other_names",
    "configs.shipped",
    "recipe.presets",
    "recipe.command_line",
    "recipe.options",
    "recipe.options_batch",
    "recipe.options_data",
    "recipe.model_arguments",
    "recipe.options_training",
    "recipe.rate",
    "recipe.settings",
    "recipe.resume",
    "recipe.contract",
    "recipe.signals",
    "recipe.schedule_table",
    "landscape.axes",
    "stability.limit",
    "runs.folder",
    "runs.environment",
    "runs.bug_report",
    "runs.outputs",
    "runs.length",
    "runs.pace",
    "runs.lock",
    "runs.own_name",
    "runs.read",
    "recipe.ending",
    "runs.compare",
    "runs.compare_figure",
    "runs.groups",
    "runs.thin",
    "runs.read_cloud",
    "runs.wandb_login",
    "recipe.experiment",
    "product.shares",
    "studies.spec",
    "studies.judging",
    "studies.seeds",
    "studies.limits",
    "studies.on_images",
    "studies.spread",
    "studies.to_target",
    "studies.rules",
    "studies.curves",
    "studies.results",
    "studies.tables",
    "runs.columns",
    "runs.figures",
    "runs.noise_readings",
    "stability.range_text",
    "report.scales",
    "report.chart",
    "report.drawing",
    "report.curves",
    "report.events",
    "report.provenance",
    "report.verdict",
    "report.pictures",
    "report.page",
    "report.study_charts",
    "report.target_chart",
    "report.study_tables",
    "report.runs_strands",
    "report.runs_tables",
    "report.of_study",
    "commands.report",
    "commands.schedule",
    "commands.advise",
    "commands.compare",
    "commands.lr_find",
    "commands.landscape",
    "commands.sharpness",
    "commands.env",
    "cli",
)


def imports(path: Path, *, only_top: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in tree.body if only_top else ast.walk(tree):
        if node in guarded:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def modules_imported(path: Path) -> set[str]:
    """Names of the package's own modules, without `lbaccel.`."""
    own = {name_of(other) for other in modules()}
    return {name.removeprefix("lbaccel.") for name in imports(path)} & own


def test_every_entry_of_the_package_is_a_room():
    entries = {
        path.stem
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path.is_dir() and path.name != "__pycache__")
    }
    assert entries - {"__init__"} == set(ROOMS)


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_a_module_imports_only_from_rooms_below(path):
    own = name_of(path).split(".")[0]
    for name in modules_imported(path):
        room = name.split(".")[0]
        assert room == own or ROOMS.index(room) < ROOMS.index(own), f"{path} imports {name}"


def test_inside_a_room_too_files_import_downward():
    """No circle: there is an order of all files in which each imports only from those before."""
    graph = {name_of(path): modules_imported(path) for path in modules()}
    assert any(graph.values())
    list(TopologicalSorter(graph).static_order())  # CycleError names the circle


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=str)
def test_a_folder_says_what_it_holds_in_one_line_and_imports_nothing(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert (ast.get_docstring(tree) or "").strip()
    if path.parent != PACKAGE:
        assert len(tree.body) == 1, f"{path}: a docstring, and nothing else"


MOST_LINES = 120  # of a function, with its docstring


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_no_function_is_longer_than_two_screens(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lengths = {
        node.name: (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert {name: n for name, n in lengths.items() if n > MOST_LINES} == {}


HEAVY = {"torch", "timm", "accelerate", "wandb", "matplotlib", "deepspeed"}
ONE_BY_ONE = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(f"lbaccel.{name}")
    print(json.dumps([name, sorted({found.split(".")[0] for found in sys.modules})]))
"""


@pytest.fixture(scope="module")
def modules_after():
    """For each of NO_TORCH, which packages one process holds when it has imported it."""
    done = subprocess.run(
        [sys.executable, "-c", ONE_BY_ONE, *NO_TORCH],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name: set(held) for name, held in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", NO_TORCH)
def test_the_arithmetic_imports_no_torch(name, modules_after):
    top = {
        found.split(".")[0]
        for found in imports(PACKAGE.joinpath(*name.split(".")).with_suffix(".py"), only_top=True)
    }
    assert not top & HEAVY
    assert not modules_after[name] & HEAVY  # nor does anything that it imports


@pytest.mark.parametrize("name", ["optim.scaling", "optim.schedules"])
def test_rates_and_schedules_need_no_numpy_either(name, modules_after):
    assert "numpy" not in modules_after[name]


def test_a_class_name_stands_in_one_module():
    """A reader who meets a name such as `Row` knows which class it is."""
    homes: dict[str, list[str]] = {}
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(name_of(path))
    assert homes["Phase"] == ["batch.phases"]
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=str)
def test_no_docstring_begins_with_what(path):
    """A docstring is a sentence or a noun phrase: it names its subject first."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            doc = ast.get_docstring(node) or ""
            assert not doc.startswith("What"), f"{path}: {doc.splitlines()[0]}"


def test_tensors_without_memory_have_one_door():
    """`fake_tensors` keeps this process able to fork; FakeTensorMode by itself does not."""
    users = {path.name for path in modules() if "FakeTensorMode" in path.read_text()}
    assert users == {"known_calls.py"}


def test_deepspeed_wandb_and_matplotlib_are_imported_only_where_used():
    for path in modules():
        top = {found.split(".")[0] for found in imports(path, only_top=True)}
        assert not top & {"deepspeed", "wandb", "matplotlib", "transformers"}, path


WITHOUT_EXTRAS = """
import importlib, importlib.metadata, importlib.util, sys

missing = ("deepspeed", "transformers")
found_spec, version = importlib.util.find_spec, importlib.metadata.version

def find_spec(name, *rest):
    return None if name.split(".")[0] in missing else found_spec(name, *rest)

def find_version(name):
    if name in missing:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

importlib.util.find_spec, importlib.metadata.version = find_spec, find_version
sys.modules.update(dict.fromkeys(missing))  # importing them fails
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_a_plain_install_imports_every_module():
    # Accelerate exports some names only where DeepSpeed is there.
    names = [f"lbaccel.{name_of(path)}" for path in modules() if path.name != "__main__.py"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, *names], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_settings_are_read_as_typed_fields(path):
    """No module reads a setting by a string: the type checker knows each field of a group."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        text = getattr(getattr(node, "slice", None), "value", None)
        if isinstance(node, ast.Subscript) and isinstance(text, str):
            name = node.value.id if isinstance(node.value, ast.Name) else ""
            assert name not in ("s", "settings", "saved"), f"{path}:{node.lineno}"
