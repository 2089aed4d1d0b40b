"""Peak memory of one update at global batches of 2,048 and 16,384 in micro-batches of 64.

python benchmarks/peak_memory.py --data parquet:PATH [--json FILE]

Each figure comes from a process of its own: bytes live in torch's CPU allocator (profiler memory
events, so the data set, which is loaded before, is not in them), and the peak resident set of the
process (a second process without the profiler, data set included).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from lbaccel import BatchPlan, KeyedImages, LargeBatch, UpdateLoader, open_source

BATCHES = (2048, 16384)
MICRO = 64


def child(data: str, batch: int, profiled: bool) -> dict[str, float]:
    torch.set_num_threads(1)
    source = open_source(data)
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = KeyedImages(source.train, (0.5,) * 3, (0.25,) * 3, pad=4, flip=0.5)
    plan = BatchPlan(global_batch_size=batch, micro_batch_size=MICRO, norm_batch_size=32)
    large_batch = LargeBatch(Accelerator(cpu=True), plan)
    model, optimizer, loader = large_batch.prepare(model, optimizer, UpdateLoader(images, plan))

    def loss_fn(model, batch):
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    update = next(iter(loader))
    if not profiled:
        large_batch.update(update, loss_fn)
        return {"peak_process_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        large_batch.update(update, loss_fn)
    live = peak = 0
    for event in sorted(trace.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return {"peak_allocator_bytes": peak}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print("RESULT", json.dumps(child(args.data, int(args.child[0]), args.child[1] == "1")))
        return 0
    found: dict[int, dict[str, float]] = {batch: {} for batch in BATCHES}
    for batch in BATCHES:
        for profiled in ("1", "0"):
            command = [sys.executable, __file__, "--data", args.data, "--child", str(batch)]
            done = subprocess.run([*command, profiled], capture_output=True, text=True, check=True)
            line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT "))
            found[batch] |= json.loads(line.removeprefix("RESULT "))
        print(batch, found[batch], flush=True)
    small, large = (found[batch] for batch in BATCHES)
    ratios = {key: large[key] / small[key] for key in small}
    print("ratios", ratios)
    if args.json:
        report = {"torch": torch.__version__, "peaks": found, "ratios": ratios}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if ratios["peak_allocator_bytes"] < 1.05 and ratios["peak_process_kib"] < 1.1 else 1


if __name__ == "__main__":
    sys.exit(main())
