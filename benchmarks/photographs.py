"""Images a CPU-second of the paths from image files to batches: lbaccel's, torchvision's, timm's.

python benchmarks/photographs.py --data FOLDER [--images 160] [--repeats 6] [--workers 0 1 2]
    [--what training evaluation] [--micro-batch 32] [--img-size 224] [--interpolation bicubic]
    [--only NAME ...] [--json FILE]

FOLDER holds train/ with a folder for each class. All arms have the same augmentation (random
resized crop, mirror image, colour jitter 0.4, normalisation; in evaluation resize and centre
crop) and one thread a process. The figure is CPU time, user and system, of the process and its
workers. All arms are alive at once and take turns: a part is --images images, measured from a
moment in which the workers have read ahead as far as they will to the next such moment, and the
least of --repeats parts counts. So the start of workers counts nothing, for no arm; it has a table
of its own. "Lbaccel, fast, kept" reads decoded images that --cache-images holds. Linux only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import platform
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
from lbaccel.data.decode import pixels_of
from lbaccel.data.pipelines import EvaluationBatches, training_set
from lbaccel.data.pixel_cache import CachePart, PixelCache
from lbaccel.data.sources import open_source

FAST = "lbaccel, fast"
TIMES = 50  # the images are repeated, so that no path comes to an end
ROOM = 2**30  # bytes of kept images
MEAN, STD, CROP = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.875
FIRST = 2  # batches before the first part
IDLE = 0.05  # seconds without work of the workers


def cpu_of(pid):
    """CPU-seconds of a process that runs, all its threads: see clock_getcpuclockid(3)."""
    return time.clock_gettime((~pid << 3) | 2)


class Arm:
    """A path from files to batches without end, and the CPU time of parts of it."""

    def __init__(self, make):
        before = time.process_time()
        others = set(multiprocessing.active_children())
        batches, self.close = make()
        self.batches = iter(batches)
        self.workers = [p.pid for p in set(multiprocessing.active_children()) - others]
        self.take(FIRST)
        # started lazily by some
        self.workers = [p.pid for p in set(multiprocessing.active_children()) - others]
        self.settle()
        self.start = time.process_time() - before + sum(map(cpu_of, self.workers))

    def take(self, count):
        """Read so many batches."""
        return sum(len(images) for images, _ in itertools.islice(self.batches, count))

    def settle(self):
        """Wait until no worker works."""
        spent = -1
        while spent != (spent := sum(map(cpu_of, self.workers))):
            time.sleep(IDLE)

    def part(self, count):
        """CPU-seconds of so many batches."""
        before = time.process_time() + sum(map(cpu_of, self.workers))
        self.take(count)
        self.settle()
        return time.process_time() + sum(map(cpu_of, self.workers)) - before


def of_lbaccel(a, source, decoder, kept, train, workers):
    pre = {
        "img_size": a.img_size, "mean": MEAN, "std": STD, "interpolation": a.interpolation,
        "crop_pct": CROP, "decoder": decoder,
    }  # fmt: skip
    cache = CachePart(PixelCache(len(source), ROOM)) if kept else None
    if cache is not None:
        for index in range(len(source)):
            cache.pixels(index, partial(pixels_of, source, index))
    if not train:
        rows = list(range(len(source))) * TIMES
        first = EvaluationBatches(source, preprocessing=pre, num_workers=workers, cache=cache)
        first.indices = rows
        return first(0, a.micro_batch), first.close
    plan = BatchPlan(global_batch_size=a.micro_batch, micro_batch_size=a.micro_batch)
    data = training_set(source, preprocessing=pre, seed=0, cache=cache)
    loader = UpdateLoader(data, plan, num_workers=workers)
    endless = (data for _ in itertools.count() for update in loader for _, data in update)
    return endless, loader.close


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


def of_torchvision(a, kind, train, workers):
    images = kind(str(a.data / "train"), transform_of(a, train, tensors=kind is Tensors))
    loader = DataLoader(
        Subset(images, list(range(len(images))) * TIMES), batch_size=a.micro_batch,
        shuffle=train, num_workers=workers, generator=torch.Generator(),
    )  # fmt: skip
    return iter(loader), lambda: None


def of_timm(a, prefetcher, train, workers):
    images = timm.data.create_dataset("", root=str(a.data / "train"))
    images.reader.samples = images.reader.samples * TIMES
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
    arms = {
        FAST: partial(of_lbaccel, a, source, "fast", False),
        "lbaccel, fast, kept": partial(of_lbaccel, a, source, "fast", True),
        "lbaccel, pillow": partial(of_lbaccel, a, source, "pillow", False),
        "lbaccel, pillow, kept": partial(of_lbaccel, a, source, "pillow", True),
        "torchvision, Pillow's images": partial(of_torchvision, a, ImageFolder),
        "torchvision, tensors of bytes": partial(of_torchvision, a, Tensors),
        "timm": partial(of_timm, a, False),
        "timm, its prefetcher": partial(of_timm, a, True),
    }
    return {name: make for name, make in arms.items() if not a.only or name in (FAST, *a.only)}


def measure(a, train, workers):
    """Milliseconds of CPU: an image of each arm, and the start of each."""
    arms = {name: Arm(partial(make, train, workers)) for name, make in arms_of(a).items()}
    least = dict.fromkeys(arms, float("inf"))
    for round_ in range(a.repeats):
        for name in list(arms)[:: 1 if round_ % 2 else -1]:
            least[name] = min(least[name], arms[name].part(a.images // a.micro_batch))
    starts = {name: 1000 * arm.start for name, arm in arms.items()}
    for arm in arms.values():
        arm.batches = None
        arm.close()
    return {name: 1000 * seconds / a.images for name, seconds in least.items()}, starts


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    both = ("training", "evaluation")
    parser.add_argument("--what", choices=both, nargs="+", default=both)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--interpolation", choices=("bilinear", "bicubic"), default="bicubic")
    parser.add_argument("--only", nargs="+", default=(), help="arms beside lbaccel, fast")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    if a.images % a.micro_batch:
        parser.error("--micro-batch must divide --images")
    torch.set_num_threads(1)
    versions = {m.__name__: m.__version__ for m in (torch, torchvision, timm, PIL)}
    print(versions, platform.machine(), torch.backends.cpu.get_cpu_capability())
    found = []
    for train in (what == "training" for what in a.what):
        for workers in a.workers:
            rows, starts = measure(a, train, workers)
            best = rows[FAST]
            what = "training" if train else "evaluation"
            print(f"\n{what}, {workers} workers\n")
            print("| path | ms an image | images a CPU-second | fast is | start |")
            print("|---|---|---|---|---|")
            for name, ms in rows.items():
                print(
                    f"| {name} | {ms:.2f} | {1000 / ms:,.0f} | {ms / best:.2f} x "
                    f"| {starts[name]:.0f} ms |",
                    flush=True,
                )
                found.append({"what": what, "workers": workers, "path": name, "ms": ms})
    if a.json:
        a.json.write_text(json.dumps({"versions": versions, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
