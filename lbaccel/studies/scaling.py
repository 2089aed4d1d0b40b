"""The scaling study of one's own problem, as a study: one arm, a tuned rate, several batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lbaccel.errors import InputError
from lbaccel.recipe.options import Settings, default_of
from lbaccel.recipe.settings import layered
from lbaccel.runs.compare import lower_is_better
from lbaccel.studies.checks import judged_on_test_images, splits
from lbaccel.studies.folder import rewrite, run_folder, state_of
from lbaccel.studies.outcome import value_in
from lbaccel.studies.own_values import own_value
from lbaccel.studies.read import MOST_SEEDS
from lbaccel.studies.spec import NO_NORM, NORM, Arm, ArmBatch, Study, Target, Tune

ARM = "recipe"
GRID = Tune("base_lr", (0.5, 1.0, 2.0))
NORM_BATCH = 32


def scaling_study(
    typed: Mapping[str, Any],
    *,
    batches: Sequence[int],
    seeds: int,
    tune: Tune | None,
    target: float | None,
) -> Study:
    """The study of one recipe at several batch sizes.

    The rate at each of them is tuned with one grid, around what the recipe's rule gives there. As
    in Shallue et al. 2019, the question is how many updates reach a target.

    Args:
        typed: settings of the recipe, by name.
        batches: global batch sizes, at least two.
        seeds: runs of each.
        tune: None: the rule's rate is taken as it is.
        target: of val/top1, in %; None: it is set afterwards, see `set_target`.

    Raises:
        InputError: fewer than two batch sizes, or data that can't be split for the grid.
    """
    sizes = tuple(sorted(set(batches)))
    if len(sizes) < 2 or len(sizes) < len(batches):
        raise InputError(
            f"--batches {' '.join(map(str, batches))}: a study of scaling needs at least two "
            "different global batch sizes, such as 64,256,1024."
        )
    if not 1 <= seeds <= MOST_SEEDS:
        raise InputError(f"--seeds {seeds}: a study has 1 to {MOST_SEEDS}.")
    stated = dict(typed)
    data = str(stated.setdefault("data", default_of("data")))
    stated.setdefault(NORM, _norm_of(stated, smallest=sizes[0]))
    if tune is not None and tune.relative:
        stated.setdefault(tune.setting, own_value(stated, tune.setting))
    if tune is not None and not splits(data):
        raise InputError(
            f"--data {data} can't be split, and a rate is tuned on a part of the "
            "training set. Use folder:PATH, parquet:PATH or the like, or --tune none."
        )
    first = ArmBatch(ARM, sizes[0])
    study = Study(
        name="scaling",
        scale="",
        title=f"Batch sizes {', '.join(f'{size:,}' for size in sizes)} of one recipe",
        question="How many updates and samples does each batch size need, and what does it cost?",
        source=None,
        settings=stated,
        arms=(Arm(ARM, "the recipe"),),
        batches=sizes,
        seeds=tuple(range(seeds)),
        baseline=first,
        target=None if target is None else Target("val/top1", target),
        tune=tune,
        pinned=tuple(sorted(typed)),
    )
    return judged_on_test_images(study)


def set_target(folder: Path, study: Study) -> Study:
    """The study with the target that every run reaches, where none was given.

    It is the worst of the runs' results: a batch size that ends lower than others decides it, so
    no run is censored, and the numbers say how fast each gets there.
    """
    if study.target is not None:
        return study
    values = [
        value
        for cell in study.cells()
        if (run := run_folder(folder, cell)) is not None
        and state_of(run) == "done"
        and (value := value_in(run, study)) is not None
    ]
    if not values:
        return study
    worst = max(values) if lower_is_better(study.metric) else min(values)
    study = replace(study, target=Target(study.metric, worst))
    rewrite(folder, study)
    return study


def _norm_of(settings: Mapping[str, Any], *, smallest: int) -> int | str:
    """BatchNorm's samples that the study states: those of the recipe, where it has BatchNorm."""
    from lbaccel.models import create_backbone
    from lbaccel.update.normalization import has_batch_norm

    s = layered(Settings(), settings, origin="flag")
    model = create_backbone(s.model.model, num_classes=s.model.num_classes or 2)
    return min(NORM_BATCH, smallest) if has_batch_norm(model) else NO_NORM
