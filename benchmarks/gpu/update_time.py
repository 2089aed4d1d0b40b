"""One update on a GPU beside a plain loop and Accelerate's `accumulate`, interleaved.

python benchmarks/gpu/update_time.py [--results FILE] [--seconds S] [--dry]

A case is a network, with or without drop-path, as it is or compiled (`torch.compile` before
`prepare`): 16 micro-batches in bf16, channels-last, SGD with momentum; images that lie on the GPU.
The three loops take turns in one process; a figure is the least of 7 times of a whole update, by
the clock after a synchronisation. `host_ms` is the time until the last kernel is queued: where it
is the larger part, Python is what a user waits for.

Lines are appended to FILE (default: $OUT/update_time.jsonl); a rerun skips what is there.
"""

from __future__ import annotations

import time

START = time.monotonic()  # imports count

import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from typing import Any  # noqa: E402

import timm  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from children import run_cases  # noqa: E402
from torch.utils.data import TensorDataset  # noqa: E402

from lbaccel import BatchPlan, LargeBatch, UpdateLoader  # noqa: E402
from lbaccel.planning.cost.update import classification_loss  # noqa: E402

STEPS, REPEATS = 16, 7
Arm = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    network: str
    img_size: int
    micro_batch_size: int
    drop_path: float
    compiled: bool


def cases(dry: bool) -> list[Case]:
    if dry:
        return [Case("resnet10t", 32, 4, drop_path, False) for drop_path in (0.0, 0.1)]
    networks = (("resnet50", 224, 64), ("vit_small_patch16_224", 224, 64), ("resnet18", 32, 128))
    return [
        Case(network, size, micro, drop_path, compiled)
        for compiled in (False, True)
        for network, size, micro in networks
        for drop_path in (0.0, 0.1)
    ]


def _network(case: Case, where: str) -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model: Any = timm.create_model(case.network, num_classes=10, drop_path_rate=case.drop_path)
    model = model.to(device=where, memory_format=torch.channels_last)
    model = torch.compile(model) if case.compiled else model
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)


def _ours(case: Case, where: str, data: tuple[Any, Any]) -> Arm:
    count = STEPS * case.micro_batch_size
    accelerator = Accelerator(mixed_precision="bf16", cpu=where == "cpu")
    plan = BatchPlan(
        global_batch_size=count,
        micro_batch_size=case.micro_batch_size,
        norm_batch_size=case.micro_batch_size,
    )
    large_batch = LargeBatch(accelerator, plan)
    model, optimizer = _network(case, where)
    loader = UpdateLoader(TensorDataset(*data), plan)
    model, optimizer, loader = large_batch.prepare(model, optimizer, loader)
    (update,) = loader
    return lambda: large_batch.update(update, classification_loss)


def _plain(case: Case, where: str, data: tuple[Any, Any]) -> Arm:
    model, optimizer = _network(case, where)
    images, labels = (t.to(where) for t in data)

    def run() -> None:
        for x, y in zip(images.chunk(STEPS), labels.chunk(STEPS), strict=True):
            with torch.autocast(where, dtype=torch.bfloat16):
                loss = classification_loss(model, (x, y))
            (loss / STEPS).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def _accumulate(case: Case, where: str, data: tuple[Any, Any]) -> Arm:
    accelerator = Accelerator(
        mixed_precision="bf16", gradient_accumulation_steps=STEPS, cpu=where == "cpu"
    )
    model, optimizer = accelerator.prepare(*_network(case, where))
    images, labels = (t.to(where) for t in data)

    def run() -> None:
        for x, y in zip(images.chunk(STEPS), labels.chunk(STEPS), strict=True):
            with accelerator.accumulate(model):
                accelerator.backward(classification_loss(model, (x, y)))
                optimizer.step()
                optimizer.zero_grad()

    return run


ARMS = {"lbaccel": _ours, "plain loop": _plain, "accumulate": _accumulate}


def run(case: Case, where: str) -> dict[str, Any]:
    count = STEPS * case.micro_batch_size
    images = torch.randn(count, 3, case.img_size, case.img_size)
    data = images.contiguous(memory_format=torch.channels_last), torch.randint(10, (count,))
    wait = torch.cuda.synchronize if where == "cuda" else lambda: None
    arms = {name: make(case, where, data) for name, make in ARMS.items()}
    whole: dict[str, list[float]] = {name: [] for name in arms}
    host: dict[str, list[float]] = {name: [] for name in arms}
    for arm in arms.values():  # kernels are chosen, and compiled
        arm()
        arm()
    for _ in range(REPEATS):
        for name, arm in arms.items():
            wait()
            start = time.perf_counter()
            arm()
            host[name].append(time.perf_counter() - start)
            wait()
            whole[name].append(time.perf_counter() - start)
    plain = min(whole["plain loop"])
    return {
        "ms": {name: round(1000 * min(times), 3) for name, times in whole.items()},
        "host_ms": {name: round(1000 * min(times), 3) for name, times in host.items()},
        "of_plain": {name: round(min(times) / plain, 4) for name, times in whole.items()},
        "steps": STEPS,
        "torch": torch.__version__,
    }


def table(rows: dict[Case, dict[str, Any]]) -> str:
    lines = [
        f"{'network':<24}{'drop-path':>10}{'compiled':>10}{'plain ms':>10}{'lbaccel':>9}{'acc.':>9}"
    ]
    for case, row in rows.items():
        share = row["of_plain"]
        lines.append(
            f"{case.network:<24}{case.drop_path:>10g}{case.compiled!s:>10}"
            f"{row['ms']['plain loop']:>10.1f}{share['lbaccel']:>9.3f}{share['accumulate']:>9.3f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_cases("update_time", cases, run, table, start=START))
