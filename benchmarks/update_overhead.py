"""Microseconds of a micro-batch that lbaccel adds to a hand-written loop, with and without masks.

python benchmarks/update_overhead.py [--repeats 9] [--micro-batches 32] [--only TEXT]
    [--launches | --compile]

Both arms run the same network on the same samples: lbaccel's update, with all its parts, and a loop
of forward, backward and `optimizer.step()` with torch's and timm's own masks. They are interleaved
in one process with one thread; the figure is the smallest process time of each. The networks are
small on purpose: what an update adds to a micro-batch does not grow with the network, but for the
number of its masks. The cases of 20 layers have next to no work: they show the microseconds alone.

`--launches` counts kernels in place of time: the operators that are no view, no allocation and no
token of a mask (which the host draws for itself), as the dispatcher sees them; a multi-tensor
operator is one. Counts do not depend on the processor. `--compile` puts both networks
through torch.compile (inductor). `--json FILE` keeps all figures.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from timm.layers.drop import DropPath
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))

from launches import Launches
from random_images import Images, loss_fn

from lbaccel import BatchPlan, LargeBatch, NoiseScale, UpdateLoader
from lbaccel.models import adapt_stem

VIT = {"img_size": 32, "patch_size": 8}
CASES = {  # network, its arguments, pixels, micro-batch, noise scale
    "vit_tiny": ("vit_tiny_patch16_224", VIT, 32, 4, False),
    "vit_tiny, drop-path 0.2": (
        "vit_tiny_patch16_224",
        {**VIT, "drop_path_rate": 0.2},
        32,
        4,
        False,
    ),
    "vit_tiny, dropout 0.1 of every element": (
        "vit_tiny_patch16_224",
        {**VIT, "proj_drop_rate": 0.1, "pos_drop_rate": 0.1},
        32,
        4,
        False,
    ),
    "vit_tiny, noise scale": ("vit_tiny_patch16_224", VIT, 32, 4, True),
    "resnet10t": ("resnet10t", {}, 8, 8, False),
    "resnet10t, drop-path 0.2": ("resnet10t", {"drop_path_rate": 0.2}, 8, 8, False),
    "20 layers": ("layers", {}, 2, 4, False),
    "20 layers, drop-path 0.2": ("layers", {"mask": DropPath}, 2, 4, False),
    "20 layers, dropout 0.2": ("layers", {"mask": nn.Dropout}, 2, 4, False),
    "20 layers, noise scale": ("layers", {}, 2, 4, True),
}


def layers(mask=None):
    middle = (m for _ in range(20) for m in (nn.Linear(12, 12), *([mask(0.2)] if mask else [])))
    return nn.Sequential(nn.Flatten(), *middle)


def network(name, options, compiled):
    model = built(name, options)
    if compiled:
        model.compile()
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def built(name, options):
    torch.manual_seed(0)
    if name == "layers":
        return layers(**options)
    model = timm.create_model(name, num_classes=10, **options)
    if "resnet" in name:
        adapt_stem(model)
    return model


def lbaccel_arm(name, options, data, micro, noise, compiled):
    model, optimizer = network(name, options, compiled)
    count = len(data)
    plan = BatchPlan(
        global_batch_size=count,
        micro_batch_size=micro,
        norm_batch_size=micro if "resnet" in name else None,
    )
    scale = NoiseScale(half_life_samples=10 * count, training_set_size=count) if noise else None
    large_batch = LargeBatch(Accelerator(cpu=True), plan, noise_scale=scale)
    model, optimizer, loader = large_batch.prepare(model, optimizer, UpdateLoader(data, plan))

    def run():
        loader.load_state_dict({"next_update": 0})
        (update,) = loader
        large_batch.update(update, loss_fn)

    return run


def plain_arm(name, options, data, micro, compiled):
    model, optimizer = network(name, options, compiled)
    count = len(data)

    def run():
        total = torch.zeros(())
        for start in range(0, count, micro):
            loss = loss_fn(model, data.fetch(range(start, start + micro), None))
            (loss * (micro / count)).backward()
            total += loss.detach() * (micro / count)
        optimizer.step()
        optimizer.zero_grad()
        return total.item()

    return run


def arms_of(case, count, compiled=False):
    name, options, size, micro, noise = CASES[case]
    data = Images(count * micro, size)
    return {
        "lbaccel": lbaccel_arm(name, options, data, micro, noise, compiled),
        "plain": plain_arm(name, options, data, micro, compiled),
    }


def launches(case):
    """Kernels of a micro-batch, and of an update without its micro-batches, by arm."""
    counts = {}
    for count in (6, 10):
        for arm, run in arms_of(case, count).items():
            run()  # learns the masks' layouts
            with Launches() as seen:
                run()
            counts[arm, count] = seen.count
    found = {}
    for arm in ("lbaccel", "plain"):
        each = (counts[arm, 10] - counts[arm, 6]) / 4
        found[arm] = {"a_micro_batch": each, "an_update": counts[arm, 6] - 6 * each}
    return found


def measure(case, repeats, count, compiled):
    arms = arms_of(case, count, compiled)
    best = dict.fromkeys(arms, float("inf"))
    for _ in range(repeats + 1):  # the first round learns the masks' layouts
        for arm, run in arms.items():
            start = time.process_time()
            run()
            best[arm] = min(best[arm], time.process_time() - start)
    micro_step = best["plain"] / count
    return {
        "plain_micro_step_us": 1e6 * micro_step,
        "added_us": 1e6 * (best["lbaccel"] / count - micro_step),
        "ratio": best["lbaccel"] / best["plain"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--micro-batches", type=int, default=32)
    parser.add_argument("--only", default="")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--launches", action="store_true")
    how.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for case in CASES:
        if args.only not in case:
            continue
        if args.launches:
            found = results[case] = launches(case)
            ours, plain = found["lbaccel"], found["plain"]
            print(
                f"{case:<40} a micro-batch {plain['a_micro_batch']:5.0f} kernels, lbaccel "
                f"{ours['a_micro_batch']:5.0f}; an update {plain['an_update']:4.0f} more, lbaccel "
                f"{ours['an_update']:4.0f}",
                flush=True,
            )
            continue
        found = results[case] = measure(case, args.repeats, args.micro_batches, args.compile)
        print(
            f"{case:<40} plain {found['plain_micro_step_us']:7.0f} us a micro-step, "
            f"lbaccel adds {found['added_us']:5.0f} us ({found['ratio']:.3f})",
            flush=True,
        )
    if args.json:
        versions = {"torch": torch.__version__, "timm": timm.__version__}
        versions["compiled"] = args.compile
        content = {"python": platform.python_version(), **versions, "results": results}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
