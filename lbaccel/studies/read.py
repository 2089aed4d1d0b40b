"""A study out of a YAML file, at one of its scales; every fault is one sentence (no torch)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lbaccel.documents import Malformed, yaml_in
from lbaccel.errors import InputError, brief
from lbaccel.recipe.options import OPTIONS
from lbaccel.recipe.values import nearest_name
from lbaccel.studies.checks import OWN, check_parts, tune_of
from lbaccel.studies.entries import (
    Fault,
    a_batch,
    a_count,
    a_list,
    a_mapping,
    a_number,
    a_text,
    check_entries,
    fault,
)
from lbaccel.studies.spec import (
    SCALES,
    Arm,
    ArmBatch,
    ArmPair,
    Publication,
    Study,
    Surface,
    Target,
)

MOST_SEEDS = 1000
MOST_LETTERS = 80  # of an arm: its name is a part of folders' names
_SETTINGS = frozenset(OPTIONS) - set(OWN)
_OF_ARM = ("title", "settings", "batches", "per_batch")
_OF_SCALE = (
    *("settings", "arms", "batches", "seeds", "baseline", "pairs", "target", "spread", "note"),
    *("only", "last", "tune", "landscapes"),
)
_KEYS = {f.name for f in fields(Study)} | {"scales", "only"}
_WORD = re.compile(r"[a-z0-9][a-z0-9_.]*(-[a-z0-9_.]+)*")


def read_study(path: Path, scale: str | None = None) -> Study:
    """The study in a file.

    Args:
        path: a YAML file.
        scale: one of its scales; None: "small" where it has scales.

    Raises:
        InputError: no such file or scale, or a study that can't be run: which entry, and the rule.
    """
    try:
        content = yaml_in(path)
    except Malformed as error:
        raise InputError(f"{path} is no YAML: {error}.") from error
    try:
        return study_of(content, scale)
    except Fault as fault:
        raise InputError(f"{path}: {fault}") from None


def scales_in(path: Path) -> list[str]:
    """The names of a file's scales, none where it has none."""
    try:
        content = yaml_in(path)
    except Malformed as error:
        raise InputError(f"{path} is no YAML: {error}.") from error
    found = content.get("scales") if isinstance(content, Mapping) else None
    return [str(name) for name in found] if isinstance(found, Mapping) else []


def study_of(content: Any, scale: str | None) -> Study:
    """The study that a mapping describes; see `read_study`."""
    whole = dict(a_mapping(content, "the file"))
    check_entries(whole, _KEYS, "the file")
    scales = a_mapping(whole.pop("scales", {}), "scales")
    check_entries(scales, SCALES, "scales")
    name = scale or ("small" if scales else str(whole.get("scale", "")))
    if scales and name not in scales:
        fault(f"there is no scale {brief(name)}; it has {', '.join(map(str, scales))}.")
    if not scales and scale not in (None, whole.get("scale")):
        fault(f"it has no scales, so there is no {brief(scale)}. Leave --scale out.")
    at = a_mapping(scales.get(name) or {}, f"scale {name}")
    check_entries(at, _OF_SCALE, f"scale {name}")
    return check_parts(_study({**_merged(whole, at), "scale": name}))


def as_mapping(study: Study) -> dict[str, Any]:
    """A study as what `study_of` reads, with plain values."""
    found = {key: value for key, value in asdict(study).items() if value not in (None, (), {}, "")}
    found["arms"] = {
        arm.name: {
            key: value
            for key, value in asdict(arm).items()
            if key != "name" and value not in ((), {})
        }
        for arm in study.arms
    }
    if study.tune is not None:
        found["tune"] = str(study.tune)
    return found


def _merged(whole: Mapping[str, Any], at: Mapping[str, Any]) -> dict[str, Any]:
    """The file with a scale's entries: mappings of settings and of arms are laid on top."""
    found = {**whole, **{k: v for k, v in at.items() if k not in ("settings", "arms")}}
    found["settings"] = {
        **a_mapping(whole.get("settings") or {}, "settings"),
        **a_mapping(at.get("settings") or {}, "settings"),
    }
    arms = {k: dict(a_mapping(v or {}, k)) for k, v in a_mapping(whole.get("arms"), "arms").items()}
    for name, more in a_mapping(at.get("arms") or {}, "arms").items():
        if name not in arms and "title" not in a_mapping(more, f"arm {name}"):
            fault(
                f"the scale changes an arm {brief(name)} that the file has not; there are "
                f"{', '.join(map(str, arms))}. An arm of a scale alone has a title."
            )
        arms.setdefault(name, {})
        for key, value in a_mapping(more, f"arm {name}").items():
            below = arms[name].get(key)
            laid = value
            if isinstance(value, Mapping) and isinstance(below, Mapping):
                laid = {**below, **value}
            if key == "per_batch" and isinstance(laid, Mapping):  # null leaves a batch size out
                laid = {batch: of for batch, of in laid.items() if of is not None}
            arms[name][key] = laid
    only = found.pop("only", None)
    if only is not None:
        only = [a_text(name, "only") for name in a_list(only, "only")]
        unknown = [name for name in only if name not in arms]
        if unknown:
            fault(f"only: there is no arm {brief(unknown[0])}; there are {', '.join(arms)}.")
    expected = a_mapping(found.get("expected") or {}, "expected")
    unknown = [name for name in expected if name not in arms]
    if unknown:
        fault(f"expected: there is no arm {brief(unknown[0])}; there are {', '.join(arms)}.")
    kept = arms if only is None else {name: arms[name] for name in arms if name in only}
    found["expected"] = {name: expected[name] for name in expected if name in kept}
    found["arms"] = kept
    return found


def _study(found: Mapping[str, Any]) -> Study:
    name = a_text(found.get("name"), "name")
    if not _WORD.fullmatch(name):
        fault(f"name {brief(name)} is no word of small letters, digits, - and _.")
    batches = _batches(found.get("batches"), "batches")
    arms = tuple(_arm(k, v) for k, v in a_mapping(found.get("arms"), "arms").items())
    return Study(
        name=name,
        scale=a_text(found.get("scale", ""), "scale"),
        title=a_text(found.get("title", name), "title"),
        question=a_text(found.get("question", ""), "question"),
        source=_source(found.get("source")),
        settings=_settings(found.get("settings") or {}, "settings"),
        arms=arms,
        batches=batches,
        seeds=seeds_of(found.get("seeds", 3)),
        metric=a_text(found.get("metric", "val/top1"), "metric"),
        last=a_count(found.get("last", 5), "last"),
        baseline=_place(found["baseline"]) if found.get("baseline") else None,
        pairs=tuple(_pair(one) for one in a_list(found.get("pairs") or [], "pairs")),
        target=_target(found.get("target")),
        spread=a_number(found.get("spread", 0.4), "spread"),
        fixed=tuple(a_text(one, "fixed") for one in a_list(found.get("fixed") or [], "fixed")),
        expected=_expected(found.get("expected") or {}),
        note=a_text(found.get("note", ""), "note"),
        landscapes=tuple(
            _surface(one) for one in a_list(found.get("landscapes") or [], "landscapes")
        ),
        pinned=_pinned(found),
        tune=None if found.get("tune") is None else tune_of(a_text(found["tune"], "tune")),
    )


def _pinned(found: Mapping[str, Any]) -> tuple[str, ...]:
    names = tuple(a_text(one, "pinned") for one in a_list(found.get("pinned") or [], "pinned"))
    unknown = [name for name in names if name not in found["settings"]]
    if unknown:
        fault(f"pinned names {brief(unknown[0])}, which settings does not.")
    return names


def seeds_of(value: Any) -> tuple[int, ...]:
    """Seeds from a number of them, 0 to n - 1, or a list.

    >>> seeds_of(3)
    (0, 1, 2)
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if not 1 <= value <= MOST_SEEDS:
            fault(f"seeds {value}: a study has 1 to {MOST_SEEDS}.")
        return tuple(range(value))
    found = tuple(a_list(value, "seeds"))
    whole = all(
        isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in found
    )
    if not found or not whole or len(set(found)) < len(found):
        fault(f"seeds {brief(value)}: give how many, or a list of different whole numbers.")
    return found


def _arm(name: Any, value: Any) -> Arm:
    name = str(name)
    if not _WORD.fullmatch(name) or len(name) > MOST_LETTERS:
        fault(
            f"arm {brief(name)} is no word of small letters, digits, - and _, of at most "
            f"{MOST_LETTERS} characters."
        )
    found = a_mapping(value or {}, f"arm {name}")
    check_entries(found, _OF_ARM, f"arm {name}")
    where = f"arm {name}"
    per_batch = {
        a_batch(batch, f"{where}: per_batch"): _settings(of, f"{where} at {batch}")
        for batch, of in a_mapping(found.get("per_batch") or {}, f"{where}: per_batch").items()
    }
    batches = found.get("batches") or ()
    return Arm(
        name=name,
        title=a_text(found.get("title", name), f"{where}: title"),
        settings=_settings(found.get("settings") or {}, where),
        batches=_batches(batches, f"{where}: batches") if batches else (),
        per_batch=per_batch,
    )


def _settings(value: Any, where: str) -> dict[str, Any]:
    found = {str(k).replace("-", "_"): v for k, v in a_mapping(value, where).items()}
    for name in found:
        if name in OWN:
            fault(f"{where}: {name} is no setting of a study; batches and seeds say what varies.")
        if name not in _SETTINGS:
            fault(f"{where}: there is no setting {brief(name)}.{nearest_name(name, _SETTINGS)}")
    return found


def _batches(value: Any, where: str) -> tuple[int, ...]:
    found = tuple(a_count(one, where) for one in a_list(value, where))
    if not found or list(found) != sorted(set(found)):
        fault(f"{where} {brief(value)}: give global batch sizes, each larger than the one before.")
    return found


def _source(value: Any) -> Publication | None:
    if value is None:
        return None
    found = a_mapping(value, "source")
    check_entries(found, ("authors", "title", "year", "where"), "source")
    return Publication(
        authors=a_text(found.get("authors", ""), "source: authors"),
        title=a_text(found.get("title", ""), "source: title"),
        year=a_count(found.get("year", 0), "source: year", least=0),
        where=a_text(found.get("where", ""), "source: where"),
    )


def _place(value: Any, where: str = "baseline") -> ArmBatch:
    found = a_mapping(value, where)
    check_entries(found, ("arm", "batch"), where)
    return ArmBatch(str(found.get("arm")), a_count(found.get("batch"), f"{where}: batch"))


def _pair(value: Any) -> ArmPair:
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return ArmPair(str(value[0]), str(value[1]))
    found = a_mapping(value, "pairs")
    check_entries(found, ("arm", "against", "batch", "against_batch"), "pairs")
    batch, other = found.get("batch"), found.get("against_batch")
    return ArmPair(
        str(found.get("arm")),
        str(found.get("against")),
        None if batch is None else a_count(batch, "pairs: batch"),
        None if other is None else a_count(other, "pairs: against_batch"),
    )


def _surface(value: Any) -> Surface:
    found = a_mapping(value, "landscapes")
    check_entries(found, ("place", "arm", "batch", "x", "y", "samples"), "landscapes")
    place = found.get("place") or {name: found.get(name) for name in ("arm", "batch")}
    return Surface(
        _place(place, "landscapes"),
        a_text(found.get("x", Surface.x), "landscapes: x"),
        a_text(found.get("y", ""), "landscapes: y"),
        a_count(found.get("samples", 0), "landscapes: samples", least=0),
    )


def _target(value: Any) -> Target | None:
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Target("val/top1", a_number(value, "target"))
    found = a_mapping(value, "target")
    check_entries(found, ("metric", "value"), "target")
    return Target(
        a_text(found.get("metric", "val/top1"), "target"), a_number(found.get("value"), "target")
    )


def _expected(value: Any) -> dict[str, dict[int, float]]:
    return {
        str(arm): {
            a_batch(batch, f"expected: {arm}"): a_number(number, f"expected: {arm}")
            for batch, number in a_mapping(of, f"expected: {arm}").items()
        }
        for arm, of in a_mapping(value, "expected").items()
    }
