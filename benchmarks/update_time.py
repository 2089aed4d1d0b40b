"""Time and peak bytes of one update: lbaccel, a hand-written loop, Accelerate's `accumulate`.

python benchmarks/update_time.py [--repeats 5] [--micro-batches 64] [--compile] [--only TEXT]

All arms run the same network on the same samples in the same order, interleaved in one process
with one thread; the figure is the minimum of the process times. Peak bytes are those of torch's
CPU allocator (profiler memory events) over one update of 4 micro-batches, weights included.
`--compile` puts every network through torch.compile (inductor), the plain loop's as well, and
`--json FILE` keeps all times.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import accelerate
import timm
import torch
from accelerate import Accelerator
from random_images import Images, loss_fn
from torch.profiler import ProfilerActivity, profile

from lbaccel import BatchPlan, LargeBatch, UpdateLoader
from lbaccel.data.order import epoch_order

MICRO = 32
VIT = {"img_size": 32, "patch_size": 8}
CASES = {  # network, its arguments, pixels
    "resnet18": ("resnet18", {}, 32),
    "mobilenetv2_100": ("mobilenetv2_100", {}, 96),
    "vit_tiny": ("vit_tiny_patch16_224", VIT, 32),
    "vit_tiny, drop-path 0.2": ("vit_tiny_patch16_224", {**VIT, "drop_path_rate": 0.2}, 32),
}


def make_model(case, compiled):
    name, options, _ = CASES[case]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **options)
    if compiled:
        model.compile()
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def lbaccel_arm(name, data, count, compiled):
    accelerator = Accelerator(cpu=True)
    model, optimizer = make_model(name, compiled)
    norm = None if "vit" in name else MICRO  # ghost batches of a micro-batch, as the plain loop's
    plan = BatchPlan(global_batch_size=count, micro_batch_size=MICRO, norm_batch_size=norm)
    large_batch = LargeBatch(accelerator, plan)
    model, optimizer, loader = large_batch.prepare(model, optimizer, UpdateLoader(data, plan))

    def run():
        loader.load_state_dict({"next_update": 0})
        (update,) = loader
        return large_batch.update(update, loss_fn).loss

    return run


def plain_arm(name, data, count, compiled):
    model, optimizer = make_model(name, compiled)
    order = epoch_order(0, 0, count)

    def run():
        total = torch.zeros(())
        for start in range(0, count, MICRO):
            batch = data.fetch(order[start : start + MICRO], None)
            loss = loss_fn(model, batch)
            (loss * (MICRO / count)).backward()
            total += loss.detach() * (MICRO / count)
        optimizer.step()
        optimizer.zero_grad()
        return total.item()

    return run


def accelerate_arm(name, data, count, compiled):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=count // MICRO)
    model, optimizer = make_model(name, compiled)
    model, optimizer = accelerator.prepare(model, optimizer)
    order = epoch_order(0, 0, count)

    def run():
        total = torch.zeros(())
        for start in range(0, count, MICRO):
            with accelerator.accumulate(model):
                loss = loss_fn(model, data.fetch(order[start : start + MICRO], None))
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                total += loss.detach() * (MICRO / count)
        return total.item()

    return run


ARMS = {"lbaccel": lbaccel_arm, "plain loop": plain_arm, "accumulate": accelerate_arm}


def peak_bytes(run):
    """Largest sum of the allocator's events above its start."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    live = peak = 0
    for event in sorted(trace.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--micro-batches", type=int, default=64)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {
        "versions": {"torch": torch.__version__, "accelerate": accelerate.__version__}
        | {"timm": timm.__version__, "python": platform.python_version()},
        "micro_batch_size": MICRO,
        "micro_batches": args.micro_batches,
        "repeats": args.repeats,
        "compiled": args.compile,
    }
    for name, (_, options, size) in CASES.items():
        if args.only not in name:
            continue
        count = MICRO * args.micro_batches
        data = Images(count, size)
        runs = {arm: make(name, data, count, args.compile) for arm, make in ARMS.items()}
        first = {arm: run() for arm, run in runs.items()}
        # the plain loop has timm's own masks
        assert options.get("drop_path_rate") or max(first.values()) - min(first.values()) < 1e-4
        seconds = {arm: [] for arm in ARMS}
        for _ in range(args.repeats):
            for arm, run in runs.items():
                start = time.process_time()
                run()
                seconds[arm].append(time.process_time() - start)
        small = Images(4 * MICRO, size)
        peaks = {
            arm: peak_bytes(make(name, small, 4 * MICRO, args.compile))
            for arm, make in ARMS.items()
        }
        best = {arm: min(values) for arm, values in seconds.items()}
        results[f"{name} at {size} px"] = {"seconds": seconds, "peak_bytes": peaks}
        print(f"\n{name} at {size} px, {args.micro_batches} micro-batches of {MICRO}")
        for arm in ARMS:
            ratio, extra = best[arm] / best["plain loop"], peaks[arm] - peaks["plain loop"]
            print(
                f"  {arm:<11} {best[arm]:8.3f} s  {ratio:.4f} of the plain loop  "
                f"peak {peaks[arm] / 2**20:9.3f} MiB ({extra:+,d} bytes)"
            )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
