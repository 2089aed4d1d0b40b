"""How near `trace_update` comes to the real peak memory of an update on a CPU.

python benchmarks/planner_memory.py --results FILE [--fresh] [--only TEXT] [--report]

The real peak: one `LargeBatch` update of two micro-steps in a child of its own, bytes live in
torch's CPU allocator (profiler memory events) above its start, weights and buffers added. The
predicted one: the same update on fake tensors, with `cpu_workspace` and without. Results are
appended to FILE (JSON lines) as they come, and a rerun skips what is there, but predicts anew what
other code has predicted; `--fresh` drops them, `--only` takes the cases whose words hold TEXT,
`--report` runs nothing and writes docs/results/planner_memory.md.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import itertools
import json
import os
import platform
import re
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read once, when torch is imported

import accelerate
import numpy as np
import timm
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from lbaccel import BatchPlan, LargeBatch
from lbaccel.checkpointing import apply_activation_checkpointing
from lbaccel.data.loader import Update
from lbaccel.normalization import has_batch_norm
from lbaccel.planning import trace, update, workspace

REPORT = Path(__file__).parents[1] / "docs/results/planner_memory.md"
STEPS = 2
CNN, FIXED_INPUT = 128, 224  # pixels
# The convolutions' rules of `cpu_workspace` were read off the first.
FITTED = {
    "resnet50": CNN,
    "convnext_tiny": CNN,
    "mobilenetv3_large_100": CNN,
    "regnety_004": CNN,
    "vgg11_bn": CNN,
}
UNSEEN = {
    "wide_resnet50_2": CNN,
    "mobilenetv2_100": CNN,
    "efficientnet_b0": CNN,
    "densenet121": CNN,
    "vit_small_patch16_224": FIXED_INPUT,
    "deit_tiny_patch16_224": FIXED_INPUT,
    "swin_tiny_patch4_window7_224": FIXED_INPUT,
    "mixer_s16_224": FIXED_INPUT,
}
NETWORKS = {**FITTED, **UNSEEN}
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
GOALS = {"median": 0.5, "p95": 2.0, "largest": 5.0, "too_low": -1.0}  # percent
_SOURCES = [Path(str(module.__file__)).read_bytes() for module in (trace, update, workspace)]
CODE = hashlib.sha256(b"".join(_SOURCES)).hexdigest()[:12]  # of what predicts


@dataclass(frozen=True)
class Case:
    network: str
    checkpointing: str
    optimizer: str
    precision: str
    micro_batch_size: int
    memory_format: str


def all_cases() -> list[Case]:
    """Small micro-batches first, so that a run that is cut short has seen every network."""
    found = [
        Case(network, checkpointing, optimizer, precision, size, "contiguous")
        for size, optimizer, precision, checkpointing, network in itertools.product(
            (4, 8, 16), OPTIMIZERS, ("fp32", "bf16"), ("none", "full"), NETWORKS
        )
    ]
    last = [
        replace(case, memory_format="channels_last")
        for case in found
        if (case.micro_batch_size, case.optimizer) == (8, "sgd") and NETWORKS[case.network] == CNN
    ]
    return found + last


def plan_of(case: Case, model: torch.nn.Module) -> BatchPlan:
    size = case.micro_batch_size
    return BatchPlan(
        global_batch_size=STEPS * size,
        micro_batch_size=size,
        norm_batch_size=size if has_batch_norm(model) else None,
    )


def held_by(model: torch.nn.Module) -> dict[int, int]:
    """Bytes of parameters and buffers by address."""
    storages = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def measure(case: Case) -> dict[str, Any]:
    """Bytes at the peak of one real update."""
    torch.manual_seed(0)
    layout = LAYOUTS[case.memory_format]
    model = timm.create_model(case.network, num_classes=1000).to(memory_format=layout)
    if case.checkpointing == "full":
        apply_activation_checkpointing(model)
    plan = plan_of(case, model)
    accelerator = Accelerator(
        cpu=True, mixed_precision="bf16" if case.precision == "bf16" else "no"
    )
    large_batch = LargeBatch(accelerator, plan, clip_grad_norm=1.0)
    optimizer = OPTIMIZERS[case.optimizer](model.parameters())
    model, optimizer, _ = large_batch.prepare(model, optimizer, [])
    size = NETWORKS[case.network]

    def micro_batches():
        for micro_batch in plan.partition():
            images = torch.randn(micro_batch.num_samples, 3, size, size)
            yield micro_batch, (images, torch.zeros(micro_batch.num_samples, dtype=torch.long))

    def loss_fn(model, micro_batch):
        images, labels = micro_batch
        return F.cross_entropy(model(images.to(memory_format=layout)), labels)  # as the recipe

    whole = Update(index=0, num_samples=plan.global_batch_size, micro_batches=micro_batches())
    held = held_by(model)
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        large_batch.update(whole, loss_fn)
    seconds = time.perf_counter() - start
    gc.enable()
    live = lowest = peak = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            lowest, peak = min(lowest, live), max(peak, live)
    # Torch leaves out what frees memory from before the profile; weights may be no part of it.
    assert lowest == 0 and held_by(model) == held, f"memory from before was freed ({lowest})"
    return {"real": sum(held.values()) + peak, "update_seconds": seconds}


def predict(case: Case) -> dict[str, Any]:
    """Bytes at the peak of the traced update, and the same without workspaces."""
    start = time.perf_counter()
    with torch.device("meta"):
        model = timm.create_model(case.network, num_classes=1000)
    network = update.Network(
        model=model,
        make_batch=update.image_batch(3, NETWORKS[case.network]),
        optimizer=OPTIMIZERS[case.optimizer](model.parameters()),
        clips=True,
        memory_format=case.memory_format,
    )
    checkpointed = case.checkpointing == "full"
    traced = update.trace_update(
        network,
        plan_of(case, model),
        precision="bf16" if case.precision == "bf16" else "fp32",
        workspace=workspace.cpu_workspace,
        change=(lambda model, _: apply_activation_checkpointing(model)) if checkpointed else None,
    )
    plain = [replace(e, workspace=0) if isinstance(e, trace.Kernel) else e for e in traced.events]
    return {
        "predicted": traced.peak(),
        "code": CODE,
        "plain": trace.Trace(plain, traced.roles).peak(),
        "trace_seconds": time.perf_counter() - start,
    }


def in_child(function: Callable[[Case], dict[str, Any]], case: Case) -> dict[str, Any]:
    """`function(case)` in a process that has the imports and nothing of another case."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            found = function(case)
        except BaseException as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"[:300]}
        with os.fdopen(writer, "w") as pipe:
            json.dump(found, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text else {"error": f"the child ended with status {status}"}


def environment() -> dict[str, str]:
    onednn = re.search(r"MKL-DNN v([\d.]+)", torch.__config__.show())
    cpu = Path("/proc/cpuinfo").read_text()
    model, flags = (re.search(rf"^{key}\s*: (.*)$", cpu, re.M) for key in ("model name", "flags"))
    has = flags.group(1).split() if flags else []
    known = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16")
    return {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "accelerate": accelerate.__version__,
        "oneDNN": onednn.group(1) if onednn and torch.backends.mkldnn.is_available() else "none",
        "CPU": model.group(1) if model else platform.processor(),
        "flags": ", ".join(f"{flag} {'yes' if flag in has else 'no'}" for flag in known),
    }


def run(path: Path, *, only: str) -> None:
    known = read(path)
    with path.open("a") as file:
        for case in all_cases():
            row = known.get(case, {})
            if only not in " ".join(map(str, asdict(case).values())):
                continue
            found = {}
            if "real" not in row:
                found |= in_child(measure, case)
            if row.get("code") != CODE:
                found |= in_child(predict, case)
            if not found:
                continue
            row.pop("error", None)
            row |= found
            line = {**asdict(case), **row, "environment": environment()}
            print(json.dumps(line), file=file, flush=True)
            shown = (
                f"{100 * (row['predicted'] / row['real'] - 1):+.3f} %" if not lacks(row) else row
            )
            print(*asdict(case).values(), shown, flush=True)


def lacks(row: dict[str, Any]) -> bool:
    return "real" not in row or "predicted" not in row


def read(path: Path) -> dict[Case, dict[str, Any]]:
    """The last line of each case."""
    names = [field.name for field in fields(Case)]
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {Case(*(row.pop(name) for name in names)): row for row in rows}


def figures(errors: list[float]) -> dict[str, float]:
    """Of errors in percent."""
    sizes = np.abs(errors)
    return {
        "median": float(np.median(sizes)),
        "p95": float(np.percentile(sizes, 95)),
        "largest": float(sizes.max()),
        "too_low": min(0.0, *errors),
    }


def table_row(label: str, errors: list[float]) -> str:
    found = figures(errors)
    cells = [f"{value:.3f}" for value in found.values()]
    for index, (key, goal) in enumerate(GOALS.items()):
        if found[key] < goal if key == "too_low" else found[key] > goal:
            cells[index] = f"**{cells[index]}**"
    return f"| {label} | {len(errors)} | " + " | ".join(cells) + " |"


def report(path: Path) -> str:
    every = read(path)
    rows = {case: row for case, row in every.items() if case in all_cases() and not lacks(row)}
    errors = {case: 100 * (row["predicted"] / row["real"] - 1) for case, row in rows.items()}
    plain = {case: 100 * (row["plain"] / row["real"] - 1) for case, row in rows.items()}
    parts: dict[str, Callable[[Case], bool]] = {
        "all": lambda _: True,
        "fitted families": lambda case: case.network in FITTED,
        "unseen families": lambda case: case.network in UNSEEN,
        "fp32": lambda case: case.precision == "fp32",
        "bf16": lambda case: case.precision == "bf16",
        "no checkpointing": lambda case: case.checkpointing == "none",
        "checkpointing": lambda case: case.checkpointing == "full",
        "channels last": lambda case: case.memory_format == "channels_last",
    }
    head = "| cases | number | median | 95th percentile | largest | most too low |"
    head = f"{head}\n|---|---|---|---|---|---|"
    goal = " | ".join(f"{value:g}" for value in GOALS.values())

    def table(of: dict[Case, float], names: list[str]) -> str:
        lines = []
        for name in names:
            chosen = [error for case, error in of.items() if parts[name](case)]
            lines += [table_row(name, chosen)] if chosen else []
        return "\n".join([head, f"| goal | | {goal} |", *lines])

    by_network = "\n".join(
        table_row(
            f"{network}, {size} px{'' if network in UNSEEN else ' (fitted)'}",
            [error for case, error in errors.items() if case.network == network],
        )
        for network, size in NETWORKS.items()
        if any(case.network == network for case in errors)
    )
    worst = sorted(errors, key=lambda case: -abs(errors[case]))[:10]
    mib = 2**20
    worst_head = "| network | checkpointing | optimizer | precision | micro-batch | layout "
    worst_head += "| real MiB | predicted MiB | error % | without rules % |\n" + 10 * "|---" + "|"
    worst_rows = "\n".join(
        f"| {case.network} | {case.checkpointing} | {case.optimizer} | {case.precision} "
        f"| {case.micro_batch_size} | {case.memory_format} | {rows[case]['real'] / mib:.2f} "
        f"| {rows[case]['predicted'] / mib:.2f} | {errors[case]:+.3f} | {plain[case]:+.3f} |"
        for case in worst
    )
    where = next(iter(rows.values()))["environment"]
    failed = [
        f"{' '.join(map(str, asdict(c).values()))}: {r['error']}"
        for c, r in every.items()
        if lacks(r)
    ]
    codes = {row["code"] for row in rows.values()}
    assert len(codes) <= 1, f"predictions of different code: {codes}. Run again without --report."
    updates, traces = (
        sum(row[key] for row in rows.values()) for key in ("update_seconds", "trace_seconds")
    )
    return f"""# The planner's peak memory against the CPU's allocator

    OMP_NUM_THREADS=1 python benchmarks/planner_memory.py --results FILE
    python benchmarks/planner_memory.py --results FILE --report

{where["date"]}. {where["CPU"]} ({where["flags"]}), one thread. Python {where["python"]}, torch
{where["torch"]}, timm {where["timm"]}, accelerate {where["accelerate"]}, oneDNN {where["oneDNN"]}.
Seed 0, one run a case.

{len(rows)} of {len(all_cases())} cases: {len(NETWORKS)} networks ({CNN} px, transformers and mixer
{FIXED_INPUT} px, 1,000 classes) x activation checkpointing (none, full) x SGD with momentum, AdamW
x float32, bf16 (autocast) x micro-batches of 4, 8, 16; and the convolutional ones channels-last
with SGD and micro-batches of 8. Two micro-steps an update, ghost batches of one micro-batch,
gradients clipped. The real peak is that of torch's CPU allocator over one `LargeBatch` update in
a process of its own, weights and buffers included; what oneDNN and MKL take past that allocator
is not in it. Errors are predicted / real - 1, in percent; median, percentile and largest of their
absolute values; bold: misses the goal. The updates took {updates:.0f} s together, the traces
{traces:.0f} s.

## With the workspace rules

{table(errors, list(parts))}

"Fitted" families are those that the convolutions' rules of `lbaccel/planning/workspace.py` were
read off ({", ".join(FITTED)}).

{head}
{by_network}

## Without them

The trace alone, which sees the tensors that kernels return and not what they take inside:

{table(plain, ["all", "fitted families", "unseen families"])}

## The ten worst cases

{worst_head}
{worst_rows}
""" + ("\n## Failed\n\n" + "\n".join(f"- {line}" for line in failed) + "\n" if failed else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="JSON lines")
    parser.add_argument("--fresh", action="store_true", help="drop what FILE holds")
    parser.add_argument("--only", default="", help="cases whose words hold this text")
    parser.add_argument("--report", action="store_true", help=f"write {REPORT.name}")
    arguments = parser.parse_args()
    if not arguments.report:
        torch.set_num_threads(1)
        if arguments.fresh:
            arguments.results.unlink(missing_ok=True)
        run(arguments.results, only=arguments.only)
        return 0
    text = report(arguments.results)
    kept = REPORT.read_text() if REPORT.exists() else ""
    mark = "## Notes"  # written by hand, and kept
    REPORT.write_text(text + (f"\n{kept[kept.index(mark) :]}" if mark in kept else ""))
    print(text[text.index("## With the workspace rules") :])
    return 0


if __name__ == "__main__":
    sys.exit(main())
