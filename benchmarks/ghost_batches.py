"""What the ghost batches of a micro-batch cost: split and join, in place, one BatchNorm over all.

python benchmarks/ghost_batches.py [--repeats 7] [--device cpu] [--precision fp32] [--output FILE]

The first table has the BatchNorm layers of ResNet-50, forward and backward, and the second whole
updates. All arms run in turn in one process (with one thread on a CPU), and a figure is the
smallest time of several: process time on a CPU, and time until the device is idle on a GPU. Figures
are multiples of one BatchNorm over the whole micro-batch. The last two columns of the first table
are the most that a forward and a backward hold beside their input, in outputs of the layer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from accelerate import Accelerator
from random_images import Images, loss_fn

from lbaccel import BatchPlan, LargeBatch, UpdateLoader
from lbaccel.planning.cost.kernel_calls import allocations
from lbaccel.update import ghost_kernel

GROUPS = 4  # ghost batches of a micro-batch
LAYERS = ((64, 2), (64, 4), (256, 4), (512, 8), (1024, 16), (2048, 32))  # channels, pixels / side
SIZES = ((224, 8), (64, 16))  # pixels, samples of a ghost batch
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ARMS = ("split and join", "in place", "one BatchNorm")


def ordinary() -> Any:
    """Around what must take the ordinary route."""
    return mock.patch.object(ghost_kernel, "_goes_in_place", lambda *_: False)


def seconds(arms: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, float]:
    """The smallest time of each arm; they run in turn."""
    best: dict[str, float] = {}
    for repeat in range(repeats + 1):  # the first warms up
        for name, run in arms.items():
            start = clock(device)
            run()
            if repeat:
                best[name] = min(best.get(name, float("inf")), clock(device) - start)
    return best


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def layer_arms(
    channels: int, side: int, ghost: int, layout: str, dtype: torch.dtype, device: str
) -> tuple[dict[str, Callable[[], Any]], int]:
    """Forward and backward of one layer by each route, and the bytes of its output."""
    shape = (GROUPS * ghost, channels, side, side)
    x, grad = (
        torch.randn(shape, device=device, dtype=dtype).to(memory_format=LAYOUTS[layout])
        for _ in range(2)
    )
    x.requires_grad_()
    weight, bias = (torch.ones(channels, device=device, requires_grad=True) for _ in range(2))
    mean, var = torch.zeros(channels, device=device), torch.ones(channels, device=device)

    def run(sizes: tuple[int, ...]) -> None:
        y = ghost_kernel.normalise_runs(
            x, sizes, [(mean, var, 0.1)] * len(sizes), weight=weight, bias=bias, eps=1e-5
        )
        torch.autograd.grad(y, (x, weight, bias), grad)

    def joined() -> None:
        with ordinary():
            run((ghost,) * GROUPS)

    arms = (joined, lambda: run((ghost,) * GROUPS), lambda: run((ghost * GROUPS,)))
    return dict(zip(ARMS, arms, strict=True)), x.nbytes


def most_held(run: Callable[[], Any], device: str) -> int:
    """The most bytes that a call holds at a time."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    total = peak = 0
    for change in allocations(run):
        total += change
        peak = max(peak, total)
    return peak


def of_layers(repeats: int, device: str, precision: str) -> list[str]:
    lines = [
        "| layer | layout | split and join | in place | one BatchNorm, ms "
        "| memory: split and join | in place |",
        "|---|---|---|---|---|---|---|",
    ]
    for pixels, ghost in SIZES:
        for channels, divisor in LAYERS:
            side = pixels // divisor
            for layout in LAYOUTS:
                arms, output = layer_arms(channels, side, ghost, layout, DTYPES[precision], device)
                best = seconds(arms, repeats, device)
                one = best["one BatchNorm"]
                held = [most_held(arms[name], device) / output for name in ARMS[:2]]
                lines.append(
                    f"| {GROUPS} x {ghost} x {channels} x {side} x {side} | {layout} "
                    f"| {best['split and join'] / one:.2f} | {best['in place'] / one:.2f} "
                    f"| {1e3 * one:.2f} | {held[0]:.2f} | {held[1]:.2f} |"
                )
                print(lines[-1], flush=True)
    return lines


def update_arm(name: str, layout: str, norm: int, device: str, precision: str) -> Any:
    """An update of 128 samples at 64 px in micro-batches of 64."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).to(memory_format=LAYOUTS[layout])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = Images(128, 64)
    plan = BatchPlan(global_batch_size=128, micro_batch_size=64, norm_batch_size=norm)
    accelerator = Accelerator(
        cpu=device == "cpu", mixed_precision={"fp32": "no"}.get(precision, precision)
    )
    large_batch = LargeBatch(accelerator, plan)
    model, optimizer, loader = large_batch.prepare(model, optimizer, UpdateLoader(data, plan))

    def run(around: Any) -> None:
        loader.load_state_dict({"next_update": 0})
        (update,) = loader
        with around:
            large_batch.update(update, loss_fn)

    return run


def of_updates(repeats: int, device: str, precision: str) -> list[str]:
    lines = [
        "| network | layout | split and join | in place | one BatchNorm, ms |",
        "|---|---|---|---|---|",
    ]
    for name in ("resnet18", "resnet50"):
        for layout in LAYOUTS:
            ghosts = update_arm(name, layout, 16, device, precision)
            whole = update_arm(name, layout, 64, device, precision)
            arms = (
                lambda run=ghosts: run(ordinary()),
                lambda run=ghosts: run(nullcontext()),
                lambda run=whole: run(nullcontext()),
            )
            best = seconds(dict(zip(ARMS, arms, strict=True)), repeats, device)
            one = best["one BatchNorm"]
            lines.append(
                f"| {name} | {layout} | {best['split and join'] / one:.3f} "
                f"| {best['in place'] / one:.3f} | {1e3 * one:.0f} |"
            )
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--output", type=Path, help="else the tables are printed alone")
    a = parser.parse_args()
    if a.device == "cpu":
        torch.set_num_threads(1)
    lines = of_layers(a.repeats, a.device, a.precision)
    lines += ["", *of_updates(max(2, a.repeats // 2), a.device, a.precision)]
    if a.output is not None:
        a.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
