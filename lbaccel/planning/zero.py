"""The effect of ZeRO and offload on a network and its devices: a plan's levers, in sentences."""

from __future__ import annotations

from collections.abc import Iterator

from lbaccel.planning.levers import OFFLOAD, WITHOUT
from lbaccel.planning.plan import Plan


def explain_zero(found: Plan) -> Iterator[str]:
    """Before the run: what each stage saves here, and what would save more."""
    peak, world = found.predicted_peak_gib, found.batch.world_size
    stages = [lever for lever in found.levers if lever.name.startswith(("ZeRO-", WITHOUT))]
    how = "DDP" if found.zero_stage is None else f"ZeRO-{found.zero_stage}"
    if found.offload != "none":
        how += f" and {found.offload} on the host"
    if world == 1:
        line = "one device: ZeRO-1, 2 and 3 shard nothing, there is one shard"
        without = next((lever for lever in stages if lever.name == WITHOUT), None)
        if without is not None:
            line += f"; {peak:.2f} GiB with {how}, and {WITHOUT} {_saves(without.gib_saved)}"
        yield line
    elif stages:
        each = (
            f"{lever.name.split(' (')[0]} {_saves(lever.gib_saved)} ({lever.time_pct:+.1f} % time)"
            for lever in stages
        )
        yield f"{world} devices, {peak:.2f} GiB a device with {how}; {', '.join(each)}"
        yield (
            "lbaccel reduces once an update under ZeRO-1 and 2, which so hold and send the same: a "
            "rank has its whole gradient while it accumulates"
        )
    lever = next((lever for lever in found.levers if lever.name == OFFLOAD), None)
    if lever is not None:
        yield (
            f"{OFFLOAD} {_saves(lever.gib_saved)} of {peak:.2f} "
            f"({lever.gib_saved / peak:.1%}), {lever.time_pct:+.1f} % time and the step on the CPU"
        )
    activations = found.breakdown["activations"]
    line = f"activations are {activations:.2f} GiB of {peak:.2f}, and no stage divides them"
    others = [
        lever
        for lever in found.levers
        if not lever.changes_result and not lever.name.startswith(("ZeRO", WITHOUT, OFFLOAD))
    ]
    best = max(others, key=lambda lever: lever.gib_saved, default=None)
    if best is not None and best.gib_saved > 0:
        line += f"; {best.name} saves {best.gib_saved:.2f} GiB for {best.time_pct:+.1f} % time"
    yield line


def _saves(gib: float) -> str:
    """
    >>> _saves(0.25), _saves(-0.1)
    ('saves 0.25 GiB', 'takes 0.10 GiB more')
    """
    return f"saves {gib:.2f} GiB" if gib >= 0 else f"takes {-gib:.2f} GiB more"
