"""Twenty float64 updates of the recipe under other plans, beside control runs with one rounding
error in the initial weights.

python benchmarks/trajectory.py [--json FILE]        one process: micro-batches, checkpointing
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from lbaccel import train
from lbaccel.update.engine import LargeBatch

PLANS = {
    "micro-batch 64": [],
    "micro-batch 96": ["--micro-batch-size", "96"],
    "micro-batch 512": ["--micro-batch-size", "512"],
    "micro-batch 32, checkpointed": [
        "--micro-batch-size",
        "32",
        "--activation-checkpointing",
        "full",
    ],
}
CONTROLS = 2
PREPARE = LargeBatch.prepare


def losses(flags: list[str], perturbed: int | None = None) -> list[float]:
    def prepare(self, model, *args, **options):
        generator = torch.Generator().manual_seed(perturbed or 0)
        for parameter in model.parameters() if perturbed is not None else ():
            sign = torch.randint(2, parameter.shape, generator=generator) * 2.0 - 1
            parameter.data *= 1 + sign.double() * torch.finfo(torch.float64).eps
        return PREPARE(self, model, *args, **options)

    LargeBatch.prepare = prepare
    with tempfile.TemporaryDirectory() as folder:
        common = ["--precision", "fp64", "--max-updates", "20", "--log-with", "run_folder"]
        assert train.main([*common, "--output", folder, *flags]) == 0
        (metrics,) = Path(folder).glob("*/metrics.jsonl")
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = {name: losses(flags) for name, flags in PLANS.items()}
    found |= {f"control {i}": losses([], perturbed=i) for i in range(CONTROLS)}
    truth = found["micro-batch 64"]
    for name, values in found.items():
        worst = max(abs(a - b) / b for a, b in zip(values, truth, strict=True))
        print(f"{name:<30} largest relative difference of train/loss {worst:.1e}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
