"""Images a CPU-second of the paths from image files to batches: lbaccel's, torchvision's, timm's.

python benchmarks/photographs.py --data FOLDER [--images 320] [--repeats 4] [--workers 0 1 2]
    [--what training evaluation] [--micro-batch 32] [--img-size 224] [--interpolation bicubic]
    [--json FILE]

FOLDER holds train/ with a folder for each class. All arms have the same augmentation (random
resized crop, mirror image, colour jitter 0.4, normalisation; in evaluation resize and centre
crop), one thread a process, and are interleaved; the order is reversed in every other round. The
figure is CPU time, user and system, of the process and its workers: the least time of a pass over
64 images is taken from the least time of a longer pass, so the start of workers and what they
read ahead count nothing. The last lines have the cost of starting an evaluation's workers anew.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from functools import partial
from pathlib import Path

import PIL
import timm
import timm.data
import torch
import torchvision
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from lbaccel import BatchPlan, UpdateLoader
from lbaccel.data.pipelines import EvaluationBatches, training_set
from lbaccel.data.sources import open_source

MEAN, STD, CROP = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.875
FIRST = 64  # images of the short pass
SETTLED = 1.0  # seconds, in which workers read ahead as far as they will


def cpu_seconds():
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def whole_pass(make, count, workers):
    """CPU-seconds of a pass over so many images, with the start and the end of its workers."""
    before = cpu_seconds()
    batches, close = make(count, workers)
    seen = sum(len(images) for images, _ in batches)
    assert seen == count, (seen, count)
    if workers:
        time.sleep(SETTLED)
    del batches
    close()
    return cpu_seconds() - before


def of_lbaccel(a, source, decoder, train, count, workers):
    pre = {
        "img_size": a.img_size, "mean": MEAN, "std": STD, "interpolation": a.interpolation,
        "crop_pct": CROP, "decoder": decoder,
    }  # fmt: skip
    images = source.only(list(range(0, len(source), len(source) // count))[:count])
    if not train:
        evaluation = EvaluationBatches(images, preprocessing=pre, num_workers=workers)
        return evaluation(0, a.micro_batch), evaluation.close
    plan = BatchPlan(global_batch_size=count, micro_batch_size=a.micro_batch)
    loader = UpdateLoader(
        training_set(images, preprocessing=pre, seed=0), plan, num_workers=workers
    )
    return (data for _, data in next(iter(loader))), loader.close


class Tensors(ImageFolder):
    """Images as torchvision's decoder gives them."""

    def __init__(self, root, transform):
        super().__init__(root, transform, loader=partial(decode_image, mode=ImageReadMode.RGB))


def transform_of(a, train, tensors):
    """torchvision's transforms v2, on tensors of bytes or on Pillow's images."""
    how = v2.InterpolationMode[a.interpolation.upper()]
    if train:
        steps = [
            v2.RandomResizedCrop(a.img_size, interpolation=how, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.4, 0.4, 0.4),
        ]
    else:
        steps = [
            v2.Resize(int(a.img_size / CROP), interpolation=how, antialias=True),
            v2.CenterCrop(a.img_size),
        ]
    last = [] if tensors else [v2.PILToTensor()]
    return v2.Compose(
        [*steps, *last, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    )


def of_torchvision(a, kind, train, count, workers):
    images = kind(str(a.data / "train"), transform_of(a, train, tensors=kind is Tensors))
    part = Subset(images, range(0, len(images), len(images) // count)[:count])
    loader = DataLoader(
        part, batch_size=a.micro_batch, shuffle=train, num_workers=workers,
        generator=torch.Generator(),
    )  # fmt: skip
    return iter(loader), lambda: None


def of_timm(a, prefetcher, train, count, workers):
    images = timm.data.create_dataset("", root=str(a.data / "train"))
    samples = images.reader.samples
    images.reader.samples = samples[:: len(samples) // count][:count]
    loader = timm.data.create_loader(
        images, (3, a.img_size, a.img_size), a.micro_batch, is_training=train,
        interpolation=a.interpolation, mean=MEAN, std=STD, crop_pct=CROP, color_jitter=0.4,
        num_workers=workers, use_prefetcher=prefetcher, persistent_workers=False,
        device=torch.device("cpu"),
    )  # fmt: skip
    if train:
        loader = getattr(loader, "loader", loader) if not prefetcher else loader
    return iter(loader), lambda: None


def arms_of(a):
    source = open_source(f"folder:{a.data}").train
    return {
        "lbaccel, fast": partial(of_lbaccel, a, source, "fast"),
        "lbaccel, pillow": partial(of_lbaccel, a, source, "pillow"),
        "torchvision, Pillow's images": partial(of_torchvision, a, ImageFolder),
        "torchvision, tensors of bytes": partial(of_torchvision, a, Tensors),
        "timm": partial(of_timm, a, False),
        "timm, its prefetcher": partial(of_timm, a, True),
    }


def measure(a, train, workers):
    """Milliseconds of CPU an image, of each arm."""
    arms = arms_of(a)
    counts = (FIRST, FIRST + a.images)
    least = {(name, count): float("inf") for name in arms for count in counts}
    for round_ in range(a.repeats):
        for name, count in list(least)[:: 1 if round_ % 2 else -1]:
            # timm drops what does not fill a batch in training, so the counts are whole batches
            spent = whole_pass(partial(arms[name], train), count, workers)
            least[name, count] = min(least[name, count], spent)
    return {
        name: 1000 * (least[name, counts[1]] - least[name, counts[0]]) / a.images for name in arms
    }


def starts(a, workers):
    """CPU-milliseconds of a pass of the evaluation over 64 images: workers started, and kept."""
    make = partial(arms_of(a)["lbaccel, fast"], False)

    def twice(count, workers):
        first, close = make(count // 2, workers)
        evaluation = close.__self__
        list(first)
        both = [first, evaluation(0, a.micro_batch)]
        return (batch for part in ([(range(count // 2), 0)], both[1]) for batch in part), close

    one = min(whole_pass(make, FIRST, workers) for _ in range(a.repeats))
    two = min(whole_pass(twice, 2 * FIRST, workers) for _ in range(a.repeats))
    return 1000 * one, 1000 * (two - one)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    both = ("training", "evaluation")
    parser.add_argument("--what", choices=both, nargs="+", default=both)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--interpolation", choices=("bilinear", "bicubic"), default="bicubic")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    if FIRST % a.micro_batch or a.images % a.micro_batch:
        parser.error(f"--micro-batch must divide {FIRST} and --images")
    torch.set_num_threads(1)
    versions = {m.__name__: m.__version__ for m in (torch, torchvision, timm, PIL)}
    print(versions, platform.machine(), torch.backends.cpu.get_cpu_capability())
    found = []
    for train in (what == "training" for what in a.what):
        for workers in a.workers:
            rows = measure(a, train, workers)
            best = rows["lbaccel, fast"]
            what = "training" if train else "evaluation"
            print(f"\n{what}, {workers} workers\n")
            print("| path | ms an image | images a CPU-second | fast is |\n|---|---|---|---|")
            for name, ms in rows.items():
                print(f"| {name} | {ms:.2f} | {1000 / ms:,.0f} | {ms / best:.2f} x |", flush=True)
                found.append({"what": what, "workers": workers, "path": name, "ms": ms})
    for workers in (w for w in a.workers if w and "evaluation" in a.what):
        fresh, kept = starts(a, workers)
        how = f"{FIRST} images, {workers} workers: {fresh:.0f} ms started, {kept:.0f} ms kept"
        print(f"\nevaluation of {how}")
    if a.json:
        a.json.write_text(json.dumps({"versions": versions, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
