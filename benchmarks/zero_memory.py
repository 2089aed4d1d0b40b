"""Peak memory of a rank under DeepSpeed's stages beside the planner's, on two CPU ranks (gloo).

DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 \
    python benchmarks/zero_memory.py --results FILE [--only TEXT] [--report]

The real peak: bytes that glibc's heap holds (mallinfo2: all threads, blocks of the allocator's own
and mapped ones) above what it held before the model was built, read after every operator of the
second of two `LargeBatch` updates of two micro-steps; of both ranks the larger. torch's profiler,
which `lbaccel plan --report` reads, counts too much here: gloo's threads free tensors that it never
sees freed (ViT-S under ZeRO-3: 502 MiB where the heap has 334). What a kernel takes and gives back
inside itself is not seen. The predicted one: `lbaccel.plan` for the CPU, where offloaded tensors
lie in the same memory.

Results are appended to FILE (JSON lines); a rerun skips what is there; `--report` runs nothing and
writes docs/results/zero_memory.md.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import platform
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import accelerate
import timm
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

from lbaccel import BatchPlan, LargeBatch, plan
from lbaccel.configs.make import deepspeed_config
from lbaccel.data.loader import Update
from lbaccel.models import create_backbone
from lbaccel.optim.optimizers import create_optimizer, has_fused_step
from lbaccel.planning.cost.update import classification_loss
from lbaccel.planning.measure import hardware_name
from lbaccel.update.normalization import has_batch_norm

REPORT = Path(__file__).parents[1] / "docs/results/zero_memory.md"
RANKS, STEPS, CLASSES = 2, 2, 10
NETWORKS = {  # pixels, micro-batch
    "resnet18": (64, 16),
    "vit_tiny_patch16_224": (64, 16),
    "vit_base_patch16_224": (32, 2),
}
OPTIMIZERS = ("sgd", "adamw")
STAGES = {
    "DDP": (None, "none"),
    **{f"ZeRO-{stage}": (stage, "none") for stage in range(4)},
    "ZeRO-2, optimizer offloaded": (2, "optimizer"),
    "ZeRO-3, optimizer offloaded": (3, "optimizer"),
    "ZeRO-3, all offloaded": (3, "optimizer+parameters"),
}
WARM_UP = ("ZeRO-3, all offloaded", "ZeRO-2")  # what is imported late is not a case's
MIB = 2**20


@dataclass(frozen=True)
class Case:
    network: str
    optimizer: str
    stage: str


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks")),
        ("keepcost", ctypes.c_size_t),
    ]


_mallinfo2 = ctypes.CDLL(None).mallinfo2
_mallinfo2.restype = _Mallinfo2


def heap() -> int:
    """Bytes of this process's heap that are in use."""
    found = _mallinfo2()
    return found.uordblks + found.hblkhd


class Watch(TorchDispatchMode):
    """The largest heap after an operator."""

    peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.peak = max(self.peak, heap())
        return found


def accelerator_of(stage: int | None, offload: Any) -> Accelerator:
    if stage is None:
        return Accelerator(cpu=True)
    AcceleratorState._reset_state()  # it allows one plugin per process
    return Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed_config(stage, offload)),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )


def measure(case: Case) -> int:
    """Bytes of this rank at the peak of the second update."""
    size, micro = NETWORKS[case.network]
    gc.collect()
    before = heap()
    torch.manual_seed(0)
    model = create_backbone(case.network, num_classes=CLASSES, img_size=size)
    fused = has_fused_step(case.optimizer, device_type="cpu", precision="fp32")
    optimizer = create_optimizer(model, case.optimizer, lr=1e-6, weight_decay=1e-4, fused=fused)
    accelerator = accelerator_of(*STAGES[case.stage])
    batch = BatchPlan(
        global_batch_size=RANKS * STEPS * micro,
        micro_batch_size=micro,
        world_size=accelerator.num_processes,
        norm_batch_size=micro if has_batch_norm(model) else None,
    )
    assert batch.world_size == dist.get_world_size() == RANKS
    large_batch = LargeBatch(accelerator, batch, clip_grad_norm=1.0)
    engine, optimizer, _ = large_batch.prepare(model.train(), optimizer, [])

    def micro_batches():
        for micro_batch in batch.partition(accelerator.process_index):
            count = micro_batch.num_samples
            yield (
                micro_batch,
                (torch.randn(count, 3, size, size), torch.zeros(count, dtype=torch.long)),
            )

    for number in range(2):
        gc.collect()
        with Watch() as watch:
            update = Update(number, batch.global_batch_size, micro_batches())
            assert large_batch.update(update, classification_loss).applied
    if case.stage != "DDP":
        engine.destroy()
    found = torch.tensor(watch.peak - before)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def predict(case: Case) -> dict[str, Any]:
    """The planner's bytes of a rank, and their parts in MiB."""
    size, micro = NETWORKS[case.network]
    stage, offload = STAGES[case.stage]
    found = plan(
        case.network,
        global_batch_size=RANKS * STEPS * micro,
        img_size=size,
        memory="20GiB",
        world_size=RANKS,
        device="cpu",
        optimizer=case.optimizer,
        num_classes=CLASSES,
        norm_batch_size=micro if case.network.startswith("resnet") else None,
        micro_batch_size=micro,
        activation_checkpointing="none",
        memory_format="contiguous",
        zero_stage=stage,
        offload=offload,
        compare=False,
    )
    parts = {part: round(1024 * gib, 2) for part, gib in found.breakdown.items() if gib}
    return {"predicted": int(found.predicted_peak_gib * 2**30), "parts": parts}


def ranks(cases: list[Case]) -> None:
    """Run by torchrun: a line of JSON for each case, on rank 0."""
    from deepspeed.utils import logger

    torch.set_num_threads(1)
    logger.setLevel("ERROR")
    first = cases[0]
    under_ddp = first.stage == "DDP"  # never beside DeepSpeed in one process
    small = Case("vit_tiny_patch16_224", first.optimizer, "")
    for stage in ["DDP"] if under_ddp else WARM_UP:
        measure(Case(small.network, small.optimizer, stage))
    for case in cases:
        real = measure(case)
        if dist.get_rank() == 0:
            print("RESULT " + json.dumps({**asdict(case), "real": real}), flush=True)


def launch(cases: list[Case]) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(RANKS), __file__, "--ranks"]
    command += [json.dumps([asdict(case) for case in cases])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


def all_cases() -> list[Case]:
    return [Case(*parts) for parts in itertools.product(NETWORKS, OPTIMIZERS, STAGES)]


def read(path: Path) -> dict[Case, dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {Case(row.pop("network"), row.pop("optimizer"), row.pop("stage")): row for row in rows}


@contextmanager
def appended(path: Path):
    with path.open("a", encoding="utf-8") as file:
        yield lambda row: print(json.dumps(row), file=file, flush=True)


def run(path: Path, *, only: str) -> None:
    asked = [case for case in all_cases() if only in " ".join(asdict(case).values())]
    for network, optimizer, ddp in itertools.product(NETWORKS, OPTIMIZERS, (True, False)):
        cases = [
            case
            for case in asked
            if case not in read(path)
            and (case.network, case.optimizer, case.stage == "DDP") == (network, optimizer, ddp)
        ]
        if not cases:
            continue
        with appended(path) as append:
            for row in launch(cases):
                append({**row, "where": environment()})
                print(row, flush=True)


def environment() -> dict[str, Any]:
    import deepspeed

    return {
        "date": date.today().isoformat(),
        "CPU": hardware_name(torch.device("cpu")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "accelerate": accelerate.__version__,
        "timm": timm.__version__,
        "glibc": platform.libc_ver()[1],
    }


def report(path: Path) -> str:
    rows = read(path)
    lines, worst = [], 0.0
    for case in all_cases():
        if case not in rows:
            continue
        real, said = rows[case]["real"] / MIB, predict(case)
        predicted = said["predicted"] / MIB
        error = 100 * (predicted / real - 1)
        worst = max(worst, abs(error))
        parts = ", ".join(f"{name} {mib:.0f}" for name, mib in said["parts"].items() if mib >= 0.5)
        size, micro = NETWORKS[case.network]
        lines.append(
            f"| {case.network}, {size} px, {micro} | {case.optimizer} | {case.stage} "
            f"| {predicted:.1f} | {real:.1f} | {error:+.1f} | {parts} |"
        )
    where = next(iter(rows.values()))["where"]
    table = "\n".join(lines)
    return f"""# Peak memory of a rank under DeepSpeed's stages, predicted and measured

    DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 \\
        python benchmarks/zero_memory.py --results FILE
    python benchmarks/zero_memory.py --results FILE --report

{where["date"]}. Two CPU ranks (gloo) on one machine of two cores, {where["CPU"]}, one thread each.
Python {where["python"]}, torch {where["torch"]}, DeepSpeed {where["deepspeed"]}, accelerate
{where["accelerate"]}, timm {where["timm"]}, glibc {where["glibc"]}. Seed 0, one run a case,
float32, {CLASSES} classes, {STEPS} micro-steps a rank and update, the second of two updates,
the shipped `ds_configs` (buckets of 5,000,000 elements). On a GPU: not measured yet.

MiB of a rank; the error is predicted / measured - 1. Network, pixels a side, micro-batch. Parts are
the prediction's; "deepspeed" are its flat copies and buffers, "host" is what offload would take off
a GPU: here both are one memory, so that offload can only be seen to cost.

| network | optimizer | stage | predicted | measured | error % | parts of the prediction |
|---|---|---|---|---|---|---|
{table}

Largest error: {worst:.1f} %.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, help="JSON lines")
    parser.add_argument("--only", default="", help="cases whose words hold this text")
    parser.add_argument("--report", action="store_true", help=f"write {REPORT.name}")
    parser.add_argument("--ranks", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.ranks:
        ranks([Case(**case) for case in json.loads(a.ranks)])
        return 0
    if a.results is None:
        parser.error("--results FILE is needed")
    if not a.report:
        run(a.results, only=a.only)
        return 0
    text = report(a.results)
    kept = REPORT.read_text() if REPORT.exists() else ""
    mark = "## Notes"  # written by hand, and kept
    REPORT.write_text(text + (f"\n{kept[kept.index(mark) :]}" if mark in kept else ""))
    print(text)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    sys.exit(main())
