"""What keyed masks cost: the time of an update with them over one with torch's own masks.

python benchmarks/mask_time.py [--repeats 7] [--json FILE]

Both arms run the same network on the same micro-batches, interleaved in one process with one
thread; the figure is the ratio of the smallest process times. The last case is the worst one:
dropout of every element in every layer of a narrow network.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import timm
import torch
from torch.nn import functional as F

from lbaccel.batch.plan import MicroBatch
from lbaccel.randomness.masks import KeyedRandomness
from lbaccel.update.accumulation import accumulate
from lbaccel.update.normalization import convert_batch_norm

MICRO, STEPS, SIZE = 8, 2, 224
CASES = {
    "vit_tiny, drop-path 0.3": ("vit_tiny_patch16_224", {"drop_path_rate": 0.3}),
    "resnet18, drop-rate 0.5": ("resnet18", {"drop_rate": 0.5}),
    "efficientnet_b0, drop-rate and drop-path 0.2": (
        "efficientnet_b0",
        {"drop_rate": 0.2, "drop_path_rate": 0.2},
    ),
    "vit_tiny, dropout 0.1 of every element": (
        "vit_tiny_patch16_224",
        {"proj_drop_rate": 0.1, "pos_drop_rate": 0.1},
    ),
}


def loss_fn(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def arm(name, options, *, keyed):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **options)
    has_norm = "vit" not in name
    norm = convert_batch_norm(model, MICRO if has_norm else None)
    randomness = KeyedRandomness(0, torch.device("cpu"))
    data = (torch.randn(MICRO, 3, SIZE, SIZE), torch.randint(10, (MICRO,)))
    batches = [(MicroBatch(MICRO * i, (MICRO,)), data) for i in range(STEPS)]
    scopes = [norm, randomness] if keyed else [norm]
    done = [0]

    def run():
        for parameter in model.parameters():
            parameter.grad = None
        norm.begin()
        done[0] += 1
        if not keyed:
            return accumulate(model, batches, loss_fn, num_samples=MICRO * STEPS, scopes=scopes)
        with randomness.update(done[0]):
            return accumulate(model, batches, loss_fn, num_samples=MICRO * STEPS, scopes=scopes)

    return run


def measure(name, options, repeats):
    arms = {"torch": arm(name, options, keyed=False), "keyed": arm(name, options, keyed=True)}
    best = dict.fromkeys(arms, float("inf"))
    for _ in range(repeats + 1):  # the first round warms up and may be the slowest
        for key, run in arms.items():
            start = time.process_time()
            run()
            best[key] = min(best[key], time.process_time() - start)
    return {**best, "ratio": best["keyed"] / best["torch"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for case, (name, options) in CASES.items():
        found = results[case] = measure(name, options, arguments.repeats)
        print(
            f"{case:<46} torch {found['torch']:.3f} s  keyed {found['keyed']:.3f} s  "
            f"ratio {found['ratio']:.3f}",
            flush=True,
        )
    if arguments.json is not None:
        versions = {"torch": torch.__version__, "timm": timm.__version__}
        content = {"python": platform.python_version(), **versions, "results": results}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
