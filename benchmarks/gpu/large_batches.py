"""Whole updates of 2,048 to 16,384 images at 224 px in 24, 12 and 8 GiB, as they are planned.

python benchmarks/gpu/large_batches.py [--results FILE] [--seconds S] [--dry]

For each global batch and budget: the plan of `lbaccel plan` for MobileNetV2 and ResNet-50 in bf16,
and one update of it, the first, under a cap of torch's allocator. Images are random and made on the
host, a micro-batch at a time. `result` is the loss and the
norm of the gradient: over the budgets of one batch they have to agree to what bf16 rounds, since
the batch is a contract and the memory is not.

Lines are appended to FILE (default: $OUT/large_batches.jsonl); a rerun skips what is there.
"""

from __future__ import annotations

import time

START = time.monotonic()  # imports count

import sys  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from typing import Any  # noqa: E402

import timm  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from children import run_cases  # noqa: E402
from torch.utils.data import Dataset  # noqa: E402

from lbaccel import BatchPlan, LargeBatch, UpdateLoader, plan  # noqa: E402
from lbaccel.planning.cost.devices import GIB, device_at_hand  # noqa: E402
from lbaccel.planning.cost.update import classification_loss  # noqa: E402
from lbaccel.update.checkpointing import (  # noqa: E402
    apply_activation_checkpointing,
    apply_segments,
)
from lbaccel.update.memory.budget import memory_limit  # noqa: E402

NORM = 32


@dataclass(frozen=True)
class Case:
    network: str
    img_size: int
    global_batch_size: int
    budget_gib: float


def cases(dry: bool) -> list[Case]:
    if dry:
        return [Case("resnet10t", 32, 256, gib) for gib in (1.0, 0.5)]
    return [
        Case(network, 224, batch, gib)
        for network in ("mobilenetv2_100", "resnet50")
        for batch in (2048, 4096, 8192, 16384)
        for gib in (24, 12, 8)
    ]


class Images(Dataset):
    """Image i is drawn by its number: the same under every plan."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        draw = torch.Generator().manual_seed(i % 64)  # 64 images, so that drawing takes no time
        return torch.randn(3, self.size, self.size, generator=draw), i % 10


def run(case: Case, where: str) -> dict[str, Any]:
    device = device_at_hand(torch.device(where))
    found = plan(
        case.network, img_size=case.img_size, global_batch_size=case.global_batch_size,
        norm_batch_size=NORM, memory=f"{case.budget_gib}GiB", device=device, precision="bf16",
        optimizer="momentum", num_classes=10, compare=False,
    )  # fmt: skip
    row: dict[str, Any] = {"fits": found.fits, "plan": found.to_dict()}
    if not found.fits:
        return row
    torch.manual_seed(0)
    model: Any = timm.create_model(case.network, num_classes=10)
    layout = getattr(torch, found.memory_format.replace("contiguous", "contiguous_format"))
    model = model.to(memory_format=layout)

    def loss_fn(model: Any, micro_batch: Any) -> Any:
        images, labels = micro_batch
        turned = images.contiguous(memory_format=layout)
        return classification_loss(model, (turned, labels))

    if found.activation_checkpointing == "full":
        apply_activation_checkpointing(model)
    elif found.activation_checkpointing == "segments":
        apply_segments(model, found.segments)
    batch = BatchPlan(
        global_batch_size=case.global_batch_size,
        micro_batch_size=found.micro_batch_size,
        norm_batch_size=NORM,
    )
    large_batch = LargeBatch(Accelerator(mixed_precision="bf16", cpu=where == "cpu"), batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = UpdateLoader(Images(case.global_batch_size, case.img_size), batch)
    _, _, loader = large_batch.prepare(model, optimizer, loader)
    with memory_limit(int(case.budget_gib * GIB) - device.context, large_batch.accelerator.device):
        start = time.perf_counter()
        (update,) = loader
        result = large_batch.update(update, loss_fn)
        seconds = time.perf_counter() - start
    return {
        **row,
        "result": [result.loss, result.grad_norm],
        "num_retries": result.num_retries,
        "seconds": seconds,
        "samples_per_second": case.global_batch_size / seconds,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB if where == "cuda" else None,
        "torch": torch.__version__,
    }


def table(rows: dict[Case, dict[str, Any]]) -> str:
    lines = [
        f"{'network':<18}{'batch':>7}{'GiB':>6}{'micro':>7}{'images/s':>10}{'loss':>9}{'norm':>9}"
    ]
    for case, row in rows.items():
        line = f"{case.network:<18}{case.global_batch_size:>7,}{case.budget_gib:>6g}"
        if row["fits"]:
            loss, norm = row["result"]
            line += f"{row['plan']['micro_batch_size']:>7}{row['samples_per_second']:>10.1f}"
            line += f"{loss:>9.4f}{norm:>9.4f}"
        lines.append(line if row["fits"] else f"{line}  no plan fits")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_cases("large_batches", cases, run, table, start=START))
