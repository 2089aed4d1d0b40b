"""`lbaccel scaling`: how far one's own recipe can grow its batch, as one study and one page."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from lbaccel.commands.study import add_running, pinned_by, say
from lbaccel.errors import InputError, brief
from lbaccel.recipe import bounds
from lbaccel.recipe.settings import add_options
from lbaccel.runs.folder import atomic_write_text
from lbaccel.studies.checks import OWN, check_tune, tune_of
from lbaccel.studies.folder import begin, is_study, study_in

NO_GRID = "none"
PAGE = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The batch sizes, and the recipe."""
    parser.usage = "lbaccel scaling --data DATA --batches 64,256,1024 [flags of lbaccel train]"
    parser.description = (
        "Train one recipe at several batch sizes, each with a rate tuned on the same grid, and "
        "say how many updates and samples each needs, where a larger batch stops to help (the "
        "critical batch, beside what the noise scale predicts), and where it costs accuracy."
    )
    parser.add_argument("--batches", required=True, metavar="B,B,...", help="global batch sizes")
    parser.add_argument("--seeds", type=bounds.count, default=3, metavar="N", help="of each")
    parser.add_argument(
        "--tune",
        default="base_lr x 0.5,1,2",
        metavar="GRID",
        help="for each batch size, or none (default: %(default)s)",
    )
    parser.add_argument(
        "--target",
        type=bounds.finite,
        metavar="TOP1",
        help="whose first reaching is counted (default: the worst result, which all reach)",
    )
    add_running(parser, to="default: studies/scaling")
    add_options(parser, without=[*OWN, "scale"])  # of crops


def run(a: argparse.Namespace) -> int:
    """Run the study and write its page; 0 done, 1 where runs failed.

    Raises:
        InputError: batch sizes, a grid or settings of no use.
    """
    from lbaccel.studies.launching import run_study
    from lbaccel.studies.outlook import check_cells, check_grid_images
    from lbaccel.studies.results import study_result
    from lbaccel.studies.scaling import scaling_study, set_target
    from lbaccel.studies.tables import as_text

    tune = None if a.tune == NO_GRID else tune_of(a.tune)
    study = scaling_study(
        pinned_by(a), batches=_sizes(a.batches), seeds=a.seeds, tune=tune, target=a.target
    )
    if tune is not None:
        check_tune(study, tune)
    check_cells(study)
    check_grid_images(study)
    folder = a.to or Path("studies", study.name)
    if a.target is None and is_study(folder):  # it was set when the runs had ended
        study = replace(study, target=study_in(folder).target)
    study = begin(folder, study)
    code = run_study(folder, study, launcher=a.launcher, jobs=a.jobs, only=a.only or (), say=say)
    if code == 0 and a.launcher == "local" and not a.only:
        from lbaccel.report.parts import report

        set_target(folder, study)
        print(as_text(study_result(folder)))
        text, _ = report([folder], metric=study.metric, target=None)
        atomic_write_text(folder / PAGE, text)
        say(f"page: {folder / PAGE}")
    return code


def _sizes(text: str) -> list[int]:
    try:
        return [bounds.count(part) for part in text.replace(",", " ").split()]
    except bounds.Unfit as error:
        raise InputError(f"--batches {brief(text)}: {error}. Use such as 64,256,1024.") from None
