"""BatchNorm of the averaged weights: measured alike on any ranks, and in what is saved."""

from __future__ import annotations

import copy
import gc
import json
import multiprocessing
import os
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from accelerate import Accelerator
from forks import run_forked, values
from runs_of_recipe import BASE, differences, newest, run, stopped_at
from safetensors.torch import load_file
from torch.optim.swa_utils import update_bn
from torch.utils.data import TensorDataset

from lbaccel import BatchPlan, InputError, UpdateLoader, train
from lbaccel.data.augment import GroupMix
from lbaccel.data.order import epoch_order, samples_at
from lbaccel.data.pipelines import training_set
from lbaccel.data.sources import open_source
from lbaccel.recipe import average
from lbaccel.recipe.average import norm_of_average
from lbaccel.recipe.checks import checked
from lbaccel.recipe.evaluation import NotEvaluated
from lbaccel.recipe.resume import read_run
from lbaccel.recipe.settings import read_settings

COUNT, SIZE, SEED = 47, 4, 5


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def samples():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(COUNT, 3, 8, 8, generator=generator).double() * 2 + 1


def network():
    torch.manual_seed(3)
    return tiny.Tiny(drop_rate=0.5, drop_path_rate=0.5).double()


def norm_of(net, *, micro=4, dataset=None, workers=0):
    accelerator = Accelerator(cpu=True)
    ranks = accelerator.num_processes
    plan = BatchPlan(
        global_batch_size=24, micro_batch_size=micro, world_size=ranks, norm_batch_size=SIZE
    )
    data = dataset or TensorDataset(samples(), torch.zeros(COUNT))
    loader = UpdateLoader(
        data, plan, rank=accelerator.process_index, seed=SEED, num_workers=workers
    )
    ema = torch.nn.Module()
    ema.module = net
    return norm_of_average("recalibrated", ema, loader, accelerator, dtype=torch.float64)


def statistics(net):
    return {k: v for k, v in net.state_dict().items() if "running" in k}


def measured(rank, micro):
    net = network()
    norm = norm_of(net, micro=micro)
    norm.measure()
    return statistics(net), norm.accelerator.num_processes, len(norm.loader.dataset)


def test_the_statistics_are_torchs_update_bn_over_groups_of_the_first_epoch():
    net, truth = network().eval(), network().eval()
    norm = norm_of(net)
    assert (norm.num_groups, norm.group_size) == (11, 4)  # 3 images of 47 are in no group
    assert "over 44 training images (11 x 4)" in str(norm)
    order = torch.from_numpy(epoch_order(SEED, 0, COUNT).copy())[:44]
    for module in truth.modules():  # dropout and its kin draw nothing
        module.p = module.drop_prob = 0.0
    update_bn(samples()[order].split(SIZE), truth)
    norm.measure()
    for key, value in statistics(truth).items():
        torch.testing.assert_close(statistics(net)[key], value, rtol=1e-12, atol=1e-12)
    assert not net.training
    parameters = dict(network().named_parameters())
    assert all(torch.equal(p, parameters[n]) for n, p in net.named_parameters())


def test_the_groups_are_of_the_order_that_the_run_began_with(monkeypatch):
    monkeypatch.setattr("lbaccel.data.order.MOST_SORTED", 10)  # 47 images are a large set
    found = []
    for state in ({"next_update": 0}, norm_of(network()).loader.state_dict()):
        norm = norm_of(network())
        norm.loader.load_state_dict(state)
        groups = norm._groups()
        order = epoch_order(SEED, 0, COUNT, order=norm.loader.order)
        ((_, indices, _),) = groups._keys(0, groups.plan)
        assert indices.tolist() == order.tolist()[:SIZE]
        found.append(indices.tolist())
    assert found[0] != found[1]


def measured_of_few(rank, broken):
    """20 images in groups of 8: three ranks together would take more than there are."""
    net, accelerator, ema = network(), Accelerator(cpu=True), torch.nn.Module()
    ema.module = net
    data = TensorDataset(samples()[:20], torch.zeros(20))
    if broken:
        data = NoSuchImage() if rank == 1 else data
    plan = BatchPlan(
        global_batch_size=20,
        micro_batch_size=8,
        world_size=accelerator.num_processes,
        norm_batch_size=8,
    )
    loader = UpdateLoader(data, plan, rank=accelerator.process_index, seed=SEED)
    norm = norm_of_average("recalibrated", ema, loader, accelerator, dtype=torch.float64)
    try:
        norm.measure()
    except NotEvaluated as failed:
        return str(failed.error)
    return statistics(net)


class NoSuchImage(TensorDataset):
    def __init__(self):
        super().__init__(samples()[:20], torch.zeros(20))

    def __getitem__(self, index):
        raise InputError("no such image.")


@pytest.mark.parametrize("world_size", [2, 3])
def test_more_ranks_than_groups_change_no_bit_and_hear_of_a_failure(world_size):
    truth = measured_of_few(0, False)
    for found in values(run_forked(measured_of_few, False, world_size=world_size)):
        assert all(torch.equal(found[key], value) for key, value in truth.items())
    said = values(run_forked(measured_of_few, True, world_size=world_size))
    assert len(set(said)) == 1 and "no such image" in said[0]


@pytest.mark.parametrize(("world_size", "micro"), [(1, 24), (2, 4), (3, 8)])
def test_ranks_and_micro_batches_change_no_bit(world_size, micro):
    truth, _, _ = measured(0, 4)
    for found, ranks, _ in values(run_forked(measured, micro, world_size=world_size)):
        assert ranks == world_size
        assert found.keys() == truth.keys()
        assert all(torch.equal(found[key], value) for key, value in truth.items())


def test_nothing_is_measured_where_batchnorm_is_frozen_or_absent_or_its_averages_were_asked_for():
    data = TensorDataset(samples(), torch.zeros(COUNT))
    accelerator, ema = Accelerator(cpu=True), torch.nn.Module()
    for net, size, how in (
        (network(), "frozen", "recalibrated"),
        (network(), SIZE, "average"),
        (torch.nn.Linear(1, 1), SIZE, "recalibrated"),
    ):
        ema.module = net
        plan = BatchPlan(global_batch_size=8, micro_batch_size=4, norm_batch_size=size)
        loader = UpdateLoader(data, plan)
        assert norm_of_average(how, ema, loader, accelerator, dtype=torch.float64) is None
    assert norm_of_average("recalibrated", None, loader, accelerator, dtype=torch.float64) is None


def test_its_workers_end_with_it_and_are_not_left_to_the_collector():
    before = set(multiprocessing.active_children())
    net = network()
    gc.disable()
    try:
        norm_of(net, workers=1).measure()
        assert set(multiprocessing.active_children()) == before
    finally:
        gc.enable()
    truth, _, _ = measured(0, 4)
    assert all(torch.equal(statistics(net)[key], value) for key, value in truth.items())


def test_the_number_of_images_is_bounded(monkeypatch):
    monkeypatch.setattr(average, "MOST_IMAGES", 10)
    assert norm_of(network()).num_groups == 2
    monkeypatch.setattr(average, "MOST_IMAGES", 3)  # below one group
    assert norm_of(network()).num_groups == 1


class Broken(TensorDataset):
    """One of its images can't be read."""

    def __getitem__(self, index):
        if index == int(epoch_order(SEED, 0, COUNT)[9]):  # of the third group
            raise InputError("image 9 can't be read")
        return super().__getitem__(index)


def fails(rank):
    net = network()
    before = copy.deepcopy(statistics(net))
    norm = norm_of(net, dataset=Broken(samples(), torch.zeros(COUNT)))
    with pytest.raises(NotEvaluated) as raised:
        norm.measure()
    same = all(torch.equal(v, before[k]) for k, v in statistics(net).items())
    return type(raised.value.error).__name__, str(raised.value.error), same


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_image_that_cant_be_read_is_heard_on_every_rank_and_changes_nothing(world_size):
    found = values(run_forked(fails, world_size=world_size, timeout=60))
    assert found == [("InputError", "image 9 can't be read", True)] * world_size


def test_memory_that_runs_out_once_changes_nothing_and_twice_is_one_sentence(monkeypatch):
    net, truth = network(), network()
    norm_of(truth).measure()
    plain, calls = tiny.Tiny.forward, []

    def rationed(lacking):
        def forward(self, x):
            calls.append(len(x))
            y = plain(self, x)
            if len(calls) in lacking:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return y

        return forward

    monkeypatch.setattr(tiny.Tiny, "forward", rationed({2}))
    norm_of(net).measure()
    assert all(torch.equal(v, statistics(truth)[k]) for k, v in statistics(net).items())
    calls.clear()
    monkeypatch.setattr(tiny.Tiny, "forward", rationed({2, 3}))
    with pytest.raises(NotEvaluated, match=r"in a group of 4 samples .* --ema-norm average"):
        norm_of(net).measure()


# -- in a run -------------------------------------------------------------------------------------

EMA = ("--ema-decay", 0.5, "--precision", "fp64", "--max-updates", 6, "--mixup", 0.2)


@pytest.mark.parametrize(
    ("flags", "update"),
    [
        ((), 6),
        (("--checkpoint-every", 2, "--eval-every", 3, "--keep", 9), 2),
        (("--eval-every", 99), 6),
    ],
)
def test_the_saved_average_has_the_statistics_of_its_own_weights(flags, update):
    folder = run(*EMA, *flags)
    checkpoint = folder / "checkpoints" / f"update_{update:06d}"
    net = tiny.Tiny(in_chans=1).double()
    net.load_state_dict(load_file(checkpoint / "model_ema.safetensors"))
    truth = copy.deepcopy(net)
    pre = json.loads((checkpoint / "preprocessing.json").read_text())
    source = open_source("digits", seed=4)
    data = training_set(source.train, preprocessing=pre, seed=4, mirror=False)
    mix, groups = GroupMix(10, mixup=0.2, seed=4), []
    (part,) = BatchPlan(global_batch_size=16, micro_batch_size=16, norm_batch_size=16).partition()
    for group in range(len(source.train) // 16):  # 1438 images, fewer than 2048
        keys = samples_at(16 * group, 16, num_samples=len(source.train), seed=4)
        groups.append(mix(data.fetch(*keys), part, *keys)[0].double())
    update_bn(groups, truth)
    for key, value in statistics(truth).items():
        torch.testing.assert_close(statistics(net)[key], value, rtol=1e-10, atol=1e-10)


def test_averaged_statistics_are_another_choice_and_the_weights_do_not_depend_on_it():
    found, other = run(*EMA), run(*EMA, "--ema-norm", "average", output="other")
    ours, theirs = (load_file(newest(f) / "model_ema.safetensors") for f in (found, other))
    differ = {key for key in ours if not torch.equal(ours[key], theirs[key])}
    assert differ == {key for key in ours if "running" in key}
    same = [load_file(newest(f) / "model.safetensors") for f in (found, other)]
    assert all(torch.equal(same[1][key], value) for key, value in same[0].items())


@pytest.mark.parametrize("stop", [2, 5])  # after the first evaluation, at update 3, and before
def test_a_run_that_is_resumed_has_the_bits_of_the_unbroken_one(stop):
    flags = (*EMA, "--eval-every", 0.5)
    truth = run(*flags, output="whole")
    folder = stopped_at(stop, *flags)
    run("--resume", folder, *flags)
    assert differences(folder, truth) == []


def test_it_is_part_of_the_contract_and_a_run_of_before_has_averages(capsys):
    folder = run(*EMA, "--max-updates", 2)
    run("--resume", folder, "--ema-norm", "average", code=2)
    assert "--ema-norm average: the run in" in capsys.readouterr().err
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config.pop("ema_norm") == "recalibrated"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert read_run(folder).optimizer.ema_norm == "average"


def test_averages_may_be_stated_where_there_is_nothing_to_measure():
    """As the file of a run of before does that was gone on with."""
    Path("config.yaml").write_text("ema_norm: average\n")
    assert checked(read_settings(["--config", "config.yaml"])[0]).optimizer.ema_decay is None


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--norm-batch-size", "frozen", "--ema-decay", 0.9], "BatchNorm is frozen"),
        (["--train", "head", "--norm-batch-size", "none", "--ema-decay", 0.9], "is frozen"),
        ([], "does not read --ema-norm recalibrated. Add --ema-decay, such as 0.999"),
    ],
)
def test_where_nothing_reads_it_it_is_refused(flags, says, capsys):
    given = [*BASE, *map(str, flags), "--ema-norm", "recalibrated"]
    assert train.main(given) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("warmup", ["first", "power"])
def test_the_average_begins_as_timms_does(warmup):
    flags = ("--ema-decay", 0.4, "--ema-warmup", warmup, "--precision", "fp64", "--keep", 9)
    folder = run(*flags, "--max-updates", 4, "--checkpoint-every", 1, "--ema-norm", "average")
    files = sorted((folder / "checkpoints").glob("update_*"))
    truth: dict[str, torch.Tensor] = {}
    for u, file in enumerate(files, 1):
        decay = min(0.4, 1 - u ** (-2 / 3)) if warmup == "power" else 0.4
        decay = 0.0 if u == 1 else decay
        for key, value in load_file(file / "model.safetensors").items():
            if value.is_floating_point():
                truth[key] = decay * truth.get(key, value) + (1 - decay) * value
        found = load_file(file / "model_ema.safetensors")
        for key, value in truth.items():
            torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-12)
    assert len(files) == 4


def test_a_resumed_average_goes_on_at_its_own_update():
    flags = (*EMA, "--ema-decay", 0.9, "--ema-warmup", "power")
    truth = run(*flags, output="whole")
    folder = stopped_at(3, *flags)
    run("--resume", folder, *flags)
    assert differences(folder, truth) == []


def on_ranks(rank, output):
    import tiny  # noqa: F401

    flags = [*BASE, *map(str, EMA), "--noise-scale", "none", "--output", output]
    return train.main(flags), os.environ.get("WORLD_SIZE")


def test_two_ranks_save_the_average_of_one():
    for ranks in (1, 2):
        outcomes = run_forked(on_ranks, f"ranks{ranks}", world_size=ranks, timeout=120)
        assert [code for code, _ in values(outcomes)] == [0] * ranks
    found = [
        load_file(newest(next(Path(f"ranks{n}").iterdir())) / "model_ema.safetensors")
        for n in (1, 2)
    ]
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-9, atol=1e-9)
