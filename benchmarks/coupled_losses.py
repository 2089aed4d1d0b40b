"""Time of an update whose loss couples samples, of that of a loss of single samples.

python benchmarks/coupled_losses.py [--repeats 5] [--micro-batches 16] [--only TEXT] [--json FILE]

Three arms run the same network on the same samples: an update with `embed=` (two passes, and the
loss on the rows of the whole batch), a plain update of the same micro-batches, and the forward
passes alone without a graph. They are interleaved in one process with one thread; the figure is the
smallest process time of each. The first should take what the other two take together, and the loss.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from random_images import Images
from torch.nn import functional as F

from lbaccel import BatchPlan, LargeBatch, UpdateLoader, apply_activation_checkpointing

ROWS = 128
CASES = {  # network, its arguments, pixels, micro-batch, recompute
    "resnet10t, 32 px": ("resnet10t", {}, 32, 16, False),
    "vit_tiny, 32 px": ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 4}, 32, 16, False),
    "vit_tiny, 32 px, recompute": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 4},
        32,
        16,
        True,
    ),
    "mobilenetv2_100, 64 px": ("mobilenetv2_100", {}, 64, 16, False),
}


def network(name, options, recompute):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=ROWS, **options)
    if recompute:
        apply_activation_checkpointing(model)
    return model


def embed(model, micro_batch):
    images, labels = micro_batch
    return F.normalize(model(images), dim=1), labels


def contrast(model, rows):
    """Supervised contrastive loss on all rows (Khosla et al. 2020, equation 2)."""
    z, labels = rows
    others = ~torch.eye(len(z), dtype=torch.bool)
    log_share = F.log_softmax((z @ z.T / 0.1).masked_fill(~others, -1e9), 1)
    same = (labels[:, None] == labels) & others
    return -((same * log_share).sum(1) / same.sum(1).clamp(min=1)).mean()


def single(model, micro_batch):
    z, labels = embed(model, micro_batch)
    return F.cross_entropy(10 * z, labels)


def prepared(case, data):
    name, options, _, micro, recompute = CASES[case]
    model = network(name, options, recompute)
    plan = BatchPlan(
        global_batch_size=len(data),
        micro_batch_size=micro,
        norm_batch_size=None if "vit" in name else micro,
    )
    large_batch = LargeBatch(Accelerator(cpu=True), plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model, optimizer, loader = large_batch.prepare(model, optimizer, UpdateLoader(data, plan))

    def update(loss_fn, **options):
        loader.load_state_dict({"next_update": 0})
        (one,) = loader
        large_batch.update(one, loss_fn, **options)

    @torch.no_grad()
    def forward():
        loader.load_state_dict({"next_update": 0})
        (one,) = loader
        for _, micro_batch in one:
            embed(model, micro_batch)

    return update, forward


def measure(case, repeats, count):
    _, _, size, micro, _ = CASES[case]
    data = Images(count * micro, size)
    update, forward = prepared(case, data)
    arms = {
        "coupled": lambda: update(contrast, embed=embed),
        "plain": lambda: update(single),
        "forward": forward,
    }
    best = dict.fromkeys(arms, float("inf"))
    for number in range(repeats + 1):  # the first round warms up
        for arm, run in arms.items():
            start = time.process_time()
            run()
            taken = time.process_time() - start
            best[arm] = min(best[arm], taken) if number else best[arm]
    return best | {
        "ratio": best["coupled"] / best["plain"],
        "expected": 1 + best["forward"] / best["plain"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--micro-batches", type=int, default=16)
    parser.add_argument("--only", default="")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for case in CASES:
        if args.only not in case:
            continue
        found = results[case] = measure(case, args.repeats, args.micro_batches)
        print(
            f"{case:<28} coupled {found['coupled']:.3f} s, plain {found['plain']:.3f} s: "
            f"{found['ratio']:.3f} (one more forward: {found['expected']:.3f})",
            flush=True,
        )
    if args.json:
        versions = {"torch": torch.__version__, "timm": timm.__version__}
        content = {"python": platform.python_version(), **versions, "results": results}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
