"""How near a plan's peak comes to the real peak memory of an update on a CPU.

OMP_NUM_THREADS=1 python benchmarks/planner_memory.py --results FILE [--only TEXT] [--share 1/2]
ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 python benchmarks/planner_memory.py --results FILE
python benchmarks/planner_memory.py --results FILE --report

The real peak: one `LargeBatch` update of two micro-steps in a child of its own, bytes live in
torch's CPU allocator (profiler memory events) above its start, weights and buffers added. The
predicted one: what `Estimator`, on which plans rest, gives for the same micro-batch. Results are
appended to FILE (JSON lines) as they come, with the instruction set that they ran under; a rerun
skips what is there, but predicts anew what other code has predicted. `--share` takes a part of the
cases, `--threads` runs kernels in several; `--report` runs nothing and writes
docs/results/planner_memory.md.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import platform
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
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
from lbaccel.data.loader import Update
from lbaccel.planning import estimate
from lbaccel.planning.cost import chain, kernel_calls, kernel_memory, trace, update, workspace
from lbaccel.planning.cost.devices import find_device
from lbaccel.planning.cost.processor import instruction_set
from lbaccel.update.checkpointing import apply_activation_checkpointing, apply_segments
from lbaccel.update.normalization import has_batch_norm

REPORT = Path(__file__).parents[1] / "docs/results/planner_memory.md"
STEPS = 2
SMALL, LARGE = 20, 5  # samples a micro-batch of small and of large images
RUN = 4  # units of a segment
# The thirteen networks of the first benchmark, then others: pixels of small and of large images.
NETWORKS = {
    "resnet50": (64, 224),
    "convnext_tiny": (64, 128),
    "mobilenetv3_large_100": (64, 128),
    "regnety_004": (64, 128),
    "vgg11_bn": (32, 128),
    "wide_resnet50_2": (64, 128),
    "mobilenetv2_100": (32, 224),
    "efficientnet_b0": (64, 128),
    "densenet121": (64, 128),
    "vit_small_patch16_224": (224,),
    "deit_tiny_patch16_224": (224,),
    "swin_tiny_patch4_window7_224": (224,),
    "mixer_s16_224": (224,),
    "resnet10t": (32, 128),
    "resnet18": (32, 224),
    "resnet34": (64, 128),
    "seresnet18": (32, 128),
    "skresnet18": (64, 128),
    "resnet26d": (64, 128),
    "resnext50_32x4d": (64, 128),
    "res2net50_26w_4s": (64, 128),
    "resnest14d": (64, 128),
    "regnetx_002": (32, 224),
    "edgenext_xx_small": (64, 224),
    "convnext_atto": (64, 224),
    "convnextv2_atto": (64, 128),
    "mobilenetv4_conv_small": (64, 128),
    "mobileone_s0": (32, 128),
    "mnasnet_100": (64, 128),
    "lcnet_050": (32, 128),
    "tf_efficientnetv2_b0": (64, 128),
    "ghostnet_100": (64, 128),
    "rexnet_100": (64, 128),
    "dla34": (64, 128),
    "hrnet_w18_small": (64, 128),
    "repvgg_a0": (32, 128),
    "darknet53": (64, 128),
    "cspresnet50": (64, 128),
    "nfnet_l0": (64, 128),
    "poolformer_s12": (64, 128),
    "selecsls42b": (64, 128),
    "visformer_tiny": (224,),
}
FIRST = tuple(NETWORKS)[:13]
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
GOALS = {"median": 0.3, "p95": 3.0, "largest": 6.0, "too_low": -1.0}  # percent
_PREDICTS = (chain, estimate, kernel_calls, kernel_memory, trace, update, workspace)
CODE = hashlib.sha256(b"".join(Path(str(m.__file__)).read_bytes() for m in _PREDICTS)).hexdigest()


@dataclass(frozen=True)
class Case:
    network: str
    img_size: int
    checkpointing: str
    optimizer: str
    precision: str
    micro_batch_size: int
    memory_format: str


Key = tuple[str, Case]  # instruction set and case


def all_cases() -> list[Case]:
    """The first networks in every way; of the others each second one in half of the ways."""
    found = []
    for number, (network, sizes) in enumerate(NETWORKS.items()):
        odd = bool(number % 2)
        optimizer = "adamw" if odd else "sgd"
        small, large = sizes[0], sizes[-1]
        many = SMALL if small < large else LARGE
        ways = [
            (small, "none", "fp32", many, "channels_last"),
            (small, "segments", "fp32", many, "channels_last"),
            (small, "none", "fp32", many, "contiguous"),
            (small, "full", "fp32", many, "contiguous"),
            (large, "segments" if odd else "none", "fp32", LARGE, "contiguous"),
        ]
        if network not in FIRST:
            ways = [*(ways[:2] if odd else ways[2:4]), ways[4]]
        if network in FIRST or number % 3 == 0:  # slow where the processor has no bf16
            ways.append((small, "full" if odd else "none", "bf16", LARGE, "contiguous"))
        for size, how, precision, samples, layout in dict.fromkeys(ways):
            found.append(Case(network, size, how, optimizer, precision, samples, layout))
    return found


def create(case: Case) -> torch.nn.Module:
    return timm.create_model(case.network, num_classes=1000)


def plan_of(case: Case, model: torch.nn.Module) -> BatchPlan:
    size = case.micro_batch_size
    return BatchPlan(
        global_batch_size=STEPS * size,
        micro_batch_size=size,
        norm_batch_size=size if has_batch_norm(model) else None,
    )


def estimator_of(case: Case) -> estimate.Estimator:
    with torch.device("meta"):
        model = create(case)
    network = update.Network(
        model=model,
        make_batch=update.image_batch(3, case.img_size),
        optimizer=OPTIMIZERS[case.optimizer](model.parameters()),
        clips=True,
    )
    precision = "bf16" if case.precision == "bf16" else "fp32"
    return estimate.Estimator(network, plan_of(case, model), find_device("cpu"), precision)


def segments_of(units: Sequence[chain.Unit]) -> tuple[tuple[str, ...], ...]:
    """Runs of `RUN` units, or of fewer where the chain breaks."""
    runs: list[list[str]] = []
    for before, unit in zip((None, *units), units, strict=False):
        goes_on = before is not None and before.links and runs and len(runs[-1]) < RUN
        if goes_on:
            runs[-1].append(unit.name)
        elif unit.starts:
            runs.append([unit.name])
        else:
            runs.append([])
    return tuple(tuple(run) for run in runs if run)


def held_by(model: torch.nn.Module) -> dict[int, int]:
    """Bytes of parameters and buffers by address."""
    storages = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def measure(case: Case) -> dict[str, Any]:
    """Bytes at the peak of one real update."""
    segments = segments_of(estimator_of(case).units) if case.checkpointing == "segments" else ()
    torch.manual_seed(0)
    layout = LAYOUTS[case.memory_format]
    model: Any = create(case).to(memory_format=layout)
    if case.checkpointing == "full":
        apply_activation_checkpointing(model)
    elif segments:
        apply_segments(model, segments)
    plan = plan_of(case, model)
    accelerator = Accelerator(
        cpu=True, mixed_precision="bf16" if case.precision == "bf16" else "no"
    )
    large_batch = LargeBatch(accelerator, plan, clip_grad_norm=1.0)
    optimizer = OPTIMIZERS[case.optimizer](model.parameters())
    model, optimizer, _ = large_batch.prepare(model, optimizer, [])
    size = case.img_size

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
    """Bytes at the peak that a plan states, and those of its margin."""
    start = time.perf_counter()
    estimator = estimator_of(case)
    how: estimate.Checkpointing = "none"
    if case.checkpointing == "full":
        how = "full"
    elif case.checkpointing == "segments":
        how = segments_of(estimator.units)
    layout: Any = case.memory_format
    found = estimator.estimate(estimate.Candidate(case.micro_batch_size, layout, how))
    workspaces = estimator.cpu_workspaces
    return {
        "predicted": found.peak,
        "traced": found.traced,
        "code": CODE,
        "assumed": workspaces.num_assumed,
        "predict_seconds": time.perf_counter() - start,
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
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
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


def run(path: Path, *, only: str, share: tuple[int, int], threads: int) -> None:
    torch.set_num_threads(threads)
    known = read(path)
    isa = instruction_set() + (f"; {threads} threads" if threads > 1 else "")
    for case in all_cases()[share[0] - 1 :: share[1]]:
        row = known.get((isa, case), {})
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
        line = {"instruction_set": isa, **asdict(case), **row, "environment": environment()}
        with path.open("a") as file:
            print(json.dumps(line), file=file, flush=True)
        shown = f"{error_of(row):+.3f} %" if not lacks(row) else row
        print(isa, *asdict(case).values(), shown, flush=True)


def lacks(row: dict[str, Any]) -> bool:
    return "real" not in row or "predicted" not in row


def error_of(row: dict[str, Any]) -> float:
    return 100 * (row["predicted"] / row["real"] - 1)


def read(path: Path) -> dict[Key, dict[str, Any]]:
    """The last line of each case."""
    names = [field.name for field in fields(Case)]
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {
        (row.pop("instruction_set"), Case(*(row.pop(name) for name in names))): row for row in rows
    }


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


def parts(sets: Sequence[str]) -> dict[str, Callable[[Key], bool]]:
    """The tables' rows: which cases each takes."""
    found: dict[str, Callable[[Key], bool]] = {"all": lambda _: True}
    found |= {isa: lambda key, isa=isa: key[0] == isa for isa in sets}
    for name, value in (("networks of the first benchmark", True), ("others", False)):
        found[name] = lambda key, value=value: (key[1].network in FIRST) == value
    for field in ("precision", "checkpointing", "memory_format"):
        for value in sorted({str(getattr(case, field)) for case in all_cases()}):
            found[f"{field} {value}".replace("_", " ")] = lambda key, f=field, v=value: (
                getattr(key[1], f) == v
            )
    found["images of at most 64 px"] = lambda key: key[1].img_size <= 64
    found["larger images"] = lambda key: key[1].img_size > 64
    return found


def report(path: Path) -> str:
    every = read(path)
    wanted = set(all_cases())
    rows = {key: row for key, row in every.items() if key[1] in wanted and not lacks(row)}
    codes = {row["code"] for row in rows.values()}
    assert len(codes) <= 1, f"predictions of different code: {codes}. Run again without --report."
    errors = {key: error_of(row) for key, row in rows.items()}
    sets = sorted({isa for isa, _ in rows})
    head = "| cases | number | median | 95th percentile | largest | most too low |"
    head = f"{head}\n|---|---|---|---|---|---|"
    goal = f"| goal | | {' | '.join(f'{value:g}' for value in GOALS.values())} |"
    lines = []
    for label, takes in parts(sets).items():
        chosen = [error for key, error in errors.items() if takes(key)]
        lines += [table_row(label, chosen)] if chosen else []
    by_network = [
        table_row(
            f"{network}, {' and '.join(map(str, sizes))} px",
            [error for (_, case), error in errors.items() if case.network == network],
        )
        for network, sizes in NETWORKS.items()
        if any(case.network == network for _, case in errors)
    ]
    mib = 2**20
    worst = [
        f"| {isa} | {case.network} {case.img_size} px | {case.checkpointing} | {case.optimizer} "
        f"| {case.precision} | {case.micro_batch_size} | {case.memory_format} "
        f"| {rows[isa, case]['real'] / mib:.2f} | {rows[isa, case]['predicted'] / mib:.2f} "
        f"| {errors[isa, case]:+.3f} |"
        for isa, case in sorted(errors, key=lambda key: -abs(errors[key]))[:10]
    ]
    where = next(iter(rows.values()))["environment"]
    others = [row["environment"] for row in rows.values() if row["environment"] != where]
    assert not others, f"measured in several environments: {where}, {others[0]}"
    failed = [
        f"- {isa} {' '.join(map(str, asdict(c).values()))}: {r.get('error')}"
        for (isa, c), r in every.items()
        if lacks(r) and c in wanted
    ]
    updates, predictions = (
        sum(row[key] for row in rows.values()) for key in ("update_seconds", "predict_seconds")
    )
    isas = ", ".join(f"`{isa}`" for isa in sets)
    assumed = sum(row["assumed"] for row in rows.values())
    text = f"""# The planner's peak memory against the CPU's allocator

    OMP_NUM_THREADS=1 python benchmarks/planner_memory.py --results FILE
    ONEDNN_MAX_CPU_ISA=SSE41 OMP_NUM_THREADS=1 python benchmarks/planner_memory.py --results FILE \\
        --share 1/2
    python benchmarks/planner_memory.py --results FILE --report

{where["date"]}. {where["CPU"]} ({where["flags"]}); instruction sets: {isas};
one thread where the row says no more.
Python {where["python"]}, torch {where["torch"]}, timm {where["timm"]}, accelerate
{where["accelerate"]}, oneDNN {where["oneDNN"]}. Seed 0, one run a case.

{len(rows)} cases: {len(NETWORKS)} networks, under all sets but the first a part of the cases.
Small images ({SMALL} samples a micro-batch; networks of 224 px alone: {LARGE}) without recompute in
both layouts, with every block recomputed, and in segments of {RUN} units channels-last; large ones
({LARGE} samples) without recompute or, every second network, in segments; bf16 by autocast for some
on small ones ({LARGE} samples), without recompute or with every block. Networks that the first
benchmark did not have take half of the ways on small images, in turn. SGD with
momentum and AdamW in turn. Two micro-steps an update, ghost batches of one micro-batch, gradients
clipped. The real peak is that of torch's CPU allocator
over one `LargeBatch` update in a process of its own, weights and buffers included; what MKL takes
past that allocator is not in it. Errors are predicted / real - 1, in percent; median, percentile
and largest of their absolute values; bold: misses the goal. Kernels whose workspace could not be
measured: {assumed}. The updates took {updates:.0f} s together, the predictions {predictions:.0f} s.

{head}
{goal}
{chr(10).join(lines)}

## By network

{head}
{chr(10).join(by_network)}

## The ten worst cases

| instruction set | network | recompute | optimizer | precision | micro-batch | layout | real MiB \
| predicted MiB | error % |
{10 * "|---"}|
{chr(10).join(worst)}
"""
    return text + ("\n## Failed\n\n" + "\n".join(failed) + "\n" if failed else "")


def share_of(text: str) -> tuple[int, int]:
    part, of = map(int, text.split("/"))
    assert 1 <= part <= of
    return part, of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="JSON lines")
    parser.add_argument("--only", default="", help="cases whose words hold this text")
    parser.add_argument("--share", type=share_of, default=(1, 1), help="such as 1/2: every second")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help=f"write {REPORT.name}")
    arguments = parser.parse_args()
    if not arguments.report:
        only, share, threads = arguments.only, arguments.share, arguments.threads
        run(arguments.results, only=only, share=share, threads=threads)
        return 0
    text = report(arguments.results)
    kept = REPORT.read_text() if REPORT.exists() else ""
    mark = "## Notes"  # written by hand, and kept
    REPORT.write_text(text + (f"\n{kept[kept.index(mark) :]}" if mark in kept else ""))
    print(text[text.index("| cases") :])
    return 0


if __name__ == "__main__":
    sys.exit(main())
