"""Whether the parts of a study fit together, and whether a grid may be laid over it (no torch)."""

from __future__ import annotations

import re
from dataclasses import replace

from lbaccel.errors import InputError, brief
from lbaccel.recipe.options import OPTIONS, Settings, default_of, is_read
from lbaccel.recipe.values import nearest_name
from lbaccel.studies.entries import fault
from lbaccel.studies.own_values import own_value
from lbaccel.studies.spec import BATCH, NORM, ArmBatch, Study, Tune

MOST_RUNS = 100_000
OWN = (
    *(BATCH, "seed", "output", "target", "monitor"),
    *("resume", "max_minutes", "max_hours", "dry_run", "extend"),
)
"""Settings that a study gives itself, or that have no sense in one."""
METRICS = tuple(f"val/{name}{end}" for end in ("", "_ema") for name in ("top1", "top5", "loss"))


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


def check_parts(study: Study) -> Study:
    """The same study, where its parts fit together."""
    names = [arm.name for arm in study.arms]
    if not names:
        fault("it has no arms; write arms: {name: {settings: {...}}}.")
    for arm in study.arms:
        unknown = [batch for batch in arm.per_batch if batch not in (arm.batches or study.batches)]
        if unknown:
            fault(f"arm {arm.name}: per_batch names {unknown[0]}, which is no batch of it.")
    for place in study.places():
        settings = study.cell(place, 0).settings
        if study.stated(place).get(NORM) is None:
            fault(
                f"arm {place.arm} at batch {place.batch} states no {NORM}: the samples that "
                f"BatchNorm sees at once decide the result. Write {NORM}: 32, batch, frozen, or "
                "none for a network without BatchNorm."
            )
        still = [key for key, value in settings.items() if str(value).split()[:1] == ["batch"]]
        if still:
            fault(
                f"arm {place.arm} at batch {place.batch}: {still[0]} {brief(settings[still[0]])} "
                "is no whole number of samples there."
            )
    for metric in (study.metric, study.target.metric if study.target else study.metric):
        if metric not in METRICS:
            fault(f"metric {brief(metric)} is none of an evaluation: {', '.join(METRICS)}.")
    if study.spread <= 0:
        fault(f"spread {study.spread:g} is a standard deviation: a number above 0.")
    places = study.places()
    if study.baseline is not None and study.baseline not in places:
        fault(f"baseline {study.baseline.arm} at {study.baseline.batch} is no run of the study.")
    for surface in study.landscapes:
        if surface.place not in places:
            fault(
                f"landscapes: {surface.place.arm} at {surface.place.batch} is no run of the study."
            )
    kinds = [surface.name for surface in study.landscapes]
    twice = next((name for name in kinds if kinds.count(name) > 1), None)
    if twice is not None:
        fault(f"landscapes: {twice} is there twice, and both would have one folder.")
    for name in study.fixed:
        if name not in OPTIONS:
            fault(f"fixed: there is no setting {brief(name)}.{nearest_name(name, OPTIONS)}")
    for pair in study.pairs:
        for arm in (pair.arm, pair.against):
            if arm not in names:
                fault(f"pairs: there is no arm {brief(arm)}; there are {', '.join(names)}.")
        one = ArmBatch(pair.arm, pair.batch or 0)
        other = ArmBatch(pair.against, pair.against_batch or pair.batch or 0)
        if one == other:
            fault(f"pairs: {pair.arm} is compared with itself.")
        for place in (one, other):
            if place.batch and place not in places:
                fault(f"pairs: {place.arm} at {place.batch} is no run of the study.")
    if len(places) * len(study.seeds) > MOST_RUNS:
        fault(f"it has {len(places) * len(study.seeds):,} runs; at most {MOST_RUNS:,} are made.")
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
