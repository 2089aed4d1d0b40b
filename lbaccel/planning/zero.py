"""What ZeRO and offload can do for a network on so many devices: a plan's levers, in sentences."""

from __future__ import annotations

from collections.abc import Iterator

from lbaccel.planning.levers import Lever
from lbaccel.planning.plan import Plan

OFFLOAD = "optimizer offload"


def _lever(found: Plan, start: str) -> Lever | None:
    return next((lever for lever in found.levers if lever.name.startswith(start)), None)


def gib_saved(found: Plan, *, stage: int, offload: str) -> float:
    """GiB that a stage and offload take off a device's peak, at most.

    Divided over W devices a part saves (W - 1) / W of itself; on the host it saves the rest too.
    """
    lever = _lever(found, f"ZeRO-{stage} ")
    moved = {"none": (), "optimizer": ("optimizer",)}.get(offload, ("optimizer", "weights"))
    rest = sum(found.breakdown[part] for part in moved) / found.batch.world_size
    return rest + (lever.gib_saved if lever is not None else 0.0)


def explain_zero(found: Plan) -> Iterator[str]:
    """Before the run: what each stage saves here, and what would save more."""
    peak, world = found.predicted_peak_gib, found.batch.world_size
    if world == 1:
        yield "one device: ZeRO-1, 2 and 3 shard nothing, there is one shard"
    else:
        each = []
        for stage in (1, 2, 3):
            lever = _lever(found, f"ZeRO-{stage} ")
            if lever is not None:
                each.append(
                    f"ZeRO-{stage} {lever.gib_saved:.2f} GiB ({lever.time_pct:+.1f} % time)"
                )
        yield f"{world} devices: of {peak:.2f} GiB a device, at most {', '.join(each)}"
    lever = _lever(found, OFFLOAD)
    if lever is not None:
        yield (
            f"optimizer offload saves {lever.gib_saved:.2f} GiB of {peak:.2f} "
            f"({lever.gib_saved / peak:.1%}), {lever.time_pct:+.1f} % time"
        )
    activations = found.breakdown["activations"]
    line = f"activations are {activations:.2f} GiB of {peak:.2f}, and no stage divides them"
    others = [
        lever
        for lever in found.levers
        if not lever.changes_result and not lever.name.startswith(("ZeRO", OFFLOAD))
    ]
    best = max(others, key=lambda lever: lever.gib_saved, default=None)
    if best is not None and best.gib_saved > 0:
        line += f"; {best.name} saves {best.gib_saved:.2f} GiB for {best.time_pct:+.1f} % time"
    yield line
