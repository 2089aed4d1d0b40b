"""Real lacks of memory under a cap, and what they cost: the same updates with and without a cap.

python benchmarks/gpu/recovery.py [--results FILE] [--seconds S] [--dry]

ResNet-50 at 224 px in bf16, 256 images an update, begun with micro-batches of 128: 4 updates under
caps of torch's allocator at 8, 4 and 2 GiB, in which such a micro-batch does not fit, and without
one. `micro` has the size after each update, `retries` how often memory ran out in it, and `losses`
must agree over the caps to what bf16 rounds.

Lines are appended to FILE (default: $OUT/recovery.jsonl); a rerun skips what is there.
"""

from __future__ import annotations

import time

START = time.monotonic()  # imports count

import sys  # noqa: E402
from contextlib import nullcontext  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from typing import Any  # noqa: E402

import timm  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from children import run_cases  # noqa: E402
from torch.utils.data import TensorDataset  # noqa: E402

from lbaccel import BatchPlan, LargeBatch, UpdateLoader  # noqa: E402
from lbaccel.planning.cost.devices import GIB  # noqa: E402
from lbaccel.planning.cost.update import classification_loss  # noqa: E402
from lbaccel.update.memory.budget import memory_limit  # noqa: E402

NORM, UPDATES = 8, 4


@dataclass(frozen=True)
class Case:
    network: str
    img_size: int
    global_batch_size: int
    micro_batch_size: int
    cap_gib: float | None


def cases(dry: bool) -> list[Case]:
    if dry:  # a CPU has no cap: the plumbing alone
        return [Case("resnet10t", 32, 32, 16, None)]
    return [Case("resnet50", 224, 256, 128, cap) for cap in (None, 8.0, 4.0, 2.0)]


def run(case: Case, where: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = timm.create_model(case.network, num_classes=10, drop_rate=0.1)
    images = torch.randn(case.global_batch_size, 3, case.img_size, case.img_size)
    data = TensorDataset(images, torch.randint(10, (case.global_batch_size,)))
    plan = BatchPlan(
        global_batch_size=case.global_batch_size,
        micro_batch_size=case.micro_batch_size,
        norm_batch_size=NORM,
    )
    large_batch = LargeBatch(Accelerator(mixed_precision="bf16", cpu=where == "cpu"), plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model, optimizer, loader = large_batch.prepare(model, optimizer, UpdateLoader(data, plan))
    device = large_batch.accelerator.device
    cap = nullcontext() if case.cap_gib is None else memory_limit(int(case.cap_gib * GIB), device)
    results, seconds = [], []
    with cap:
        for _ in range(UPDATES):
            for update in loader:
                start = time.perf_counter()
                results.append(large_batch.update(update, classification_loss))
                seconds.append(round(time.perf_counter() - start, 3))
    return {
        "losses": [result.loss for result in results],
        "micro": [result.micro_batch_size for result in results],
        "retries": [result.num_retries for result in results],
        "seconds": seconds,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB if where == "cuda" else None,
        "torch": torch.__version__,
    }


def table(rows: dict[Case, dict[str, Any]]) -> str:
    lines = [f"{'cap GiB':>8}  {'retries':<14}{'micro-batch':<22}{'seconds':<30}losses"]
    for case, row in rows.items():
        cap = "none" if case.cap_gib is None else f"{case.cap_gib:g}"
        losses = " ".join(f"{loss:.4f}" for loss in row["losses"])
        lines.append(
            f"{cap:>8}  {row['retries']!s:<14}{row['micro']!s:<22}{row['seconds']!s:<30}{losses}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_cases("recovery", cases, run, table, start=START))
