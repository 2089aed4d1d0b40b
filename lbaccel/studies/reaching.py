"""How soon an arm meets the target, beside its runs' own noise scale (no torch)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from lbaccel.noise.arithmetic import Interval, rounded
from lbaccel.studies.folder import ENDED
from lbaccel.studies.one_run import CellRun, noise
from lbaccel.studies.spec import ArmBatch, Study
from lbaccel.studies.to_target import Attempt, Bend, fit_bend, points_of


def to_target(study: Study, arm: str, runs: Mapping[ArmBatch, Sequence[CellRun]]) -> dict[str, Any]:
    """Updates to the target of an arm, the fitted critical batch, and that of the noise scale."""
    ended = {
        place.batch: [one for one in of if one.state in ENDED]
        for place, of in runs.items()
        if place.arm == arm
    }
    attempts = {
        batch: {one.cell.seed: _attempt(study, one) for one in of}
        for batch, of in ended.items()
        if of
    }
    every = [one for of in ended.values() for one in of]
    title = study.arm(arm).title
    grows = any(one.cell.settings.get("batch_schedule") for one in every)
    bend = (
        Bend(reason="its batch grows in training")
        if grows
        else fit_bend([one for of in attempts.values() for one in of.values()])
    )
    predicted = _predicted(every)
    sentence = bend.sentence(title)
    if predicted is not None:
        sentence += f" The noise scale of its runs gives {predicted_text(predicted)}."
    return {
        "arm": arm,
        "points": points_of(attempts),
        "fit": bend.as_json(),
        "noise_scale": predicted,
        "sentence": sentence,
    }


def _attempt(study: Study, one: CellRun) -> Attempt:
    """When a run met the target, and its evaluation before that."""
    after = 0
    if study.target is not None and one.run is not None and one.reached_at is not None:
        evaluated = one.run.history.get(study.target.metric, ())
        after = max((p.update for p in evaluated if p.update < one.reached_at), default=0)
    return Attempt(one.cell.batch, one.reached_at, one.until, after)


def _predicted(runs: Sequence[CellRun]) -> dict[str, float | None] | None:
    """The medians over the runs of the noise scale's critical batch, and of its interval's ends."""
    found = [reading for one in runs if (reading := _when_met(one)) is not None]
    if not found:
        return None
    critical, low, high = (float(median(values)) for values in zip(*found, strict=True))
    return {"critical_batch": critical, "low": low, "high": None if high == math.inf else high}


def predicted_text(predicted: Mapping[str, float | None]) -> str:
    """The noise scale's critical batch in words."""
    low, high = predicted["low"] or 0.0, predicted["high"]
    interval = Interval(low, math.inf if high is None else high)
    shown = "its interval excludes nothing" if interval.is_unknown else str(interval)
    return f"{rounded(predicted['critical_batch'] or 0.0)} ({shown})"


def _when_met(one: CellRun) -> tuple[float, float, float] | None:
    """The critical batch that the noise scale gives at the target, or at the end of the run."""
    if one.run is None:
        return None
    found = [
        reading
        for reading in noise(one.run)
        if reading[2] is not None
        and (one.reached_at is None or (reading[0] or 0) <= one.reached_at)
    ]
    if not found:
        return None
    _, _, critical, low, high = found[-1]
    return (critical or 0.0, low or 0.0, math.inf if high is None else high)
