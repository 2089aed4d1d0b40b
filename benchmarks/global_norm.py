"""Seconds and bytes of BatchNorm over the whole batch, beside the full batch in plain torch.

python benchmarks/global_norm.py [--batch 256] [--micro-batch 32] [--repeats 3] [--only TEXT]
                                 [--json FILE]

Four arms of one network on the same samples: plain torch with the whole batch in one forward,
lbaccel's ordinary update over ghost batches of the micro-batch, and the passes over the whole batch
with all levels kept, and with two thirds of those bytes. They are interleaved in one process with
one thread; a figure is the smallest process time. Bytes are those that torch's allocator hands out
during an update beyond those before it, as its profiler counts them.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from random_images import Images, loss_fn
from torch.profiler import ProfilerActivity, profile

from lbaccel import BatchPlan, LargeBatch, UpdateLoader
from lbaccel.models import create_backbone

NETWORKS = ("cifar_resnet8", "cifar_resnet20", "mobilenetv2_050")


def network(name):
    torch.manual_seed(0)
    model = create_backbone(name, num_classes=10, img_size=32).train()
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def plain_arm(name, data, batch):
    model, optimizer = network(name)
    images, labels = data.__lbaccel_fetch__(range(batch), [0] * batch)

    def run():
        optimizer.zero_grad()
        loss_fn(model, (images, labels)).backward()
        optimizer.step()

    return run, lambda: None


def lbaccel_arm(name, data, batch, micro, norm, **options):
    model, optimizer = network(name)
    plan = BatchPlan(global_batch_size=batch, micro_batch_size=micro, norm_batch_size=norm)
    large_batch = LargeBatch(Accelerator(cpu=True), plan, **options)
    loader = UpdateLoader(data, plan, last_update="drop")
    model, optimizer, loader = large_batch.prepare(model, optimizer, loader)
    updates = endless(loader)
    return lambda: large_batch.update(next(updates), loss_fn), lambda: large_batch.passes


def endless(loader):
    while True:
        yield from loader


def peak_mib(run):
    """The most that CPU tensors take during `run` beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
    ]
    live = most = 0
    for _, num_bytes in sorted(events):
        live += num_bytes
        most = max(most, live)
    return most / 2**20


def measured(name, batch, micro, repeats):
    data = Images(batch, 32)
    arms = {
        "full batch in torch": plain_arm(name, data, batch),
        f"ghost batches of {micro}": lbaccel_arm(name, data, batch, micro, micro),
        "global": lbaccel_arm(name, data, batch, micro, "global", host_memory="64GiB"),
    }
    arms["global"][0]()
    less = arms["global"][1]().host_bytes * 2 // 3
    arms["global, 2/3 of the bytes"] = lbaccel_arm(
        name, data, batch, micro, "global", host_memory=f"{less / 1024}KiB"
    )
    best = dict.fromkeys(arms, float("inf"))
    for _ in range(repeats + 1):  # the first time warms up
        for arm, (run, _) in arms.items():
            start = time.process_time()
            run()
            best[arm] = min(best[arm], time.process_time() - start)
    rows = []
    for arm, (run, passes) in arms.items():
        found = passes()
        rows.append(
            {
                "network": name,
                "arm": arm,
                "seconds": best[arm],
                "over_ghosts": best[arm] / best[f"ghost batches of {micro}"],
                "formula": None if found is None else found.times_as_long,
                "peak_mib": peak_mib(run),
                "host_mib": None if found is None else found.peak_bytes / 2**20,
                "host_bound_mib": None if found is None else found.host_bytes / 2**20,
                "levels": None if found is None else found.levels,
                "again": None if found is None else found.again,
            }
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in NETWORKS:
        if a.only in name:
            rows += measured(name, a.batch, a.micro_batch, a.repeats)
    print(f"batch {a.batch}, micro-batch {a.micro_batch}, torch {torch.__version__}, ", end="")
    print(
        f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    )
    print("| network | arm | seconds | of ghosts | formula | peak MiB | on host MiB | levels |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        cells = [row["network"], row["arm"], f"{row['seconds']:.2f}", f"{row['over_ghosts']:.2f}"]
        cells += ["" if row["formula"] is None else f"{row['formula']:.2f}"]
        cells += [f"{row['peak_mib']:.0f}"]
        cells += ["" if row["host_mib"] is None else f"{row['host_mib']:.0f}"]
        cells += ["" if row["levels"] is None else str(row["levels"])]
        print("| " + " | ".join(cells) + " |")
    if a.json:
        a.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
