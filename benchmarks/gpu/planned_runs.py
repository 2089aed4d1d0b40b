"""Planned updates of 8,192 samples on a capped GPU: do they fit, and what does the cap cost?

python benchmarks/gpu/planned_runs.py [--results FILE] [--seconds S] [--precision bf16] [--timed T]

For each network and budget of 8, 12, 16 and 24 GiB: the plan that `lbaccel plan` makes of it, run
with torch's allocator capped (torch.cuda.set_per_process_memory_fraction) at the budget less the
context that the plan expects. Beside it, without a cap and without recompute, a grid of
micro-batches and memory formats, the best of which is the 100 %. A case is a process of its own,
one at a time; all plans are made before the first. The update is cut to as many micro-steps as
take about T seconds (default 3), after one that warms up, and samples/s are those of the whole
update: 8,192 / (steps x seconds_per_micro_step + commit_seconds). Data are random, made before,
and copied to the GPU in each micro-step.

Memory that ran out is a result ("oom"), as is a plan that is said not to fit. `used_gib` is the
allocator's peak with what the process holds outside of it, on a GPU without other work.

Lines are appended to FILE (default: $OUT/planned_runs.jsonl) as they come; a rerun skips what is
there and did not fail. It ends by itself after S seconds (default 500, 30 more at the most).
"""

from __future__ import annotations

import time

START = time.monotonic()  # imports count

import argparse  # noqa: E402
import sys  # noqa: E402
from dataclasses import asdict, dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, Literal  # noqa: E402

import torch  # noqa: E402
from children import GRACE, append, cuda_or_exit, read, results_file, run_each  # noqa: E402

from lbaccel import Plan, plan  # noqa: E402
from lbaccel.models import create_backbone  # noqa: E402
from lbaccel.planning.cost.devices import GIB  # noqa: E402
from lbaccel.planning.measure import measure  # noqa: E402
from lbaccel.planning.network import random_images  # noqa: E402
from lbaccel.planning.report import as_report  # noqa: E402
from lbaccel.update.memory.oom import is_out_of_memory  # noqa: E402

PX, GLOBAL = 224, 8192
NETWORKS = ("resnet50", "wide_resnet50_2", "convnext_tiny", "vit_base_patch16_224")
BUDGETS = (8, 12, 16, 24)  # GiB
GRID = (64, 256, 512)
PLANNERS = 8  # plans at a time, which need a core each and no GPU


@dataclass(frozen=True)
class Case:
    """A budget, or without one a point of the grid."""

    network: str
    precision: Literal["fp32", "bf16"]
    optimizer: str
    budget_gib: int | None
    micro_batch_size: int | None
    memory_format: Literal["contiguous", "channels_last"] | None


def all_cases(precision: Any, optimizer: str) -> list[Case]:
    found = []
    for network in NETWORKS:
        found += [Case(network, precision, optimizer, gib, None, None) for gib in BUDGETS]
        layouts = ("contiguous",) if "vit" in network else ("contiguous", "channels_last")
        for layout in layouts:
            found += [Case(network, precision, optimizer, None, size, layout) for size in GRID]
    return found


def make_plan(case: Case, device: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    found = plan(
        case.network,
        img_size=PX,
        global_batch_size=GLOBAL,
        memory=None if case.budget_gib is None else f"{case.budget_gib}GiB",
        device=device,
        precision=case.precision,
        optimizer=case.optimizer,
        micro_batch_size=case.micro_batch_size,
        memory_format=case.memory_format,
        activation_checkpointing=None if case.budget_gib else "none",
        compare=False,
    )
    return {"plan": found}


def run(case: Case, found: Plan, seconds: float) -> dict[str, Any]:
    if not found.fits:
        return {"fits": False, "oom": False, "plan": found.to_dict()}
    total = torch.cuda.get_device_properties(0).total_memory
    if case.budget_gib is not None:
        cap = case.budget_gib * GIB - found.device.context
        torch.cuda.set_per_process_memory_fraction(cap / total)
    model = create_backbone(case.network, num_classes=1000, img_size=PX)
    arguments: Any = (found, model, random_images(3, PX))
    try:
        first = measure(*arguments, optimizer=case.optimizer)
        steps = max(2, round(seconds / first.seconds_per_micro_step))
        measured = measure(*arguments, optimizer=case.optimizer, num_micro_steps=steps)
    except RuntimeError as error:  # RunFailed is one
        if not (is_out_of_memory(error) or "memory ran out" in str(error)):
            raise
        return {"fits": True, "oom": True, "why": str(error)[:300], "plan": found.to_dict()}
    free, _ = torch.cuda.mem_get_info()
    outside = (total - free - torch.cuda.memory_reserved()) / GIB
    assert measured.peak_reserved_gib is not None
    peaks = (first.peak_reserved_gib or 0.0, measured.peak_reserved_gib)
    return {
        "fits": True,
        "oom": False,
        "samples_per_second": GLOBAL / measured.seconds_per_update(found),
        "used_gib": max(peaks) + outside,
        "outside_gib": outside,
        "num_alloc_retries": torch.cuda.memory_stats()["num_alloc_retries"],
        **as_report(found, measured),
    }


def is_done(row: dict[str, Any] | None) -> bool:
    return row is not None and "error" not in row


def table(rows: dict[Case, dict[str, Any]]) -> str:
    """A line for each case: memory, and speed beside the best of the network's grid."""
    best: dict[str, float] = {}
    for case, row in rows.items():
        if case.budget_gib is None:
            best[case.network] = max(best.get(case.network, 0.0), row.get("samples_per_second", 0))
    lines = [
        f"{'network':<22}{'budget':>7}{'micro':>7}  {'recompute':<10}{'layout':<15}"
        f"{'predicted':>10}{'used':>8}{'of it':>7}{'samples/s':>11}{'of best':>9}"
    ]
    for case, row in rows.items():
        p = row["plan"]
        lines.append(
            f"{case.network:<22}{case.budget_gib or '-':>7}{p['micro_batch_size']:>7}  "
            f"{p['activation_checkpointing']['policy']:<10}{p['memory_format']:<15}"
            f"{p['predicted_peak_gib']:>10.2f}"
        )
        if "samples_per_second" not in row:
            lines[-1] += "  out of memory" if row["oom"] else "  no plan fits"
            continue
        used, speed = row["used_gib"], row["samples_per_second"]
        share = f"{used / case.budget_gib:.1%}" if case.budget_gib else "-"
        reference = best.get(case.network)
        of_best = f"{speed / reference:.1%}" if reference else "-"
        lines[-1] += f"{used:>8.2f}{share:>7}{speed:>11.1f}{of_best:>9}"
    num_oom = sum(row["oom"] for case, row in rows.items() if case.budget_gib)
    planned = sum(case.budget_gib is not None for case in rows)
    return "\n".join([*lines, f"{num_oom} of {planned} planned runs ran out of memory"])


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--results", type=Path, default=results_file("planned_runs.jsonl"))
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--timed", type=float, default=3.0, help="seconds of an update, about")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--optimizer", default="sgd")
    args = parser.parse_args()
    device = cuda_or_exit()
    rows = read(args.results, Case)
    cases = all_cases(args.precision, args.optimizer)
    missing = [case for case in cases if not is_done(rows.get(case))]
    print(f"{device['name']}: {len(missing)} of {len(cases)} cases, {args.results}", flush=True)
    until = START + args.seconds
    limits = {"until": until, "kill_at": until + GRACE}
    plans: dict[Case, Plan] = {}
    for case, found in run_each(
        lambda case: make_plan(case, device["name"]), missing, num_workers=PLANNERS, **limits
    ):
        if "plan" in found:
            plans[case] = found["plan"]
        else:
            print(*asdict(case).values(), found["error"], flush=True)
    print(f"{len(plans)} plans after {time.monotonic() - START:.0f} s", flush=True)
    for case, row in run_each(
        lambda case: run(case, plans[case], args.timed),
        [case for case in missing if case in plans],
        **limits,
    ):
        append(args.results, case, row)
        rows[case] = row
        shown = row.get("error") or row.get("samples_per_second") or "does not fit"
        print(*asdict(case).values(), shown, flush=True)
    done = {case: rows[case] for case in cases if is_done(rows.get(case))}
    if done:
        print(table(done))
    print(
        f"{len(done)} of {len(cases)} cases" + "; run again for the rest" * (len(done) < len(cases))
    )
    return 0 if len(done) == len(cases) else 1


if __name__ == "__main__":
    sys.exit(main())
