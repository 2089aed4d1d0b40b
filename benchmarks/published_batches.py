"""Which batches ran on a real card and which did not, beside what the planner says: no GPU needed.

python benchmarks/published_batches.py [--only resnet50] [--output FILE.json]

The facts are timm's `results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv` (Wightman, July
2022; torch 1.12, CUDA 11.3, timm 0.6.6): training with SGD under AMP, channels-last, on an
RTX 3090. timm tries 512 images first; after a failure it tries 384, 256, 192, 128, 96, 64, ...
(two steps an octave) and writes the first that ran. So a row below 512 tells of two batches: one
that ran and one that did not. Attention is not fused here, as it was not then.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from timm.layers import set_fused_attn

from lbaccel.batch.plan import BatchPlan
from lbaccel.planning.candidates import Candidate
from lbaccel.planning.cost.devices import GIB, find_device
from lbaccel.planning.cost.update import classification_loss
from lbaccel.planning.estimate import Estimator
from lbaccel.planning.network import Trained, network_of

CARD = "RTX 3090"
MOST = 512  # the first that timm tries
ROWS = {  # network: pixels a side, the batch that ran
    "resnet18": (224, 512),
    "mobilenetv2_100": (224, 512),
    "efficientnet_b0": (224, 512),
    "resnet50": (224, 512),
    "nfnet_l0": (224, 512),
    "seresnet50": (224, 384),
    "resnext50_32x4d": (224, 384),
    "res2net50_26w_4s": (224, 384),
    "wide_resnet50_2": (224, 384),
    "regnety_032": (224, 384),
    "vgg16": (224, 384),
    "vit_small_patch16_224": (224, 384),
    "resnet101": (224, 256),
    "densenet121": (224, 256),
    "convnext_tiny": (224, 256),
    "swin_tiny_patch4_window7_224": (224, 256),
    "mixer_b16_224": (224, 256),
    "resnest50d": (224, 256),
    "dpn92": (224, 256),
    "vit_base_patch16_224": (224, 192),
    "beit_base_patch16_224": (224, 192),
    "inception_v4": (299, 192),
    "resnet200d": (256, 128),
    "convnext_base": (224, 128),
    "efficientnet_b3": (288, 128),
    "tf_efficientnetv2_s": (300, 128),
    "xception": (299, 128),
    "legacy_senet154": (224, 96),
    "vit_large_patch16_224": (224, 64),
    "efficientnet_b7": (600, 8),
}


def next_larger(batch: int) -> int | None:
    """The batch that failed before this one ran; None where it was the first."""
    tried = [MOST]
    while tried[-1] > 1:
        octave = 2 ** ((tried[-1] - 1).bit_length() - 1)
        step = max(octave // 2, 1)
        tried.append(octave + (tried[-1] - octave - 1) // step * step)
    at = tried.index(batch)
    return tried[at - 1] if at else None


def needed(name: str, size: int, batch: int) -> float:
    """GiB that the planner says an update of one micro-batch of this size takes."""
    card = find_device(CARD)
    trained = Trained(
        model=name, img_size=size, num_classes=1000, optimizer="momentum", make_batch=None,
        loss_fn=classification_loss, clips=False, precision="fp16",
    )  # fmt: skip
    plan = BatchPlan(
        global_batch_size=batch, micro_batch_size=batch, world_size=1, norm_batch_size=batch
    )
    estimator = Estimator(network_of(trained, card), plan, card, "fp16")
    return estimator.estimate(Candidate(batch, "channels_last")).peak / GIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NETWORK")
    parser.add_argument("--output", type=Path, metavar="FILE")
    a = parser.parse_args()
    set_fused_attn(False)
    memory, rows, right, judged = find_device(CARD).memory or 0, [], 0, 0
    print(f"{CARD}: {memory / GIB:.2f} GiB can be allocated")
    for name in a.only or ROWS:
        size, ran = ROWS[name]
        start = time.process_time()
        row: dict = {"network": name, "pixels": size}
        for word, batch in (("ran", ran), ("failed", next_larger(ran))):
            if batch is not None:
                gib = needed(name, size, batch)
                agrees = (gib <= memory / GIB) == (word == "ran")
                row[word] = {"batch": batch, "gib": round(gib, 2), "agrees": agrees}
                right, judged = right + agrees, judged + 1
        row["seconds"] = round(time.process_time() - start, 1)
        rows.append(row)
        print(json.dumps(row), flush=True)
        if a.output is not None:
            a.output.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{right} of {judged} agree")
    sys.exit(0 if right == judged else 1)


if __name__ == "__main__":
    main()
