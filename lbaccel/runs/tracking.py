"""Trackers: the run folder is the truth, wandb is a mirror."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import shutil
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import accelerate.tracking
from accelerate.tracking import GeneralTracker, on_main_process

from lbaccel.errors import InputError, RunFailed, reading
from lbaccel.runs.folder import (
    CONFIG,
    METRICS,
    TABLE,
    atomic_write_text,
    new_run_folder,
    plain,
    write_config,
)
from lbaccel.runs.lock import give_back, take
from lbaccel.runs.metric_lines import content, faults, next_number, numbered, read_lines
from lbaccel.runs.other_trackers import OURS, check_tracker, make_tracker, store_settings
from lbaccel.runs.wandb_login import wandb_mode
from lbaccel.runs.wandb_tracker import WandB, arguments_of_init

if TYPE_CHECKING:
    from accelerate import Accelerator


class RunFolderTracker(GeneralTracker):
    """Accelerate tracker that appends one strict JSON object a `log` call to `metrics.jsonl`.

    The file is line-buffered, so a crash loses one line at most; `finish` adds `metrics.csv`. In a
    loop of your own: `import lbaccel.runs.tracking`, then `Accelerator(log_with="run_folder")`
    makes `runs/<time>-<project>`, or the folder in `init_kwargs={"run_folder": {"run": path}}`.
    """

    name = "run_folder"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, project_name: str, *, run: Path | None = None):
        super().__init__()
        self._project_name = project_name
        self._run = run
        self._file: TextIO | None = None
        self._number = 1  # of the next line

    @property
    def tracker(self) -> Path | None:
        """The run folder; None before `start`, unless it was given."""
        return self._run

    @on_main_process
    def start(self) -> None:
        """Open `metrics.jsonl` for appending; a line that a crash cut off is taken away first."""
        if self._run is None:
            self._run = new_run_folder(Path("runs"), self._project_name)
        path = self._run / METRICS
        take(self._run, say=print)
        try:
            _mend_last_line(path)
            self._number = next_number(read_lines(path)) if path.exists() else 1
            self._file = path.open("a", buffering=1, encoding="utf-8")
        except BaseException:
            give_back(self._run)
            raise

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Write `config.yaml` unless it is there: `lbaccel.train` writes it before it starts."""
        assert self._run is not None, "start() comes first"
        if not (self._run / CONFIG).exists():
            write_config(self._run, values)

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Append one line; `step` is the update where `values` does not hold `update` itself."""
        assert self._file is not None, "start() comes first"
        update = values.get("update", step)
        if update is None:
            raise InputError(
                "log() was given neither step nor 'update': every line of metrics.jsonl belongs to "
                "one update. Use accelerator.log(values, step=update)."
            )
        self._file.write(numbered({"update": update, **values}, self._number) + "\n")
        self._number += 1

    @on_main_process
    def finish(self) -> None:
        """Close `metrics.jsonl` and write `metrics.csv` (all columns, missing values empty)."""
        if self._file is None:
            return
        assert self._run is not None
        try:
            self._write_table(self._run)
        finally:
            give_back(self._run)

    def _write_table(self, run: Path) -> None:
        assert self._file is not None
        self._file.close()
        self._file = None
        path = run / METRICS
        rows = [content(line) for line in read_lines(path) if line.row is not None]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        atomic_write_text(run / TABLE, text.getvalue())


def keep_updates_until(run: Path, update: int) -> list[str]:
    """Cut `metrics.jsonl` to the lines up to `update`, beside and renamed: each update is once.

    Where a line can't be read, the file as it was stays beside under another name.

    Returns:
        Sentences on what is damaged, missing or there twice up to `update`.
    """
    path = run / METRICS
    if not path.exists():
        return []
    lines = read_lines(path)
    kept = [line for line in lines if line.row is not None and line.row["update"] <= update]
    place = max((line.place for line in kept), default=0)
    found = faults([line for line in lines if line.place <= place or line.row is None])
    if any(line.row is None and not line.torn for line in lines):
        aside = _free_name(path)
        shutil.copyfile(path, aside)
        found.append(f"the lines that can't be read are left out; all of it is kept in {aside}")
    atomic_write_text(path, "".join(line.raw.decode("utf-8") + "\n" for line in kept))
    return found


def _free_name(path: Path) -> Path:
    """A name beside `path` that no file has: an earlier copy is not written over."""
    names = (path.with_name(f"{path.stem}.damaged-{number}{path.suffix}") for number in count(1))
    return next(name for name in names if not name.exists())


def _mend_last_line(path: Path) -> None:
    """End the file with a whole line: without it the next line would be glued to the cut one."""
    if not path.exists():
        return
    with reading(path):
        content = path.read_bytes()
    last = content[content.rfind(b"\n") + 1 :]
    if not last:
        return
    try:
        json.loads(last)
        with path.open("ab") as file:
            file.write(b"\n")
    except ValueError:
        os.truncate(path, len(content) - len(last))


# Registered once: a second time (importlib.reload) would be a warning.
if RunFolderTracker.name not in accelerate.tracking.LOGGER_TYPE_TO_CLASS:
    accelerate.tracking.register_tracker_class(RunFolderTracker)


def start_trackers(
    accelerator: Accelerator,
    run: Path,
    *,
    config: Mapping[str, Any],
    log_with: tuple[str, ...] = OURS,
    project: str = "lbaccel",
    group: str | None = None,
    name: str | None = None,
    tags: Iterable[str] = (),
    mode: str | None = None,
) -> str | None:
    """Start the trackers side by side behind `accelerator.log(values, step=update)`.

    Call it on every rank, once, with a bare `Accelerator()`; only the main process opens files.
    Where `<run>/wandb` holds an earlier run (resume), wandb goes on under its id. Trackers that
    the accelerator was built with stay. wandb is imported only where it will log.

    Returns:
        One line for the user about wandb, or None (no wandb, or not the main process).

    Raises:
        InputError: an unknown tracker or wandb mode, or trackers that have been started before.
        RunFailed: a tracker could not start.
    """
    for tracker in log_with:
        check_tracker(tracker, where="log_with")
    if accelerator.trackers:
        raise InputError("start_trackers() was called twice for one Accelerator. Call it once.")
    chosen, reason = wandb_mode(mode) if "wandb" in log_with else ("disabled", "not in log_with")
    if not accelerator.is_main_process:
        return None
    others = [make_tracker(t, run=run, project=project) for t in log_with if t not in OURS]
    ours: list[GeneralTracker] = [*others]
    if chosen != "disabled":
        names = {"group": group, "name": name or run.name, "tags": list(tags)}
        ours.append(WandB(project, config=plain(config), **names, **arguments_of_init(run, chosen)))
    if "run_folder" in log_with:  # last: it has no file open where wandb cannot start
        ours.append(RunFolderTracker(project, run=run))
    given = [t for t in accelerator.log_with if str(t) not in (*OURS, *log_with)]
    accelerator.log_with = [*given, *ours]
    try:
        accelerator.init_trackers(project)
        for tracker in others:
            store_settings(tracker, config)
    except Exception as error:
        failed = _not_started(error, others, wandb=f"{chosen}: {reason}")
        if failed is None:
            raise
        accelerator.trackers.clear()  # end_training() would finish what has not begun
        raise failed from error
    if chosen == "disabled":
        return f"wandb: disabled ({reason})." if "wandb" in log_with else None
    wandb_run: Any = accelerator.get_tracker("wandb", unwrap=True)
    wandb_run.define_metric("samples_seen")
    wandb_run.define_metric("*", step_metric="samples_seen")
    if chosen == "online":
        return f"wandb: online ({reason}). This run: {wandb_run.url}"
    folder = run / "wandb" / Path(wandb_run.dir).parent.name
    # the folder of all parts: alone, a later one would replace what an earlier one had uploaded
    return (
        f"wandb: offline ({reason}). This run: {folder}; "
        f"upload later with: wandb sync {shlex.quote(str(folder.parent))}"
    )


def _not_started(error: Exception, others: list[GeneralTracker], *, wandb: str) -> RunFailed | None:
    """A sentence where the error is a tracker's own; None where it is ours."""
    if type(error).__module__.startswith("wandb"):
        return RunFailed(
            f"wandb ({wandb}) did not start: {error}. "
            f"Use wandb mode offline and upload later with wandb sync."
        )
    if not others or isinstance(error, (InputError, RunFailed)):
        return None
    names = " or ".join(str(getattr(tracker, "name", "tracker")) for tracker in others)
    reason = " ".join(str(error).split())[:300]
    return RunFailed(
        f"{names} did not start ({type(error).__name__}: {reason}). Set it up, or leave it out of "
        "--log-with."
    )
