from __future__ import annotations

import os
import signal
import time

import pytest
from torch.utils.data import DataLoader

from lbaccel.data.workers import let_the_parent_decide


class Pids:
    """Each sample is the pid of the worker that loads it."""

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        return os.getpid()


class Stuck(Pids):
    """Its second sample never comes."""

    def __getitem__(self, index):
        if index:
            time.sleep(10_000)
        return os.getpid()


def batches(dataset):
    loader = DataLoader(
        dataset, batch_size=1, num_workers=1, worker_init_fn=let_the_parent_decide,
        prefetch_factor=2,
    )  # fmt: skip
    return iter(loader)


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP", "SIGTERM"])
def test_a_worker_outlives_the_signals_of_others(name):
    found = batches(Pids())
    worker = int(next(found))
    sender = os.fork()
    if sender == 0:  # another process than the parent, as a batch system is
        os.kill(worker, getattr(signal, name))
        os.kill(worker, getattr(signal, name))
        os._exit(0)
    os.waitpid(sender, 0)
    assert [int(next(found)) for _ in range(50)] == [worker] * 50


def test_the_parent_ends_a_stuck_worker_with_one_sigterm():
    found = batches(Stuck())
    worker = int(next(found))
    (process,) = found._workers
    assert process.pid == worker
    process.terminate()
    process.join(60)
    assert process.exitcode == 0
