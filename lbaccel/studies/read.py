"""A study out of a YAML file, at one of its scales; every fault is one sentence (no torch)."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from lbaccel.documents import Malformed, yaml_in
from lbaccel.errors import InputError, brief
from lbaccel.recipe.options import OPTIONS, Settings, default_of, is_read
from lbaccel.recipe.values import nearest_name
from lbaccel.studies.own_values import own_value
from lbaccel.studies.spec import (
    BATCH,
    NORM,
    SCALES,
    Arm,
    ArmBatch,
    ArmPair,
    Publication,
    Study,
    Surface,
    Target,
    Tune,
)

MOST_SEEDS, MOST_RUNS = 1000, 100_000
MOST_LETTERS = 80  # of an arm: its name is a part of folders' names
OWN = (
    *(BATCH, "seed", "output", "target", "monitor"),
    *("resume", "max_minutes", "max_hours", "dry_run", "extend"),
)
"""Settings that a study gives itself, or that have no sense in one."""
METRICS = tuple(f"val/{name}{end}" for end in ("", "_ema") for name in ("top1", "top5", "loss"))
_SETTINGS = frozenset(OPTIONS) - set(OWN)
_OF_ARM = ("title", "settings", "batches", "per_batch")
_OF_SCALE = (
    *("settings", "arms", "batches", "seeds", "baseline", "pairs", "target", "spread", "note"),
    *("only", "last", "tune", "landscapes"),
)
_KEYS = {f.name for f in fields(Study)} | {"scales", "only"}
_WORD = re.compile(r"[a-z0-9][a-z0-9_.]*(-[a-z0-9_.]+)*")


class _Fault(InputError):
    """A sentence without the file's name, which `read_study` puts before it."""


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
    except _Fault as fault:
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
    whole = dict(_mapping(content, "the file"))
    _known(whole, _KEYS, "the file")
    scales = _mapping(whole.pop("scales", {}), "scales")
    _known(scales, SCALES, "scales")
    name = scale or ("small" if scales else str(whole.get("scale", "")))
    if scales and name not in scales:
        _fault(f"there is no scale {brief(name)}; it has {', '.join(map(str, scales))}.")
    if not scales and scale not in (None, whole.get("scale")):
        _fault(f"it has no scales, so there is no {brief(scale)}. Leave --scale out.")
    at = _mapping(scales.get(name) or {}, f"scale {name}")
    _known(at, _OF_SCALE, f"scale {name}")
    return _checked(_study({**_merged(whole, at), "scale": name}))


def judged_on_test_images(study: Study) -> Study:
    """The study, whose runs take a test set for their validation set where there is no other one.

    What is tuned is tuned on a part of the training set, so training still never sees them.
    """
    data = study.settings.get("data", default_of("data"))
    if "test_split" in study.settings or not splits(str(data)):
        return study
    return replace(study, settings={**study.settings, "test_split": "val"})


def splits(data: str) -> bool:
    """Whether data of this kind have their training set split, and their test set named, by us."""
    return is_read(OPTIONS["test_split"], Settings().with_values({"data": data}))


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
        **_mapping(whole.get("settings") or {}, "settings"),
        **_mapping(at.get("settings") or {}, "settings"),
    }
    arms = {k: dict(_mapping(v or {}, k)) for k, v in _mapping(whole.get("arms"), "arms").items()}
    for name, more in _mapping(at.get("arms") or {}, "arms").items():
        if name not in arms and "title" not in _mapping(more, f"arm {name}"):
            _fault(
                f"the scale changes an arm {brief(name)} that the file has not; there are "
                f"{', '.join(map(str, arms))}. An arm of a scale alone has a title."
            )
        arms.setdefault(name, {})
        for key, value in _mapping(more, f"arm {name}").items():
            below = arms[name].get(key)
            laid = value
            if isinstance(value, Mapping) and isinstance(below, Mapping):
                laid = {**below, **value}
            if key == "per_batch" and isinstance(laid, Mapping):  # null leaves a batch size out
                laid = {batch: of for batch, of in laid.items() if of is not None}
            arms[name][key] = laid
    only = found.pop("only", None)
    if only is not None:
        only = [_text(name, "only") for name in _list(only, "only")]
        unknown = [name for name in only if name not in arms]
        if unknown:
            _fault(f"only: there is no arm {brief(unknown[0])}; there are {', '.join(arms)}.")
        arms = {name: arms[name] for name in arms if name in only}
    found["arms"] = arms
    return found


def _study(found: Mapping[str, Any]) -> Study:
    name = _text(found.get("name"), "name")
    if not _WORD.fullmatch(name):
        _fault(f"name {brief(name)} is no word of small letters, digits, - and _.")
    batches = _batches(found.get("batches"), "batches")
    arms = tuple(_arm(k, v) for k, v in _mapping(found.get("arms"), "arms").items())
    return Study(
        name=name,
        scale=_text(found.get("scale", ""), "scale"),
        title=_text(found.get("title", name), "title"),
        question=_text(found.get("question", ""), "question"),
        source=_source(found.get("source")),
        settings=_settings(found.get("settings") or {}, "settings"),
        arms=arms,
        batches=batches,
        seeds=seeds_of(found.get("seeds", 3)),
        metric=_text(found.get("metric", "val/top1"), "metric"),
        last=_count(found.get("last", 5), "last"),
        baseline=_place(found["baseline"]) if found.get("baseline") else None,
        pairs=tuple(_pair(one) for one in _list(found.get("pairs") or [], "pairs")),
        target=_target(found.get("target")),
        spread=_number(found.get("spread", 0.4), "spread"),
        fixed=tuple(_text(one, "fixed") for one in _list(found.get("fixed") or [], "fixed")),
        expected=_expected(found.get("expected") or {}),
        note=_text(found.get("note", ""), "note"),
        landscapes=tuple(
            _surface(one) for one in _list(found.get("landscapes") or [], "landscapes")
        ),
        pinned=_pinned(found),
        tune=None if found.get("tune") is None else tune_of(_text(found["tune"], "tune")),
    )


def _pinned(found: Mapping[str, Any]) -> tuple[str, ...]:
    names = tuple(_text(one, "pinned") for one in _list(found.get("pinned") or [], "pinned"))
    unknown = [name for name in names if name not in found["settings"]]
    if unknown:
        _fault(f"pinned names {brief(unknown[0])}, which settings does not.")
    return names


def _checked(study: Study) -> Study:
    """The same study, where its parts fit together."""
    names = [arm.name for arm in study.arms]
    if not names:
        _fault("it has no arms; write arms: {name: {settings: {...}}}.")
    for arm in study.arms:
        unknown = [batch for batch in arm.per_batch if batch not in (arm.batches or study.batches)]
        if unknown:
            _fault(f"arm {arm.name}: per_batch names {unknown[0]}, which is no batch of it.")
    for place in study.places():
        settings = study.cell(place, 0).settings
        if study.stated(place).get(NORM) is None:
            _fault(
                f"arm {place.arm} at batch {place.batch} states no {NORM}: the samples that "
                f"BatchNorm sees at once decide the result. Write {NORM}: 32, batch, frozen, or "
                "none for a network without BatchNorm."
            )
        still = [key for key, value in settings.items() if str(value).split()[:1] == ["batch"]]
        if still:
            _fault(
                f"arm {place.arm} at batch {place.batch}: {still[0]} {brief(settings[still[0]])} "
                "is no whole number of samples there."
            )
    for metric in (study.metric, study.target.metric if study.target else study.metric):
        if metric not in METRICS:
            _fault(f"metric {brief(metric)} is none of an evaluation: {', '.join(METRICS)}.")
    if study.spread <= 0:
        _fault(f"spread {study.spread:g} is a standard deviation: a number above 0.")
    places = study.places()
    if study.baseline is not None and study.baseline not in places:
        _fault(f"baseline {study.baseline.arm} at {study.baseline.batch} is no run of the study.")
    for surface in study.landscapes:
        if surface.place not in places:
            _fault(
                f"landscapes: {surface.place.arm} at {surface.place.batch} is no run of the study."
            )
    kinds = [surface.name for surface in study.landscapes]
    twice = next((name for name in kinds if kinds.count(name) > 1), None)
    if twice is not None:
        _fault(f"landscapes: {twice} is there twice, and both would have one folder.")
    for name in study.fixed:
        if name not in OPTIONS:
            _fault(f"fixed: there is no setting {brief(name)}.{nearest_name(name, OPTIONS)}")
    for pair in study.pairs:
        for arm in (pair.arm, pair.against):
            if arm not in names:
                _fault(f"pairs: there is no arm {brief(arm)}; there are {', '.join(names)}.")
        one = ArmBatch(pair.arm, pair.batch or 0)
        other = ArmBatch(pair.against, pair.against_batch or pair.batch or 0)
        if one == other:
            _fault(f"pairs: {pair.arm} is compared with itself.")
        for place in (one, other):
            if place.batch and place not in places:
                _fault(f"pairs: {place.arm} at {place.batch} is no run of the study.")
    if len(places) * len(study.seeds) > MOST_RUNS:
        _fault(f"it has {len(places) * len(study.seeds):,} runs; at most {MOST_RUNS:,} are made.")
    if study.tune is not None:
        check_tune(study, study.tune)
    return study


def check_tune(study: Study, tune: Tune) -> None:
    """Stop at a grid that the study's contract forbids.

    Raises:
        InputError: the setting is none of the recipe, does not decide the result, or is fixed.
    """
    name, row = tune.setting, OPTIONS.get(tune.setting)
    if row is None:
        raise InputError(
            f"--tune {tune}: there is no setting {brief(name)}.{nearest_name(name, OPTIONS)}"
        )
    if name in OWN or name == NORM or not row.contract:
        raise InputError(
            f"--tune {tune}: {name} is no hyper-parameter of the result that may be tuned here. "
            "Tune base_lr, weight_decay or momentum."
        )
    if name in study.fixed:
        raise InputError(
            f"--tune {tune}: the study {study.name} is about a {name} that stays as its arms say, "
            "so no grid may move it. Leave --tune out, or write a study of your own."
        )
    for place in study.places():
        settings = study.cell(place, 0).settings
        own, data = own_value(settings, name), str(settings.get("data", default_of("data")))
        if not splits(data):
            raise InputError(
                f"--tune {tune}: a grid is judged on a part of the training set, and --data "
                f"{data} can't be split. Use folder:PATH, parquet:PATH or the like."
            )
        if tune.relative and not isinstance(own, (int, float)):
            raise InputError(
                f"--tune {tune}: arm {place.arm} at batch {place.batch} states no number for "
                f"{name}, so there is nothing to multiply. Write values: --tune '{name} 0.05,0.1'."
            )


def tune_of(text: str) -> Tune:
    """A grid from text such as "base_lr x 0.5,1,2" (factors) or "base_lr 0.05,0.1" (values).

    Raises:
        InputError: another text, fewer than two values, or one twice.

    >>> tune_of("base_lr x 0.5,1,2")
    Tune(setting='base_lr', values=(0.5, 1.0, 2.0), relative=True)
    """
    match = re.fullmatch(r"\s*([A-Za-z_-]+)\s+(x\s+)?([-+0-9.eE]+(?:[,\s]+[-+0-9.eE]+)*)\s*", text)
    try:
        values = tuple(float(part) for part in re.split(r"[,\s]+", match[3])) if match else ()
    except ValueError:
        values = ()
    if match is None or len(values) < 2 or min(values) <= 0 or len(set(values)) < len(values):
        raise InputError(
            f"--tune {brief(text)} is no grid: a setting and at least two different numbers above "
            "0, such as 'base_lr x 0.5,1,2' (factors) or 'base_lr 0.05,0.1,0.2' (values)."
        )
    values = tuple(sorted(values))
    return Tune(match[1].lstrip("-").replace("-", "_"), values, match[2] is not None)


def seeds_of(value: Any) -> tuple[int, ...]:
    """Seeds from a number of them, 0 to n - 1, or a list.

    >>> seeds_of(3)
    (0, 1, 2)
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if not 1 <= value <= MOST_SEEDS:
            _fault(f"seeds {value}: a study has 1 to {MOST_SEEDS}.")
        return tuple(range(value))
    found = tuple(_list(value, "seeds"))
    whole = all(
        isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in found
    )
    if not found or not whole or len(set(found)) < len(found):
        _fault(f"seeds {brief(value)}: give how many, or a list of different whole numbers.")
    return found


def _arm(name: Any, value: Any) -> Arm:
    name = str(name)
    if not _WORD.fullmatch(name) or len(name) > MOST_LETTERS:
        _fault(
            f"arm {brief(name)} is no word of small letters, digits, - and _, of at most "
            f"{MOST_LETTERS} characters."
        )
    found = _mapping(value or {}, f"arm {name}")
    _known(found, _OF_ARM, f"arm {name}")
    where = f"arm {name}"
    per_batch = {
        _batch(batch, f"{where}: per_batch"): _settings(of, f"{where} at {batch}")
        for batch, of in _mapping(found.get("per_batch") or {}, f"{where}: per_batch").items()
    }
    batches = found.get("batches") or ()
    return Arm(
        name=name,
        title=_text(found.get("title", name), f"{where}: title"),
        settings=_settings(found.get("settings") or {}, where),
        batches=_batches(batches, f"{where}: batches") if batches else (),
        per_batch=per_batch,
    )


def _settings(value: Any, where: str) -> dict[str, Any]:
    found = {str(k).replace("-", "_"): v for k, v in _mapping(value, where).items()}
    for name in found:
        if name in OWN:
            _fault(f"{where}: {name} is no setting of a study; batches and seeds say what varies.")
        if name not in _SETTINGS:
            _fault(f"{where}: there is no setting {brief(name)}.{nearest_name(name, _SETTINGS)}")
    return found


def _batches(value: Any, where: str) -> tuple[int, ...]:
    found = tuple(_count(one, where) for one in _list(value, where))
    if not found or list(found) != sorted(set(found)):
        _fault(f"{where} {brief(value)}: give global batch sizes, each larger than the one before.")
    return found


def _source(value: Any) -> Publication | None:
    if value is None:
        return None
    found = _mapping(value, "source")
    _known(found, ("authors", "title", "year", "where"), "source")
    return Publication(
        authors=_text(found.get("authors", ""), "source: authors"),
        title=_text(found.get("title", ""), "source: title"),
        year=_count(found.get("year", 0), "source: year", least=0),
        where=_text(found.get("where", ""), "source: where"),
    )


def _place(value: Any, where: str = "baseline") -> ArmBatch:
    found = _mapping(value, where)
    _known(found, ("arm", "batch"), where)
    return ArmBatch(str(found.get("arm")), _count(found.get("batch"), f"{where}: batch"))


def _pair(value: Any) -> ArmPair:
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return ArmPair(str(value[0]), str(value[1]))
    found = _mapping(value, "pairs")
    _known(found, ("arm", "against", "batch", "against_batch"), "pairs")
    batch, other = found.get("batch"), found.get("against_batch")
    return ArmPair(
        str(found.get("arm")),
        str(found.get("against")),
        None if batch is None else _count(batch, "pairs: batch"),
        None if other is None else _count(other, "pairs: against_batch"),
    )


def _surface(value: Any) -> Surface:
    found = _mapping(value, "landscapes")
    _known(found, ("place", "arm", "batch", "x", "y", "samples"), "landscapes")
    place = found.get("place") or {name: found.get(name) for name in ("arm", "batch")}
    return Surface(
        _place(place, "landscapes"),
        _text(found.get("x", Surface.x), "landscapes: x"),
        _text(found.get("y", ""), "landscapes: y"),
        _count(found.get("samples", 0), "landscapes: samples", least=0),
    )


def _target(value: Any) -> Target | None:
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Target("val/top1", _number(value, "target"))
    found = _mapping(value, "target")
    _known(found, ("metric", "value"), "target")
    return Target(
        _text(found.get("metric", "val/top1"), "target"), _number(found.get("value"), "target")
    )


def _expected(value: Any) -> dict[str, dict[int, float]]:
    return {
        str(arm): {
            _batch(batch, f"expected: {arm}"): _number(number, f"expected: {arm}")
            for batch, number in _mapping(of, f"expected: {arm}").items()
        }
        for arm, of in _mapping(value, "expected").items()
    }


def _known(found: Mapping[Any, Any], names: Collection[str], where: str) -> None:
    for key in found:
        if key not in names:
            near = nearest_name(str(key), names)
            _fault(f"{where} has an unknown entry {brief(key)}.{near} Entries: {_listed(names)}.")


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names))


def _mapping(value: Any, where: str) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else _wrong(value, where, "a mapping")


def _list(value: Any, where: str) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else _wrong(value, where, "a list")


def _text(value: Any, where: str) -> str:
    return value if isinstance(value, str) else _wrong(value, where, "text")


def _number(value: Any, where: str) -> float:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    good: Callable[[float], bool] = lambda v: abs(v) < 1e300  # noqa: E731
    return float(value) if plain and good(value) else _wrong(value, where, "a number")


def _count(value: Any, where: str, *, least: int = 1) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool) and least <= value <= 2**53
    return value if whole else _wrong(value, where, f"a whole number from {least}")


def _batch(key: Any, where: str) -> int:
    """A batch size that is the key of a mapping: JSON and lbaccel's own YAML have it as text."""
    return _count(int(key) if isinstance(key, str) and key.isdecimal() else key, where)


def _wrong(value: Any, where: str, kind: str) -> NoReturn:
    _fault(f"{where} is {brief(value)}, and has to be {kind}.")


def _fault(sentence: str) -> NoReturn:
    raise _Fault(sentence)
