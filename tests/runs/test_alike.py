"""Ranks that were started differently stop together before the first update, and are named."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from forks import run_forked, values
from PIL import Image
from runs_of_recipe import BASE, newest, stopped_at
from torch.utils.data import TensorDataset
from updates import cross_entropy

from lbaccel import BatchPlan, InputError, LargeBatch, UpdateLoader, train
from lbaccel.errors import CannotRead
from lbaccel.runs import alike, environment
from lbaccel.runs.ranks import decided


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def job(rank, flags_of_rank, changes):
    """One rank of the recipe, with flags of its own; the last rank has other software."""
    import contextlib
    import io

    import tiny  # noqa: F401

    if rank == len(flags_of_rank) - 1 and changes == "versions":
        plain = environment.versions()
        alike.versions = lambda: {**plain, "torch": "2.0.0"}
    if rank == len(flags_of_rank) - 1 and changes == "code":
        alike._code = lambda: "another"
    with contextlib.redirect_stderr(io.StringIO()) as err:
        code = train.main([*BASE, *flags_of_rank[rank]])
    return code, err.getvalue()


def started(*flags_of_rank, changes=""):
    """Exit codes of all ranks, which end, and what the first one says."""
    found = values(
        run_forked(job, flags_of_rank, changes, world_size=len(flags_of_rank), timeout=60)
    )
    return [code for code, _ in found], found[0][1]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--seed", "5"], "--seed is 4 on ranks 0, 1 and 5 on rank 2"),
        (["--base-lr", "0.2"], "--base-lr is none on ranks 0, 1 and 0.2 on rank 2"),
        (["--max-updates", "3"], "--max-updates is none on ranks 0, 1 and 3 on rank 2"),
    ],
)
def test_a_rank_with_another_setting_ends_all_and_is_named(flags, says):
    codes, error = started([], [], flags)
    assert codes == [2, 2, 2] and says in error
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [("versions", "version of torch is "), ("code", "code of lbaccel is ")],
)
def test_a_rank_with_other_software_ends_all_and_is_named(changes, says):
    codes, error = started([], [], changes=changes)
    assert codes == [2, 2] and says in error and "on rank 1" in error
    assert not Path("runs").exists()


def test_a_rank_that_has_one_file_fewer_ends_all_and_is_named():
    for rank in (0, 1):
        for split in ("train", "val"):
            for label in ("a", "b"):
                for number in range(8):
                    path = Path(f"data{rank}/{split}/{label}/{number}.png")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.new("RGB", (8, 8)).save(path)
    flags = ["--global-batch-size", "8", "--img-size", "8", "--norm-batch-size", "4"]
    flags += ["--workers", "0", "--max-updates", "1"]
    same = started([*flags, "--data", "folder:data0"], [*flags, "--data", "folder:data1"])
    assert same[0] == [0, 0], same[1]
    Path("data1/train/b/7.png").unlink()
    codes, error = started([*flags, "--data", "folder:data0"], [*flags, "--data", "folder:data1"])
    assert codes == [2, 2]
    assert "num_train of --data is 16 on rank 0 and 15 on rank 1" in error


def test_an_error_of_one_rank_s_own_flags_reaches_the_first_which_prints_it():
    codes, error = started([], ["--epochs", "-1"])
    assert codes == [2, 2] and "--epochs='-1'" in error


def resumed_elsewhere(rank, run):
    """One rank of a resume; the last one finds another checkpoint under the same relative path."""
    import tiny  # noqa: F401

    if rank == 1:
        os.chdir("elsewhere")
    return train.main(["--resume", run, "--workers", "0"])


def test_a_rank_whose_disk_holds_another_checkpoint_ends_all():
    folder = stopped_at(3)
    shutil.copytree("runs", "elsewhere/runs", symlinks=True)
    manifest = Path("elsewhere") / newest(folder) / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    assert values(run_forked(resumed_elsewhere, str(folder), world_size=2)) == [2, 2]
    shutil.rmtree("elsewhere")
    shutil.copytree("runs", "elsewhere/runs", symlinks=True)
    assert values(run_forked(resumed_elsewhere, str(folder), world_size=2)) == [0, 0]


def unreadable(rank):
    accelerator = Accelerator(cpu=True)

    def fail():
        raise CannotRead("no file")

    try:
        decided(accelerator, fail)
    except InputError as error:
        return type(error).__name__


def test_all_ranks_hear_that_a_file_can_not_be_read_by_the_same_kind_of_error():
    """With `--resume auto` another kind would let the others start a new run."""
    assert values(run_forked(unreadable, world_size=2)) == ["CannotRead"] * 2


# -- a loop of one's own --------------------------------------------------------------------------


def own_loop(rank, what):
    """The error of `prepare` where the last rank differs in `what`; "trained" without one."""
    accelerator = Accelerator(cpu=True)
    world = accelerator.num_processes
    last = what if rank == world - 1 else ""
    count = 23 if last == "data" else 24
    plan = BatchPlan(
        global_batch_size=12, micro_batch_size=1 if last == "plan" else 2, world_size=world
    )
    torch.manual_seed(rank)  # weights may differ: the first rank's are taken
    model = torch.nn.Linear(3, 5 if last == "model" else 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2 if last == "rate" else 0.1)
    targets = torch.arange(count) % 4
    data = TensorDataset(torch.ones(count, 3), targets)
    data.targets = targets.flip(0) if last == "labels" else targets
    large_batch = LargeBatch(
        accelerator,
        plan,
        seed=1 if last == "seed" else 0,
        clip_grad_norm=2.0 if last == "clip" else 1.0,
    )
    loader = UpdateLoader(data, plan, rank=0 if last == "rank" else rank)
    try:
        model, optimizer, loader = large_batch.prepare(model, optimizer, loader)
    except InputError as error:
        return str(error)
    large_batch.update(next(iter(loader)), cross_entropy)
    return "trained"


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("", "trained"),
        ("plan", "BatchPlan micro_batch_size is 2 on ranks 0, 1 and 1 on rank 2"),
        ("seed", "seed of LargeBatch is 0 on ranks 0, 1 and 1 on rank 2"),
        ("clip", "clip_grad_norm is 1.0 on ranks 0, 1 and 2.0 on rank 2"),
        ("rate", "lr in group 0 of the optimizer is 0.1 on ranks 0, 1 and 0.2 on rank 2"),
        ("model", "shape of weight is "),
        ("data", "samples in the data set is 24 on ranks 0, 1 and 23 on rank 2"),
        ("labels", "targets of the data set is "),
        ("rank", "UpdateLoader(rank=0) on rank 2: two ranks would train on the same samples"),
    ],
)
def test_ranks_of_a_loop_of_ones_own_stop_together(what, says):
    for said in values(run_forked(own_loop, what, world_size=3, timeout=60)):
        assert says in said
