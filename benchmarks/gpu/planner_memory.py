"""How near a plan's peak comes to that of torch's CUDA allocator, over 192 updates.

python benchmarks/gpu/planner_memory.py [--results FILE] [--seconds S] [--workers N] [--only TEXT]

A case is a plan with everything pinned and one real update of it (`lbaccel.planning.measure`) in a
process of its own: 12 networks at 224 px x recompute (none, full) x SGD, AdamW x fp32, bf16 x
micro-batches of 32 and 64. `predicted` lies beside max_memory_allocated and max_memory_reserved;
the context of the runtime is in none of them. Several cases run at a time: bytes of a process do
not depend on its neighbours, unless memory runs short (`num_alloc_retries`, which is checked).

Lines are appended to FILE (default: $OUT/planner_memory.jsonl) as they come; a rerun skips what is
there and did not fail. It ends by itself after S seconds (default 500, 30 more at the most).
"""

from __future__ import annotations

import time

START = time.monotonic()  # imports count

import argparse  # noqa: E402
import itertools  # noqa: E402
import sys  # noqa: E402
from dataclasses import asdict, dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, Literal  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from children import GRACE, append, cuda_or_exit, read, results_file, run_each  # noqa: E402

from lbaccel import plan  # noqa: E402
from lbaccel.models import create_backbone  # noqa: E402
from lbaccel.planning.measure import measure  # noqa: E402
from lbaccel.planning.network import random_images  # noqa: E402
from lbaccel.planning.report import as_report  # noqa: E402

PX = 224
NETWORKS = (
    "resnet50",
    "convnext_tiny",
    "vit_small_patch16_224",
    "mobilenetv3_large_100",
    "swin_tiny_patch4_window7_224",
    "efficientnet_b0",
    "regnety_004",
    "wide_resnet50_2",
    "densenet121",
    "deit_tiny_patch16_224",
    "mixer_s16_224",
    "vgg11_bn",
)
SHARE = 0.9  # of the device, for all cases that run at one time


@dataclass(frozen=True)
class Case:
    network: str
    activation_checkpointing: Literal["none", "full"]
    optimizer: str
    precision: Literal["fp32", "bf16"]
    micro_batch_size: int
    memory_format: Literal["contiguous", "channels_last"]


def all_cases(memory_format: Any) -> list[Case]:
    """A run that is cut short has seen every network."""
    return [
        Case(network, how, optimizer, precision, size, memory_format)
        for size, optimizer, precision, how, network in itertools.product(
            (32, 64), ("sgd", "adamw"), ("fp32", "bf16"), ("none", "full"), NETWORKS
        )
    ]


def run(case: Case, num_workers: int) -> dict[str, Any]:
    torch.set_num_threads(2)
    torch.cuda.set_per_process_memory_fraction(SHARE / num_workers)
    found = plan(
        case.network,
        img_size=PX,
        global_batch_size=2 * case.micro_batch_size,
        compare=False,
        **{key: value for key, value in asdict(case).items() if key != "network"},
    )
    assert found.micro_batch_size == case.micro_batch_size, "the plan does not fit in this device"
    model = create_backbone(case.network, num_classes=1000, img_size=PX)
    measured = measure(found, model, random_images(3, PX), optimizer=case.optimizer)
    statistics = torch.cuda.memory_stats()
    row = as_report(found, measured)
    return {
        **{key: row[key] for key in ("predicted", "measured", "error_pct", "versions")},
        "breakdown": dict(found.breakdown),
        "num_alloc_retries": statistics["num_alloc_retries"],
    }


def is_done(row: dict[str, Any] | None) -> bool:
    return row is not None and "error" not in row and row["num_alloc_retries"] == 0


def summary(rows: dict[Case, dict[str, Any]]) -> str:
    """Errors in percent, predicted / measured - 1, by what the cases have in common."""
    parts = {"all": lambda case: True}
    for key in ("precision", "activation_checkpointing", "optimizer", "network"):
        for value in dict.fromkeys(getattr(case, key) for case in rows):
            parts[f"{key} {value}"] = lambda case, k=key, v=value: getattr(case, k) == v
    lines = []
    for peak in ("peak_allocated_gib", "peak_reserved_gib"):
        head = f"{peak}, error %"
        lines.append(f"{head:<48}{'cases':>6}{'median':>9}{'95th':>9}{'most':>9}{'lowest':>9}")
        for label, belongs in parts.items():
            found = [row["error_pct"][peak] for case, row in rows.items() if belongs(case)]
            sizes = np.abs(found)
            figures = np.median(sizes), np.percentile(sizes, 95), sizes.max(), min(found)
            cells = "".join(f"{value:9.2f}" for value in figures)
            lines.append(f"  {label:<46}{len(found):>6}{cells}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--results", type=Path, default=results_file("planner_memory.jsonl"))
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--only", default="", help="cases whose words hold this text")
    parser.add_argument(
        "--memory-format", choices=("contiguous", "channels_last"), default="contiguous"
    )
    args = parser.parse_args()
    device = cuda_or_exit()
    rows = read(args.results, Case)
    cases = [
        case
        for case in all_cases(args.memory_format)
        if args.only in " ".join(map(str, asdict(case).values()))
    ]
    print(f"{device['name']}: {len(cases)} cases, {args.results}", flush=True)
    until = START + args.seconds
    for case, row in run_each(
        lambda case: run(case, args.workers),
        [case for case in cases if not is_done(rows.get(case))],
        num_workers=args.workers,
        until=until,
        kill_at=until + GRACE,
    ):
        append(args.results, case, row)
        rows[case] = row
        errors = row.get("error_pct", {})
        print(*asdict(case).values(), row.get("error") or list(errors.values())[:2], flush=True)
    done = {case: rows[case] for case in cases if is_done(rows.get(case))}
    if done:
        print(summary(done))
    print(
        f"{len(done)} of {len(cases)} cases" + "; run again for the rest" * (len(done) < len(cases))
    )
    return 0 if len(done) == len(cases) else 1


if __name__ == "__main__":
    sys.exit(main())
