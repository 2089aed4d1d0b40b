"""The runs of a study as one job array of submitit, which is an extra."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lbaccel.errors import InputError
from lbaccel.studies.folder import without_result
from lbaccel.studies.spec import StudyCell

JOBS = "submitit"  # a folder of the study


def submit(
    folder: Path, cells: Sequence[StudyCell], *, jobs: int, say: Callable[[str], object]
) -> int:
    """Hand each run without a result to the cluster, at most `jobs` at one time.

    The parameters of the queue (partition, time, GPUs) are those of submitit's environment and of
    the cluster's defaults.

    Raises:
        InputError: submitit is not installed.
    """
    try:
        import submitit
    except ImportError as error:
        raise InputError(
            "--launcher submitit needs submitit: pip install 'lbaccel[submitit]'. Without it, "
            "--launcher print writes a line a run for any scheduler."
        ) from error
    waiting = without_result(folder, cells)
    if not waiting:
        say("every run has its result")
        return 0
    executor: Any = submitit.AutoExecutor(folder=folder / JOBS)
    executor.update_parameters(name=folder.name, slurm_array_parallelism=jobs)
    names = [cell.name for cell in waiting]
    sent = executor.map_array(_run_one, [str(folder.resolve())] * len(names), names)
    say(f"{len(sent)} jobs are in the queue, the first is {sent[0].job_id}")
    return 0


def _run_one(folder: str, name: str) -> int:
    """In the job: the worker of this one run."""
    line = [sys.executable, "-m", "lbaccel", "study", "run", folder, "--only", name]
    return subprocess.run(line, check=True).returncode
