"""One run killed and resumed on other numbers of ranks, drawn over the run left in peace.

python benchmarks/resumed_curve.py [--png docs/results/resumed.png]

The default recipe on digits (resnet10t, global batch 512). The second run is killed (-9) in its
11th update, goes on with two ranks, is killed again, goes on with one rank in checkpointed
micro-batches of 32, is killed a third time, and ends on three ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))

import faults
from forks import run_forked

from lbaccel import train

FLAGS = ["--checkpoint-every", "5", "--log-with", "run_folder", "--seed", "3", "--epochs", "15"]
# ranks, update of this start that is killed, more flags
STARTS = (
    (1, 11, []),
    (2, 12, []),
    (1, 10, ["--micro-batch-size", "32", "--activation-checkpointing", "full"]),
    (3, None, ["--micro-batch-size", "64"]),
)


def job(rank, flags, killed_at):
    if killed_at is not None:
        faults.install("commit", killed_at, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return train.main([*FLAGS, *flags])


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [(r["update"], r["train/loss"]) for r in rows if "train/loss" in r]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--png", type=Path, default=Path("docs/results/resumed.png"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run_forked(job, ["--output", str(folder / "whole")], None, timeout=600)
        for ranks, killed_at, more in STARTS:
            flags = ["--output", str(folder / "runs"), "--resume", "auto", *more]
            run_forked(job, flags, killed_at, world_size=ranks, timeout=600)
        whole, resumed = (next((folder / name).iterdir()) for name in ("whole", "runs"))
        truth, found = losses(whole), losses(resumed)
        lines = (resumed / "resumes.jsonl").read_text().splitlines()
        resumes = [json.loads(line) for line in lines]
    draw(truth, found, resumes, arguments.png)
    assert [u for u, _ in found] == [u for u, _ in truth]
    difference = max(abs(a - b) for (_, a), (_, b) in zip(truth, found, strict=True))
    print(
        f"{len(found)} updates, {len(resumes)} kills; largest difference of a loss {difference:.2e}"
    )


def draw(truth, found, resumes, png):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 3.4), constrained_layout=True)
    axes.plot(*zip(*truth, strict=True), color="#c9c9c9", linewidth=5, label="left in peace")
    axes.plot(*zip(*found, strict=True), color="#1f4e79", linewidth=1.3, label="killed three times")
    for resume in resumes:
        axes.axvline(resume["update"], color="#b4442f", linestyle=":", linewidth=1.2)
        ranks = resume["world_size"]
        axes.annotate(
            f"kill -9; goes on\nwith {ranks} rank{'s' * (ranks > 1)}",
            (resume["update"], 0.97), xycoords=("data", "axes fraction"),
            xytext=(4, 0), textcoords="offset points", va="top", fontsize=8, color="#b4442f",
        )  # fmt: skip
    axes.set(xlabel="update", ylabel="training loss", xlim=(0, truth[-1][0]))
    axes.legend(frameon=False, loc="center right")
    axes.spines[["top", "right"]].set_visible(False)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=110)


if __name__ == "__main__":
    main()
