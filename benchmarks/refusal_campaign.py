"""Faults outside the update: each must end in a sentence, or leave the result as it is.

python benchmarks/refusal_campaign.py [--faults 500] [--seed 0] [--json FILE]

A run of a small network on a folder of digits is stopped half way. Then come faults, one at a time,
on copies of it: its data or its `config.yaml` is changed, a second process starts it, a rank
differs in a setting or in its data, a loader's worker or the launcher is killed, memory runs out in
validation or in saving, a line of its metrics is damaged, a validation image can't be read. Each
start is the command line of the recipe (`lbaccel.train.main`) in processes of its own, forked from
one that has torch.

A start passes where it ends with exit code 0 and the result of the run in peace (to 1e-9: two ranks
round otherwise); or with another code and a sentence, no traceback, and a run that then goes on to
that same result once the fault is undone. Exit code 0 with another result is silent, the worst.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import multiprocessing
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))

import faults
import tiny  # noqa: F401  registers lbaccel_tiny
from fault_campaign import far_tensors
from forks import Outcome, run_forked
from runs_out import OUT

from lbaccel import train
from lbaccel.recipe import launcher_watch
from lbaccel.recipe.options import OPTIONS
from lbaccel.recipe.settings import ADDED
from lbaccel.runs import session as run_session

FLAGS = [
    *("--model", "lbaccel_tiny", "--img-size", "8", "--global-batch-size", "32", "--epochs", "2"),
    *("--norm-batch-size", "8", "--drop-rate", "0.1", "--seed", "4", "--precision", "fp64"),
    *("--log-with", "run_folder", "--checkpoint-every", "2", "--momentum", "0.9"),
]
HALF = 5  # updates after which the run is stopped
TIMEOUT = 120.0


@dataclass
class Place:
    """A folder of its own: data, a stopped run, what the starts print."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def run(self) -> Path:
        return max(p for p in (self.folder / "runs").iterdir() if p.is_dir())

    def said(self) -> str:
        """What all starts since the last call printed."""
        log = self.folder / "log"
        text = log.read_text(errors="replace") if log.exists() else ""
        log.unlink(missing_ok=True)
        return text


Before = Callable[[int], Any]


def job(rank: int, place: Path, flags: list[str], before: Before | None) -> int:
    """One rank of one start."""
    os.chdir(place)
    with (
        (place / "log").open("a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        if before is not None:
            flags = [*flags, *(before(rank) or [])]
        return train.main(flags)


def start(
    place: Place,
    *,
    flags: tuple[str, ...] = (),
    ranks: int = 1,
    before: Before | None = None,
    resume: bool = True,
    timeout: float = TIMEOUT,
) -> list[Outcome]:
    """Start the run, or go on with it."""
    given = [*FLAGS, "--data", "folder:data", *flags]
    given += ["--resume", "auto"] if resume else []
    return run_forked(
        job, place.folder, given, before, world_size=ranks, timeout=timeout
    )  # fmt: skip


def make_data(folder: Path) -> None:
    """Digits of four classes as pictures."""
    digits: Any = load_digits()
    counts: collections.Counter[int] = collections.Counter()
    for image, label in zip(digits.images, digits.target, strict=True):
        if label < 4 and counts[label] < 48:
            split = "train" if counts[label] < 40 else "val"
            target = folder / split / f"digit{label}"
            target.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 15).astype("uint8")).save(target / f"{counts[label]:03}.png")
            counts[label] += 1


# -- faults: each prepares `place`, starts, and returns (outcomes, undo) ---------------------------

Fault = Callable[[Place, random.Random], tuple[list[Outcome], Callable[[], object]]]


def nothing() -> None:
    """Undo nothing."""


def data_changed(place: Place, rng: random.Random) -> tuple[list[Outcome], Callable[[], object]]:
    """A file deleted, five added, one moved to another class, a class renamed, bytes added."""
    kept = place.folder / "data-kept"
    shutil.copytree(place.data, kept)
    classes = sorted((place.data / "train").iterdir())
    files = sorted(rng.choice(classes).iterdir())
    how = rng.choice(("delete", "add", "move", "rename", "resize", "delete val"))
    if how == "delete":
        rng.choice(files).unlink()
    elif how == "add":
        for number in range(5):
            shutil.copy(files[0], files[0].with_name(f"new{number}.png"))
    elif how == "move":
        file = rng.choice(files)
        other = rng.choice([c for c in classes if c != file.parent])
        file.rename(other / f"moved-{file.name}")
    elif how == "rename":
        for split in ("train", "val"):
            (place.data / split / "digit0").rename(place.data / split / "z")
    elif how == "resize":
        file = rng.choice(files)
        Image.open(file).resize((9, 9)).save(file)
    else:
        next((place.data / "val" / "digit1").iterdir()).unlink()

    def undo() -> None:
        shutil.rmtree(place.data)
        kept.rename(place.data)

    return start(place), undo


OTHERS: dict[Any, tuple[Any, ...]] = {
    bool: (True, False),
    int: (1, 2, 3, 7),
    float: (0.0, 0.3, 2.0),
}


def config_edited(place: Place, rng: random.Random) -> tuple[list[Outcome], Callable[[], object]]:
    """A value of config.yaml edited, a line removed, or a value of another type."""
    path = place.run / "config.yaml"
    text = path.read_text()
    content = yaml.safe_load(text)
    key = rng.choice([k for k in content if k in OPTIONS or k in ADDED])
    how = rng.choice(("edit", "edit", "remove", "type"))
    value = content[key]
    if how == "remove":
        del content[key]
    elif how == "type":
        content[key] = rng.choice(("word", [1, 2], {"a": 1}, None, -1, 1e30, True))
    else:
        row = OPTIONS.get(key)
        near = list(row.choices) if row is not None and row.choices else []
        near += list(OTHERS.get(type(value), ("adamw", "other", 3)))
        content[key] = rng.choice([v for v in near if v != value] or ["other"])
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return start(place, flags=("--resume", str(place.run))), lambda: path.write_text(text)


def two_starters(place: Place, rng: random.Random) -> tuple[list[Outcome], Callable[[], object]]:
    """A second process goes on with the run while the first one writes."""
    phase, found = rng.choice(list(faults.PHASES)), place.folder / "second.json"

    def second() -> None:
        (outcome,) = start(place)
        found.write_text(json.dumps([outcome.value, outcome.exit_code]))

    def before(_: int) -> None:
        faults.install(phase, 2, second)

    outcomes = start(place, before=before)
    if found.exists():
        code = json.loads(found.read_text())[0]
        found.unlink()
        if code == 0 and phase != "summary":
            return [Outcome(0, "the second writer was let in", "")], nothing
    return outcomes, nothing


def rank_differs(place: Place, rng: random.Random) -> tuple[list[Outcome], Callable[[], object]]:
    """Rank 1 has another seed, rate or setting, or other images."""
    flags = rng.choice(
        (["--seed", "5"], ["--base-lr", "0.3"], ["--weight-decay", "0.1"], ["--drop-rate", "0.2"],
         ["--label-smoothing", "0.2"], ["--clip-grad-norm", "0.5"], ["--data", "folder:other"])
    )  # fmt: skip
    other = place.folder / "other"
    shutil.copytree(place.data, other)
    next((other / "train" / "digit2").iterdir()).unlink()

    def before(rank: int) -> list[str]:
        return flags if rank == 1 else []

    outcomes = start(place, ranks=2, before=before, resume=False, flags=("--output", "fresh"))
    return outcomes, lambda: shutil.rmtree(other)


def worker_killed(place: Place, rng: random.Random) -> tuple[list[Outcome], Callable[[], object]]:
    """A process that loads images is killed."""
    phase = rng.choice(("forward", "backward", "after the update", "evaluation"))

    def kill() -> None:
        own, status = os.getpid(), Path("/proc")
        for entry in status.iterdir():
            with contextlib.suppress(OSError, ValueError):
                if int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == own:
                    os.kill(int(entry.name), signal.SIGKILL)
                    return

    def before(_: int) -> None:
        faults.install(phase, rng.randint(1, 3), kill)

    return start(place, before=before, flags=("--workers", "1")), nothing


def out_of_memory(place: Place, rng: random.Random) -> tuple[list[Outcome], Callable[[], object]]:
    """Memory runs out in validation, or while a checkpoint is written."""
    where = rng.choice(("validation", "save", "plots"))

    def fail() -> None:
        raise torch.OutOfMemoryError(OUT)

    def before(_: int) -> None:
        if where == "validation":
            count, plain = [0], torch.nn.functional.cross_entropy

            def hooked(*args: Any, **kwargs: Any) -> Any:
                if not torch.is_grad_enabled() and count[0] < 1 and kwargs.get("reduction"):
                    count[0] += 1
                    fail()
                return plain(*args, **kwargs)

            torch.nn.functional.cross_entropy = hooked  # type: ignore[assignment]
        elif where == "save":
            faults.install("checkpoint file", 1, fail)
        else:
            faults.before(run_session, "plot_run")(fail)

    return start(place, before=before), nothing


def metrics_damaged(place: Place, rng: random.Random) -> tuple[list[Outcome], Callable[[], object]]:
    """A line of the metrics is cut, lost, there twice, or no JSON."""
    path = place.run / "metrics.jsonl"
    text = path.read_text()
    lines = text.splitlines()
    at = rng.randrange(len(lines))
    how = rng.choice(("cut", "lost", "twice", "no JSON", "another number"))
    if how == "cut":
        lines[at] = lines[at][: rng.randrange(1, len(lines[at]))]
    elif how == "lost":
        del lines[at]
    elif how == "twice":
        lines.insert(at, lines[at])
    elif how == "no JSON":
        lines[at] = '{"update": NaN'
    else:
        lines[at] = lines[at].replace("0.", "1.", 1)
    path.write_text("\n".join(lines) + "\n")
    return start(place), lambda: None


def image_unreadable(
    place: Place, rng: random.Random
) -> tuple[list[Outcome], Callable[[], object]]:
    """An image of validation has the right size and can't be read, on any of two ranks."""
    files = sorted((place.data / "val").rglob("*.png"))
    file = rng.choice(files)
    content = file.read_bytes()
    file.write_bytes(b"\0" * len(content))
    return start(place, ranks=rng.choice((1, 2))), lambda: file.write_bytes(content)


def launcher_killed(place: Place, rng: random.Random) -> tuple[list[Outcome], Callable[[], object]]:
    """The parent of one or two ranks is killed; they must end by themselves."""
    phase = rng.choice(("forward", "backward", "after the update", "evaluation"))
    ranks, call = rng.choice((1, 2)), rng.randint(1, 3)

    def before(rank: int) -> None:
        os.environ["TORCHELASTIC_RUN_ID"] = "campaign"
        launcher_watch.PARENT = os.getppid()
        if rank == 0:
            faults.install(phase, call, lambda: os.kill(os.getppid(), signal.SIGKILL))

    reader, writer = os.pipe()  # the ranks have it open, and their workers
    with os.fdopen(reader, "rb") as alive:
        launcher = multiprocessing.get_context("fork").Process(
            target=start, args=(place,), kwargs={"ranks": ranks, "before": before}
        )
        launcher.start()
        os.close(writer)
        launcher.join(TIMEOUT)
        if not select.select([alive], [], [], TIMEOUT)[0]:
            raise TimeoutError(f"{ranks} ranks go on without their launcher, killed in {phase}")
    return [Outcome(launcher.exitcode or 0, 0, "")], nothing


KINDS: dict[str, Fault] = {
    "data changed": data_changed,
    "config edited": config_edited,
    "two starters": two_starters,
    "rank differs": rank_differs,
    "worker killed": worker_killed,
    "launcher killed": launcher_killed,
    "out of memory outside the update": out_of_memory,
    "metrics damaged": metrics_damaged,
    "validation image unreadable": image_unreadable,
}


def judged(place: Place, truth: Path, kind: str, rng: random.Random) -> tuple[str, str]:
    """A verdict on one fault, and its evidence where it is bad."""
    place.said()
    outcomes, undo = KINDS[kind](place, rng)
    text = place.said()
    codes = [o.value if o.exit_code == 0 else o.exit_code for o in outcomes]
    # Python prints what torch's handler of a dead worker raises inside a destructor, and goes on
    own = text.partition("Exception ignored in")[0]
    if "Traceback (most recent call last)" in own or any(o.error for o in outcomes):
        error = next((o.error for o in outcomes if o.error), text)
        return "traceback", error[-1500:]
    if kind == "rank differs":
        refused = all(c != 0 for c in codes) and "rank" in text
        shutil.rmtree(place.folder / "fresh", ignore_errors=True)
        undo()
        if not refused:
            return "silent", f"{codes}: {text[-600:]}"
    elif all(c == 0 for c in codes):
        if kind == "metrics damaged":
            return ("said" if "metrics.jsonl" in text else "without effect"), ""
        wrong = far_tensors(place.run, truth)
        return ("silent", f"{wrong[:3]} {text[-600:]}") if wrong else ("survived", "")
    else:
        undo()
        if not text.strip():
            return "without a word", str(codes)
    (again,) = start(place)
    text = place.said()
    if again.value != 0:
        return "not to be resumed", f"{again} {text[-600:]}"
    wrong = far_tensors(place.run, truth)
    return ("another result", f"{wrong[:3]}") if wrong else ("refused, then the same result", "")


def stopped_run(folder: Path) -> None:
    """A run that was killed half way, with its data."""
    place = Place(folder)
    make_data(place.data)
    (outcome,) = start(place, flags=("--output", "whole"), resume=False)
    assert outcome.value == 0, place.said()

    def before(_: int) -> None:
        faults.install("after the update", HALF, lambda: os.kill(os.getpid(), signal.SIGKILL))

    start(place, before=before)
    place.said()


def main() -> int:
    """Run the faults in turn; the exit code says whether one was bad."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600.0, help="then it stops, and counts")
    parser.add_argument("--only", choices=list(KINDS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table: collections.Counter[tuple[str, str]] = collections.Counter()
    bad, began = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as home:
        model = Path(home, "model")
        model.mkdir()
        stopped_run(model)
        truth = next((model / "whole").iterdir())
        for number in range(arguments.seed, arguments.seed + arguments.faults):
            if time.perf_counter() - began > 60 * arguments.minutes:
                break
            rng = random.Random(number)
            kind = arguments.only or list(KINDS)[number % len(KINDS)]
            folder = Path(home, f"fault{number}")
            shutil.copytree(model, folder, symlinks=True)
            try:
                verdict, evidence = judged(Place(folder), truth, kind, rng)
            except TimeoutError as error:
                verdict, evidence = "it hung", str(error)
            table[kind, verdict] += 1
            if evidence:
                bad.append({"fault": number, "kind": kind, "verdict": verdict, "why": evidence})
                print(f"{number} {kind}: {verdict}: {evidence}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    for (kind, verdict), count in sorted(table.items()):
        print(f"{count:5}  {kind}: {verdict}")
    seconds = round(time.perf_counter() - began)
    print(f"{sum(table.values())} faults in {seconds} s, {len(bad)} bad")
    if arguments.json is not None:
        content = {"table": [[*k, n] for k, n in sorted(table.items())], "bad": bad}
        arguments.json.write_text(json.dumps({**content, "seconds": seconds}, indent=1) + "\n")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
