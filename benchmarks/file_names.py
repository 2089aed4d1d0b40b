"""Bytes a name, and what a loader worker grows by: a tuple of Python strings, and `Names`.

python benchmarks/file_names.py [--count 1000000]

The names are made up, in the manner of ImageNet's; no file has to exist. Each form is measured in
processes of its own: the growth of the resident set by the names, the growth of the private pages
of a forked worker that reads every name once in random order, the size of the pickle that a spawned
worker is sent with the time to write and read it, and the processor time to read a name and to take
half of the names. Linux only: private pages stand in /proc/self/smaps_rollup.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pickle
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from lbaccel.data.names import Names

FORMS = {"tuple": tuple, "Names": Names}


def made(count):
    per_class = max(1, count // 1000)
    for i in range(count):
        folder = f"n{i // per_class + 1440764:08d}"
        yield f"{folder}/{folder}_{i % per_class * 13}.JPEG"


def bytes_of(*kinds):
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.partition(":")[0]: line.split()[1] for line in lines}
    return sum(int(sizes[kind]) for kind in kinds) * 1024


def in_a_fork(names, order):
    """Growth of a child's private pages while it reads all names."""
    read_end, write_end = os.pipe()
    if not os.fork():
        before = bytes_of("Private_Clean", "Private_Dirty")
        letters = sum(len(names[row]) for row in order)
        after = bytes_of("Private_Clean", "Private_Dirty")
        os.write(write_end, json.dumps([after - before, letters]).encode())
        os._exit(0)
    grown, letters = json.loads(os.read(read_end, 1000))
    os.wait()
    return grown, letters


def spent(function):
    begun = time.process_time()
    found = function()
    return time.process_time() - begun, found


def measure(form, count):
    FORMS[form](made(10_000))  # loads the code
    order = np.random.default_rng(0).permutation(count)
    gc.collect()
    before = bytes_of("Rss")
    build, names = spent(lambda: FORMS[form](made(count)))
    gc.collect()
    held = bytes_of("Rss") - before
    gc.freeze()  # a collection in the child would write to each object
    grown, letters = in_a_fork(names, order)
    write, pickled = spent(lambda: pickle.dumps(names))
    load, _ = spent(lambda: pickle.loads(pickled))
    read, _ = spent(lambda: [len(names[row]) for row in order[:100_000]])
    half = order[: count // 2].tolist()
    take = names.take if form == "Names" else (lambda rows: tuple(names[row] for row in rows))
    part, _ = spent(lambda: take(half))
    return {
        "letters a name": letters / count,
        "bytes a name": held / count,
        "worker, forked, MB": grown / 1e6,
        "pickle, MB": len(pickled) / 1e6,
        "pickle written and read, s": write + load,
        "built, s": build,
        "one name read, us": read * 10,
        "half taken, s": part,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.form:
        print(json.dumps(measure(args.form, args.count)))
        return
    print(f"Python {platform.python_version()}, NumPy {np.__version__}, pyarrow {pa.__version__}")
    found = {}
    for form in FORMS:
        command = [sys.executable, __file__, "--count", str(args.count), "--form", form]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[form] = json.loads(out)
    print(f"\n{args.count:,} names | " + " | ".join(FORMS))
    for key in found["Names"]:
        print(f"{key} | " + " | ".join(f"{found[form][key]:.3g}" for form in FORMS))


if __name__ == "__main__":
    main()
