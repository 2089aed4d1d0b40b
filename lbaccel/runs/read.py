"""Finished and crashed runs as values: read out of a run folder or out of wandb's offline log."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lbaccel.documents import Malformed, json_in, yaml_in
from lbaccel.errors import InputError, RunFailed
from lbaccel.runs.folder import CONFIG, METRICS, SUMMARY
from lbaccel.runs.metric_lines import Line, content, faults, read_lines

NOT_METRICS = frozenset({"update", "samples_seen", "epoch", "perf/seconds"})


class Point(NamedTuple):
    """One logged value and where on each x-axis it stands; None is unknown, or not finite."""

    update: int
    samples_seen: int | None
    hours: float | None
    value: float | None


Series = tuple[Point, ...]


@dataclass(frozen=True)
class Run:
    """One training run: its settings, its last words, and each metric in order of updates.

    `config` and `summary` are flat: nested settings have keys such as `plan/micro_batch_size`.
    """

    name: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    history: Mapping[str, Series]
    source: Literal["folder", "wandb-offline", "wandb-cloud"]
    notes: tuple[str, ...] = ()  # on lines that are damaged, missing or there twice

    def warn(self) -> None:
        """Print the notes beside the result, not into it."""
        for note in self.notes:
            print(f"warning: {note}", file=sys.stderr)


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level, keys joined by `/`.

    >>> flatten({"seed": 0, "plan": {"micro_batch_size": 64}})
    {'seed': 0, 'plan/micro_batch_size': 64}
    """
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def history_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, Series]:
    """Series of each metric out of logged rows, each with its `update`, in the order of logging.

    Rows of one update are one row (the later value counts), as wandb has it. A row whose update
    is smaller than the row before comes from a resumed run: it and what follows take the place of
    everything that was logged from that update on.

    >>> history_of([{"update": 8, "samples_seen": 512, "val/top1": 0.5}])
    {'val/top1': (Point(update=8, samples_seen=512, hours=None, value=0.5),)}
    """
    merged: dict[int, dict[str, Any]] = {}
    before = -math.inf
    for row in rows:
        update = row["update"]
        if update < before:
            merged = {key: kept for key, kept in merged.items() if key < update}
        merged.setdefault(update, {}).update(row)
        before = update
    history: dict[str, list[Point]] = {}
    for update, row in merged.items():
        seconds = _number(row.get("perf/seconds"))
        hours = None if seconds is None else seconds / 3600
        samples_seen = row.get("samples_seen")
        for key, value in row.items():
            if key not in NOT_METRICS and not key.startswith("_") and _is_metric(value):
                points = history.setdefault(key, [])
                points.append(Point(update, samples_seen, hours, _number(value)))
    return {key: tuple(points) for key, points in history.items()}


def _is_metric(value: Any) -> bool:
    # wandb writes NaN and infinities as strings, the run folder as null.
    if isinstance(value, str):
        return value in ("NaN", "Infinity", "-Infinity")
    return not isinstance(value, bool) and (value is None or isinstance(value, (int, float)))


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if abs(value) < math.inf else None  # a whole number may be past any float


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a `metrics.jsonl`; a last line that a crash cut off is left out.

    Raises:
        InputError: any other line that is not a JSON object with an integer `update`, or a file
            that can't be read.
    """
    return _rows(path, read_lines(path))


def _rows(path: Path, lines: Sequence[Line]) -> list[dict[str, Any]]:
    for line in lines:
        if line.row is None and not line.torn:
            raise InputError(
                f"{path}:{line.place}: {line.fault}: every line is a JSON object such as "
                f'{{"update": 1, "samples_seen": 256, "train/loss": 2.3}}. '
                f"Remove line {line.place} to read the rest."
            )
    return [content(line) for line in lines if line.row is not None]


def notes_of(lines: Sequence[Line], summary: Mapping[str, Any]) -> tuple[str, ...]:
    """Sentences on lines that are damaged, missing or there twice, the last ones included."""
    found = faults(list(lines))
    last = max((line.row["update"] for line in lines if line.row is not None), default=0)
    done = summary.get("num_updates")
    if summary.get("status") == "done" and isinstance(done, int) and last < done:
        found.append(f"the lines end at update {last}, and the run ended at update {done}")
    return tuple(found)


def load_run_folder(path: Path) -> Run:
    """Read a run folder: `metrics.jsonl`, and `config.yaml` and `summary.json` where they are.

    Raises:
        InputError: no such folder, no `metrics.jsonl`, or a broken file.
    """
    metrics = path / METRICS
    if not metrics.is_file():
        raise InputError(
            f"{path}: no {METRICS} here: a run folder holds one. " + _what_to_type_instead(path)
        )
    lines, summary = read_lines(metrics), flatten(read_mapping(path / SUMMARY))
    return Run(
        name=path.resolve().name,
        config=flatten(read_mapping(path / CONFIG)),
        summary=summary,
        history=history_of(_rows(metrics, lines)),
        source="folder",
        notes=tuple(f"{metrics}: {note}" for note in notes_of(lines, summary)),
    )


def _what_to_type_instead(path: Path) -> str:
    if not path.exists():
        return "There is no such folder; check the path."
    runs = sorted(path.glob(f"*/{METRICS}")) if path.is_dir() else []
    if runs:
        return f"It holds {len(runs)} run folders: use {path}/*"
    return "Use the folder that lbaccel.train printed, or a wandb offline-run-... folder."


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON file that holds a mapping; {} where there is no such file (a crashed run)."""
    if not path.is_file():
        return {}
    try:
        content = (yaml_in if path.suffix == ".yaml" else json_in)(path)
    except Malformed as error:
        raise InputError(f"{path}: broken file ({error}). Mend or remove it.") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: holds a {type(content).__name__}, a mapping is needed. Mend or remove it."
        )
    return content


def load_wandb_offline(path: Path) -> Run:
    """Read what wandb wrote in offline mode, without a server, by `wandb leet inspect --json`.

    `path` is a `.wandb` file, its `offline-run-...` folder, or a `wandb` folder that holds one run.
    Offline, wandb begins a new folder at each resume; folders of one run id lying side by side are
    read as one run, in order of their start.

    Raises:
        InputError: no `.wandb` file, several run ids, or no wandb installed.
        RunFailed: wandb could not read its own file.
    """
    files = _wandb_files(path)
    ids = sorted({file.stem.removeprefix("run-") for file in files})
    if not files:
        raise InputError(f"{path}: no run-<id>.wandb file here. " + _what_to_type_instead(path))
    if len(ids) > 1:
        raise InputError(
            f"{path}: holds {len(ids)} runs ({', '.join(ids)}), one is needed. "
            f"Use one of its folders, such as {files[0].parent}"
        )
    starts = sorted((_inspect(file) for file in files), key=_start_time)
    records = [record for start in starts for record in start]
    named = [record["run"]["display_name"] for record in records if "display_name" in _run(record)]
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    for record in records:
        config |= _run(record).get("config", {}).get("update", {})
        config |= record.get("config", {}).get("update", {})
        summary |= record.get("summary", {}).get("update", {})
    items = [record["history"]["item"] for record in records if "history" in record]
    rows = [{"update": item["_step"], **item} for item in items]
    return Run(
        name=named[-1] if named else ids[0],
        config=public(flatten(config)),
        summary=in_numbers(public(flatten(summary))),
        history=history_of(rows),
        source="wandb-offline",
    )


def _wandb_files(path: Path) -> list[Path]:
    """The transaction logs that `path` stands for, with those of the same run id beside them."""
    if path.suffix == ".wandb" and path.is_file():
        own = [path]
    else:
        own = sorted(path.glob("run-*.wandb"))
    if own:
        beside = own[0].resolve().parent.parent.glob(f"*run-*/{own[0].name}")
        return sorted(beside) or own
    # `latest-run` is a link to one of the others, and its name does not match.
    return sorted(path.glob("*run-*/run-*.wandb")) or sorted(path.glob("wandb/*run-*/run-*.wandb"))


def _inspect(file: Path) -> list[dict[str, Any]]:
    """Records of one `.wandb` file, by the public command line: wandb has no reader in Python."""
    if importlib.util.find_spec("wandb") is None:
        raise InputError(f"{file}: reading it needs wandb. Type: pip install 'wandb>=0.31'")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RunFailed(
            f"{file}: `wandb leet inspect` (wandb 0.31 or newer) could not read it: "
            f"{done.stderr.strip() or done.returncode}. Read the run folder instead."
        )
    return [json.loads(line) for line in done.stdout.splitlines() if line.strip()]


def _run(record: Mapping[str, Any]) -> Mapping[str, Any]:
    return record.get("run", {})


def _start_time(records: list[dict[str, Any]]) -> str:
    return next((_run(record)["start_time"] for record in records if "run" in record), "")


def public(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Without wandb's own entries, whose names begin with an underscore."""
    return {key: value for key, value in mapping.items() if not key.startswith("_")}


def in_numbers(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A summary of wandb, in which a value that is not finite is a string, with None for it."""
    return {k: _number(v) if _is_metric(v) else v for k, v in summary.items()}


def load_run(path: Path | str) -> Run:
    """Read a run folder, or else wandb's offline log: whichever `path` is.

    A run that still goes on, or that crashed, can be read too; `Run.notes` says what is damaged.

    Raises:
        InputError: it is neither.

    >>> run = load_run("runs/20261128-220927-test_resnet-gbs96")  # doctest: +SKIP
    >>> [(p.samples_seen, p.value) for p in run.history["val/top1"]]  # doctest: +SKIP
    [(2880, 91.2), ...]
    """
    path = Path(path)
    if not (path / METRICS).is_file() and _wandb_files(path):
        return load_wandb_offline(path)
    return load_run_folder(path)
