"""Processor time of an augmented image of 32 px, beside torchvision's transforms.

python benchmarks/small_images.py [--repeats 10] [--before CHECKOUT] [--json FILE]

50,000 images of random bytes as CIFAR has them; a random crop of a frame padded by 4 pixels, a
random mirror image, normalised floats in batches of 512. Each arm makes the same batch in turn, in
one thread, and its figure is the least of `--repeats`, by `time.process_time`.

- lbaccel: `KeyedImages.fetch`, as its loader calls it (draws by seed, epoch and sample index).
- v1: torchvision's transforms on Pillow images, a sample at a time, as its CIFAR10 is used.
- v2: torchvision's v2 transforms on tensors of bytes, a sample at a time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import v2

from lbaccel.data import augment
from lbaccel.data.images import ImageArray

BATCH, MEAN, STD = 512, (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def older(checkout: Path) -> Any:
    """The module of another checkout."""
    spec = importlib.util.spec_from_file_location("older", checkout / "lbaccel/data/augment.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["older"] = module
    spec.loader.exec_module(module)
    return module


def arms(before: Path | None) -> dict[str, Callable[[], object]]:
    """What makes a batch, by name."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50_000, 3, 32, 32), dtype=torch.uint8, generator=generator)
    source = ImageArray(images, torch.zeros(len(images), dtype=torch.long), ("a",))
    chosen = torch.randperm(len(images), generator=generator)[:BATCH].numpy()
    epochs = np.zeros(BATCH, dtype=np.int64)
    options: dict[str, Any] = {"seed": 0, "pad": 4, "flip": 0.5}
    pictures = {int(i): Image.fromarray(images[i].permute(1, 2, 0).numpy()) for i in chosen}
    of_pillow = v1.Compose(
        [v1.RandomCrop(32, 4), v1.RandomHorizontalFlip(), v1.ToTensor(), v1.Normalize(MEAN, STD)]
    )
    of_bytes = v2.Compose(
        [
            *(v2.RandomCrop(32, 4), v2.RandomHorizontalFlip()),
            *(v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)),
        ]
    )
    found: dict[str, Callable[[], object]] = {}
    if before is not None:
        old = older(before).KeyedImages(source, MEAN, STD, **options)
        found["before"] = lambda: old.fetch(chosen, epochs)
    ours = augment.KeyedImages(source, MEAN, STD, **options)
    return found | {
        "lbaccel": lambda: ours.fetch(chosen, epochs),
        "v1": lambda: torch.stack([of_pillow(pictures[int(i)]) for i in chosen]),
        "v2": lambda: torch.stack([of_bytes(images[i]) for i in chosen]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--before", type=Path, help="a checkout of an older lbaccel")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(1)
    calls = arms(a.before)
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(a.repeats):
        for name, call in calls.items():
            start = time.process_time()
            call()
            least[name] = min(least[name], time.process_time() - start)
    row = {name: round(1e6 * seconds / BATCH, 2) for name, seconds in least.items()}
    print(torch.backends.cpu.get_cpu_capability(), torch.__version__, torchvision.__version__)
    print("microseconds an image:", row)
    print("over lbaccel:", {name: round(us / row["lbaccel"], 1) for name, us in row.items()})
    if a.json:
        a.json.write_text(json.dumps(row))


if __name__ == "__main__":
    main()
