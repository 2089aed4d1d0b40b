"""How far the pixels of --decoder fast are from timm's and torchvision's on Pillow's images.

python benchmarks/photographs_apart.py --data FOLDER [--images 50] [--img-size 224]

Both have the same draws; the slow side is the reference of tests/data/test_photographs.py. Figures
are in units of 0..255: the mean, the mean of the worst image, the largest of a pixel, and the mean
with its sign.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "data"))
import test_photographs as reference

from lbaccel.data.photographs import Photographs
from lbaccel.data.sources import open_source


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--img-size", type=int, default=224)
    a = parser.parse_args()
    source = open_source(f"folder:{a.data}").train
    indices = np.arange(0, len(source), max(1, len(source) // a.images))[: a.images]
    reference.SIZE = a.img_size
    unit = 255 * torch.tensor(reference.STD).view(3, 1, 1)
    mean_std = reference.MEAN, reference.STD
    print("| | mean | worst image | largest | with sign |\n|---|---|---|---|---|")
    for interpolation in ("bilinear", "bicubic"):
        for strength in (0.0, 0.4):
            fast = Photographs(
                source, *mean_std, a.img_size, 1, interpolation, color_jitter=strength
            )
            found = reference.load(fast, indices)
            with pytest.MonkeyPatch.context() as patched:
                apart = torch.stack([
                    (image - reference.slowly(fast, int(index), 0, patched)) * unit
                    for index, image in zip(indices, found, strict=True)
                ])  # fmt: skip
            of_image = apart.abs().mean((1, 2, 3))
            figures = (
                f"{of_image.mean():.4f} | {of_image.max():.4f} | {apart.abs().max():.1f} "
                f"| {apart.mean():+.5f}"
            )
            print(f"| {interpolation}, colour jitter {strength} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
