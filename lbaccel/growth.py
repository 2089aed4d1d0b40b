"""What the recipe makes of `--batch-schedule`: sizes for the loader, factors for the rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lbaccel.batch_schedules import MILESTONES, Segment, batch_schedule
from lbaccel.errors import InputError
from lbaccel.schedules import Schedule
from lbaccel.stream import UpdateStream

Say = Callable[[str], object]


def segments_of(s: Mapping[str, Any], *, num_samples: int, say: Say) -> tuple[Segment, ...]:
    """The segments that the settings ask for; none without a batch schedule.

    Raises:
        InputError: as `batch_schedule`, or a setting that only a batch schedule reads.
    """
    rule = s["batch_schedule"]
    _check(s)
    if rule is None:
        return ()
    largest = s["max_batch_size"]
    if largest is not None and largest > num_samples:
        say(f"--max-batch-size {largest} is above the training set's {num_samples} samples: those.")
        largest = num_samples
    return batch_schedule(
        rule,
        global_batch_size=min(s["global_batch_size"], num_samples),
        epochs=s["epochs"],
        num_samples=num_samples,
        milestones=milestones(s),
        factors=s["factor"][0] if len(s["factor"]) == 1 else s["factor"] or None,
        max_batch_size=largest,
        past_max=s["past_max"],
        growth=s["growth"],
        lr_growth=s["lr_growth"],
        first_epoch=s["first_epoch"],
    )


def milestones(s: Mapping[str, Any]) -> tuple[float, ...]:
    """The milestones asked for; under a batch schedule that has them, study E's.

    >>> milestones({"milestones": (), "batch_schedule": "bsi", "epochs": 30})
    (10, 19, 25)
    """
    if s["milestones"] or s["batch_schedule"] in (None, "steady", "instant"):
        return s["milestones"]
    return default_milestones(s["epochs"])


def default_milestones(epochs: float) -> tuple[int, ...]:
    """Study E's starts of epochs 60, 120 and 160 of 200 (59, 119 and 159 done), in proportion.

    >>> default_milestones(200), default_milestones(30)
    ((60, 120, 160), (10, 19, 25))
    """
    return tuple(1 + round((epoch - 1) / 200 * epochs) for epoch in MILESTONES)


def _check(s: Mapping[str, Any]) -> None:
    rule = s["batch_schedule"]
    if rule is None:
        for name in ("factor", "max_batch_size", "past_max", "growth", "lr_growth", "first_epoch"):
            if s[name] not in ((), None, "drop"):
                shown = " ".join(f"{x:g}" for x in s[name]) if name == "factor" else s[name]
                flag = f"--{name.replace('_', '-')} {shown}"
                raise InputError(
                    f"{flag} is read with --batch-schedule alone, such as bsi. Add it."
                )
    elif s["schedule"] in ("step", "multistep"):
        raise InputError(
            f"--schedule {s['schedule']} with --batch-schedule {rule}: both change the rate at "
            "milestones. Use --batch-schedule lrd (the rate falls) or mixed, or --schedule cosine."
        )


def sizes(segments: Sequence[Segment]) -> tuple[tuple[int, int], ...]:
    """`UpdateStream`'s growth: epochs counted from 0, each with its number of samples an update."""
    return tuple((segment.epoch - 1, segment.global_batch_size) for segment in segments[1:])


def with_factors(
    schedule: Schedule, segments: Sequence[Segment], *, samples_per_epoch: int
) -> Schedule:
    """The schedule times the factor of the segment that `samples_seen` lies in."""
    if all(segment.lr_factor == 1.0 for segment in segments):
        return schedule
    starts = [((segment.epoch - 1) * samples_per_epoch, segment.lr_factor) for segment in segments]

    def scaled(samples_seen: float) -> float:
        return schedule(samples_seen) * [f for start, f in starts if start <= samples_seen][-1]

    return scaled


def explain(segments: Sequence[Segment], *, stream: UpdateStream, epochs: float, lr: float) -> str:
    """A line a segment: from which epoch on, how many samples, at which rate, how many updates."""
    firsts = [
        min(stream.first_update(seg.epoch - 1), stream.num_updates(epochs)) for seg in segments
    ]
    ends = [*firsts[1:], stream.num_updates(epochs)]
    rows = [
        f"  from epoch {segment.epoch}: {segment.global_batch_size} samples an update, "
        f"lr {segment.lr(lr):.6g}, {end - first} updates"
        for segment, first, end in zip(segments, firsts, ends, strict=True)
    ]
    return "\n".join(["batch schedule:", *rows])
