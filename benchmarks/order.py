"""The start of an epoch and of a resume, and the time a sample, under both rules of order.

python benchmarks/order.py [--samples 14000000] [--starts 3] [--repeats 5]

The start is measured in a process of its own for each rule and place: processor time and growth of
the peak resident set over the first micro-batch of 256. The time a sample is measured in one
process, interleaved, with the sorted order in memory; it is the minimum of the process times. The
image beside it is a JPEG of noise that is smoothed, 500 x 375 pixels, decoded to RGB.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import resource
import subprocess
import sys
import time

import numpy as np
from PIL import Image, ImageFilter, features

from lbaccel.data.images import decode_image
from lbaccel.data.order import COMPUTED, MOST_SORTED, SORTED, samples_at

NAMES = {SORTED: "sorted", COMPUTED: "computed"}
PLACES = {"first epoch": 0.0, "resume in epoch 41": 40.5, "end of an epoch": 1.0}
SIZES = (1, 32, 256, 2048)


def peak_mib():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def start(rule, count, epochs):
    """Seconds and MiB until the first 256 samples are known."""
    samples_at(0, 256, num_samples=2 * MOST_SORTED + 1, seed=1, order=COMPUTED)  # loads the code
    before, begun = peak_mib(), time.process_time()
    samples_at(
        int(count * epochs) - 100 * (epochs == 1), 256, num_samples=count, seed=0, order=rule
    )
    return time.process_time() - begun, peak_mib() - before


def in_a_process(rule, count, epochs):
    command = [sys.executable, __file__, "--start", json.dumps([rule, count, epochs])]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def an_image():
    noise = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2)).save(file, "jpeg", quality=90)
    return file.getvalue()


def least(function, repeats, calls):
    """The least process time of a call, in microseconds."""
    found = []
    for _ in range(repeats):
        begun = time.process_time()
        for _ in range(calls):
            function()
        found.append((time.process_time() - begun) / calls)
    return min(found) * 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=14_000_000)
    parser.add_argument("--starts", type=int, default=3, help="processes a figure; 0: none")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--start", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        print(json.dumps(start(*json.loads(args.start))))
        return
    print(f"Python {platform.python_version()}, NumPy {np.__version__}")
    print(f"\nstart, {args.samples:,} samples, first 256 | rule | seconds | MiB")
    for name, epochs in PLACES.items() if args.starts else ():
        for rule in NAMES:
            found = [in_a_process(rule, args.samples, epochs) for _ in range(args.starts)]
            seconds, mib = min(s for s, _ in found), max(m for _, m in found)
            print(f"{name} | {NAMES[rule]} | {seconds:.4f} | {mib:.1f}")
    print(f"\nmicroseconds a sample, {args.samples:,} samples | sorted, in memory | computed")
    for size in SIZES:
        times = dict.fromkeys(NAMES, float("inf"))
        for _ in range(args.repeats):
            for rule in NAMES:

                def call(rule=rule, size=size):
                    samples_at(12345, size, num_samples=args.samples, seed=0, order=rule)

                times[rule] = min(times[rule], least(call, 1, 50))
        print(f"micro-batch {size} | " + " | ".join(f"{times[r] / size:.3f}" for r in NAMES))
    encoded = an_image()
    image = least(lambda: decode_image(io.BytesIO(encoded), "it"), args.repeats, 5)
    turbo = "libjpeg-turbo" if features.check("libjpeg_turbo") else "libjpeg"
    print(f"\none image of {len(encoded):,} bytes decoded ({turbo}): {image:.0f} microseconds")
    seeds = iter(range(1000))  # another order each time: the last three are kept
    whole = least(
        lambda: samples_at(0, 1, num_samples=MOST_SORTED, seed=next(seeds)), args.repeats, 1
    )
    print(f"the order of {MOST_SORTED:,} samples, sorted: {whole / 1e6:.3f} s")


if __name__ == "__main__":
    main()
