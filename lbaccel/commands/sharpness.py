"""`lbaccel sharpness`: how sharp the minimum is that a run ended in."""

from __future__ import annotations

import argparse

from lbaccel.commands.landscape import add_images, say
from lbaccel.recipe import bounds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lbaccel sharpness`."""
    parser.add_argument(
        "path",
        metavar="CHECKPOINT",
        help="run folder (its best checkpoint), RUN/checkpoints/last, export, hf-hub:OWNER/NAME",
    )
    add_images(parser, samples=256)
    parser.add_argument(
        "--top", type=bounds.count, default=3, metavar="K", help="eigenvalues (default: 3)"
    )
    parser.add_argument(
        "--epsilon",
        type=bounds.positive,
        default=1e-3,
        help="of Keskar's box, epsilon (|w_i| + 1) (default: 0.001)",
    )
    parser.add_argument(
        "--radius",
        type=bounds.positive,
        default=0.1,
        help="of the random directions, in norms of each filter (default: 0.1)",
    )
    parser.add_argument(
        "--directions", type=bounds.count, default=10, help="random directions (default: 10)"
    )
    parser.add_argument(
        "--seed", type=bounds.seed, default=0, help="of the directions (default: 0)"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON alone")


def run(args: argparse.Namespace) -> int:
    """Print the three measures."""
    from lbaccel.landscape.sharpness import sharpness
    from lbaccel.landscape.words import report_sharpness
    from lbaccel.runs.folder import strict_json

    found = sharpness(
        args.path,
        split=args.data,
        images=args.images,
        samples=args.samples,
        top=args.top,
        epsilon=args.epsilon,
        radius=args.radius,
        directions=args.directions,
        seed=args.seed,
        ema=args.ema,
        say=say,
    )
    print(strict_json(found.as_json(), indent=1) if args.json else report_sharpness(found))
    return 0
