"""How far the seeds of a study spread, measured, beside the spread that was planned (no torch)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import variance
from typing import Any

from lbaccel.runs.compare import is_in_points
from lbaccel.studies.judging import Outcomes, paired
from lbaccel.studies.seeds import resolves
from lbaccel.studies.spec import ArmBatch, Study


def pooled(samples: Iterable[Sequence[float]]) -> tuple[float, int] | None:
    """The standard deviation within samples, and its degrees of freedom; None where none are left.

    It is sqrt(sum (n_i - 1) s_i^2 / sum (n_i - 1)) over the samples of at least two values.

    >>> pooled([[1.0, 3.0], [5.0, 5.0], [7.0]])
    (1.0, 2)
    """
    several = [values for values in samples if len(values) > 1]
    freedom = sum(len(values) - 1 for values in several)
    if not freedom:
        return None
    squares = sum((len(values) - 1) * variance(values) for values in several)
    return math.sqrt(squares / freedom), freedom


def spread_of(
    study: Study, outcomes: Mapping[ArmBatch, Outcomes], base: ArmBatch
) -> dict[str, Any]:
    """The spread of one run and of a paired difference, pooled over places.

    Args:
        study: its seeds and the spread that it plans with.
        outcomes: of places that share no runs.
        base: the place that the others are paired with.

    Returns:
        `planned` and `run`, standard deviations of one run over seeds, `pair` that of a paired
        difference from the baseline, `resolves` the difference that the seeds of the study then
        resolve, and a sentence; None where there is no number.
    """
    run = pooled([list(of.values.values()) for of in outcomes.values()])
    pair = pooled(
        [
            list(paired(of, outcomes[base]).values())
            for place, of in outcomes.items()
            if place != base
        ]
    )
    n = len(study.seeds)
    found = None if pair is None or n < 2 else resolves(n, pair[0] / math.sqrt(2))
    sentence = None
    if run is not None and pair is not None and found is not None and is_in_points(study.metric):
        sentence = (
            f"The seeds of a place spread by {run[0]:.2f} points (standard deviation, pooled; "
            f"{study.spread:g} was planned), and paired differences by {pair[0]:.2f}: with that, "
            f"{n} seeds resolve {found:.2f} points."
        )
    return {
        "planned": study.spread,
        "run": None if run is None else run[0],
        "pair": None if pair is None else pair[0],
        "resolves": found,
        "sentence": sentence,
    }
