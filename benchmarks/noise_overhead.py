"""What measuring the noise scale costs: process time of an update with and without it.

python benchmarks/noise_overhead.py [--repeats 40] [--micro-batches 4] [--json FILE]

Arms on the same network and the same samples, interleaved in one process with one thread, the
order reversed in every other round. The figure is the ratio of the minima of the process times,
each with the same optimizer, beside the median of the ratios within a round. The share is the
time spent inside the measuring functions over the update's, with the clock's own reads in it: where
other processes crowd the machine it is the steadier figure, as both parts slow down alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from contextlib import contextmanager
from pathlib import Path

import accelerate
import timm
import torch
from accelerate import Accelerator
from random_images import Images, loss_fn
from timm.optim import create_optimizer_v2

from lbaccel import BatchPlan, LargeBatch, NoiseScale, UpdateLoader
from lbaccel.models import adapt_stem
from lbaccel.noise.unit_norms import UnitNorms

# network, pixels a side, channels, samples a micro-batch: the recipe's digits, and a larger image
CASES = (("resnet10t", 8, 1, 64), ("mobilenetv2_100", 64, 3, 32))
# what is measured, and the optimizer of the update
ARMS = (("none", "sgd"), ("plain", "sgd"), ("none", "adamw"), ("preconditioned", "adamw"))


@contextmanager
def timed(spent):
    """Inside, the process time of the measuring functions is added to `spent[0]`."""
    names = ("add", "read", "_take_share", "_listener")
    plain = {name: getattr(UnitNorms, name) for name in names}

    def clocked(function):
        def run(*args):
            start = time.process_time()
            out = function(*args)
            spent[0] += time.process_time() - start
            return out

        return run

    for name in names[:-1]:
        setattr(UnitNorms, name, clocked(plain[name]))
    UnitNorms._listener = lambda self, number: clocked(plain["_listener"](self, number))
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(UnitNorms, name, function)


def arm(kind, optimizer_name, name, data, *, channels, size, micro):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, in_chans=channels)
    if size < 64:
        adapt_stem(model)
    optimizer = create_optimizer_v2(model, opt=optimizer_name, lr=1e-3)
    plan = BatchPlan(global_batch_size=len(data), micro_batch_size=micro, norm_batch_size=32)
    noise = None
    if kind != "none":
        noise = NoiseScale(
            half_life_samples=10 * len(data),
            training_set_size=len(data),
            preconditioned=kind == "preconditioned",
        )
    large_batch = LargeBatch(Accelerator(cpu=True), plan, noise_scale=noise)
    model, optimizer, loader = large_batch.prepare(model, optimizer, UpdateLoader(data, plan))

    def run():
        loader.load_state_dict({"next_update": 0})
        (update,) = loader
        start = time.process_time()
        large_batch.update(update, loss_fn)
        if noise is not None:
            noise.metrics()
        return time.process_time() - start

    return run


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {
        "versions": {"torch": torch.__version__, "accelerate": accelerate.__version__}
        | {"timm": timm.__version__, "python": platform.python_version()},
        "repeats": args.repeats,
        "micro_batches": args.micro_batches,
    }
    for name, size, channels, micro in CASES:
        data = Images(micro * args.micro_batches, size, channels)
        shape = {"channels": channels, "size": size, "micro": micro}
        runs = {one: arm(*one, name, data, **shape) for one in ARMS}
        for _ in range(2):
            for run in runs.values():
                run()
        seconds = {one: [] for one in ARMS}
        for repeat in range(args.repeats):
            for one in ARMS if repeat % 2 else ARMS[::-1]:
                seconds[one].append(runs[one]())
        shares = {one: [] for one in ARMS if one[0] != "none"}
        spent = [0.0]
        with timed(spent):
            for _ in range(args.repeats):
                for one in shares:
                    spent[0] = 0.0
                    whole = runs[one]()
                    shares[one].append(spent[0] / whole)
        results[f"{name} at {size} px"] = {" ".join(one): s for one, s in seconds.items()}
        print(f"{name} at {size} px, {args.micro_batches} micro-batches of {micro}")
        for kind, optimizer in ARMS:
            own, without = seconds[kind, optimizer], seconds["none", optimizer]
            ratios = [a / b for a, b in zip(own, without, strict=True)]
            share = shares.get((kind, optimizer))
            print(
                f"  {kind:<14} {optimizer:<5} {min(own):7.4f} s  "
                f"{min(own) / min(without):.4f} of without  "
                f"(median ratio {statistics.median(ratios):.4f})"
                + (f"  share {statistics.median(share):.4f}" if share else "")
            )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
