"""Batch-size schedules in the recipe, and loss dropout: what updates hold and what they write."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from accelerate import Accelerator
from forks import run_forked, values
from recipes import settings_of
from runs_of_recipe import BASE, check_refused, differences, rows, run, whole
from updates import cross_entropy

from lbaccel import BatchPlan, InputError, LargeBatch, UpdateLoader, train
from lbaccel.batch.stream import UpdateStream
from lbaccel.cli import main
from lbaccel.recipe.settings import read_settings
from lbaccel.update.loss_dropout import LossDropout

NUM_TRAIN = 1438
# 1438 samples in epochs of 12 updates of 128, then 6 of 256, then 3 of 512 (the last one short)
BSI = "--batch-schedule bsi --global-batch-size 128 --factor 2 --base-lr 0.08 --milestones 2 3"
SIZES = [128] * 11 + [30] + [256] * 5 + [158] + [512] * 2 + [414]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def logged(folder, key):
    return [line[key] for line in rows(folder) if key in line]


def test_a_growing_batch_is_what_the_schedule_says_in_updates_samples_and_rates(capsys):
    folder = run(*BSI.split(), "--epochs", 3)
    assert logged(folder, "batch/global") == SIZES
    assert logged(folder, "samples_seen")[-1] == sum(SIZES) == 3 * NUM_TRAIN
    assert set(logged(folder, "optim/lr")) == {0.08}
    said = capsys.readouterr().out
    assert "from epoch 2: 256 samples an update, lr 0.08, 6 updates" in said
    assert "21 in all" in said and json.loads((folder / "summary.json").read_text())["status"]


@pytest.mark.parametrize(
    ("flags", "factors"),
    [
        ("--batch-schedule lrd --factor 2", {1: 1, 2: 1 / 2, 3: 1 / 4}),
        ("--batch-schedule mixed --factor 4 2 2 --milestones 2 3 4", {1: 1, 2: 1 / 4, 3: 1 / 4}),
        (
            "--batch-schedule bsi --factor 2 --max-batch-size 320 --past-max lr",
            {1: 1, 2: 1, 3: 0.625},
        ),
    ],
)
def test_rates_follow_the_rule_epoch_by_epoch(flags, factors):
    milestones = [] if "mixed" in flags else ["--milestones", 2, 3]
    folder = run(
        "--global-batch-size", 128, "--base-lr", 0.08, *flags.split(), *milestones, "--epochs", 4,
        "--max-updates", 30,
    )  # fmt: skip
    for line in rows(folder):
        if "optim/lr" in line:
            seen = line["samples_seen"] - line["batch/global"]
            assert line["optim/lr"] == pytest.approx(
                0.08 * factors[min(3, 1 + seen // NUM_TRAIN)], rel=1e-12
            )


def test_warmup_cosine_and_growth_compose_by_multiplication():
    flags = "--schedule cosine --warmup gradual --warmup-epochs 1 --warmup-start zero"
    folder = run(*BSI.replace("bsi", "lrd").split(), *flags.split(), "--epochs", 3)
    total = 3 * NUM_TRAIN
    for line in rows(folder):
        if "optim/lr" in line:
            seen = line["samples_seen"] - line["batch/global"]
            part = torch.tensor((seen - NUM_TRAIN) / (total - NUM_TRAIN), dtype=torch.float64)
            shape = seen / NUM_TRAIN if seen < NUM_TRAIN else (1 + torch.cos(torch.pi * part)) / 2
            truth = 0.08 * float(shape) * (0.5 if NUM_TRAIN <= seen < 2 * NUM_TRAIN else 1)
            truth *= 0.25 if seen >= 2 * NUM_TRAIN else 1
            assert line["optim/lr"] == pytest.approx(truth, rel=1e-9, abs=1e-12)


# before, at and after a growth of the batch
@pytest.mark.parametrize(("stop", "last"), [(5, "wrap"), (12, "keep"), (15, "keep")])
def test_a_run_resumed_in_the_middle_of_a_schedule_is_the_unbroken_one_to_the_bit(stop, last):
    flags = [*BSI.split(), "--epochs", 3, "--last-update", last, "--ema-decay", 0.5]
    truth = whole(*flags)
    broken = stopped_at(stop, *flags)
    assert len(logged(broken, "batch/global")) == stop
    assert run("--resume", broken, *flags) == broken
    assert not differences(broken, truth)


def stopped_at(number, *flags):
    plain, count = LargeBatch.update, [0]

    def update(self, *args):
        count[0] += 1
        if count[0] == number:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, *args)

    LargeBatch.update = update
    try:
        return run(*flags, code=130)
    finally:
        LargeBatch.update = plain


def test_ranks_share_a_growing_batch_and_see_each_sample_once():
    found = values(run_forked(_indices_of_a_rank, world_size=3))
    truth = _indices_of_a_rank(None)
    assert [sorted(i for rank in found for i in rank[u]) for u in range(len(truth))] == [
        sorted(indices) for indices in truth
    ]
    assert all(rank[u] for rank in found for u in range(len(truth)))


def _indices_of_a_rank(rank):
    world_size, rank = (1, 0) if rank is None else (3, rank)
    plan = BatchPlan(global_batch_size=6, micro_batch_size=4, world_size=world_size)
    loader = UpdateLoader(
        list(range(40)), plan, rank=rank, last_update="keep", growth=((1, 12), (2, 60))
    )
    updates = [update for _ in range(3) for update in loader]
    return [[int(i) for _, data in update for i in data] for update in updates]


@pytest.mark.parametrize("extra", ["", "--loss-dropout 1 3"])
def test_a_schedule_that_starts_on_one_rank_and_goes_on_with_three_is_the_one_of_one_rank(extra):
    flags = [*BSI.split(), "--epochs", "3", "--precision", "fp64", *extra.split()]
    truth = run(*flags, output="whole")
    broken = stopped_at(11, *flags)
    assert values(run_forked(_go_on, broken, flags, world_size=3)) == [0] * 3
    assert logged(broken, "batch/global") == logged(truth, "batch/global") == SIZES
    assert logged(broken, "train/loss") == pytest.approx(logged(truth, "train/loss"), rel=1e-9)
    assert logged(broken, "optim/lr") == logged(truth, "optim/lr")
    if extra:
        assert logged(broken, "optim/num_dropped") == logged(truth, "optim/num_dropped")


def _go_on(rank, folder, flags):
    return train.main([*BASE, *flags, "--resume", str(folder)])


@pytest.mark.parametrize("last_update", ["keep", "wrap"])
def test_a_run_made_longer_grows_as_the_longer_schedule_says(last_update):
    flags = "--batch-schedule fast --first-epoch 2 --milestones 2 --global-batch-size 64"
    flags = [*flags.split(), "--last-update", last_update, "--checkpoint-every", "100"]
    truth = run(*flags, "--epochs", 5, output="whole")
    grown = run(*flags, "--epochs", 3)  # its schedule ends at 256 samples
    assert logged(grown, "batch/global")[-2] == 256
    assert run("--resume", grown, *flags, "--epochs", 5) == grown
    assert logged(grown, "batch/global")[-1] > 256
    assert not differences(grown, truth)


def loader_of(**given):
    plan = BatchPlan(global_batch_size=4, micro_batch_size=4)
    return UpdateLoader(list(range(16)), plan, last_update="keep", **given)


def test_a_loader_that_was_grown_goes_on_as_its_state_says():
    loader = loader_of()
    list(loader)
    loader.grow(8)
    list(loader)
    state = loader.state_dict()
    loader.grow(16)  # of a future that is not to be
    loader.load_state_dict(state)
    assert loader.stream.growth == ((1, 8),) and loader.next_update == 6
    again = loader_of()
    again.load_state_dict(state)
    assert again.stream.growth == ((1, 8),)


def test_what_an_update_was_is_the_states_and_what_comes_is_the_loaders():
    state = {"next_update": 5, "growth": [[1, 8], [3, 12]]}  # in the middle of epoch 1
    for own, then in {
        (): ((1, 8), (3, 12)),
        ((1, 8), (2, 16)): ((1, 8), (2, 16)),
        ((2, 16),): ((1, 8), (2, 16)),
        ((1, 16),): ((1, 8),),  # epoch 1 has begun
    }.items():
        loader = loader_of(growth=own)
        loader.load_state_dict(state)
        assert loader.stream.growth == then
    loader = loader_of(growth=((1, 16),))
    loader.load_state_dict({"next_update": 4, "growth": []})  # epoch 1 has not
    assert loader.stream.growth == ((1, 16),)


def test_a_batch_grows_between_epochs_alone():
    loader = loader_of()
    with pytest.raises(InputError, match="before the first update"):
        loader.grow(8)
    next(iter(loader))
    with pytest.raises(InputError, match="in the middle of one"):
        loader.grow(8)
    assert [update.num_samples for update in loader] == [4] * 3
    assert loader.grow(64) == 16
    assert [update.num_samples for update in loader] == [16]


def test_a_size_above_the_training_set_is_the_whole_of_it():
    plan = BatchPlan(global_batch_size=4, micro_batch_size=4)
    loader = UpdateLoader(list(range(10)), plan, last_update="keep", growth=((1, 64),))
    assert [loader.stream.span(u)[1] for u in range(5)] == [4, 4, 2, 10, 10]


BAD = {
    "--batch-schedule bsy": "Did you mean bsi",
    "--factor 2": "does not read --factor 2. Add --batch-schedule, such as bsi",
    "--max-batch-size 900": "does not read --max-batch-size 900. Add --batch-schedule",
    "--batch-schedule steady --factor 2": "does not read",
    "--batch-schedule bsi --factor 1": "not above 1",
    "--batch-schedule bsi --global-batch-size 512 --max-batch-size 128": "no room to grow",
    "--batch-schedule bsi --schedule multistep --milestones 2 3": "both change the rate",
    "--batch-schedule bsi --last-update drop": "every size would leave out",
    "--batch-schedule bsi --base-lr 0.1 --lr-scaling linear": "no reference batch",
    "--batch-schedule bsi --milestones 30": "after the last one of a run of 20 epochs",
    "--loss-dropout 3": "the first and the last epoch",
    "--loss-dropout 5 3": "the last is before the first",
    "--loss-dropout 50 60": "begins after the last epoch",
    "--global-batch-size auto --min-batch-size 64 --max-batch-size 512 --factor 2": "not read --f",
    "--loss-dropout 3 inf": "each a number from 0 to 1,000,000",
    "--loss-dropout nan 3": "each a number from 0",
    "--loss-dropout 0 3": "numbered from 1",
}


@pytest.mark.parametrize("flags", BAD)
def test_what_can_not_be_is_said_with_exit_code_2_and_nothing_is_written(flags, capsys, tmp_path):
    check_refused(flags, BAD[flags], capsys, tmp_path)


def test_a_rate_that_falls_at_one_batch_may_drop_the_remainder():
    flags = "--batch-schedule lrd --factor 2 --milestones 2 --last-update drop"
    folder = run(*flags.split(), "--base-lr", 0.08)
    assert logged(folder, "batch/global") == [256] * 10  # 1438 is 5 x 256 and some
    assert logged(folder, "optim/lr") == [0.08] * 5 + [0.04] * 5


def test_the_end_of_a_run_and_advise_judge_its_batch_and_not_a_short_last_update(capsys):
    flags = ["--last-update", "keep", "--micro-batch-size", 64]
    folder = run(*BSI.split(), "--epochs", 3, *flags)
    assert logged(folder, "batch/global")[-1] == 414
    closing = [line for line in capsys.readouterr().out.splitlines() if "critical batch" in line]
    assert main(["advise", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["global_batch_size"] == 512 and found["advice"][1] == closing[-1]
    assert "512" in closing[-1] and "414" not in closing[-1]


def test_a_batch_above_the_training_set_is_explained_with_its_own_last_update(capsys):
    flags = "--batch-schedule lrd --factor 2 --milestones 2 --global-batch-size 5000"
    run("--dry-run", *flags.split())
    assert "2 in all (2 epochs, last update: keep)" in capsys.readouterr().out


def test_a_run_past_the_updates_asked_for_names_the_flag_that_says_so(capsys):
    folder = run(*BSI.split(), "--epochs", 3, "--max-updates", 9)
    run("--resume", folder, *BSI.split(), "--epochs", 3, "--max-updates", 3, code=2)
    assert "--max-updates 3, and the run has done 9" in capsys.readouterr().err


def test_a_warmup_that_starts_at_its_peak_is_said(capsys):
    run("--dry-run", *BSI.split(), "--epochs", 3, "--warmup-epochs", 1)
    assert "--warmup-start reference is the peak itself, 0.08" in capsys.readouterr().out
    run("--dry-run", *BSI.split(), "--epochs", 3, "--warmup-epochs", 1, "--warmup-start", "zero")
    assert "is the peak itself" not in capsys.readouterr().out


@pytest.mark.parametrize("rule", ["per-256", "per-1024"])
def test_a_rate_stated_per_samples_has_its_reference_under_a_batch_schedule_too(rule, capsys):
    flags = BSI.replace("--base-lr 0.08", "--base-lr 0.16").split()
    run("--dry-run", *flags, "--epochs", 3, "--lr-scaling", rule)
    lr = 0.16 * 128 / int(rule.removeprefix("per-"))
    assert f"from epoch 2: 256 samples an update, lr {lr:.6g}" in capsys.readouterr().out


def read(flags):
    return read_settings(flags.split())[0].values()


def test_under_a_batch_schedule_the_rate_is_as_written_and_what_is_typed_wins():
    values = read("--batch-schedule bsi --base-lr 0.1 --global-batch-size 64")
    assert values["base_batch_size"] == 64
    assert (values["schedule"], values["warmup"], values["last_update"]) == (
        "constant", "none", "keep",
    )  # fmt: skip
    typed = "--batch-schedule bsi --schedule cosine --warmup gradual --last-update wrap"
    values = read(f"{typed} --base-lr 0.1 --base-batch-size 32")
    assert values["base_batch_size"] == 32
    assert (values["schedule"], values["warmup"], values["last_update"]) == (
        "cosine", "gradual", "wrap",
    )  # fmt: skip
    assert settings_of("--batch-schedule", "bsi", "--warmup-epochs", 2).rate.warmup == "gradual"


# -- loss dropout -----------------------------------------------------------------------------


def test_loss_dropout_is_the_rule_of_the_study_loss_by_loss():
    stream = UpdateStream(2, 8, "keep")  # four updates an epoch
    losses = [3.0, 2.0, 1.0, 0.5, *[2.0, 1.0, 1.0, 2.0], *[1.0, 0.9, 0.8, 2.0]]
    losses += [3.0, 1.0, 1.0, 0.0]
    drops = LossDropout(stream, first_epoch=2, last_epoch=3)
    found = [drops(loss, update) for update, loss in enumerate(losses)]
    no, yes = False, True
    truth = [no] * 4 + [no, yes, no, no] + [no, yes, yes, no] + [no] * 4
    assert found == truth and drops.num_dropped == 3


def test_a_dropped_update_moves_statistics_and_counters_and_no_weight():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)
    )
    data = [(torch.randn(3), i % 2) for i in range(32)]
    plan = BatchPlan(global_batch_size=8, micro_batch_size=4, norm_batch_size=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1.0 / (1 + update))
    said = []

    def second(loss, update):
        said.append((loss, update))
        return update == 1

    large_batch = LargeBatch(Accelerator(cpu=True), plan, drops=second)
    model, optimizer, loader, scheduler = large_batch.prepare(
        model, optimizer, UpdateLoader(data, plan), scheduler
    )
    states = []
    for update in loader:
        result = large_batch.update(update, cross_entropy)
        moments = [s["momentum_buffer"].clone() for s in optimizer.state.values()]
        weights = [p.detach().clone() for p in model.parameters()]
        states.append((result, weights, moments, model[1].running_mean.clone()))
    first, dropped, third = states[:3]
    assert (dropped[0].applied, dropped[0].dropped, dropped[0].num_updates) == (False, True, 2)
    assert dropped[0].samples_seen == 16 and said[1] == (dropped[0].loss, 1)
    for part in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(first[part], dropped[part], strict=True))
        assert not torch.equal(dropped[part][0], third[part][0])
    assert not torch.equal(first[3], dropped[3])
    assert int(model[1].num_batches_tracked) == 8  # two ghost batches an update, four updates
    assert scheduler.last_epoch == 4
    assert all(p.grad is None for p in model.parameters())


def test_the_recipe_drops_what_its_losses_say_and_goes_on_after_a_kill():
    flags = ["--loss-dropout", 1, 2, "--global-batch-size", 128, "--last-update", "keep"]
    folder = run(*flags, output="whole")
    losses = logged(folder, "train/loss")
    per_epoch = 12
    truth = sum(losses[u] < losses[u - 1] for u in range(1, 2 * per_epoch) if u % per_epoch)
    assert logged(folder, "optim/num_dropped")[-1] == truth > 3
    assert (
        sum("optim/grad_norm" not in line for line in rows(folder) if "train/loss" in line) == truth
    )
    broken = stopped_at(7, *flags)
    assert run("--resume", broken, *flags) == broken
    assert not differences(broken, folder)


def test_loss_dropout_is_refused_where_gradients_can_not_be_let_go(monkeypatch):
    plan = BatchPlan(global_batch_size=2, micro_batch_size=2)
    large_batch = LargeBatch(Accelerator(cpu=True), plan, drops=lambda loss, update: True)
    monkeypatch.setattr("lbaccel.update.sharding.replicated.Replicated.droppable", False)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="ZeRO-3 and FSDP2"):
        large_batch.prepare(model, optimizer, UpdateLoader([torch.ones(2)] * 4, plan))
