"""All numbers of a study's folder, and the verdict in words: what every report shows (no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from lbaccel.runs.compare import is_in_points
from lbaccel.runs.folder import plain
from lbaccel.runs.groups import LEVEL, Mean
from lbaccel.studies.curves import curves_of
from lbaccel.studies.folder import chosen_in, shared_names, study_in
from lbaccel.studies.judging import Outcomes, judge
from lbaccel.studies.limits import interquartile_mean, scaling_limit
from lbaccel.studies.on_images import on_the_same_images
from lbaccel.studies.one_run import CellRun, read_cell
from lbaccel.studies.reaching import to_target
from lbaccel.studies.rules import edge_warnings, over_images
from lbaccel.studies.settings_of_runs import settings_of_runs
from lbaccel.studies.spec import ArmBatch, ArmPair, Study
from lbaccel.studies.spread import spread_of
from lbaccel.studies.surfaces import pictures
from lbaccel.studies.verdict import verdict

LIMITS = (0.5, 1.0)  # points of the scaling limits


def study_result(folder: Path) -> dict[str, Any]:
    """The numbers of a study as strict JSON: runs, table, comparisons, limits, verdict.

    A run that is damaged or missing costs its own numbers alone; `warnings` names it.

    Args:
        folder: of a study, as `lbaccel study run` made it.

    Raises:
        InputError: the folder is no study's.
    """
    study = study_in(folder)
    runs: dict[ArmBatch, list[CellRun]] = {place: [] for place in study.places()}
    for cell in study.cells():
        runs[ArmBatch(cell.arm, cell.batch)].append(read_cell(study, cell, folder))
    every = [one for of in runs.values() for one in of]
    outcomes = {place: outcomes_of(of) for place, of in runs.items()}
    of_arms, equal = settings_of_runs(study, every)
    base = baseline_of(study)
    tuning = chosen_in(folder)
    result: dict[str, Any] = {
        "kind": "study",
        **{key: getattr(study, key) for key in ("name", "title", "question", "scale", "note")},
        "source": None if study.source is None else asdict(study.source),
        "metric": study.metric,
        "last": study.last,
        "level": LEVEL,
        "arms": [
            {"name": arm.name, "title": arm.title, "settings": of_arms[arm.name]}
            for arm in study.arms
        ],
        "settings": equal,
        "batches": sorted({place.batch for place in runs}),
        "seeds": list(study.seeds),
        "baseline": asdict(base),
        "target": None if study.target is None else asdict(study.target),
        "runs": _runs(study, every, folder),
        "table": [_row(study, place, of) for place, of in runs.items()],
        "comparisons": comparisons(study, outcomes, runs),
        "spread": spread_of(study, {place: outcomes[place] for place in _apart(runs, base)}, base),
        "scaling_limits": _limits(study, outcomes),
        "aggregates": _aggregates(study, outcomes),
        "to_target": [to_target(study, arm.name, runs) for arm in study.arms]
        if study.target
        else [],
        "tuning": tuning,
        "figures": _figures(folder, study),
        "warnings": [*(w for one in every for w in one.warnings), *edge_warnings(tuning)],
    }
    return plain({**result, "verdict": verdict(result)}, finite=True)


def _figures(folder: Path, study: Study) -> list[dict[str, Any]]:
    """The pictures of the study's landscapes, as they are now."""
    return [
        {
            "name": f"{surface.name}: {path.stem}",
            "file": path.relative_to(folder).as_posix(),
            "alt": f"Loss around the weights of {place_name(study, surface.place)}: {path.stem}",
        }
        for surface, path in pictures(folder, study)
    ]


def outcomes_of(runs: Sequence[CellRun]) -> Outcomes:
    """The results of a place by seed; a run that diverged has none, and counts."""
    values = {one.cell.seed: one.value for one in runs if one.value is not None}
    return Outcomes(values, frozenset(r.cell.seed for r in runs if r.state == "diverged"))


def baseline_of(study: Study) -> ArmBatch:
    """The place that every other one is compared with."""
    return study.baseline or study.places()[0]


def _runs(study: Study, runs: Sequence[CellRun], folder: Path) -> list[dict[str, Any]]:
    shared = shared_names(folder)
    return [
        {
            "cell": one.cell.name,
            "shared_with": shared.get(one.cell.name),  # the cell whose run stands for this one
            "name": None if one.folder is None else one.folder.name,
            "folder": None if one.folder is None else one.folder.relative_to(folder).as_posix(),
            "arm": one.cell.arm,
            "batch": one.cell.batch,
            "seed": one.cell.seed,
            "status": one.state,
            "exit_reason": None if one.run is None else one.run.summary.get("exit_reason") or None,
            **one.numbers,
            **curves,
        }
        for one, curves in zip(runs, curves_of(runs, study.metric), strict=True)
    ]


def _row(study: Study, place: ArmBatch, runs: Sequence[CellRun]) -> dict[str, Any]:
    """A row of the table: the mean over the runs that ended, and how many did not."""
    done = [one for one in runs if one.value is not None]
    diverged = sum(one.state == "diverged" for one in runs)
    mean = Mean(tuple(one.value for one in done if one.value is not None))
    low, high = mean.interval or (None, None)
    first = next((one.run for one in runs if one.run is not None), None)
    return {
        **asdict(place),
        "n": len(done),
        "diverged": diverged,
        "missing": len(runs) - len(done) - diverged,
        "mean": mean.mean,
        "low": low,
        "high": high,
        "half_width": mean.half_width,
        "updates": _mean_of(done, "num_updates"),
        "samples": _mean_of(done, "samples"),
        "expected": study.expected.get(place.arm, {}).get(place.batch),
        "train_mean": _mean_of(done, "train_value"),
        "wilson": _wilson(study, mean.mean, done),
        "num_test": next((one.numbers["num_test"] for one in done), None),
        "lr": None if first is None else first.config.get("plan/lr"),
        "each": {str(one.cell.seed): one.value for one in done},
    }


def _mean_of(runs: Sequence[CellRun], name: str) -> float | None:
    values = [one.numbers[name] for one in runs]
    return None if not values or None in values else fmean(values)


def _wilson(study: Study, mean: float | None, runs: Sequence[CellRun]) -> list[float] | None:
    """In %: the interval over test images of one network that has this share of them right."""
    sizes = {one.numbers["num_test"] for one in runs}
    found = over_images(mean, sizes.pop(), study.metric) if len(sizes) == 1 else None
    return None if found is None else list(found)


def comparisons(
    study: Study, outcomes: Mapping[ArmBatch, Outcomes], runs: Mapping[ArmBatch, Sequence[CellRun]]
) -> list[dict[str, Any]]:
    """Every place against the baseline, and the pairs of the study, each once.

    Two places of the same settings share their runs, so there is nothing to compare.
    """
    base = baseline_of(study)
    pairs = [(place, base) for place in outcomes if place != base]
    pairs += [both for pair in study.pairs for both in places_of(pair, outcomes)]
    found = []
    for one, other in dict.fromkeys(pairs):
        if share_runs(runs[one], runs[other]):
            continue
        names = (place_name(study, one), place_name(study, other))
        judged = judge(outcomes[one], outcomes[other], names=names, metric=study.metric)
        found.append(
            {
                **asdict(one),
                "against_arm": other.arm,
                "against_batch": other.batch,
                "n": len(judged.per_seed),
                **{key: getattr(judged, key) for key in ("difference", "low", "high", "verdict")},
                "sentence": judged.sentence,
                "per_seed": {str(seed): diff for seed, diff in judged.per_seed.items()},
                "on_images": on_the_same_images(runs[one], runs[other]),
            }
        )
    return found


def share_runs(one: Sequence[CellRun], other: Sequence[CellRun]) -> bool:
    """Whether two places have their runs in the same folders, since their settings are equal."""
    folders = [{run.folder for run in of if run.folder is not None} for of in (one, other)]
    return bool(folders[0] & folders[1])


def _apart(runs: Mapping[ArmBatch, Sequence[CellRun]], base: ArmBatch) -> list[ArmBatch]:
    """The places that share no run with the baseline or with one before."""
    found = [base]
    for place, of in runs.items():
        if not any(share_runs(of, runs[other]) for other in found) and place != base:
            found.append(place)
    return found


def places_of(pair: ArmPair, places: Mapping[ArmBatch, Any]) -> list[tuple[ArmBatch, ArmBatch]]:
    """The two places of each comparison that a pair stands for; those that the study has."""
    sizes = sorted({place.batch for place in places}) if pair.batch is None else [pair.batch]
    both = [
        (ArmBatch(pair.arm, size), ArmBatch(pair.against, pair.against_batch or size))
        for size in sizes
    ]
    return [(one, other) for one, other in both if one in places and other in places]


def place_name(study: Study, place: ArmBatch) -> str:
    """An arm at a batch size, for a sentence."""
    return f"{study.arm(place.arm).title} at batch {place.batch:,}"


def _limits(study: Study, outcomes: Mapping[ArmBatch, Outcomes]) -> list[dict[str, Any]]:
    """The scaling limits of each arm that has several batch sizes, from the baseline's size on."""
    if not is_in_points(study.metric):
        return []
    found = []
    for arm in study.arms:
        places = {place.batch: of for place, of in outcomes.items() if place.arm == arm.name}
        base = baseline_of(study).batch
        base = base if base in places else min(places)
        if not any(batch > base for batch in places):
            continue
        for points in LIMITS:
            limit = scaling_limit(
                places, base=base, points=points, title=arm.title, metric=study.metric
            )
            found.append({"arm": arm.name, "base": base, **asdict(limit)})
    return found


def _aggregates(study: Study, outcomes: Mapping[ArmBatch, Outcomes]) -> list[dict[str, Any]]:
    """The interquartile mean of each arm over the batch sizes that all arms have.

    A diverged run counts as 0 %. There is none where a run has no result yet, and for a metric that
    is not in %.
    """
    arms = [arm.name for arm in study.arms]
    sizes = [b for b in study.batches if all(ArmBatch(arm, b) in outcomes for arm in arms)]
    if len(arms) < 2 or len(sizes) < 2 or not is_in_points(study.metric):
        return []
    found = []
    for arm in arms:
        places = []
        for size in sizes:
            of = outcomes[ArmBatch(arm, size)]
            places.append([*of.values.values(), *(0.0 for _ in of.diverged)])
        if any(len(values) < len(study.seeds) for values in places):
            return []
        aggregate = interquartile_mean(places)
        if aggregate is not None:
            found.append({"arm": arm, "batches": sizes, **asdict(aggregate)})
    return found
