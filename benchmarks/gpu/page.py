"""docs/results/gpu.md out of what `all.py` left in a folder; the rest is "not measured yet".

python benchmarks/gpu/page.py FOLDER [--output docs/results/gpu.md] [--dry]
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from children import STATES, read

NOT_YET = "not measured yet"
HEAD = """# On a GPU

    python benchmarks/gpu/all.py --minutes 8 --data parquet:CIFAR10
    python benchmarks/gpu/page.py $OUT

One command makes all figures of this page, in the order of their worth, and ends by itself; a
second one goes on where the first was cut off. {state}
"""


def results_of(module: Any, path: Path) -> str | None:
    """The table of a benchmark's file, as it prints it; None without a result."""
    rows = read(path, module.Case) if path.is_file() else {}
    done = {case: row for case, row in rows.items() if "error" not in row}
    return (getattr(module, "table", None) or module.summary)(done) if done else None


def said(folder: Path, part: str) -> str | None:
    """The last line of a part that has no file of its own, such as "9 passed in 40 s"."""
    path = folder / STATES
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = [row for row in map(json.loads, lines) if row["part"] == part]
    last = (rows[-1].get("said") or [""])[-1] if rows else ""
    return last if "passed" in last else None


def accuracy(folder: Path) -> str | None:
    """The summary of the run to an accuracy."""
    path = folder / "accuracy.json"
    if not path.is_file():
        return None
    keys = ("status", "model", "val_top1", "num_updates", "seconds", "peak_gib")
    found = json.loads(path.read_text())
    shown = {key: value for key, value in found.items() if key in keys or "target" in key}
    return "\n".join(f"{key}: {value}" for key, value in shown.items())


def devices(folder: Path) -> set[str]:
    """The devices that the rows name; those of the two older benchmarks are in their reports."""
    found = set()
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line) if line.endswith("}") else {}
            found |= {str(row["device"])} if "device" in row else set()
    return found


def sections(folder: Path) -> list[tuple[str, str, str | None]]:
    """Title, command and result of each part."""

    def of(name: str) -> str | None:
        return results_of(importlib.import_module(name), folder / f"{name}.jsonl")

    return [
        (
            "Tests that need a GPU",
            "pytest -m gpu tests/test_gpu.py",
            said(folder, "tests"),
        ),
        (
            "The simulated allocator beside the real one",
            "pytest -m gpu tests/planning/cost/test_cuda_allocator.py",
            said(folder, "allocator"),
        ),
        ("Predicted peaks beside real ones", "planner_memory.py", of("planner_memory")),
        ("Planned runs under caps", "planned_runs.py", of("planned_runs")),
        ("Real lacks of memory under a cap", "recovery.py", of("recovery")),
        ("An update beside a plain loop", "update_time.py", of("update_time")),
        ("2,048 to 16,384 images at 224 px", "large_batches.py", of("large_batches")),
        ("Activations on the host", "activation_offload.py", of("activation_offload")),
        ("CIFAR-10 to 94 % at 2,048 in 2 GiB", "all.py --only accuracy", accuracy(folder)),
    ]


def page(folder: Path) -> str:
    """The page as Markdown."""
    named = sorted(devices(folder))
    state = f"Hardware: {', '.join(named)}." if named else "No figure was taken on a GPU yet."
    blocks = [HEAD.format(state=state)]
    for title, command, result in sections(folder):
        body = f"```text\n{result}\n```" if result else f"{NOT_YET}."
        blocks.append(f"## {title}\n\n`{command}`\n\n{body}\n")
    return "\n".join(blocks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, help="else the page is printed")
    parser.add_argument("--dry", action="store_true", help="take figures of a dry run")
    a = parser.parse_args()
    if not a.folder.is_dir():
        parser.error(f"{a.folder} is no folder.")
    if not a.dry and any("dry run" in name for name in devices(a.folder)):
        parser.error(f"{a.folder} holds figures of a dry run on a CPU, which belong on no page.")
    text = page(a.folder)
    if a.output is None:
        print(text, end="")
    else:
        a.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
