"""Runs of the recipe under random faults, each compared with the same run left in peace.

python benchmarks/fault_campaign.py [--runs 200] [--seed 0] [--json FILE]

A run is a small network on digits in float64, with ghost BatchNorm, dropout, drop-path, EMA and
momentum or AdamW, on one or two ranks. Each start of it may be killed (-9) in a random phase,
run out of memory in a random forward or backward, or find its newest checkpoint truncated, with a
flipped bit or without a file; it is started again with `--resume auto`, on another number of ranks
or with another micro-batch, until it ends. Where neither memory nor plan made the micro-batches
differ, all weights, optimizer state and metrics must be equal to the bit, else to 1e-9.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))

import faults
from forks import run_forked
from runs_of_recipe import BASE, differences, newest, rows, tensors
from runs_out import OUT, RunsOut

from lbaccel import train

TOLERANCE = 1e-9
MOST_STARTS = 12


def flags_of(rng: random.Random) -> list[str]:
    """A contract: what decides the result."""
    flags = ["--precision", "fp64", "--seed", str(rng.randrange(1000)), "--epochs", "1.5"]
    flags += rng.choice((["--optimizer", "adamw"], ["--momentum", "0.9"], ["--mixup", "0.2"]))
    flags += rng.choice(([], ["--ema-decay", "0.7"]))
    flags += rng.choice(([], ["--last-update", "keep"]))
    flags += rng.choice(([], ["--log-every", "2"], ["--eval-every", "0.3"]))
    return [*flags, "--checkpoint-every", rng.choice("123")]


def run_out_of_memory(nth: int, phase: str) -> None:
    """Make this process run out of memory in its `nth` forward or backward."""

    plain, count = F.cross_entropy, [0]

    def hooked(*args, **kwargs):
        loss = plain(*args, **kwargs)
        if not torch.is_grad_enabled():
            return loss
        count[0] += 1
        if count[0] != nth:
            return loss
        if phase == "forward":
            raise torch.OutOfMemoryError(OUT)
        return RunsOut.apply(loss)

    F.cross_entropy = hooked


def job(rank: int, flags: list[str], fault: tuple, log: str) -> int:
    with (
        Path(log).open("a") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        kind, *how = fault
        if kind == "kill":
            faults.install(*how, lambda: os.kill(os.getpid(), signal.SIGKILL))
        elif kind == "memory" and rank == how[2]:
            run_out_of_memory(*how[:2])
        return train.main([*BASE, *flags])


def corrupt(run: Path, rng: random.Random) -> str:
    """Damage a file of the newest checkpoint."""
    file = rng.choice(sorted(newest(run).iterdir()))
    content = bytearray(file.read_bytes())
    how = rng.choice(("truncated", "bit flipped", "missing"))
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(content[: rng.randrange(len(content))])
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    return f"corruption: {how}"


def fault_of(rng: random.Random, world_size: int) -> tuple:
    kind = rng.choice(("kill", "kill", "memory", "none"))
    if kind == "kill":
        return ("kill", rng.choice(list(faults.PHASES)), rng.randint(1, 6))
    if kind == "memory":
        phase = rng.choice(("forward", "backward"))
        return ("memory", rng.randint(1, 30), phase, rng.randrange(world_size))
    return ("none",)


def one_run(seed: int, folder: Path) -> tuple[collections.Counter, list[str]]:
    """The faults that one run survived, and what differed in the end."""
    rng = random.Random(seed)
    flags, log = flags_of(rng), str(folder / "log")
    world_size = rng.choice((1, 1, 2))
    whole, runs = folder / "whole", folder / "runs"
    (*outcomes,) = run_forked(
        job, [*flags, "--output", str(whole)], ("none",), log, world_size=world_size
    )
    if any(o.value != 0 for o in outcomes):
        return collections.Counter(), [f"the run in peace failed: {outcomes}"]
    truth = next(whole.iterdir())
    survived: collections.Counter = collections.Counter()
    same_kernels, plan = True, []
    for start in range(MOST_STARTS):
        fault = fault_of(rng, world_size) if start < MOST_STARTS - 2 else ("none",)
        outcomes = run_forked(
            job,
            [*flags, *plan, "--output", str(runs), "--resume", "auto"],
            fault,
            log,
            world_size=world_size,
            timeout=120,
        )
        found = max(runs.iterdir())
        text = Path(log).read_text()
        if "out of memory in update" in text:
            same_kernels = False
        if fault[0] == "memory" and all(o.value == 0 for o in outcomes):
            survived["out of memory"] += "out of memory in update" in text
            Path(log).write_text("")
        if all(o.value == 0 for o in outcomes):
            break
        killed = any(o.exit_code == -signal.SIGKILL for o in outcomes)
        if not killed:
            return survived, [f"start {start} ended with {outcomes} under {fault}"]
        survived[f"kill: {fault[1]}"] += 1
        if rng.random() < 0.3 and any((found / "checkpoints").glob("update_*")):
            survived[corrupt(found, rng)] += 1
        if rng.random() < 0.3:
            world_size = rng.choice((1, 2))
            plan = ["--micro-batch-size", rng.choice(("32", "64", "128"))]
            survived["another plan"] += 1
            same_kernels = False
    else:
        return survived, ["it did not end"]
    if same_kernels:
        return survived, differences(found, truth)
    return survived, close(found, truth)


def close(found: Path, truth: Path) -> list[str]:
    """What differs by more than rounding."""
    wrong = far_tensors(found, truth)
    a, b = rows(found), rows(truth)
    if [r["update"] for r in a] != [r["update"] for r in b]:
        wrong.append("updates logged")
    return wrong


def far_tensors(found: Path, truth: Path) -> list[str]:
    """Weights, averages and optimizer state that differ by more than rounding."""
    wrong, ours, theirs = [], tensors(found), tensors(truth)
    if ours.keys() != theirs.keys():
        return ["names of tensors"]
    for key, value in theirs.items():
        error = (ours[key].double() - value.double()).norm() / value.double().norm().clamp(min=1e-9)
        if error > TOLERANCE:
            wrong.append(f"{key}: {error:.1e}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    survived: collections.Counter = collections.Counter()
    mismatches, started = [], time.perf_counter()
    for seed in range(arguments.seed, arguments.seed + arguments.runs):
        with tempfile.TemporaryDirectory() as folder:
            found, wrong = one_run(seed, Path(folder))
        survived += found
        if wrong:
            mismatches.append({"seed": seed, "wrong": wrong[:3]})
            print(f"seed {seed}: {wrong[:3]}", flush=True)
    print(f"{arguments.runs} runs, {sum(survived.values())} faults survived:")
    for name, count in sorted(survived.items()):
        print(f"  {count:5}  {name}")
    print(f"mismatches: {len(mismatches)}")
    if arguments.json is not None:
        content = {
            "runs": arguments.runs,
            "first_seed": arguments.seed,
            "survived": dict(sorted(survived.items())),
            "mismatches": mismatches,
            "seconds": round(time.perf_counter() - started, 1),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return bool(mismatches)


if __name__ == "__main__":
    sys.exit(main())
