"""The verdict of a study in words: the sentences that a report begins with (no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lbaccel.runs.compare import is_in_points
from lbaccel.studies.judging import Verdict, signed
from lbaccel.studies.rules import study_rule

_ORDER: tuple[Verdict, ...] = ("loss", "gain", "no loss", "not resolved", "not enough seeds")
_PHRASES: dict[Verdict, tuple[str, str]] = {
    "loss": ("shows a loss", "show a loss"),
    "gain": ("shows a gain", "show a gain"),
    "no loss": ("shows no loss", "show no loss"),
    "not resolved": ("is not resolved", "are not resolved"),
    "not enough seeds": ("has not enough seeds", "have not enough seeds"),
}
Comparison = Mapping[str, Any]


def verdict(result: Mapping[str, Any]) -> list[str]:
    """The sentences, the most important one first.

    Args:
        result: of `study_result`, without its verdict.
    """
    compared: Sequence[Comparison] = result["comparisons"]
    said = [_headline(compared), *_incomplete(result)]
    if len(compared) > 1:
        said += _by_pair_of_arms(result, compared)
    said += _limits(result["scaling_limits"])
    said += [one["sentence"] for one in result["to_target"]]
    said += [result["spread"]["sentence"]] * (result["spread"]["sentence"] is not None)
    if is_in_points(result["metric"]) and compared:
        said.append(study_rule(result))
    number = len(result["warnings"])
    if number:
        said.append(f"{number} warning{'s' * (number > 1)} below.")
    return said


def _headline(compared: Sequence[Comparison]) -> str:
    if not compared:
        return "There is one place alone, so nothing is compared."
    if len(compared) == 1:
        return compared[0]["sentence"]
    counts: list[tuple[Verdict, int]] = [
        (kind, sum(one["verdict"] == kind for one in compared)) for kind in _ORDER
    ]
    words = [f"{count} {_PHRASES[kind][count > 1]}" for kind, count in counts if count]
    return f"Of {len(compared)} comparisons {_listed(words)}."


def _listed(words: Sequence[str]) -> str:
    """
    >>> _listed(["a", "b", "c"]), _listed(["a"])
    ('a, b and c', 'a')
    """
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def once(runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The runs of a result, each once: not again for another cell that it stands for."""
    return [run for run in runs if run["shared_with"] is None]


def _incomplete(result: Mapping[str, Any]) -> list[str]:
    own = once(result["runs"])
    diverged = sum(run["status"] == "diverged" for run in own)
    missing = sum(run["value"] is None for run in own) - diverged
    total, said = len(own), []
    if missing:
        said.append(f"{missing} of {total} runs {'has' if missing == 1 else 'have'} no result yet.")
    if diverged:
        said.append(f"{diverged} of {total} runs diverged.")
    if len(result["seeds"]) == 1:
        said.append("Each place has one seed, so no verdict is possible; run at least 3 seeds.")
    return said


def _limits(limits: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of each arm the strictest limit, and a looser one where it lies elsewhere."""
    said, before = [], None
    for one in limits:
        if (one["arm"], one["batch"]) != before:
            said.append(one["sentence"])
        before = (one["arm"], one["batch"])
    return said


def _by_pair_of_arms(result: Mapping[str, Any], compared: Sequence[Comparison]) -> list[str]:
    """A sentence for each two arms: their batch sizes by verdict, with the differences."""
    groups: dict[tuple[str, str, int | None], list[Comparison]] = {}
    for one in compared:
        same = one["batch"] == one["against_batch"] and one["arm"] != one["against_arm"]
        where = None if same else one["against_batch"]
        groups.setdefault((one["arm"], one["against_arm"], where), []).append(one)
    titles = {arm["name"]: arm["title"] for arm in result["arms"]}
    return [
        f"{titles[arm]} against {titles[other]}"
        f"{' at the same batch' if where is None else f' at batch {where:,}'}: "
        f"{_verdicts(of, result['metric'])}."
        for (arm, other, where), of in groups.items()
    ]


def _verdicts(compared: Sequence[Comparison], metric: str) -> str:
    parts = []
    for kind in _ORDER:
        of = [one for one in compared if one["verdict"] == kind]
        if of:
            places = [f"{one['batch']:,}{_difference(one, metric)}" for one in of]
            parts.append(f"{kind} at batch {_listed(places)}")
    return "; ".join(parts)


def _difference(one: Comparison, metric: str) -> str:
    return "" if one["difference"] is None else f" ({signed(one['difference'], metric)})"
