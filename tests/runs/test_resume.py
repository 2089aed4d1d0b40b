"""Going on with a run: to the bit on the same plan, in the same samples on any other."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from forks import run_forked, values
from runs_of_recipe import (
    BASE,
    NUM_UPDATES,
    at_update,
    differences,
    interrupt,
    newest,
    rows,
    run,
    stopped_at,
    tensors,
    whole,
    without_contract,
)
from updates import cross_entropy

from lbaccel import BatchPlan, InputError, LargeBatch, UpdateLoader, train
from lbaccel.batch.stream import UpdateStream
from lbaccel.data import order
from lbaccel.data.order import samples_at
from lbaccel.recipe.checks import checked
from lbaccel.recipe.resume import resolve
from lbaccel.recipe.settings import read_settings
from lbaccel.runs.checkpoints import read_state
from lbaccel.update import engine


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


EXTRAS = {
    "SGD, EMA, sparse lines": "--ema-decay 0.5 --log-every 5 --eval-every 0.4",
    "AdamW, mixup, keep": "--optimizer adamw --mixup 0.2 --last-update keep --clip-grad-norm 1",
    "per_update, steps": "--schedule step --milestones 0.5 --warmup none "
    "--bn-statistics per_update --activation-checkpointing none --precision bf16",
}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("stop", [1, 5, 7])  # in the first epoch, and in the second
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(extra, stop):
    flags = EXTRAS[extra].split()
    truth = whole(*flags)
    broken = stopped_at(stop, *flags)
    assert newest(broken).name == f"update_{stop:06d}"
    summary = json.loads((broken / "summary.json").read_text())
    assert (summary["status"], summary["num_updates"]) == ("interrupted", stop)
    assert run("--resume", broken, *flags) == broken
    assert not differences(broken, truth)
    assert (broken / "metrics.csv").stat().st_size > 0
    (line,) = (broken / "resumes.jsonl").read_text().splitlines()
    assert json.loads(line)["update"] == stop


def test_a_run_may_be_resumed_many_times_and_from_an_older_checkpoint():
    truth = run("--keep", 20, output="whole")
    folder = stopped_at(3, "--keep", 20)
    for _ in range(3):
        undo = at_update(2, interrupt)
        run("--resume", folder, code=130)
        undo()
    assert newest(folder).name == "update_000009"
    older = folder / "checkpoints" / "update_000004"
    assert run("--resume", older) == folder
    assert not differences(folder, truth)
    assert len((folder / "resumes.jsonl").read_text().splitlines()) == 4


def test_a_resume_alone_takes_every_setting_from_the_run(capsys):
    truth = run("--momentum", 0.8, output="whole")
    folder = stopped_at(4, "--momentum", 0.8)
    assert train.main(["--resume", str(folder)]) == 0
    assert not differences(folder, truth)
    assert (
        f"resume: {newest(folder).parent / 'update_000004'} (update 4)" in capsys.readouterr().out
    )


def test_auto_finds_the_run_of_the_same_command_and_starts_one_where_there_is_none(capsys):
    first = run("--resume", "auto", "--seed", 1)  # nothing there: a new run
    assert "no run here was asked for with these settings" in capsys.readouterr().out
    other = stopped_at(5, "--seed", 2)
    third = stopped_at(3, "--seed", 3)
    assert len({first, other, third}) == 3
    run("--resume", "auto", "--seed", 2)
    assert len(list(Path("runs").iterdir())) == 3
    assert json.loads((other / "summary.json").read_text())["status"] == "done"
    assert json.loads((third / "summary.json").read_text())["status"] == "interrupted"
    before = (other / "metrics.jsonl").read_bytes(), (other / "summary.json").read_bytes()
    run("--resume", "auto", "--seed", 2)
    assert "nothing left to do: 12 of 12 updates" in capsys.readouterr().out
    assert before == ((other / "metrics.jsonl").read_bytes(), (other / "summary.json").read_bytes())


def test_auto_compares_what_was_typed_not_what_came_of_it():
    flags = ["--lr-scaling", "auto", "--mean", "0.5", "--clip-grad-norm", "none"]
    folder = stopped_at(3, *flags)
    assert run("--resume", "auto", *flags) == folder
    assert run("--resume", folder, *flags, "--base-lr", 0.1) == folder  # what came of the default


def test_another_plan_goes_on_in_the_same_samples_on_one_curve():
    flags = ["--precision", "fp64"]
    truth = rows(run(*flags, output="whole"))
    for number, plan in enumerate(
        (
            ["--micro-batch-size", 16],
            ["--micro-batch-size", 256],
            ["--activation-checkpointing", "full", "--workers", 1],
            ["--memory-format", "channels_last", "--keep", 5, "--log-every", 1],
        )
    ):
        folder = stopped_at(5, *flags, output=f"plan{number}")
        run("--resume", folder, *plan, output=f"plan{number}")
        found = rows(folder)
        assert len(found) == len(truth)
        for a, b in zip(found, truth, strict=True):
            noise = {k for k in (*a, *b) if k.startswith("noise/")}  # not at one micro-batch
            assert a.keys() - noise == b.keys() - noise
            for key in ("train/loss", "optim/grad_norm", "val/loss", "optim/lr"):
                if key in b and a["update"] <= 6:  # one update after the resume
                    assert a[key] == pytest.approx(b[key], rel=1e-12), (key, a["update"])
                elif key in b:
                    assert a[key] == pytest.approx(b[key], rel=1e-9), (key, a["update"])


# -- several ranks --------------------------------------------------------------------------------


def on_ranks(rank, flags, stop):
    """One rank of a run, interrupted by a signal to the last rank alone where `stop` is given."""
    import tiny  # noqa: F401

    if stop and rank == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        at_update(stop, interrupt)
    return train.main([*BASE, *map(str, flags)])


def start(world_size, *flags, stop=0, output="runs", code=0):
    flags = ["--output", output, *flags]
    outcomes = run_forked(on_ranks, flags, stop, world_size=world_size, timeout=120)
    assert values(outcomes) == [code] * world_size
    return max(Path(output).iterdir())


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_stop_together_and_go_on_to_the_bit(world_size):
    truth = start(world_size, output="whole")
    folder = start(world_size, stop=5, code=130)
    assert newest(folder).name == "update_000005"
    assert start(world_size, "--resume", "auto") == folder
    assert not differences(folder, truth)


@pytest.mark.parametrize("norm", [(), ("--norm-batch-size", "global")], ids=["ghost", "global"])
def test_a_run_moves_between_one_two_three_and_four_ranks(norm):
    flags = ("--precision", "fp64", *norm)
    truth = start(1, *flags, output="whole")
    folder = start(1, *flags, stop=2, code=130)
    for world_size, stop in ((2, 3), (3, 2), (4, 0)):
        code = 130 if stop else 0
        assert start(world_size, *flags, "--resume", "auto", stop=stop, code=code) == folder
    found, expected = rows(folder), rows(truth)
    assert [r["update"] for r in found] == [r["update"] for r in expected]
    for a, b in zip(found, expected, strict=True):
        for key in a.keys() & {"train/loss", "optim/grad_norm", "val/loss"}:
            assert a[key] == pytest.approx(b[key], rel=1e-12 if a["update"] <= 3 else 1e-9)
    for key, value in tensors(truth).items():
        assert torch.allclose(tensors(folder)[key], value, rtol=1e-9, atol=1e-12), key
    worlds = [
        json.loads(line)["world_size"]
        for line in (folder / "resumes.jsonl").read_text().splitlines()
    ]
    assert worlds == [2, 3, 4]


def order_in(folder):
    return read_state(newest(folder))["loader"]["order"]


def test_a_run_on_a_large_set_keeps_its_rule_of_order_to_the_bit(monkeypatch):
    """A checkpoint without the field is of the first rule, and those that follow it say so."""
    monkeypatch.setattr(order, "MOST_SORTED", 100)  # so that 1,438 images are a large set
    truth, folder = run(output="whole"), stopped_at(5)
    assert order_in(folder) == order.COMPUTED
    run("--resume", folder)
    assert not differences(folder, truth)

    def of_before(self):
        return {"next_update": self.next_update, "growth": []}

    with monkeypatch.context() as before:  # the second rule came
        before.setattr("lbaccel.data.loader.COMPUTED", order.SORTED)
        before.setattr(UpdateLoader, "state_dict", of_before)
        old_truth, old = run(output="whole-before"), stopped_at(3, output="runs-before")
    assert "order" not in read_state(newest(old))["loader"]
    assert rows(old_truth)[0]["train/loss"] != rows(truth)[0]["train/loss"]
    undo = at_update(4, interrupt)  # in the second epoch
    run("--resume", old, code=130, output="runs-before")
    undo()
    assert order_in(old) == order.SORTED
    run("--resume", old, output="runs-before")
    assert not differences(old, old_truth)


def test_the_samples_of_an_update_depend_on_neither_plan_nor_place():
    """What the loader hands out is `samples_at`, whoever asks from wherever."""
    from lbaccel import BatchPlan, UpdateLoader

    for world in (1, 2, 3, 4):
        plan = BatchPlan(global_batch_size=24, micro_batch_size=4, world_size=world)
        loaders = [UpdateLoader(list(range(46)), plan, rank=r, seed=7) for r in range(world)]
        for loader in loaders:
            loader.load_state_dict({"next_update": 3})
        seen = []
        for loader in loaders:
            for micro, data in next(iter(loader)):
                seen += [] if micro.is_filler else data.tolist()
        start = UpdateStream(24, 46).span(3)[0]
        assert seen == samples_at(start, 24, num_samples=46, seed=7)[0].tolist()


# -- ends before time -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_update_end_and_says_how_to_go_on(number, capsys):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    undo = at_update(3, lambda: os.kill(os.getpid(), number))
    folder = run(code=130)
    undo()
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err == (
        "interrupted. Update 3 was finished, update_000003 is kept. "
        f"To go on: lbaccel train --resume {folder}"
    )
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_ctrl_c_stops_at_once(capsys):
    undo = at_update(3, lambda: (interrupt(), interrupt()))
    folder = run(code=130)
    undo()
    assert newest(folder).name == "update_000002"
    assert "update_000002 is kept. To go on:" in capsys.readouterr().err


def test_a_time_limit_stops_in_good_order_and_exits_0(capsys, monkeypatch):
    folder = run("--max-hours", 1e-9)
    out = capsys.readouterr().out
    assert newest(folder).name == "update_000001"
    assert "the time limit of 1e-09 h; update_000001 is kept. To go on: lbaccel train" in out
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["exit_reason"]) == ("stopped", "time limit after update 1")
    run("--resume", folder, "--max-hours", 1)
    truth = whole()
    assert not differences(folder, truth)


def test_an_interrupt_on_one_rank_outweighs_a_time_limit_on_another():
    assert values(run_forked(stop_reasons, world_size=2, timeout=60)) == ["interrupt"] * 2


def stop_reasons(rank):
    from accelerate import Accelerator

    from lbaccel.update.accumulation import Sums, agree

    accelerator = Accelerator(cpu=True)
    one = torch.ones((), dtype=torch.float64)
    agreement = agree(
        Sums(one, one, False), [], world_size=2, device=accelerator.device,
        stop="interrupt" if rank else "time limit",
    )  # fmt: skip
    return agreement.stop


def test_outside_the_main_thread_no_handler_is_set():
    codes = []
    thread = threading.Thread(
        target=lambda: codes.append(train.main([*BASE, "--max-updates", "1"]))
    )
    thread.start()
    thread.join()
    assert codes == [0]


def test_a_failure_says_which_checkpoint_is_kept(capsys, monkeypatch):
    def breaks(*_):
        raise train.RunFailed("the loss is nan")

    undo = at_update(4, breaks)
    folder = run(code=1)
    undo()
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("run failed: the loss is nan update_000002 is kept. To go on: lbaccel")
    undo = at_update(1, breaks)
    run(code=1, output="other")
    undo()
    assert capsys.readouterr().err.strip().endswith("No checkpoint was written.")
    assert not differences(run("--resume", folder), whole())


# -- longer runs ----------------------------------------------------------------------------------


def lrs(folder):
    return {r["update"]: r["optim/lr"] for r in rows(folder) if "optim/lr" in r}


@pytest.mark.parametrize(
    "schedule", [["constant"], ["step", "--milestones", "0.5"], ["multistep", "--milestones", "1"]]
)
def test_schedules_that_do_not_end_go_on_as_if_longer_from_the_start(schedule):
    flags = ["--schedule", *schedule, "--warmup-epochs", 0.5]
    truth = run(*flags, "--epochs", 4, output="whole")
    folder = run(*flags)
    run("--resume", folder, "--epochs", 4)
    assert lrs(folder) == lrs(truth)
    assert tensors(folder).keys() == tensors(truth).keys()
    for key, value in tensors(truth).items():
        assert torch.equal(tensors(folder)[key], value), key


def test_a_cosine_asks_how_it_goes_on_and_shows_the_three_in_numbers(capsys):
    folder = run()
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert train.main(["--resume", str(folder), "--epochs", "4"]) == 2
    err = capsys.readouterr().err
    for words in (
        "--extend restart (a new cosine from 0.1 at epoch 2 to 0 at 4)",
        f"--extend constant (stays at {lrs(folder)[12]:.4g}",
        "--extend stretch (the cosine of 4 epochs from here on: at epoch 2 it has 0.0",
    ):
        assert words in err
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_each_way_to_extend_a_cosine_has_the_rates_it_says():
    base = run()
    old = lrs(base)
    longer = lrs(run("--epochs", 4, "--warmup-epochs", 0.5, output="whole"))
    for how in ("restart", "constant", "stretch"):
        folder = Path("copies") / how
        shutil.copytree(base, folder, symlinks=True)
        assert train.main(["--resume", str(folder), "--epochs", "4", "--extend", how]) == 0
        new = lrs(folder)
        assert {u: new[u] for u in old} == old and max(new) == 23
        later = [new[u] for u in range(13, 24)]
        if how == "constant":
            assert set(later) == {old[12]}
        elif how == "stretch":
            assert later == [longer[u] for u in range(13, 24)]
        else:
            assert later[0] == 0.1 and later[-1] < 0.01
            assert all(a > b for a, b in pairwise(later))
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["epochs"] == 4 and config["extensions"] == [[2.0, how]]


def test_an_extended_run_goes_on_without_being_told_again():
    truth = run()
    run("--resume", truth, "--epochs", 4, "--extend", "restart")
    folder = run(output="other")
    undo = at_update(5, interrupt)
    run("--resume", folder, "--epochs", 4, "--extend", "restart", code=130)
    undo()
    assert train.main(["--resume", str(folder)]) == 0
    assert not differences(folder, truth)


def test_a_shorter_run_is_a_stretched_cosine_and_never_shorter_than_what_is_done(capsys):
    folder = stopped_at(3, "--epochs", 4, "--warmup", "none")
    assert train.main(["--resume", str(folder), "--epochs", "2"]) == 2
    assert "--extend stretch" in capsys.readouterr().err
    assert train.main(["--resume", str(folder), "--epochs", "2", "--extend", "restart"]) == 2
    assert train.main(["--resume", str(folder), "--epochs", "0.2", "--extend", "stretch"]) == 2
    assert "the run has done 3" in capsys.readouterr().err
    assert train.main(["--resume", str(folder), "--epochs", "2", "--extend", "stretch"]) == 0
    assert max(lrs(folder)) == NUM_UPDATES


# -- what a fault leaves --------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGE = {
    "truncated": (truncate, "is cut off"),
    "bit-flipped": (flip, "is damaged"),
    "missing": (Path.unlink, "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["model.safetensors", "state.pt", "classes.json"])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_taken(file, damage, capsys):
    truth = whole()
    folder = stopped_at(5)
    act, words = DAMAGE[damage]
    act(newest(folder) / file)
    assert run("--resume", folder) == folder
    out = capsys.readouterr().out
    assert f"resume: refused update_000005: {newest(folder).parent}/update_000005/{file}" in out
    assert words in out and "(update 4)" in out
    assert not differences(folder, truth)


def test_a_damaged_manifest_and_no_good_checkpoint_are_said(capsys):
    folder = stopped_at(5)
    for path in (folder / "checkpoints").glob("update_*"):
        (path / "manifest.json").write_text("{")
    assert train.main(["--resume", str(folder)]) == 2
    captured = capsys.readouterr()
    assert "update_000005/manifest.json is damaged" in captured.out
    assert "no checkpoint in" in captured.err and "can be used" in captured.err
    fresh = run("--resume", "auto")  # nobody named this run: a machine must go on by itself
    assert (
        "can be used. Start a new run without --resume. A new one starts" in capsys.readouterr().out
    )
    assert fresh != folder and not differences(fresh, whole())


def test_leftovers_of_a_killed_process_are_taken_away():
    folder = stopped_at(5)
    leftover = folder / "checkpoints" / ".writing-abc"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"update": 6, "train/lo')
    run("--resume", folder)
    assert not leftover.exists()
    assert not differences(folder, whole())


def test_weights_without_a_state_are_refused_with_what_to_type(capsys):
    folder = stopped_at(5)
    for path in (folder / "checkpoints").glob("update_*"):
        (path / "state.pt").unlink()
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest["files"]["state.pt"]
        (path / "manifest.json").write_text(json.dumps(manifest))
    assert train.main(["--resume", str(folder)]) == 2
    assert "weights only" in capsys.readouterr().out


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--global-batch-size", "128"], "--global-batch-size 128: the run in"),
        (["--model", "resnet10t"], "has lbaccel_tiny, and this setting decides its result"),
        (["--norm-batch-size", "frozen"], "Leave --norm-batch-size out"),
        (["--base-lr", "0.3"], "--base-lr 0.3"),
        (["--dry-run"], "Use one of them"),
        (["--extend", "restart"], "Give the new length too"),
        (["--precision", "fp64"], "--precision fp64"),
    ],
)
def test_a_setting_that_decides_the_result_cannot_change(flags, words, capsys):
    folder = stopped_at(2)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert train.main(["--resume", str(folder), *flags]) == 2
    assert words in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_paths_that_are_no_runs_are_named(capsys):
    assert train.main(["--resume", "nowhere"]) == 2
    assert "--resume nowhere does not exist" in capsys.readouterr().err
    Path("file").write_text("x")
    assert train.main(["--resume", "file"]) == 2
    assert "is no run folder" in capsys.readouterr().err
    assert train.main(["--extend", "restart"]) == 2
    assert "Add --resume" in capsys.readouterr().err
    folder = stopped_at(2)
    (folder / "config.yaml").write_text("epochs: [")
    assert train.main(["--resume", str(folder)]) == 2
    assert "is no YAML" in capsys.readouterr().err
    (folder / "config.yaml").write_text("epochs: 3\n")
    assert train.main(["--resume", str(folder)]) == 2
    assert "differs from the contract" in capsys.readouterr().err
    without_contract(folder)
    assert train.main(["--resume", str(folder)]) == 2
    assert "is not whole" in capsys.readouterr().err


def test_a_deleted_metrics_file_is_no_obstacle():
    folder = stopped_at(6)
    (folder / "metrics.jsonl").unlink()
    run("--resume", folder)
    assert [r["update"] for r in rows(folder) if "train/loss" in r] == list(range(7, 13))


def test_every_setting_of_the_contract_is_kept_by_config_yaml():
    folder = stopped_at(1)
    resumed = resolve(read_settings(["--resume", str(folder)])[0])
    values_ = resumed.values()
    typed = resolve(read_settings(BASE)[0])
    for name, value in typed.values().items():
        if name not in ("resume", "output", "lr_scaling") and value is not None:
            assert values_[name] == value, name
    assert checked(resumed)
    assert InputError and engine


# -- the user's own loop --------------------------------------------------------------------------


class Own:
    """A loop of one's own: Accelerate, a scheduler, dropout and BatchNorm."""

    def __init__(self):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5),
            torch.nn.Linear(8, 3),
        )  # fmt: skip
        data = torch.utils.data.TensorDataset(torch.randn(50, 5), torch.randint(3, (50,)))
        plan = BatchPlan(global_batch_size=16, micro_batch_size=8, norm_batch_size=4)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        self.accelerator = Accelerator(cpu=True)
        self.large_batch = LargeBatch(self.accelerator, plan, seed=1)
        self.net, _, self.loader, self.scheduler = self.large_batch.prepare(
            net, optimizer, UpdateLoader(data, plan, seed=1), scheduler
        )

    def updates(self, count):
        found = []
        while len(found) < count:
            for update in self.loader:
                found.append(self.large_batch.update(update, cross_entropy))
                if len(found) == count:
                    break
        return [(r.loss, r.grad_norm, r.num_updates) for r in found]


def test_a_loop_of_ones_own_resumes_through_accelerate_to_the_bit(tmp_path):
    own = Own()
    own.updates(2)  # in the middle of an epoch of 4
    own.accelerator.save_state(str(tmp_path / "state"))
    truth = own.updates(5)
    torch.rand(7)  # what is drawn outside has no effect
    other = Own()
    other.updates(1)
    other.accelerator.load_state(str(tmp_path / "state"))
    assert other.updates(5) == truth
    for a, b in zip(other.net.parameters(), own.net.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_loop_of_ones_own_keeps_the_order_of_a_state_of_before(tmp_path, monkeypatch):
    monkeypatch.setattr(order, "MOST_SORTED", 10)
    with monkeypatch.context() as before:
        before.setattr("lbaccel.data.loader.COMPUTED", order.SORTED)
        before.setattr(UpdateLoader, "state_dict", lambda self: {"next_update": self.next_update})
        own = Own()
        own.updates(2)
        own.accelerator.save_state(str(tmp_path / "state"))
        truth = own.updates(5)
    other = Own()
    other.accelerator.load_state(str(tmp_path / "state"))
    assert other.loader.state_dict()["order"] == order.SORTED
    assert other.updates(5) == truth
    assert Own().updates(1) != truth[:1]
