"""CPU time an image of --decoder draft beside fast, on pictures of several sizes made from a seed.

python benchmarks/photographs_large.py [--sides 500 2000] [--count 32] [--repeats 4]
    [--workers 0] [--what training evaluation] [--img-size 224]

Each side is the shorter one of --count JPEG files of ratio 3 : 4 (quality 90, half the colour), in
a temporary folder. Photographs have noise whose amplitude falls as its frequency grows (Field 1987,
"Relations between the statistics of natural images and the response properties of cortical cells"),
and so have these. Arms and figures are those of photographs.py: all arms of a row take turns in one
process. "Smaller" is the share of the images that draft decodes smaller, and "apart" the mean
difference of its bytes from those of fast at the same draws, of 0..255, without colour jitter.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import photographs
import PIL
import torch
import torchvision
from PIL import Image

from lbaccel.data.crops import ResizedBox
from lbaccel.data.decode import pixels_of
from lbaccel.data.draft import denominator
from lbaccel.data.images import ImageFiles, read_image
from lbaccel.data.photographs import Centre, Photographs

AMPLITUDE, FALL = 24.0, 0.75
FAST, DRAFT, TENSORS = "lbaccel, fast", "lbaccel, draft", "torchvision, tensors of bytes"


def picture(height, width, seed):
    """Octaves of grey noise, each of FALL times the amplitude of the last, in soft colours."""
    draws = np.random.default_rng(seed)

    def octave(side, channels):
        rows, columns = min(side, height), min(side * width // height, width)
        coarse = draws.normal(size=(channels, rows, columns)).astype(np.float32)
        size = (width, height)
        made = [Image.fromarray(x).resize(size, Image.Resampling.BICUBIC) for x in coarse]
        return np.stack(made, 2)

    total = 128 + 25 * octave(5, 3) + 10 * octave(40, 3)
    side, amplitude = 3, AMPLITUDE
    while side < 2 * height:
        total += amplitude * octave(side, 1)
        side, amplitude = 2 * side, FALL * amplitude
    return Image.fromarray(np.clip(total, 0, 255).astype(np.uint8))


def made(folder, side, count):
    """Files of this shorter side, as images, and their bits a pixel."""
    inside = folder / "train" / "a"
    inside.mkdir(parents=True)
    names = [f"{number}.jpg" for number in range(count)]
    for number, name in enumerate(names):
        image = picture(side, side * 4 // 3, [side, number])
        image.save(inside / name, quality=90, subsampling=2)
    read = partial(read_image, root=str(inside))
    bits = 8 * sum((inside / name).stat().st_size for name in names)
    images = ImageFiles(names, (0,) * count, ("a",), names, read)
    return images, bits / (count * side * (side * 4 // 3))


def difference(a, source, train):
    """The share of images that draft decodes smaller, and how far its bytes are from fast's."""
    plain, draft = (Seen(a, source, train, draft) for draft in (False, True))
    apart, smaller = [], 0
    for index in range(len(source)):
        height, width = pixels_of(source, index).shape[1:]
        smaller += denominator(draft.box_of(index, height, width)) > 1
        apart.append((plain.bytes_of(index) - draft.bytes_of(index)).abs().mean())
    return smaller / len(source), float(sum(apart) / len(apart))


class Seen:
    """Images as a decoder gives them to training, in its first epoch, or to evaluation."""

    def __init__(self, a, source, train, draft):
        mean_std = photographs.MEAN, photographs.STD
        self.source, self.train = source, train
        if train:
            self.how = Photographs(source, *mean_std, a.img_size, color_jitter=0.0, draft=draft)
        else:
            self.how = Centre(*mean_std, a.img_size, photographs.CROP, "bicubic", draft=draft)

    def bytes_of(self, index):
        """Float, of 0..255."""
        row = np.array([index])
        of_source = (row, 0 * row) if self.train else (self.source, [index])
        return self.how.load(*of_source)[0].float()

    def box_of(self, index, height, width):
        """What is resized of an image of this size."""
        if not self.train:
            return self.how.part(height, width)
        ((*draws,),) = self.how.draws(np.array([index]), np.array([0]))
        return ResizedBox(self.how.box(draws, height, width), (self.how.img_size,) * 2)


def measured(a, source, train, workers):
    """Milliseconds of CPU an image, of each arm."""
    makes = {
        FAST: partial(photographs.of_lbaccel, a, source, "fast", False),
        DRAFT: partial(photographs.of_lbaccel, a, source, "draft", False),
        TENSORS: partial(photographs.of_torchvision, a, photographs.Tensors),
    }
    arms = {name: photographs.Arm(partial(make, train, workers)) for name, make in makes.items()}
    least = dict.fromkeys(arms, float("inf"))
    for round_ in range(a.repeats):
        for name in list(arms)[:: 1 if round_ % 2 else -1]:
            least[name] = min(least[name], arms[name].part(1))
    for arm in arms.values():
        arm.batches = None
        arm.close()
    return {name: 1000 * seconds / a.micro_batch for name, seconds in least.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[500, 2000])
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--workers", type=int, default=0)
    both = ("training", "evaluation")
    parser.add_argument("--what", choices=both, nargs="+", default=both)
    parser.add_argument("--img-size", type=int, default=224)
    a = parser.parse_args()
    a.micro_batch, a.interpolation = a.count, "bicubic"
    torch.set_num_threads(1)
    versions = {m.__name__: m.__version__ for m in (torch, torchvision, PIL)}
    print(versions, platform.machine(), torch.backends.cpu.get_cpu_capability())
    print("| | bits a pixel | fast | draft | torchvision | draft is | smaller | apart |")
    print("|---|---|---|---|---|---|---|---|")
    for side in a.sides:
        with tempfile.TemporaryDirectory() as folder:
            a.data = Path(folder)
            source, bits = made(a.data, side, a.count)
            for what in a.what:
                train = what == "training"
                ms = measured(a, source, train, a.workers)
                smaller, apart = difference(a, source, train)
                print(
                    f"| {what}, {side} px | {bits:.2f} | {ms[FAST]:.2f} ms | {ms[DRAFT]:.2f} ms "
                    f"| {ms[TENSORS]:.2f} ms | {ms[FAST] / ms[DRAFT]:.2f} x | {100 * smaller:.0f} %"
                    f" | {apart:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
