"""An evaluation that runs out of memory, or fails: the state is kept, and all ranks end."""

from __future__ import annotations

import io
import json
import os
import signal
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import tiny  # noqa: F401  registers lbaccel_tiny
import torch
from accelerate import Accelerator
from forks import run_forked, run_fresh, values
from runs_of_recipe import break_inside, make_images
from torch import nn

from lbaccel import RunFailed, train
from lbaccel.data import images as images_module
from lbaccel.recipe.evaluation import NotEvaluated, Room, evaluate


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Limited(nn.Module):
    """A classifier that holds no more than `most` samples at a time."""

    def __init__(self, most):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.most, self.sizes = nn.Linear(4, 3), most, []

    def forward(self, x):
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return self.fc(x)


X = torch.randn(23, 4, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (23,), generator=torch.Generator().manual_seed(2))


def batches(start, size):
    for first in range(start, len(X), size):
        yield X[first : min(len(X), first + size)], Y[first : min(len(X), first + size)]


def evaluated(model, *, room=None, size=16, batches=batches):
    return evaluate(
        model, batches, Accelerator(cpu=True), dtype=torch.float32, batch_size=size, room=room
    )


def test_memory_that_runs_out_halves_the_batch_and_no_sample_counts_twice_or_not_at_all():
    logits = Limited(23).fc(X).double()
    loss = nn.functional.cross_entropy(logits, Y).item()
    top1 = 100 * (logits.argmax(1) == Y).double().mean().item()
    room = Room()
    model = Limited(5)
    found = evaluated(model, room=room)
    assert found["loss"] == pytest.approx(loss, rel=1e-7)
    assert found["top1"] == pytest.approx(top1, rel=1e-12)
    assert model.sizes == [16, 8, 4, 4, 4, 4, 4, 3]
    model.sizes.clear()
    assert evaluated(model, room=room) == found
    assert model.sizes == [4, 4, 4, 4, 4, 3], "the next evaluation tried what did not fit again"


def test_it_goes_on_at_the_first_sample_that_is_not_counted():
    model, asked = Limited(23), []

    def rationed(start, size):
        asked.append((start, size))
        for i, batch in enumerate(batches(start, size)):
            if len(asked) == 1 and i == 2:  # the reader itself runs out
                raise MemoryError
            yield batch

    found = evaluated(model, size=4, batches=rationed)
    assert asked == [(0, 4), (8, 2)]
    assert found["loss"] == pytest.approx(evaluated(Limited(23))["loss"], rel=1e-7)


def test_one_sample_that_does_not_fit_is_one_sentence():
    model = Limited(0)
    with pytest.raises(NotEvaluated) as raised:
        evaluated(model)
    assert type(raised.value.error) is RunFailed
    assert "at a batch of one sample (CUDA out of memory" in str(raised.value.error)
    assert model.sizes == [16, 8, 4, 2, 1] and model.training


def test_another_error_is_not_taken_for_a_lack_of_memory():
    class Wrong(Limited):
        def forward(self, x):
            raise KeyError("k")

    with pytest.raises(NotEvaluated) as raised:
        evaluated(Wrong(1))
    assert isinstance(raised.value.error, KeyError)


def test_a_validation_batch_that_a_real_limit_does_not_hold_changes_no_result():
    micro = ["--micro-batch-size", "32"]
    small, tight = run_fresh(
        "limited",
        "recipes",
        [micro, [*micro, "--memory", "100MiB", "--val-batch-size", "359"]],
    )
    assert small[0] == tight[0] == 0
    assert tight[1]["val_batch_size"] == 359
    for a, b in zip(small[2], tight[2], strict=True):
        for key in {"train/loss", "val/loss", "val/top1"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-6)


def test_the_size_of_validation_batches_is_the_users(monkeypatch):
    from lbaccel.data.pipelines import EvaluationBatches

    plain, sizes = EvaluationBatches.__call__, []

    def seen(batches, start, size):
        sizes.append(size)
        return plain(batches, start, size)

    monkeypatch.setattr(EvaluationBatches, "__call__", seen)
    flags = "--model lbaccel_tiny --global-batch-size 512 --micro-batch-size 64 --max-updates 1"
    assert train.main([*flags.split(), "--log-with", "run_folder"]) == 0
    assert train.main([*flags.split(), "--log-with", "run_folder", "--val-batch-size", "7"]) == 0
    assert sizes == [64, 7]


def test_a_size_of_nothing_is_refused(capsys):
    assert train.main(["--model", "lbaccel_tiny", "--val-batch-size", "0"]) == 2
    assert "--val-batch-size='0' is not a whole number from 1" in capsys.readouterr().err


FLAGS = [
    *("--model", "lbaccel_tiny", "--img-size", "8", "--data", "folder:images", "--seed", "4"),
    *("--global-batch-size", "8", "--micro-batch-size", "4", "--norm-batch-size", "4"),
    *("--log-with", "run_folder", "--max-updates", "4", "--eval-every", "1", "--output", "runs"),
]


def trained(rank, flags, at_image=None):
    """Exit code and what is printed as errors; `at_image` is called in whoever reads an image."""
    if at_image is not None:
        plain = images_module.decode_image

        def hooked(file, where, **options):
            at_image(rank, str(where))
            return plain(file, where, **options)

        images_module.decode_image = hooked
    said = io.StringIO()
    with redirect_stderr(said):
        code = train.main([*FLAGS, *map(str, flags)])
    return code, said.getvalue()


def only_run():
    (folder,) = Path("runs").iterdir()
    return folder


def metrics(folder):
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("perf/", "memory/", "check")  # a line's checksum is of these too
    return [{k: v for k, v in x.items() if not k.startswith(clock)} for x in lines]


def resumed_as_unbroken(folder, *flags):
    """Go on with the run; it ends as one that nothing happened to."""
    assert values(run_forked(trained, ["--resume", folder, *flags]))[0][0] == 0
    assert values(run_forked(trained, ["--output", "truth", *flags]))[0][0] == 0
    (truth,) = Path("truth").iterdir()
    assert metrics(folder) == metrics(truth)
    summaries = [json.loads((f / "summary.json").read_text()) for f in (folder, truth)]
    assert summaries[0]["status"] == summaries[1]["status"] == "done"
    assert summaries[0]["best_update"] == summaries[1]["best_update"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_corrupt_validation_image_costs_no_update(world_size):
    make_images()
    image = Path("images/val/cat/1.png")  # index 1: of the last rank
    whole = image.read_bytes()
    break_inside(image)
    outcomes = run_forked(trained, ["--workers", 0], world_size=world_size, timeout=60)
    said = values(outcomes)[0][1]
    folder = only_run()
    assert [value[0] for value in values(outcomes)] == [2] * world_size
    assert "1.png can't be read as an image" in said and said.count("\n") == 1
    assert f"update_000002 is kept. To go on: lbaccel train --resume {folder}" in said
    image.write_bytes(whole)
    if world_size == 1:
        resumed_as_unbroken(folder, "--workers", 0)


def kills_the_reader(rank, where):
    if rank == 0 and "/val/" in where and where.endswith("2.png"):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_killed_worker_of_the_evaluation_is_one_sentence_and_costs_no_update(world_size):
    make_images()
    outcomes = values(
        run_forked(trained, ["--workers", 1], kills_the_reader, world_size=world_size, timeout=90)
    )
    assert [code for code, _ in outcomes] == [1] * world_size
    said = outcomes[0][1]
    assert "a process that loads images (pid " in said and "ended by itself (Killed" in said
    assert "update_000002 is kept" in said and said.count("\n") == 1
    assert [said for _, said in outcomes[1:]] == [""] * (world_size - 1)
    if world_size == 1:
        resumed_as_unbroken(only_run(), "--workers", 0)


def kills_a_training_reader(rank, where):
    saved = any(Path("runs").glob("*/checkpoints/update_000002"))
    if rank == 0 and "/train/" in where and saved:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_killed_worker_of_the_training_is_one_sentence(world_size):
    make_images()
    flags = ["--workers", 1, "--max-updates", 12]
    outcomes = values(
        run_forked(trained, flags, kills_a_training_reader, world_size=world_size, timeout=90)
    )
    assert [code for code, _ in outcomes] == [1] * world_size
    said = "".join(said for _, said in outcomes)
    # by its signal, or by the connection that broke first
    assert "ended by itself (" in said or "is killed by signal" in said or "Connection" in said
    assert "is kept. To go on" in said and "Traceback" not in said


def interrupts_all(rank, where):
    if where.endswith("/val/cat/0.png"):
        Path("ignores").write_text(str(signal.getsignal(signal.SIGINT) is signal.SIG_IGN))
        os.killpg(0, signal.SIGINT)


def interrupted(rank):
    os.setsid()  # a group of its own, as a terminal's
    return trained(rank, ["--workers", 1, "--max-updates", 20], interrupts_all)


def test_ctrl_c_in_the_evaluation_leaves_its_workers_alive():
    make_images()
    (outcome,) = run_forked(interrupted, timeout=90)
    assert outcome.exit_code == 0, outcome.error
    code, said = outcome.value
    assert code == 130 and "was finished" in said, said
    # a worker that only inherits the run's handler outlives one Ctrl-C, and not the second
    assert Path("ignores").read_text() == "True"


def dies_in_the_evaluation(rank, flags):
    if rank == 1:
        from lbaccel.recipe import evaluation

        evaluation.evaluate = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    return trained(rank, flags)


def test_a_rank_that_is_killed_in_the_evaluation_ends_the_others_with_a_sentence():
    make_images()
    flags = ["--workers", 0, "--checkpoint-every", 1]
    first, second = run_forked(dies_in_the_evaluation, flags, world_size=2, timeout=60)
    assert second.exit_code == -signal.SIGKILL
    code, said = first.value
    assert code == 1 and said.startswith("run failed: the connection to another rank broke")
    assert "update_000001 is kept. To go on" in said and said.count("\n") == 1
