"""Real processes of the real command line, and real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from lbaccel.recipe import launcher_watch
from lbaccel.recipe.signals import graceful_signals

TRAIN = [
    *("--model", "lbaccel_tiny", "--global-batch-size", "64", "--epochs", "200"),
    *("--norm-batch-size", "16", "--log-with", "run_folder", "--checkpoint-every", "1000"),
    *("--eval-every", "100", "--output", "runs"),
]
# registers the tiny network, and runs the command line
STARTER = "import sys, tiny; from lbaccel.cli import main; sys.exit(main())"
HELPERS = str(Path(__file__).parent.parent / "helpers")
ROOT = str(Path(__file__).parents[2])
FAR = 120.0  # seconds: a process that does not end by then hangs


def environment(**more):
    path = os.pathsep.join([ROOT, HELPERS])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "100", **more}


@contextmanager
def started(*command, cwd, env=None, **options):
    """A process in a session of its own, which is over at the end, with all its children."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment(**(env or {})),
        start_new_session=True,
        text=True,
        **options,
    )
    try:
        yield process
    finally:
        with_group_killed(process)


def with_group_killed(process):
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def until(condition, what):
    end = time.monotonic() + FAR
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {FAR:g} s")


def updates_done(folder):
    files = list((folder / "runs").glob("*/metrics.jsonl"))
    return sum(len(file.read_text().splitlines()) for file in files)


def until_it_trains(folder, process):
    def trains():
        assert process.poll() is None, process.stdout.read()
        return updates_done(folder) >= 2

    until(trains, "two updates")


def finished(process):
    out, _ = process.communicate(timeout=FAR)
    return process.returncode, out


def check_saved(folder, out):
    """The last update that was counted has a checkpoint, and the run says how to go on."""
    (run,) = (folder / "runs").iterdir()
    done = json.loads((run / "summary.json").read_text())["num_updates"]
    assert (run / "checkpoints" / f"update_{done:06d}").is_dir()
    assert f"update_{done:06d} is kept. To go on: lbaccel train --resume" in out
    assert "Traceback" not in out


# -- inside one process ---------------------------------------------------------------------------


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_signal_asks_for_the_end_and_the_handlers_come_back(number):
    asked, before = [], signal.getsignal(number)
    with graceful_signals(lambda: asked.append(1)):
        send(number)
    assert asked == [1] and signal.getsignal(number) is before


def test_sigterm_and_sighup_never_end_at_once():
    asked = []
    with graceful_signals(lambda: asked.append(1)):
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            send(number)
    assert len(asked) == 4


def test_a_second_ctrl_c_ends_at_once():
    with pytest.raises(KeyboardInterrupt), graceful_signals(lambda: None):
        send(signal.SIGINT)
        send(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored(number):
    asked, before = [], signal.signal(number, signal.SIG_IGN)
    try:
        with graceful_signals(lambda: asked.append(1)):
            send(number)
        assert asked == [] and signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_under_a_launcher_two_sigints_at_once_are_one(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(launcher_watch, "PARENT", os.getppid())
    asked, now = [], [0.0]
    with graceful_signals(lambda: asked.append(1), clock=lambda: now[0]):
        send(signal.SIGINT)
        now[0] = 0.5
        send(signal.SIGINT)
        now[0] = 1.5
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert len(asked) == 2


# -- the command line -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 128 small images in two classes."""
    import numpy as np
    from PIL import Image

    place = tmp_path_factory.mktemp("signals")
    for split in ("train", "val"):
        for label in ("a", "b"):
            folder = place / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(64):
                pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return place / "images"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_to_the_group_finishes_the_update_with_workers(name, tmp_path, images):
    flags = ["--workers", 2, "--data", images, "--img-size", 16]
    with started("-c", STARTER, "train", *TRAIN, *flags, cwd=tmp_path) as process:
        until_it_trains(tmp_path, process)
        os.killpg(process.pid, getattr(signal, name))
        time.sleep(0.2)
        if name != "SIGINT":
            os.killpg(process.pid, getattr(signal, name))  # batch systems send it twice
        code, out = finished(process)
    assert code == 130, out
    check_saved(tmp_path, out)
