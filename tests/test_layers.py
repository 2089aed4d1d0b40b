"""An import points only downward: the layout of the design, walked and enforced."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lbaccel"

LEVELS = [
    {"errors"},
    {
        "duration",
        "generators",
        "keys",
        "launch",
        "noise_arithmetic",
        "option_values",
        "scaling",
        "stability",
        "stream",
    },
    {
        "adascale",
        "advice",
        "batch",
        "batch_segments",
        "ending",
        "learning_rate",
        "momentum",
        "param_groups",
        "schedules",
    },
    {"batch_schedules"},
    {"auto_batch", "growth", "loss_dropout"},
    {
        "masks",
        "schedulers",
        "run_folder",
        "schedule_table",
        "normalization",
        "checkpointing",
        "models",
        "optimizers",
        "progress",
        "options",
    },
    {"memory", "environment"},
    {"accumulation", "failures", "noise_scale", "preflight", "checkpoints", "settings"},
    {"data", "sharding", "update_result"},
    {"transaction"},
    {"engine", "evaluation", "tracking"},
    {"planning", "rehearsal", "runs"},
    {
        "accelerator",
        "auto_plan",
        "compare",
        "configs",
        "curvature",
        "plots",
        "range_test",
        "recipe",
        "recipe_growth",
        "resume",
        "run_log",
        "schedule_command",
        "sheet",
        "signals",
        "verification",
    },
    {"building", "doctor", "export", "replication", "run_session"},
    {"lr_find_command", "run_curvature", "train"},
    {"advise_command"},
    {"cli"},
    {"__main__"},
]
NO_TORCH = (
    "errors",
    "stream",
    "duration",
    "batch",
    "batch_schedules",
    "batch_segments",
    "scaling",
    "learning_rate",
    "schedules",
    "auto_batch",
    "growth",
    "loss_dropout",
    "keys",
    "option_values",
    "options",
    "settings",
    "stability",
    "resume",
    "signals",
    "runs",
    "compare",
    "schedule_table",
    "schedule_command",
    "adascale",
    "advice",
    "advise_command",
    "noise_arithmetic",
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


def level_of(module: str) -> int:
    (level,) = (i for i, names in enumerate(LEVELS) if module in names)
    return level


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_from_below(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    below = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "lbaccel" and len(parts) > 1 and parts[1] != "__version__":
            below.add(parts[1])
    known = {name for names in LEVELS for name in names}
    for name in (below & known) - {own}:
        assert level_of(name) < level_of(own), f"{own} imports {name}"


@pytest.mark.parametrize("name", NO_TORCH)
def test_the_arithmetic_imports_no_torch(name):
    heavy = {"torch", "timm", "accelerate", "wandb", "matplotlib", "deepspeed"}
    top = {found.split(".")[0] for found in imports(PACKAGE / f"{name}.py", only_top=True)}
    assert not top & heavy


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
    names = [
        ".".join(("lbaccel", *path.relative_to(PACKAGE).with_suffix("").parts))
        for path in modules()
        if path.name != "__main__.py"
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, *names], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
