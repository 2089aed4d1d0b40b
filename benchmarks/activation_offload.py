"""What the planner predicts of activation offload, with and without it, for some cards.

python benchmarks/activation_offload.py [--output FILE] [--budget 8] [--cards ...]

No GPU is needed and none is used. Each row is `lbaccel plan` for a card at a budget: without
offload, with `activation_offload="auto"`, and with recompute forbidden and the micro-batch pinned
to twice the plan's (or to the plan's, where that does not fit), which shows what offload costs
where it does the work alone. Seconds are from datasheet rates: they compare plans.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lbaccel import plan

CARDS = ("RTX 4060", "RTX 3060", "RTX 4090", "H100")
CASES: tuple[dict[str, Any], ...] = (
    {"model": "resnet50", "norm_batch_size": 32},
    {"model": "convnext_tiny"},
    {"model": "vit_base_patch16_224"},
    {"model": "swin_tiny_patch4_window7_224"},
    # one ghost batch that does not fit as it is: where offload can be worth anything
    {"model": "resnet50", "norm_batch_size": 128},
    {"model": "resnet50", "norm_batch_size": 256},
    {"model": "resnet50", "norm_batch_size": 512},
)
HEAD = (
    "| network | ghost batch | card | plan | offload allowed | offload alone, at a pinned size |\n"
    "|---|---|---|---|---|---|"
)


def shown(found: Any) -> str:
    """One cell: what the plan does, and what it takes."""
    if not found.fits:
        return f"does not fit ({found.predicted_peak_gib:.2f} GiB)"
    how = {
        "none": "no recompute",
        "full": "all recomputed",
        "segments": f"{sum(map(len, found.segments))} modules recomputed",
    }[found.activation_checkpointing]
    if found.activation_offload:
        count = sum(map(len, found.activation_offload))
        how += f", {count} modules offloaded ({found.host_gib:.1f} GiB of the host)"
    return f"{found.micro_batch_size}, {how}: {found.predicted_seconds_per_update:.1f} s"


def row(case: dict[str, Any], card: str, gib: float) -> str:
    """A line of the table."""
    options = {
        "global_batch_size": 4096,
        "memory": f"{gib}GiB",
        "device": card,
        "precision": "bf16",
        "compare": False,
        "host_memory": "64GiB",
        "activation_offload": "auto",
        **case,
    }
    plain = {k: v for k, v in options.items() if k not in ("host_memory", "activation_offload")}
    without, both = plan(**plain), plan(**options)
    twice = plan(
        **options,
        activation_checkpointing="none",
        micro_batch_size=without.micro_batch_size * (2 if without.fits else 1),
    )
    norm = case.get("norm_batch_size", "none")
    cells = [case["model"], str(norm), card, shown(without), shown(both), shown(twice)]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="else the table is printed")
    parser.add_argument("--budget", type=float, default=8.0, metavar="GIB")
    parser.add_argument("--cards", nargs="+", default=list(CARDS))
    a = parser.parse_args()
    lines = [HEAD]
    for case in CASES:
        for card in a.cards:
            lines.append(row(case, card, a.budget))
            print(lines[-1], flush=True)
    if a.output is not None:
        a.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
