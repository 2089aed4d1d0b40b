"""`lbaccel study ls|show|plan|run|report`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from lbaccel.recipe import bounds
from lbaccel.recipe.options import Settings
from lbaccel.recipe.settings import add_options, layered, typed_options
from lbaccel.runs.columns import columns
from lbaccel.runs.folder import plain
from lbaccel.studies.checks import OWN, check_tune, judged_on_test_images, tune_of
from lbaccel.studies.find import find_study, shipped
from lbaccel.studies.folder import begin, is_study
from lbaccel.studies.read import read_study, scales_in, seeds_of
from lbaccel.studies.spec import SCALES, Study, Target
from lbaccel.text import printable

LAUNCHERS = ("local", "print", "submitit")
_ACTIONS = "ls|show|plan|run|report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Five actions."""
    parser.description = (
        "A study is a set of runs: arms x batch sizes x seeds. It is run, killed, gone on with and "
        "reported as one. Any flag of lbaccel train pins that setting in all of its runs."
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar=_ACTIONS)
    actions.add_parser("ls", help="the studies that come with lbaccel", allow_abbrev=False)
    showing = actions.add_parser("show", help="what a study does", allow_abbrev=False)
    showing.add_argument("study", metavar="NAME|FILE")
    showing.add_argument("--scale", choices=SCALES, help="its runs, with all of their settings")

    planning = actions.add_parser(
        "plan", help="runs, updates, hours here, and what the seeds can resolve", allow_abbrev=False
    )
    _add_study(planning)
    _add_jobs(planning)
    planning.add_argument("--no-timing", action="store_true", help="time no update on this machine")
    running = actions.add_parser("run", help="run what has no result yet", allow_abbrev=False)
    _add_study(running)
    add_running(running, to="default: studies/NAME-SCALE")

    reporting = actions.add_parser("report", help="what came of it", allow_abbrev=False)
    reporting.add_argument("folder", type=Path, metavar="DIR")
    shown = reporting.add_mutually_exclusive_group()
    shown.add_argument("--md", action="store_true", help="print Markdown")
    shown.add_argument("--json", action="store_true", help="print the result as JSON alone")
    reporting.add_argument("--csv", type=Path, metavar="FILE", help="write the table as CSV")


def add_running(parser: argparse.ArgumentParser, *, to: str) -> None:
    """The flags by which the runs of a study are started."""
    _add_jobs(parser)
    parser.add_argument(
        "--launcher",
        choices=LAUNCHERS,
        default="local",
        help="local; print: a shell line a run, for any scheduler; submitit (default: %(default)s)",
    )
    parser.add_argument("--output", dest="to", type=Path, metavar="DIR", help=to)
    parser.add_argument("--only", nargs="+", metavar="RUN", help="these runs alone, by their names")


def _add_jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=bounds.count, default=1, metavar="N", help="runs at a time")


def _add_study(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", metavar="NAME|FILE|DIR", help="DIR: go on with its results")
    parser.add_argument(
        "--scale", dest="at_scale", choices=SCALES, help="default: small, where there is one"
    )
    parser.add_argument("--seeds", type=bounds.count, metavar="N", help="how many")
    parser.add_argument(
        "--target", type=bounds.finite, metavar="X", help="of its metric; default: the file's"
    )
    parser.add_argument("--tune", metavar="GRID", help="such as 'base_lr x 0.5,1,2', for each arm")
    add_options(parser, without=[*OWN, "scale"])  # of crops: in a file alone


def run(arguments: argparse.Namespace) -> int:
    """0 done; 1 where runs failed or are still to be done.

    Raises:
        InputError: no such study, an arm that can't run, a folder of another study.
    """
    actions = {"ls": _list, "show": _show, "plan": _plan, "run": _run, "report": _report}
    return actions[arguments.action](arguments)


def _list(_: argparse.Namespace) -> int:
    rows = []
    for name, path in shipped().items():
        study = read_study(path)
        rows.append((name, study.title))
    print("\n".join(columns(rows)))
    print("\nlbaccel study show NAME says more, lbaccel study plan NAME how long it takes here.")
    return 0


def _show(a: argparse.Namespace) -> int:
    from lbaccel.studies.describe import describe, describe_runs

    path = find_study(a.study)
    if a.scale is None:
        scales = scales_in(path) or [""]
        print(describe({name: read_study(path, name or None) for name in scales}), end="")
    else:
        print(describe_runs(read_study(path, a.scale)), end="")
    return 0


def study_of(a: argparse.Namespace) -> Study:
    """The study that the arguments ask for, with what they pin in all runs.

    Raises:
        InputError: see `read_study`, and a setting or a grid of no use.
    """
    path = find_study(a.study)
    study = read_study(path, a.at_scale)
    typed = pinned_by(a)
    pinned = tuple(sorted({*study.pinned, *typed}))
    study = replace(study, settings={**study.settings, **typed}, pinned=pinned)
    study = judged_on_test_images(study)
    if a.seeds is not None:
        study = replace(study, seeds=seeds_of(a.seeds))
    if a.target is not None:
        study = replace(study, target=Target(study.metric, a.target))
    if a.tune is not None:
        tune = tune_of(a.tune)
        check_tune(study, tune)
        study = replace(study, tune=tune)
    return study


def pinned_by(a: argparse.Namespace) -> dict[str, Any]:
    """The settings that flags pin in all runs, as a file has them.

    Raises:
        InputError: a value that is none of its setting.
    """
    typed = {name: value for name, value in typed_options(vars(a)).items() if name not in OWN}
    parsed = layered(Settings(), typed, origin="flag")
    return {name: plain(parsed.value(name)) for name in typed}


def _plan(a: argparse.Namespace) -> int:
    from lbaccel.studies.outlook import check_cells, check_grid_images, lengths, measured_pace
    from lbaccel.studies.outlook_text import lines
    from lbaccel.studies.running import alike
    from lbaccel.studies.tuning import grid_of

    study = study_of(a)
    check_cells(study)
    check_grid_images(study)
    cells = study.cells()
    shared = alike(cells)
    own = [cell for cell in cells if cell.name not in shared]
    found = lengths([*grid_of(study), *own])
    pace = None if a.no_timing else measured_pace(study, jobs=a.jobs, say=say)
    for line in lines(study, found, pace, jobs=a.jobs):
        print(line)
    return 0


def _run(a: argparse.Namespace) -> int:
    from lbaccel.studies.launching import run_study
    from lbaccel.studies.outlook import check_cells, check_grid_images

    folder = Path(a.study) if is_study(Path(a.study)) and a.to is None else a.to
    study = study_of(a)
    check_cells(study)
    if folder is None:
        folder = Path("studies") / "-".join(filter(None, (study.name, study.scale)))
    check_grid_images(study)
    study = begin(folder, study)
    return run_study(folder, study, launcher=a.launcher, jobs=a.jobs, only=a.only or (), say=say)


def _report(a: argparse.Namespace) -> int:
    from lbaccel.runs.folder import atomic_write_text, strict_json
    from lbaccel.runs.outputs import writable
    from lbaccel.studies.results import study_result
    from lbaccel.studies.tables import TABLE_FILE, as_csv, as_markdown, as_text

    if a.csv is not None:
        writable(a.csv, "--csv", own=TABLE_FILE)
    result = study_result(a.folder)
    if a.json:
        for warning in result["warnings"]:  # the others have them in their text
            print(f"warning: {warning}", file=sys.stderr)
        print(strict_json(result, indent=1))
    else:
        print(as_markdown(result) if a.md else as_text(result))
    if a.csv is not None:
        atomic_write_text(a.csv, as_csv(result))
    return 0


def say(text: str) -> None:
    """Print a line at once."""
    print(printable(text), flush=True)
