"""kill -9 at every phase of a run: what is resumed ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import faults
import pytest
from forks import run_forked, values
from runs_of_recipe import BASE, differences, rows

from lbaccel import train

KILL = -signal.SIGKILL


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def job(rank, output, phase, nth, only_rank):
    if phase and only_rank in (None, rank):
        faults.install(phase, nth, die)
    return train.main([*BASE, "--resume", "auto", "--output", output])


def start(output, *, phase=None, nth=1, world_size=1, only_rank=None, after=None, timeout=120):
    return run_forked(
        job, output, phase, nth, only_rank, world_size=world_size, after=after, timeout=timeout
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The unbroken run."""
    folder = tmp_path_factory.mktemp("whole")
    assert values(start(str(folder))) == [0]
    return next(folder.iterdir())


def only_run():
    return max(Path("runs").iterdir())  # a kill before the first checkpoint leaves a dead folder


def finish(world_size=1):
    assert values(start("runs", world_size=world_size)) == [0] * world_size
    return only_run()


FAST = [("backward", 14), ("commit", 5), ("checkpoint file", 4), ("rename", 3), ("link", 5)]
RARE = ("evaluation", "between epochs", "summary")
# twice in each phase, early and late
SLOW = [(phase, nth) for phase in faults.PHASES for nth in (1, 2 if phase in RARE else 3)]


def check_kill(phase, nth, whole):
    (outcome,) = start("runs", phase=phase, nth=nth)
    if outcome.exit_code != KILL:  # a run has one summary
        assert (phase, outcome.exit_code, nth) == ("summary", 0, 2)
    finished = finish()
    assert not differences(finished, whole)
    updates = [row["update"] for row in rows(finished) if "train/loss" in row]
    assert updates == sorted(set(updates)) == list(range(1, 13))


@pytest.mark.parametrize(("phase", "nth"), FAST)
def test_a_kill_in_this_phase_changes_nothing(phase, nth, whole):
    check_kill(phase, nth, whole)


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "nth"), SLOW)
def test_a_kill_in_every_phase_changes_nothing(phase, nth, whole):
    check_kill(phase, nth, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_kills_at_random_moments_change_nothing(seed, whole):
    rng = random.Random(seed)

    def kill_later(pids):
        time.sleep(rng.uniform(0.05, 0.7))
        os.kill(pids[0], signal.SIGKILL)

    killed = 0
    for _ in range(3):
        (outcome,) = start("runs", after=kill_later)
        killed += outcome.exit_code == KILL
        assert outcome.exit_code in (KILL, 0), outcome.error
    assert killed
    assert not differences(finish(), whole)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["backward", "reduce", "checkpoint file"])
def test_the_death_of_one_rank_ends_the_other_and_both_go_on(phase, tmp_path):
    truth = start("whole", world_size=2)
    assert values(truth) == [0, 0]
    dying = 0 if phase == "checkpoint file" else 1
    outcomes = start("runs", phase=phase, nth=3, world_size=2, only_rank=dying, timeout=60)
    assert outcomes[dying].exit_code == KILL
    other = outcomes[1 - dying]
    assert (other.exit_code, other.value) == (0, 1)  # it ends by itself, as a run that failed
    assert not differences(finish(world_size=2), next(Path("whole").iterdir()))


@pytest.mark.slow
def test_a_run_killed_after_every_single_update_still_ends_the_same(whole):
    for _ in range(20):
        (outcome,) = start("runs", phase="after the update", nth=3)
        if outcome.exit_code == 0:
            break
        assert outcome.exit_code == KILL
    folder = only_run()
    assert not differences(folder, whole)
    starts = [json.loads(x)["update"] for x in (folder / "resumes.jsonl").read_text().splitlines()]
    assert starts == [2, 4, 6, 8, 10, 12][: len(starts)] and len(starts) >= 4
