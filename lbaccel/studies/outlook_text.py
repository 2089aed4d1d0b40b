"""The plan of a study in words (no torch)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lbaccel.runs.columns import columns
from lbaccel.runs.pace import clock_time
from lbaccel.studies.outlook import CellLength, StudyPace
from lbaccel.studies.seeds import resolution
from lbaccel.studies.spec import Study


def lines(
    study: Study, found: Sequence[CellLength], pace: StudyPace | None, *, jobs: int
) -> Iterator[str]:
    """Runs, updates, samples and hours, and what the seeds can resolve.

    Args:
        study: the study.
        found: the length of each of its runs, those of its grid among them.
        pace: of this machine; None where nothing was timed.
        jobs: runs at one time.
    """
    scale = f" at scale {study.scale}" if study.scale else ""
    yield f"{study.name}{scale}: {study.title}"
    yield ""
    yield from columns([_head(pace), *_rows(study, found, pace)])
    yield ""
    grid = sum(1 for one in found if one.cell.variant)
    runs = f"{len(found)} runs" + (f", {grid} of them of the grid {study.tune}" if grid else "")
    samples = sum(one.samples for one in found)
    yield f"{runs}, {sum(one.num_updates for one in found):,} updates, {samples:,} samples"
    if pace is not None:
        seconds = sum(map(pace.of, found)) / jobs
        at_once = f", {jobs} at a time" if jobs > 1 else ""
        took = f"about {clock_time(seconds)} (h:min:s) on this machine{at_once}"
        yield f"{took}, without the starts of the processes"
    fewest = min(one.num_updates for one in found)
    if fewest < FEW_UPDATES:
        yield (
            f"note: the shortest run has {fewest} updates; below {FEW_UPDATES} a large batch loses "
            "by its few updates, and a verdict on its size means little"
        )
    yield resolution(len(study.seeds), study.spread)


FEW_UPDATES = 250


def _head(pace: StudyPace | None) -> tuple[str, ...]:
    timed = () if pace is None else ("time",)
    return ("arm", "batch", "runs", "updates", "samples", *timed)


def _rows(
    study: Study, found: Sequence[CellLength], pace: StudyPace | None
) -> Iterator[tuple[str, ...]]:
    for place in study.places():
        of = [one for one in found if (one.cell.arm, one.cell.batch) == (place.arm, place.batch)]
        one = next((one for one in of if not one.cell.variant), None)
        if one is None:  # an earlier arm has a run of these settings
            yield (place.arm, f"{place.batch:,}", "as above", *[""] * (2 if pace is None else 3))
            continue
        timed = () if pace is None else (clock_time(sum(map(pace.of, of))),)
        yield (
            place.arm,
            f"{place.batch:,}",
            str(len(of)),
            f"{one.num_updates:,}",
            f"{one.samples:,}",
            *timed,
        )
