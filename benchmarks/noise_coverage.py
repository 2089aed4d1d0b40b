"""Bias and coverage of the noise scale on normal gradients whose scale is known.

python benchmarks/noise_coverage.py [--seeds 500]

One row a design: units' sizes, updates, half-life in updates, the true critical batch over the
update's. Seeds are 0, 1, 2, ...; the gradient has 40 dimensions of unequal variance.
"""

from __future__ import annotations

import argparse
import math

import numpy as np

from lbaccel.noise.arithmetic import NoiseEstimate, RatioAverage, estimate

STD = np.linspace(0.5, 1.5, 40)
S = float((STD**2).sum())
DESIGNS = [
    # sizes of the units, updates, half-life in updates, B_crit / B
    ((8,) * 8, 200, None, 1.5),
    ((8, 8, 8, 8, 8, 3), 200, None, 2.5),
    ((1, 30, 5, 12), 200, None, 2.0),
    ((8,) * 8, 200, 20, 1.5),
    ((8,) * 8, 200, 5, 1.5),
    ((8,) * 2, 200, None, 1.5),
    ((8,) * 8, 20, None, 0.2),
    ((8,) * 8, 200, None, 0.05),
    ((8,) * 8, 200, None, 15.0),
]


def one(seed, sizes, num_updates, half_life, critical):
    rng = np.random.default_rng(seed)
    sizes, total = np.array(sizes, dtype=float), float(sum(sizes))
    mean = math.sqrt(S / critical / len(STD))
    noise = rng.standard_normal((num_updates, len(sizes), len(STD))) * STD
    units = mean + noise / np.sqrt(sizes)[:, None]
    update = (units * sizes[:, None]).sum(1) / total
    found = estimate(
        (sizes * (units**2).sum(-1)).sum(-1),
        (update**2).sum(-1),
        num_samples=total,
        num_units=len(sizes),
    )
    average = RatioAverage(1e15 if half_life is None else half_life * total)
    for pair in zip(*found, strict=True):
        average.add(NoiseEstimate(*map(float, pair)), num_samples=int(total))
    return average


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=500)
    seeds = parser.parse_args().seeds
    print(
        "| units | updates | half-life | B_crit / B | error of the ratio of means | mean error "
        "of a run's ratio | covered | unbounded |\n|---|---|---|---|---|---|---|---|"
    )
    for sizes, num_updates, half_life, over in DESIGNS:
        critical = over * sum(sizes)
        runs = [one(seed, sizes, num_updates, half_life, critical) for seed in range(seeds)]
        intervals = [run.interval() for run in runs]
        covered = np.mean([i.low <= critical <= i.high for i in intervals])
        open_ends = np.mean([i.high == math.inf for i in intervals])
        means = np.mean([run.scale_s for run in runs]) / np.mean([r.grad_norm_sq for r in runs])
        ratios = np.mean([run.ratio for run in runs])
        own = f"{ratios / critical - 1:+.1%}" if math.isfinite(ratios) else "-"
        print(
            f"| {'+'.join(map(str, sizes))} | {num_updates} | {half_life or 'none'} | {over:g} | "
            f"{means / critical - 1:+.2%} | {own} | {covered:.1%} | {open_ends:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
