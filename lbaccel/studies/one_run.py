"""One run of a study as numbers: its result, cost, curves, and what happened in it (no torch)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from lbaccel.errors import InputError
from lbaccel.runs.compare import first_reaching, totals
from lbaccel.runs.folder import RESUMES
from lbaccel.runs.noise_readings import readings
from lbaccel.runs.read import Point, Run, Series, load_run, read_metrics
from lbaccel.studies.folder import ENDED, State, run_folder, state_of
from lbaccel.studies.outcome import final_value
from lbaccel.studies.provenance import provenance
from lbaccel.studies.spec import Study, StudyCell

_UNREADABLE = (InputError, OSError, LookupError, TypeError, ValueError, ArithmeticError)
"""What a damaged or edited file may bring about; such a run is told of, and the rest is judged."""


@dataclass(frozen=True)
class CellRun:
    """A run of a study, read.

    Attributes:
        cell: arm, batch size and seed.
        state: how far it is; a run that can't be read has failed.
        folder: of the run; None before it began.
        run: all that was logged; None where there is no run, or none that can be read.
        value: the median of the last evaluations; None where the run has not ended.
        numbers: the entry of the study's JSON, without its curves.
        warnings: on this run, sentences.
    """

    cell: StudyCell
    state: State
    folder: Path | None
    run: Run | None
    value: float | None
    numbers: Mapping[str, Any]
    warnings: tuple[str, ...] = ()

    @property
    def until(self) -> int:
        """Its last update."""
        return self.numbers["num_updates"] or 0

    @property
    def reached_at(self) -> int | None:
        """The update at which it met the target."""
        reached = self.numbers["reached"]
        return None if reached is None else reached["updates"]


def read_cell(study: Study, cell: StudyCell, folder: Path) -> CellRun:
    """The run of a cell in the folder of a study; a damaged one becomes a warning."""
    path: Path | None = None
    try:
        path = run_folder(folder, cell)
        state = state_of(path)
    except InputError as error:
        return _without(cell, "failed", path, _left_out(cell, error))
    if path is None:
        return _without(cell, state, None)
    try:
        run = load_run(path)
        numbers = {**measures(run, study, ended=state in ENDED), "events": events(run, path)}
        numbers |= {"noise": noise(run), "provenance": provenance(run, path)}
    except _UNREADABLE as error:
        return _without(cell, "failed", path, _left_out(cell, error))
    value = numbers["value"]
    if state == "done" and value is None:
        state = "diverged" if run.history.get(study.metric) else "failed"
        numbers |= measures(run, study, ended=state in ENDED)
    if state != "done":
        value = numbers["value"] = None
    return CellRun(
        cell, state, path, run, value, numbers, tuple(_warnings(cell, run, study, state))
    )


def _left_out(cell: StudyCell, error: Exception) -> str:
    why = str(error) or type(error).__name__
    return f"{cell.name} can't be read, and is left out: {why}"


def _without(cell: StudyCell, state: State, path: Path | None, warning: str = "") -> CellRun:
    names = ("value", "train_value", "num_updates", "samples", "seconds", "peak_gib")
    numbers: dict[str, Any] = dict.fromkeys((*names, "predicted_gib", "reached", "num_test"))
    more = {"censored": False, "events": [], "noise": [], "provenance": None}
    return CellRun(cell, state, path, None, None, {**numbers, **more}, (warning,) * bool(warning))


def _warnings(cell: StudyCell, run: Run, study: Study, state: State) -> list[str]:
    found = list(run.notes[:1])
    if len(run.notes) > 1:
        found = [f"{found[0]} (and {len(run.notes) - 1} more)"]
    evaluations = len(run.history.get(study.metric, ()))
    if state == "failed":
        reason = str(run.summary.get("exit_reason") or f"it has no {study.metric}")
        found.append(f"{cell.name} has no result: {reason}")
    if state == "done" and evaluations < study.last:
        few = f"{evaluations} evaluations, so its result is their median"
        if evaluations == 1:
            few = "one evaluation, so its result is that one"
        found.append(f"{cell.name} has {few} and not that of the last {study.last}")
    return found


def measures(run: Run, study: Study, *, ended: bool = True) -> dict[str, Any]:
    """The numbers of a run that any source of it gives: a run folder, or wandb's data.

    Args:
        run: by `load_run`.
        study: metric, how many evaluations a result takes, and the target.
        ended: it came to its end or diverged, so that a target which it did not meet is censored.
    """
    points = run.history.get(study.metric, ())
    total = totals(run)
    reached = None
    if study.target is not None:
        metric, value = study.target.metric, study.target.value
        met = first_reaching(run.history.get(metric, ()), metric, target=value)
        if met is not None:
            reached = {"updates": met.update, "samples": met.samples_seen, "hours": met.hours}
    return {
        "value": final_value(points, study.last),
        "train_value": _trained(run, points, study),
        "num_updates": _whole(total["updates"]),
        "samples": _whole(total["samples"]),
        "seconds": _number(total["seconds"]),
        "peak_gib": _number(total["peak_gib"]),
        "predicted_gib": _number(run.config.get("plan/predicted_peak_gib")),
        "reached": reached,
        "censored": ended and study.target is not None and reached is None,
        "num_test": _whole(run.config.get("data_identity/num_val")),
    }


def _number(value: Any) -> float | None:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if plain and math.isfinite(value) else None


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None or number < 0 else int(number)


def _trained(run: Run, evaluated: Series, study: Study) -> float | None:
    """The same median of the training metric: of its means over the samples before each evaluation.

    An evaluation of the test set ends a stretch of training; lines of training are means over the
    samples since the line before.
    """
    name = f"train/{study.metric.rpartition('/')[2]}"
    lines = run.history.get(name, ())
    if not lines or not evaluated:
        return None
    ends = [point.update for point in evaluated]
    starts = [0, *ends[:-1]]
    stretches = list(zip(starts, ends, strict=True))[-study.last :]
    means = [_mean([p for p in _weighed(lines) if a < p[0] <= b]) for a, b in stretches]
    known = [mean for mean in means if mean is not None]
    return median(known) if known and len(known) == len(means) else None


def _weighed(lines: Series) -> list[tuple[int, float | None, float]]:
    """Update, value and number of samples of each line."""
    found, before = [], 0
    for point in lines:
        at = point.update if point.samples_seen is None else point.samples_seen
        found.append((point.update, point.value, float(at - before)))
        before = at
    return found


def _mean(lines: Sequence[tuple[int, float | None, float]]) -> float | None:
    weight = sum(samples for _, _, samples in lines)
    if weight <= 0 or any(value is None for _, value, _ in lines):
        return None
    return sum(value * samples for _, value, samples in lines if value is not None) / weight


def events(run: Run, folder: Path | None) -> list[dict[str, Any]]:
    """The events of a run: resumes, and updates for which memory ran short.

    A run writes its resumes into a file. A lack of memory shows in its lines: nothing else makes
    the micro-batch smaller within one start of a run.
    """
    path = None if folder is None else folder / RESUMES
    lines = read_metrics(path) if path is not None and path.is_file() else []
    found = [{"kind": "resume", "update": line["update"], "text": _resumed(line)} for line in lines]
    starts = [line["update"] for line in lines]
    before: Point | None = None
    first = _number(run.config.get("plan/micro_batch_size"))
    if first is not None and not starts:
        before = Point(0, None, None, first)
    for point in run.history.get("batch/micro", ()):
        if before is not None and before.value and point.value and point.value < before.value:
            resumed = any(before.update <= start < point.update for start in starts)
            if not resumed:
                text = (
                    f"memory ran short: the micro-batch went from {before.value:.0f} to "
                    f"{point.value:.0f} samples"
                )
                found.append({"kind": "oom", "update": point.update, "text": text})
        before = point
    return sorted(found, key=lambda one: one["update"])


def _resumed(line: Mapping[str, Any]) -> str:
    text = f"resumed after update {line['update']:,}"
    return f"{text}: {line['plan']}" if line.get("plan") else text


def noise(run: Run) -> list[list[float | int | None]]:
    """Update, samples, critical batch and its interval, of each line with a noise scale."""
    updates = [p.update for p in run.history.get("noise/critical_batch_size", ())]
    found = [
        [update, one.samples_seen, one.critical, one.interval.low, one.interval.high]
        for update, one in zip(updates, readings(run), strict=True)
    ]
    return [[_number(value) for value in row] for row in found]
