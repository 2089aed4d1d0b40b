"""Which runs of a page have a colour in common, and how they are named (no torch)."""

from __future__ import annotations

from collections.abc import Sequence

from lbaccel.report.curves import Strand
from lbaccel.runs.groups import SEED, Group, are_grouped, differing_settings, ended, label_of
from lbaccel.runs.read import Run

_LONGEST_LABEL = 16  # at the end of a line


def strands_of(runs: Sequence[Run], groups: Sequence[Group]) -> list[Strand]:
    """A strand a group, with the mean of its seeds that came to their end."""
    settings = differing_settings(groups)
    grouped = are_grouped(groups)
    found = []
    for number, (group, differing) in enumerate(zip(groups, settings, strict=True), 1):
        label = label_of(differing, number)
        short = label if len(label) <= _LONGEST_LABEL else f"group {number}"
        name = f"group {number}: {label}" if differing else label
        if not grouped:
            name = group.runs[0].name if not differing else f"{group.runs[0].name} ({label})"
            short = label if len(label) <= _LONGEST_LABEL else f"run {number}"
        if len(groups) == 1:
            name, short = ("all runs" if grouped else group.runs[0].name), ""
        counted = [i for i, one in enumerate(group.runs) if ended(one)]
        seeds = {group.runs[i].config.get(SEED) for i in counted}
        averaged = counted if len(seeds) == len(counted) > 1 else []
        found.append(Strand(name, short, [(r.name, r.history) for r in group.runs], averaged))
    return found
