"""Real processes of the real command line, and real signals."""

from __future__ import annotations

import json
import os
import signal
import sys

import pytest
from command_lines import STARTER, finished, started, until

from lbaccel.recipe import launcher_watch
from lbaccel.recipe.signals import graceful_signals

TRAIN = [
    *("--model", "lbaccel_tiny", "--global-batch-size", "64", "--epochs", "200"),
    *("--norm-batch-size", "16", "--log-with", "run_folder", "--checkpoint-every", "1000"),
    *("--eval-every", "100", "--output", "runs"),
]


def updates_done(folder):
    files = list((folder / "runs").glob("*/metrics.jsonl"))
    return sum(len(file.read_text().splitlines()) for file in files)


def until_it_trains(folder, process):
    def trains():
        assert process.poll() is None, process.stdout.read()
        return updates_done(folder) >= 2

    until(trains, "two updates")


def check_saved(folder, out):
    """The last update that was counted has a checkpoint, and the run says how to go on."""
    (run,) = (folder / "runs").iterdir()
    done = json.loads((run / "summary.json").read_text())["num_updates"]
    assert (run / "checkpoints" / f"update_{done:06d}").is_dir()
    assert f"update_{done:06d} is kept. To go on: lbaccel train --resume" in out
    assert "lbaccel/" not in out.partition("Traceback")[2]  # a launcher has tracebacks of its own


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
    try:
        with graceful_signals(lambda: asked.append(1)):
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                send(number)
    except KeyboardInterrupt:  # pytest would take it for its own end
        pytest.fail("ended at once")
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
    flags = ["--workers", 2, "--data", f"folder:{images}", "--img-size", 16]
    with started("-c", STARTER, "train", *TRAIN, *flags, cwd=tmp_path) as process:
        until_it_trains(tmp_path, process)
        os.killpg(process.pid, getattr(signal, name))
        if name != "SIGINT":  # batch systems send more than one, and to every process
            os.killpg(process.pid, signal.SIGHUP if name == "SIGTERM" else signal.SIGTERM)
        code, out = finished(process)
    assert code == 130, out
    check_saved(tmp_path, out)


def command(launcher, folder):
    """The arguments of a launcher that starts the recipe."""
    script = folder / "go.py"
    script.write_text(STARTER)
    if launcher == "accelerate":
        return ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", 1, script, "train"]
    ranks = ["--standalone", "--nproc-per-node", 2]
    return ["-m", "torch.distributed.run", *ranks, script, "train"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_to_a_launcher_finishes_the_update(launcher, name, tmp_path):
    where = command(launcher, tmp_path)
    with started(*where, *TRAIN, cwd=tmp_path) as process:
        until_it_trains(tmp_path, process)
        os.killpg(process.pid, getattr(signal, name))
        _, out = finished(process)  # the launcher's own traceback, if any, is in it
    check_saved(tmp_path, out)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_ranks_whose_launcher_was_killed_save_and_end(launcher, tmp_path):
    where = command(launcher, tmp_path)
    with started(*where, *TRAIN, cwd=tmp_path) as process:
        until_it_trains(tmp_path, process)
        process.kill()
        _, out = finished(process)  # the pipe is closed when the last rank has ended
    assert out.count("the launcher died") == 1
    check_saved(tmp_path, out)


@pytest.mark.slow
def test_a_run_in_the_background_outlives_its_shell(tmp_path):
    line = ["nohup", sys.executable, "-c", STARTER, "train", *TRAIN[:4], "--epochs", "20"]
    rest = [*TRAIN[6:]]
    script = f"import os, subprocess; subprocess.Popen({[*line, *rest]!r}); os._exit(0)"
    with started("-c", script, cwd=tmp_path) as shell:
        _, out = finished(shell)
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "summary.json").read_text())["status"] == "done", out
