"""All evidence on a GPU in one command that ends by itself, the most valuable part first.

python benchmarks/gpu/all.py --minutes 8 [--only tests memory ...] [--data parquet:FOLDER] [--dry]

Each part is a process with an end of its own, and writes into $OUT as it goes, 9 files in all; a
part that came to its end is not run again, so a second call goes on where the first was cut off.
`python benchmarks/gpu/page.py $OUT` makes docs/results/gpu.md of what is there. --dry runs the
parts that have a small version on the CPU: it proves that the parts are found, end in time and
write what the page reads.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from children import STATES

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LOG = "all.log"
TO_ACCURACY = Path(tempfile.gettempdir()) / "lbaccel_to_accuracy"  # of it the summary is kept
GRACE = 40.0  # seconds that a part may take beyond its share before it is killed
PYTEST = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider")
Command = Callable[[float, bool], Sequence[str] | None]
"""(seconds, dry) -> what is run; None where there is nothing to run."""


@dataclass(frozen=True)
class Part:
    """A part of the evidence: what it asks, and at most how many seconds of a full call."""

    name: str
    asks: str
    seconds: float
    command: Command


def script(name: str, *flags: str, dry: bool = True) -> Command:
    """A benchmark of this folder; one without a dry run is left out of a dry call."""

    def command(seconds: float, is_dry: bool) -> Sequence[str] | None:
        if is_dry and not dry:
            return None
        line = [sys.executable, str(HERE / name), "--seconds", f"{seconds:.0f}", *flags]
        return [*line, "--dry"] if is_dry else line

    return command


def tests(*paths: str) -> Command:
    """Tests that need a GPU; without one they are collected and skipped."""
    return lambda seconds, dry: [*PYTEST, *paths]


def to_accuracy(data: str | None) -> Command:
    """CIFAR-10 to 94 % at 2,048 samples an update within 2 GiB."""

    def command(seconds: float, dry: bool) -> Sequence[str] | None:
        if dry:
            flags = ["--data", "digits", "--model", "cifar_resnet8", "--global-batch-size", "256"]
            flags += ["--epochs", "1"]
        elif data is None:
            return None
        else:
            flags = ["--data", data, "--model", "wide_resnet16_4", "--global-batch-size", "2048"]
            flags += ["--memory", "2GiB", "--precision", "bf16", "--micro-batch-size", "auto"]
            flags += ["--epochs", "30", "--workers", "8", "--target", "94", "--test-split", "val"]
            flags += ["--max-minutes", f"{seconds / 60:.2f}"]
        where = ["--output", str(TO_ACCURACY), "--log-with", "run_folder", "--resume", "auto"]
        return [sys.executable, "-m", "lbaccel", "train", *flags, *where]

    return command


def parts(data: str | None) -> list[Part]:
    """In the order of their worth."""
    allocator = "tests/planning/cost/test_cuda_allocator.py"
    return [
        Part("tests", "what only CUDA has: fp16, bf16, no waits", 90, tests("tests/test_gpu.py")),
        Part("allocator", "the simulated allocator beside the real one", 30, tests(allocator)),
        Part(
            "memory",
            "predicted peaks beside allocated and reserved ones",
            80,
            script("planner_memory.py", "--only", "sgd bf16 32", dry=False),
        ),
        Part("runs", "planned runs under caps", 110, script("planned_runs.py", dry=False)),
        Part("recovery", "real lacks of memory under a cap", 40, script("recovery.py")),
        Part("update", "an update beside a plain loop", 90, script("update_time.py")),
        Part("large", "2,048 to 16,384 at 224 px in 24, 12, 8 GiB", 90, script("large_batches.py")),
        Part("offload", "activations on the host", 60, script("activation_offload.py")),
        Part("accuracy", "CIFAR-10 to 94 % in 2 GiB", 240, to_accuracy(data)),
    ]


def run(part: Part, seconds: float, out: Path, *, dry: bool) -> dict:
    """One part: its output goes to the log, and it is ended GRACE seconds after its share."""
    command = part.command(seconds, dry)
    if command is None:
        return {"part": part.name, "state": "left out"}
    env = {**os.environ, "OUT": str(out), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    with (out / LOG).open("a+") as log:
        print(f"\n== {part.name}: {part.asks}", file=log, flush=True)
        begin = log.tell()
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
        try:
            code = process.wait(timeout=seconds + GRACE)
            state = "done" if code == 0 else f"ended with {code}"
        except subprocess.TimeoutExpired:
            process.terminate()  # a run saves where it is
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            state = "cut off"
        log.seek(begin)
        said = [line for line in log.read().splitlines() if line.strip()]
    seconds = round(time.monotonic() - start, 1)
    return {"part": part.name, "state": state, "seconds": seconds, "said": said[-1:]}


def main() -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", nargs="+", metavar="PART")
    parser.add_argument("--data", help="CIFAR-10, such as parquet:FOLDER, for the last part")
    parser.add_argument("--dry", action="store_true", help="small cases on a CPU")
    a = parser.parse_args()
    known = parts(a.data)
    unknown = set(a.only or ()) - {part.name for part in known}
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}: {', '.join(p.name for p in known)}")
    out = Path(os.environ.get("OUT", ".")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    states = out / STATES
    lines = states.read_text().splitlines() if states.is_file() else []
    done = {row["part"] for row in map(json.loads, lines) if row["state"] == "done"}
    for part in known:
        left = 60 * a.minutes - GRACE - (time.monotonic() - start)
        if part.name in done or (a.only and part.name not in a.only):
            continue
        if left < min(20.0, part.seconds):
            print(f"{part.name}: no time left", flush=True)
            continue
        row = run(part, min(part.seconds, left), out, dry=a.dry)
        with states.open("a") as file:
            print(json.dumps(row), file=file, flush=True)
        for summary in sorted(TO_ACCURACY.glob("*/summary.json"))[-1:]:
            shutil.copy(summary, out / "accuracy.json")
        print(f"{part.name} ({part.asks}): {row['state']}, {row.get('seconds', 0)} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
