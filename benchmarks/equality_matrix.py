"""The equality matrix as a table: largest relative error of loss, gradient and buffers, float64.

python benchmarks/equality_matrix.py [--world-sizes 1 2 3] [--markdown FILE]

Networks x partitions x checkpointing x ranks, each against plain torch training the ghost batches
one after the other (tests/helpers/reference.py). A cell that was not run says so.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS / "helpers"), str(TESTS / "update")]

from reference import MODELS  # noqa: E402
from test_ranks import launch  # noqa: E402

PARTITIONS = ("one group", "ragged")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--world-sizes", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    found = {}
    for world in args.world_sizes:
        for cell, error in launch(world, ",".join(MODELS))["cells"].items():
            found[world, cell] = error
    kinds = [f"{p} | {c}" for p in PARTITIONS for c in ("plain", "checkpointed")]
    heads = [f"{kind.replace(' | ', ', ')}, {w}" for kind in kinds for w in (1, 2, 3)]
    rows = []
    for name in MODELS:
        errors = [found.get((w, f"{name} | {kind}")) for kind in kinds for w in (1, 2, 3)]
        rows.append([name, *("not run" if e is None else f"{e:.0e}" for e in errors)])
    lines = [["network", *heads], ["---"] * (len(heads) + 1), *rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    print(text)
    print(f"largest: {max(found.values()):.1e} over {len(found)} cells")
    if args.markdown:
        args.markdown.write_text(text + "\n")


if __name__ == "__main__":
    main()
