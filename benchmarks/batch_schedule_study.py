"""Growing the batch against decaying the learning rate, in pairs of seeds.

python benchmarks/batch_schedule_study.py --cifar10 FOLDER --work FOLDER [--seeds 0 1 2]

FOLDER holds CIFAR-10 as the hub's parquet files. 10,000 of its training images (1,000 a class,
chosen with seed 0) and its test images; timm's test_byobnet at 40 px (4.7 MFLOP a forward) from
scratch, 30 epochs; otherwise as the thesis on large and increasing batch sizes does it
(`docs/sources.md`): SGD with momentum 0.9, weight decay 5e-4 on everything, clipping at 5, ghost
batches of 128, the last incomplete batch kept, changes in proportion to 60, 120 and 160 of 200.
Each run is the command that `--dry` prints; one that is done is not run again.
The result goes to WORK/result.json and, as a table, to the screen.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from scipy import stats

RULES = ("lrd", "bsi")
FLAGS = shlex.split("""
--model test_byobnet --img-size 40 --epochs 30 --global-batch-size 128
--base-lr 0.05 --factor 5 --micro-batch-size 128 --norm-batch-size 128 --optimizer momentum
--momentum 0.9 --weight-decay 5e-4 --decay-all --clip-grad-norm 5 --eval-every 1 --keep 1
--log-with run_folder""")


def make_data(cifar10: Path, folder: Path) -> None:
    """A subset with 1,000 training images a class, and all test images."""
    if (folder / "validation-00000-of-00001.parquet").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    train = pq.read_table(cifar10 / "train-00000-of-00001.parquet")
    labels, rng = np.array(train["label"]), np.random.default_rng(0)
    chosen = [rng.permutation(np.flatnonzero(labels == c))[:1000] for c in range(10)]
    pq.write_table(
        train.take(np.sort(np.concatenate(chosen))), folder / "train-00000-of-00001.parquet"
    )
    test = pq.read_table(cifar10 / "test-00000-of-00001.parquet")
    pq.write_table(test, folder / "validation-00000-of-00001.parquet")


def run(work: Path, rule: str, seed: int, *, dry: bool) -> Path | None:
    """The run folder of one arm."""
    output = work / f"{rule}-{seed}"
    command = [sys.executable, "-m", "lbaccel", "train", "--data", f"parquet:{work / 'data'}"]
    command += [*FLAGS, "--batch-schedule", rule, "--seed", str(seed), "--output", str(output)]
    print(shlex.join(command), flush=True)
    done = any('"status": "done"' in f.read_text() for f in output.glob("*/summary.json"))
    if not (dry or done):
        with (work / f"{rule}-{seed}.log").open("a") as log:
            subprocess.run([*command, "--resume", "auto"], check=True, stdout=log, stderr=log)
    folders = sorted(output.glob("*"))
    return folders[-1] if folders else None


def curve(folder: Path) -> list[dict]:
    """Its evaluations."""
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "val/top1" in line]


def last_five(folder: Path, key: str) -> float:
    """Median over the last five epochs (Goyal et al. 2017, section 5.1)."""
    return float(np.median([line[key] for line in curve(folder)[-5:]]))


def paired(differences: list[float]) -> tuple[float, float, float]:
    """Mean and its 95 % interval by Student's t."""
    mean, n = float(np.mean(differences)), len(differences)
    half = stats.t.ppf(0.975, n - 1) * float(np.std(differences, ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar10", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dry", action="store_true", help="print the commands")
    parser.add_argument("--plot", type=Path)
    a = parser.parse_args()
    make_data(a.cifar10, a.work / "data")
    folders = {(r, s): run(a.work, r, s, dry=a.dry) for s in a.seeds for r in RULES}
    if any(folder is None for folder in folders.values()):
        return
    result: dict = {"seeds": a.seeds, "updates": {}}
    for rule in RULES:
        summary = json.loads((folders[rule, a.seeds[0]] / "summary.json").read_text())
        result["updates"][rule] = summary["num_updates"]
        for key in ("val/top1", "val/loss"):
            result[f"{rule} {key}"] = [last_five(folders[rule, s], key) for s in a.seeds]
    for key in ("val/top1", "val/loss"):
        arms = (result[f"{rule} {key}"] for rule in ("bsi", "lrd"))
        result[f"bsi - lrd {key}"] = paired([b - r for b, r in zip(*arms, strict=True)])
    (a.work / "result.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))
    if a.plot is not None:
        draw(folders, a.plot)


def draw(folders: dict, path: Path) -> None:
    """Validation top-1 over epochs and over updates."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for (rule, seed), folder in folders.items():
        lines = curve(folder)
        style = {"color": {"lrd": "C0", "bsi": "C1"}[rule], "lw": 1}
        label = {"lrd": "learning rate / 5", "bsi": "batch x 5"}[rule] if seed == 0 else None
        for ax, key in zip(axes, ("epoch", "update"), strict=True):
            ax.plot([x[key] for x in lines], [x["val/top1"] for x in lines], label=label, **style)
    axes[0].set(xlabel="epoch", ylabel="validation top-1 %")
    axes[1].set(xlabel="update")
    axes[0].legend()
    for ax in axes:
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
