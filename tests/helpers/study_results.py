"""The JSON of a study, made by hand: three arms, five batch sizes, three seeds, faults."""

from __future__ import annotations

import math
import random
from statistics import fmean, stdev

from lbaccel.studies.to_target import Attempt, points_of

ARMS = {
    "none": "no warmup",
    "gradual": "gradual warmup",
    "ghost": "gradual warmup, BatchNorm over 32",
}
BATCHES, SEEDS = (128, 256, 512, 1024, 2048), (0, 1, 2)
SAMPLES = 40_000
T = 4.303  # Student's quantile for three seeds


def level_of(arm, batch):
    """Validation top-1 that an arm ends at."""
    lost = math.log2(batch / 128)
    return 91.0 - {"none": 0.55, "gradual": 0.2, "ghost": 0.05}[arm] * lost**1.6


def a_history(rng, arm, batch, num_updates, *, diverges):
    level, history = level_of(arm, batch) + rng.gauss(0, 0.2), {}
    evals, lines = [], []
    for i in range(1, num_updates + 1):
        samples, share = i * batch, i / num_updates
        right = level * (1 - math.exp(-5 * share)) + rng.gauss(0, 0.8)
        gone = diverges and share > 0.4
        lines.append((i, samples, samples / 3.6e6, None if gone else right))
        if i % max(1, num_updates // 20) == 0:
            evals.append((i, samples, samples / 3.6e6, None if gone else right - 0.6))
    loss = [(u, s, h, None if v is None else 2.4 - v / 42) for u, s, h, v in lines]
    history["train/top1"], history["train/loss"] = lines, loss
    history["val/top1"] = evals
    history["val/loss"] = [(u, s, h, None if v is None else 2.45 - v / 42) for u, s, h, v in evals]
    return history


def a_run(rng, arm, batch, seed):
    diverges = arm == "none" and batch == 2048 and seed == 1
    num_updates = SAMPLES // batch
    history = a_history(rng, arm, batch, num_updates, diverges=diverges)
    last = [v for *_, v in history["val/top1"][-5:]]
    value = None if diverges else sorted(last)[2]
    reached = next((p for p in history["val/top1"] if p[3] is not None and p[3] >= 84), None)
    return {
        "cell": f"{arm}-gbs{batch}-seed{seed}",
        "shared_with": None,
        "name": f"20261129-1{seed}-{arm}",
        "folder": f"cells/{arm}-gbs{batch}-seed{seed}",
        "arm": arm,
        "batch": batch,
        "seed": seed,
        "status": "diverged" if diverges else "done",
        "value": value,
        "train_value": None if value is None else value + 0.9 - 0.4 * math.log2(batch / 128),
        "num_updates": num_updates,
        "samples": num_updates * batch,
        "seconds": 44.0,
        "peak_gib": 0.4 + batch / 4000,
        "predicted_gib": 0.41 + batch / 4000,
        "reached": None
        if reached is None
        else {"updates": reached[0], "samples": reached[1], "hours": reached[2]},
        "censored": reached is None,
        "num_test": 2000,
        "history": history,
        "events": [{"kind": "resume", "update": 30, "text": "resumed after update 30"}]
        if (arm, batch, seed) == ("ghost", 512, 0)
        else [],
        "noise": [],
        "provenance": {
            "command": f"lbaccel train --model cifar_resnet8 --global-batch-size {batch}",
            "commit": "4683c41",
            "versions": {"torch": "2.15.0", "timm": "1.0.31"},
            "hardware": "cpu, 2 processors",
            "plan": {"equation": f"global batch {batch}", "world_size": 1},
            "origin": {"model": "study", "seed": "study", "epochs": "default"},
            "reproduce": f"lbaccel train --model cifar_resnet8 --global-batch-size {batch} "
            f"--seed {seed}",
        },
    }


def a_row(runs, arm, batch):
    own = [run for run in runs if (run["arm"], run["batch"]) == (arm, batch)]
    values = [run["value"] for run in own if run["value"] is not None]
    half = T * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    mean = fmean(values)
    expected = {128: 91.2, 512: 90.9, 2048: 89.6}.get(batch) if arm == "gradual" else None
    return {
        "arm": arm,
        "batch": batch,
        "n": len(values),
        "diverged": sum(run["status"] == "diverged" for run in own),
        "missing": 0,
        "mean": mean,
        "low": None if half is None else mean - half,
        "high": None if half is None else mean + half,
        "updates": SAMPLES // batch,
        "expected": expected,
        "train_mean": fmean(r["train_value"] for r in own if r["train_value"] is not None),
        "wilson": [mean - 1.2, mean + 1.1],
        "lr": 0.1 * batch / 256,
    }


def a_comparison(rows, arm, batch, verdict):
    mean = {(row["arm"], row["batch"]): row["mean"] for row in rows}
    gap = mean[arm, batch] - mean["gradual", 128]
    return {
        "arm": arm,
        "batch": batch,
        "against_arm": "gradual",
        "against_batch": 128,
        "n": 3,
        "difference": gap,
        "low": gap - 0.6,
        "high": gap + 0.6,
        "verdict": verdict,
        "sentence": f"{arm} at {batch} loses {-gap:.2f} points.",
        "per_seed": {"0": gap - 0.1, "1": gap, "2": gap + 0.1},
    }


def to_target(runs, arm):
    attempts = {batch: {} for batch in BATCHES}
    for run in runs:
        if run["arm"] == arm:
            updates = run["reached"] and run["reached"]["updates"]
            attempt = Attempt(run["batch"], updates, run["num_updates"])
            attempts[run["batch"]][run["seed"]] = attempt
    fit = {"min_updates": 18.0, "critical_batch": 700.0, "low": 520.0, "high": 960.0, "level": 0.95}
    return {
        "arm": arm,
        "points": points_of(attempts),
        "fit": fit if arm != "none" else None,
        "noise_scale": {"critical_batch": 610.0, "low": 400.0, "high": 900.0},
        "sentence": f"{ARMS[arm]}: the critical batch is 700 (520 to 960).",
    }


def a_study_result(**changes):
    """A whole result; `changes` replace entries of it."""
    rng = random.Random(0)
    runs = [a_run(rng, arm, b, seed) for seed in SEEDS for arm in ARMS for b in BATCHES]
    rows = [a_row(runs, arm, batch) for arm in ARMS for batch in BATCHES]
    result = {
        "kind": "study",
        "name": "goyal-small",
        "title": "Linear scaling with warmup",
        "question": "Does growing the batch lose accuracy, and does gradual warmup recover it?",
        "source": {
            "authors": "Goyal et al.",
            "title": "Accurate, Large Minibatch SGD",
            "year": 2017,
            "where": "table 1",
        },
        "scale": "small",
        "note": "CIFAR-10 (JPEG copy), a small network.",
        "metric": "val/top1",
        "last": 5,
        "level": 0.95,
        "arms": [{"name": k, "title": v, "settings": {"warmup": k}} for k, v in ARMS.items()],
        "settings": {"model": "cifar_resnet8", "epochs": 20},
        "batches": list(BATCHES),
        "seeds": list(SEEDS),
        "baseline": {"arm": "gradual", "batch": 128},
        "target": {"metric": "val/top1", "value": 84.0},
        "runs": runs,
        "table": rows,
        "comparisons": [
            a_comparison(rows, "none", 2048, "loss"),
            a_comparison(rows, "gradual", 2048, "not resolved"),
            a_comparison(rows, "ghost", 2048, "no loss"),
        ],
        "scaling_limits": [
            {
                "arm": "ghost",
                "points": 0.5,
                "batch": 2048,
                "factor": 16,
                "sentence": "Up to 2,048 the loss stays within 0.5 points, resolved.",
            },
            {
                "arm": "none",
                "points": 0.5,
                "batch": None,
                "factor": None,
                "sentence": "No batch size above the baseline's stays within 0.5 points.",
            },
        ],
        "to_target": [to_target(runs, arm) for arm in ARMS],
        "tuning": [
            {
                "arm": "none",
                "batch": 128,
                "setting": "base_lr",
                "values": [0.05, 0.1, 0.2],
                "results": [88.0, 89.5, 90.1],
                "best": 0.2,
                "at_edge": True,
            },
            {
                "arm": "gradual",
                "batch": 128,
                "setting": "base_lr",
                "values": [0.05, 0.1, 0.2],
                "results": [88.0, 90.5, 90.1],
                "best": 0.1,
                "at_edge": False,
            },
        ],
        "figures": [],
        "warnings": ["none, batch 2,048: 1 of 3 seeds diverged."],
        "verdict": [
            "From a batch of 128 to 2,048 gradual warmup with BatchNorm over 32 loses nothing: "
            "-0.1 points (-0.4 to 0.2, 3 paired seeds).",
            "Without warmup 4.9 points are lost (3.2 to 6.6), and 1 of 3 seeds diverged.",
        ],
    }
    return result | changes
