"""A plan for people."""

from __future__ import annotations

from collections.abc import Iterator

from lbaccel.planning.plan import Plan
from lbaccel.runs.columns import columns


def lines(found: Plan) -> Iterator[str]:
    """The plan for people."""
    yield f"{found.model} on {found.device.name}, {found.budget_gib:.2f} GiB a device"
    yield str(found.batch)
    if not found.fits:
        yield f"does not fit: {found.why}. The nearest plan is this one:"
    how = {
        "none": "no recompute",
        "full": "every block recomputed",
        "segments": f"{len(found.segments)} segments recomputed: "
        + ", ".join(_span(segment) for segment in found.segments),
    }[found.activation_checkpointing]
    if found.activation_offload:
        runs = ", ".join(_span(run) for run in found.activation_offload)
        how += f"; activations of {runs} on the host ({found.host_gib:.2f} GiB there)"
    fused = " fused" if found.fused_optimizer else ""
    contract = f"{found.precision}; {found.optimizer}{fused}, lr {found.lr:g}"
    if found.zero_stage is not None:
        moved = "" if found.offload == "none" else f", {found.offload} offloaded"
        how = f"ZeRO-{found.zero_stage}{moved}; {how}"
    yield f"plan: {how}; {found.memory_format}; {contract}"
    yield (
        f"peak {found.predicted_peak_gib:.2f} GiB, "
        f"{found.predicted_seconds_per_update:.3g} s an update, {found.num_updates} updates"
    )
    parts = [f"{part} {gib:.2f}" for part, gib in found.breakdown.items() if gib >= 0.005]
    yield f"  of it: {', '.join(parts)}"
    if found.workspaces is not None:
        yield f"  {found.workspaces}"
    yield from _tables(found)
    for note in found.notes:
        yield f"note: {note}"


def _tables(found: Plan) -> Iterator[str]:
    """The levers, the other numbers of devices, and the frontier, as far as they were asked for."""
    if found.levers:
        yield ""
        yield from _table(
            ("lever", "GiB saved", "time", "result", ""),
            [
                (
                    lever.name,
                    f"{lever.gib_saved:.2f}",
                    f"{lever.time_pct:+.1f} %",
                    "changes" if lever.changes_result else "same",
                    lever.verdict,
                )
                for lever in found.levers
            ],
        )
    if found.alternatives:
        yield ""
        yield from _table(
            ("devices", "micro-batch", "peak GiB", "s an update", "hours", "GPU-hours"),
            [
                (
                    str(other.world_size),
                    str(other.micro_batch_size),
                    f"{other.peak_gib:.2f}",
                    f"{other.seconds_per_update:.3g}",
                    f"{other.hours:.1f}",
                    f"{other.gpu_hours:.1f}",
                )
                for other in found.alternatives
            ],
        )
    if found.points:
        yield ""
        yield from _table(
            ("peak GiB", "s an update", "micro-batch", "activations kept"),
            [
                (
                    f"{point.peak_gib:.2f}",
                    f"{point.seconds_per_update:.3g}",
                    str(point.micro_batch_size),
                    "the plan" if point.chosen else f"{point.activations_kept:.0%}",
                )
                for point in found.points
                if point.best or point.chosen
            ],
        )


def _span(segment: tuple[str, ...]) -> str:
    return segment[0] if len(segment) == 1 else f"{segment[0]} .. {segment[-1]}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return columns([head, *rows])
