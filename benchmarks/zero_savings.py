"""What ZeRO, offload, small micro-batches and recompute save in vision, by the planner's figures.

python benchmarks/zero_savings.py [MODEL ...]

Prints the two tables of docs/configs.md: for one device, then for four. Nothing is trained.
"""

from __future__ import annotations

import argparse
from functools import partial

import lbaccel

MODELS = (
    "mobilenetv2_100",
    "resnet50",
    "convnext_tiny",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
)
STATES = ("weights", "gradients", "optimizer")


def planned(model, *, world_size, micro=64, recompute="none", **sharding):
    return lbaccel.plan(
        model,
        global_batch_size=4096,
        micro_batch_size=micro,
        world_size=world_size,
        device="RTX 4090",
        memory="24GiB",
        activation_checkpointing=recompute,
        compare=False,
        **sharding,
    )


def of_one_device(model):
    one = partial(planned, model, world_size=1)
    whole, full, small = one(), one(recompute="full"), one(micro=32)
    states = sum(whole.breakdown[key] for key in STATES)
    peaks = [found.predicted_peak_gib for found in (full, small)]
    share = 100 * states / whole.predicted_peak_gib
    cells = [f"{whole.predicted_peak_gib:.2f}", f"{states:.2f}", f"{share:.1f} %"]
    return [model, *cells, *(f"{peak:.2f}" for peak in peaks)]


def of_four_devices(model):
    four = partial(planned, model, world_size=4)
    base = four()

    def saved(found, *, timed=True):
        gib = base.predicted_peak_gib - found.predicted_peak_gib
        slower = found.predicted_seconds_per_update / base.predicted_seconds_per_update - 1
        return f"{gib:.2f}" + (f", {100 * slower:+.1f} %" if timed else "")

    stages = [saved(four(zero_stage=stage)) for stage in (1, 2, 3)]
    offloaded = saved(four(zero_stage=2, offload="optimizer"))
    small, full = saved(four(micro=32), timed=False), saved(four(recompute="full"))
    return [model, *stages, offloaded, small, full]


def table(heads, rows):
    lines = [heads, ["---"] * len(heads), *rows]
    print("\n".join("| " + " | ".join(line) + " |" for line in lines), "\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    models = parser.parse_args().models
    table(
        ["timm model", "peak", "states", "ceiling of every stage and offload",
         "peak, every block recomputed", "... at micro-batch 32"],
        [of_one_device(model) for model in models],
    )  # fmt: skip
    table(
        ["timm model", "ZeRO-1", "ZeRO-2", "ZeRO-3", "optimizer offload", "micro-batch 32",
         "every block recomputed"],
        [of_four_devices(model) for model in models],
    )  # fmt: skip


if __name__ == "__main__":
    main()
