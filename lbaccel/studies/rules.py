"""The rules behind the figures of runs and studies, in the words of every report (no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lbaccel.product.shares import wilson
from lbaccel.runs.compare import is_in_points
from lbaccel.runs.groups import LEVEL
from lbaccel.studies.seeds import MARGIN


def value_rule(metric: str, last: int) -> str:
    """The figure that stands for a run.

    >>> value_rule("val/top1", 5)
    'The value of a run is the median of its last 5 evaluations of val/top1, never its best.'
    """
    of = f"the median of its last {last} evaluations" if last > 1 else "its last evaluation"
    return f"The value of a run is {of} of {metric}, never its best."


def seeds_rule(metric: str, level: float = LEVEL) -> str:
    """Intervals, differences and verdicts over seeds."""
    text = (
        f"Intervals over seeds are Student's at {100 * level:g} %. A difference is taken seed by "
        "seed: runs of one seed share the order of the data, the augmentation and the initial "
        "weights."
    )
    if is_in_points(metric):
        text += (
            f' "No loss" means that the interval of the mean difference lies inside ±{MARGIN:g} '
            'points; "loss" and "gain" mean that it excludes 0.'
        )
    return text


def study_rule(result: Mapping[str, Any]) -> str:
    """Both, of a study's result."""
    metric = result["metric"]
    return f"{value_rule(metric, result['last'])} {seeds_rule(metric, result['level'])}"


def over_images(percent: float | None, num_images: Any, metric: str) -> tuple[float, float] | None:
    """In %: Wilson's interval of one network with this share of the validation images right.

    None for a metric that is no share of them, and where their number is not known.

    >>> [round(end, 1) for end in over_images(90.0, 10, "val/top1")]
    [59.6, 98.2]
    >>> over_images(90.0, 10, "train/top1")
    """
    known = isinstance(num_images, int) and not isinstance(num_images, bool) and num_images > 0
    if percent is None or not known or not 0 <= percent <= 100:
        return None
    if not (metric.startswith("val/") and is_in_points(metric)):
        return None
    low, high = wilson(round(num_images * percent / 100), num_images)
    return 100 * low, 100 * high


def edge_warnings(tuning: Sequence[Mapping[str, Any]]) -> list[str]:
    """A warning for each place whose best value lies at the edge of its grid."""
    return [
        f"{one['arm']} at batch {one['batch']}: the best {one['setting']}, {one['best']:g}, lies "
        "at the edge of its grid, so a better one may lie beyond it. Widen the grid with --tune."
        for one in tuning
        if one.get("at_edge") and isinstance(one.get("best"), (int, float))
    ]
