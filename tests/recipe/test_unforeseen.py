"""Errors of other libraries: each is one sentence, and a defect keeps its traceback."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from forks import run_forked, values
from torch.utils.data import DataLoader

from lbaccel import InputError, RunFailed
from lbaccel.errors import RankFailed, told
from lbaccel.recipe.ending import ending
from lbaccel.recipe.unforeseen import in_a_sentence, workers_may_end


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "(pid 7) ended"),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "(pid 7, 8) ended"),
        (
            RuntimeError(
                "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
                "dataloader's workers are out of shared memory. Please try to raise your shared "
                "memory limit."
            ),
            "ended by itself (Bus error)",
        ),
        (RuntimeError("unable to write to file </torch_9_1_2>: No space left (28)"), "/dev/shm"),
        (RuntimeError("received 0 items of ancdata"), "/dev/shm"),
        (MemoryError(), "memory ran out outside an update (MemoryError)"),
        (torch.OutOfMemoryError("CUDA out of memory."), "(CUDA out of memory)"),
        (
            RuntimeError(
                "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer "
                "[127.0.0.1]:1"
            ),
            "the connection to another rank broke",
        ),
        (
            torch.distributed.DistBackendError(
                "NCCL error in: x.cpp\nncclRemoteError: A call failed possibly due to a network "
                "error or a remote process exiting prematurely."
            ),
            "the connection to another rank broke",
        ),
    ],
)
def test_it_is_one_sentence_on_the_rank_that_knows(error, words):
    found = in_a_sentence(error)
    assert isinstance(found, RankFailed) and words in str(found) and "\n" not in str(found)
    assert found.__cause__ is error


def test_what_all_ranks_have_heard_is_the_first_ranks_to_say():
    assert type(in_a_sentence(told(MemoryError()))) is RunFailed


@pytest.mark.parametrize(
    "error",
    [
        KeyError("k"),
        InputError("Connection closed by peer"),
        RunFailed("out of memory"),
        KeyboardInterrupt(),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ConnectionResetError(104, "Connection reset by peer"),  # of a download, say
    ],
)
def test_a_defect_and_our_own_errors_stay_as_they_are(error):
    assert in_a_sentence(error) is error


def test_every_command_ends_so(capsys):
    def body():
        raise MemoryError

    assert ending(body) == 1
    assert capsys.readouterr().err.startswith("run failed: memory ran out outside an update")

    def defect():
        raise KeyError("k")

    with pytest.raises(KeyError):
        ending(defect)


class Suicidal:
    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def read_while_closing(rank, quiet):
    batches = iter(DataLoader(Suicidal(), batch_size=1, num_workers=1))
    next(batches)
    if quiet:
        with workers_may_end():
            time.sleep(1)
        return "closed"
    try:
        for _ in range(100):
            time.sleep(0.1)
    except RuntimeError as error:
        return str(in_a_sentence(error))
    return "nothing was raised"


@pytest.mark.parametrize("quiet", [True, False])
def test_the_death_of_a_worker_raises_at_any_line_but_not_while_a_run_is_closed(quiet):
    (said,) = values(run_forked(read_while_closing, quiet, timeout=60))
    assert said == "closed" if quiet else "ended by itself (Killed)" in said


def test_an_error_that_a_workers_end_caused_in_another_line_is_told_as_that_end():
    """torch's handler raises anywhere: here inside `Thread.start`, which then fails by itself."""
    try:
        try:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
        except RuntimeError:
            del {}["thread"]
    except KeyError as error:
        found = in_a_sentence(error)
    assert isinstance(found, RunFailed) and "(pid 7) ended by itself (Killed)" in str(found)
