from __future__ import annotations

import copy
import io
import zipfile
from functools import partial

import pytest
import timm
import torch
from accelerate import Accelerator
from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct, convert_sync_batchnorm
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset
from updates import cross_entropy, one_update, visiting_order

from lbaccel import LargeBatch, UpdateLoader, restore_batch_norm
from lbaccel.batch.plan import BatchPlan, MicroBatch
from lbaccel.errors import InputError
from lbaccel.update.normalization import convert_batch_norm, has_batch_norm, recalibrate

GROUPS = MicroBatch(0, (3, 3, 2))


def run_groups(layer, norm, x, micro_batch=GROUPS):
    with norm.forward(micro_batch):
        return layer(x)


def sequential_statistics(x, sizes, momentum):
    """Running statistics after training the groups one after the other, from 0 and 1."""
    mean, var = torch.zeros(x.shape[1]).double(), torch.ones(x.shape[1]).double()
    for i, part in enumerate(x.split(sizes)):
        m = 1 / (i + 1) if momentum is None else momentum
        values = part.transpose(0, 1).flatten(1)
        mean = (1 - m) * mean + m * values.mean(1)
        var = (1 - m) * var + m * values.var(1)
    return mean, var


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(4), (8, 4)),
        (nn.BatchNorm1d(4), (8, 4, 5)),
        (nn.BatchNorm2d(4), (8, 4, 3, 5)),
        (nn.BatchNorm3d(4), (8, 4, 2, 3, 2)),
        (BatchNormAct2d(4), (8, 4, 3, 5)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_statistics_move_once_a_ghost_batch_and_only_at_commit(layer, shape, momentum):
    layer = copy.deepcopy(layer).double()
    layer.momentum = momentum
    x = torch.randn(shape, dtype=torch.float64) * 3 + 1
    norm = convert_batch_norm(layer, 3)
    norm.begin()
    run_groups(layer, norm, x)
    assert layer.num_batches_tracked == 0 and (layer.running_mean == 0).all()
    norm.commit()
    mean, var = sequential_statistics(x, [3, 3, 2], momentum)
    torch.testing.assert_close(layer.running_mean, mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(layer.running_var, var, rtol=1e-12, atol=1e-14)
    assert layer.num_batches_tracked == 3


def test_per_update_statistics_are_those_of_the_whole_batch():
    layer = nn.BatchNorm2d(4).double()
    x = torch.randn(8, 4, 3, 5, dtype=torch.float64) * 3 + 1
    x[3:] += 2  # the means of the ghost batches differ, so their spread must count
    norm = convert_batch_norm(layer, 3, statistics="per_update")
    norm.begin()
    run_groups(layer, norm, x[:6], MicroBatch(0, (3, 3)))
    run_groups(layer, norm, x[6:], MicroBatch(6, (2,)))
    norm.commit()
    truth = nn.BatchNorm2d(4).double()
    truth(x)
    for key, value in truth.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[key], value, rtol=1e-12, atol=1e-14)


def keep_and_stop(vectors, vector):
    vectors.append(vector)
    raise InterruptedError


def stacked(vectors, vector):
    assert any(torch.equal(vector, other) for other in vectors)
    return torch.stack(vectors)


def test_commit_over_ranks_equals_one_process_in_order_of_position():
    x = torch.randn(8, 4, 3, 5, dtype=torch.float64)
    for statistics in ("per_ghost", "per_update"):
        alone = nn.BatchNorm2d(4).double()
        norm = convert_batch_norm(alone, 3, statistics=statistics)
        norm.begin()
        run_groups(alone, norm, x)
        norm.commit()
        vectors, ranks = [], []
        for start, sizes in ((0, (3, 3)), (6, (2,))):
            layer = nn.BatchNorm2d(4).double()
            norm = convert_batch_norm(layer, 3, statistics=statistics)
            norm.begin()
            run_groups(layer, norm, x[start : start + sum(sizes)], MicroBatch(start, sizes))
            with pytest.raises(InterruptedError):
                norm.commit(partial(keep_and_stop, vectors))
            ranks.append((layer, norm))
        for layer, norm in ranks:
            norm.commit(partial(stacked, vectors))
            for key, value in alone.state_dict().items():
                torch.testing.assert_close(layer.state_dict()[key], value, rtol=1e-12, atol=1e-14)


def test_a_dropped_update_leaves_no_statistic():
    layer = nn.BatchNorm2d(4)
    norm = convert_batch_norm(layer, 3)
    before = copy.deepcopy(layer.state_dict())
    norm.begin()
    run_groups(layer, norm, torch.randn(8, 4, 3, 5))
    norm.begin()
    norm.commit()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_a_filler_leaves_no_statistic():
    layer = nn.BatchNorm2d(4)
    norm = convert_batch_norm(layer, 3)
    norm.begin()
    run_groups(layer, norm, torch.randn(3, 4, 3, 5), MicroBatch(0, (3,), is_filler=True))
    norm.commit()
    assert layer.num_batches_tracked == 0 and (layer.running_mean == 0).all()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("make", [nn.BatchNorm2d, BatchNormAct2d])
def test_recompute_counts_no_ghost_batch_twice(use_reentrant, nested, make):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), make(4)

        def forward(self, x):
            return self.bn(self.conv(x))

    torch.manual_seed(0)
    plain = Block().double()
    wrapped = copy.deepcopy(plain)
    x = torch.randn(8, 3, 8, 8, dtype=torch.float64, requires_grad=True)

    def checkpointed(x):
        def inner(x):
            return checkpoint(wrapped, x, use_reentrant=use_reentrant) if nested else wrapped(x)

        return checkpoint(inner, x, use_reentrant=use_reentrant)

    for block, call in ((plain, plain), (wrapped, checkpointed)):
        norm = convert_batch_norm(block, 3)
        norm.begin()
        with norm.forward(GROUPS):
            loss = call(x).square().mean()
            with norm.backward():
                loss.backward()
        norm.commit()
        assert block.bn.num_batches_tracked == 3
    for a, b in zip(plain.state_dict().values(), wrapped.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=0)


def test_an_exception_in_backward_leaves_the_layers_plain():
    layer = nn.BatchNorm2d(4)
    norm = convert_batch_norm(layer, 3)
    norm.begin()
    with pytest.raises(KeyError), norm.forward(GROUPS), norm.backward():
        raise KeyError
    assert norm.micro_batch is None and not norm.recomputing


def test_outside_an_update_the_layers_do_what_they_did():
    model = timm.create_model("resnet10t", num_classes=3)
    truth = copy.deepcopy(model)
    convert_batch_norm(model, 4)
    x = torch.randn(4, 3, 32, 32)
    for mode in (True, False):
        assert torch.equal(model.train(mode)(x), truth.train(mode)(x))
    assert list(model.state_dict()) == list(truth.state_dict())
    for key, value in truth.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


def test_a_copy_of_a_converted_model_is_plain():
    model = nn.Sequential(nn.BatchNorm2d(4))
    norm = convert_batch_norm(model, 3)
    twin = copy.deepcopy(model)
    norm.begin()
    with norm.forward(GROUPS):
        twin(torch.randn(8, 4, 3, 5))
    assert twin[0].num_batches_tracked == 1 and model[0].num_batches_tracked == 0


def test_sync_batch_norm_is_taken_over_plain_and_with_activation():
    model = timm.create_model("regnetx_002", num_classes=3).double()
    count = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    truth = copy.deepcopy(model)
    synced = convert_sync_batchnorm(copy.deepcopy(model))
    outputs = []
    for network in (truth, synced):
        norm = convert_batch_norm(network, 3)
        assert len(norm) == count
        norm.begin()
        outputs.append(run_groups(network, norm, x, MicroBatch(0, (3, 3))))
        norm.commit()
    assert torch.equal(*outputs)
    for a, b in zip(truth.state_dict().values(), synced.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_layer_without_running_statistics_is_cut_too():
    layer = nn.BatchNorm2d(4, track_running_stats=False).double()
    x = torch.randn(8, 4, 3, 5, dtype=torch.float64)
    norm = convert_batch_norm(layer, 3)
    norm.begin()
    y = run_groups(layer, norm, x)
    norm.commit()
    plain = nn.BatchNorm2d(4, track_running_stats=False).double()
    assert torch.equal(y, torch.cat([plain(part) for part in x.split([3, 3, 2])]))


def test_a_model_with_batch_norm_needs_a_norm_batch_size():
    with pytest.raises(InputError, match=r"has 20 BatchNorm layers.*norm_batch_size=32"):
        convert_batch_norm(timm.create_model("resnet18"), None)
    assert len(convert_batch_norm(nn.Linear(2, 2), None)) == 0
    assert has_batch_norm(nn.BatchNorm1d(2)) and not has_batch_norm(nn.LayerNorm(2))


def test_an_unknown_subclass_is_refused_by_name():
    class Odd(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    with pytest.raises(InputError, match=r"'1' is a Odd, which lbaccel does not know"):
        convert_batch_norm(nn.Sequential(nn.Identity(), Odd(3)), 2)


def test_a_batch_that_is_not_the_micro_batch_is_refused():
    layer = nn.BatchNorm2d(4)
    norm = convert_batch_norm(nn.Sequential(layer), 3)
    norm.begin()
    with pytest.raises(InputError, match=r"'0' got 16 samples where the micro-batch holds 8"):
        run_groups(layer, norm, torch.randn(16, 4, 3, 5))


def test_a_layer_that_runs_twice_is_refused_where_the_order_would_depend_on_the_plan():
    layer = nn.BatchNorm2d(4)
    norm = convert_batch_norm(layer, 4)
    norm.begin()
    x = torch.randn(8, 4, 3, 5)
    with norm.forward(MicroBatch(0, (4, 4))):
        layer(x)
        with pytest.raises(InputError, match="runs 2 times in one forward"):
            layer(x)
    norm.begin()
    with norm.forward(MicroBatch(0, (8,))):
        layer(layer(x))
    norm.commit()
    assert layer.num_batches_tracked == 2


def test_one_value_a_channel_is_refused_with_advice():
    layer = nn.BatchNorm2d(4)
    norm = convert_batch_norm(layer, 2)
    norm.begin()
    with pytest.raises(InputError, match=r"one value a channel.*norm_batch_size >= 2"):
        run_groups(layer, norm, torch.randn(3, 4, 1, 1), MicroBatch(0, (2, 1)))


def test_recalibration_is_the_mean_over_batches_in_a_copy():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(4)).double()
    convert_batch_norm(model, 4)
    before = copy.deepcopy(model.state_dict())
    batches = [torch.randn(4, 4, 3, 5, dtype=torch.float64) * (i + 1) for i in range(3)]
    twin = recalibrate(model, batches)
    moments = [b.transpose(0, 1).flatten(1) for b in batches]
    torch.testing.assert_close(
        twin[0].running_mean, torch.stack([m.mean(1) for m in moments]).mean(0)
    )
    torch.testing.assert_close(
        twin[0].running_var, torch.stack([m.var(1) for m in moments]).mean(0)
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_running_statistics_have_a_horizon_in_samples_that_no_partition_shortens():
    """Trap: naive accumulation over K micro-batches of one ghost batch each is what we want; one
    of several ghost batches must give the same buffers."""
    images = torch.randn(12, 3, 8, 8, dtype=torch.float64)
    labels = torch.randint(2, (12,))
    found = []
    for micro in (3, 6, 12):
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)
        ).double()
        found.append(
            one_update(model, images, labels, micro_batch_size=micro, norm_batch_size=3)[2]
        )
    with torch.no_grad():
        x = model[0](images[visiting_order(12)])
    mean, _ = sequential_statistics(x, [3, 3, 3, 3], 0.1)
    for buffers in found:
        torch.testing.assert_close(buffers["1.running_mean"], mean, rtol=1e-12, atol=1e-15)
        assert buffers["1.num_batches_tracked"] == 4


def test_every_timm_family_with_batch_norm_is_converted_whole():
    for name in ("resnet18", "mobilenetv2_050", "efficientnet_b0", "regnetx_002", "densenet121"):
        model = timm.create_model(name)
        count = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        plan = BatchPlan(global_batch_size=64, micro_batch_size=32, norm_batch_size=32)
        assert len(convert_batch_norm(model, plan.norm_batch_size)) == count > 0


def test_frozen_statistics_that_are_not_kept_are_refused():
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(InputError, match=r"'0' keeps no running statistics.*norm_batch_size=32"):
        convert_batch_norm(model, "frozen")


# -- the way back, and pickle -----------------------------------------------------------------

KINDS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(BatchNormAct2d, nn.SyncBatchNorm, SyncBatchNormAct),
)
SHAPES = {nn.BatchNorm1d: (6, 4), nn.BatchNorm3d: (6, 4, 2, 3, 2)}


def pickled(model):
    """Saved by torch and loaded again; the names that the pickle asks for."""
    file = io.BytesIO()
    torch.save(model, file)
    with zipfile.ZipFile(file) as parts:
        (name,) = (n for n in parts.namelist() if n.endswith("data.pkl"))
        assert b"lbaccel" not in parts.read(name)
    file.seek(0)
    return torch.load(file, weights_only=False)


def assert_same_layer(found, truth):
    assert type(found) is type(truth) and vars(found).keys() == vars(truth).keys()
    states = found.state_dict(), truth.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("size", [3, "frozen"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_comes_back_to_the_bit_by_restoring_and_by_pickle(kind, size):
    torch.manual_seed(0)
    x = torch.randn(SHAPES.get(kind, (6, 4, 3, 5)))
    layer = kind(4)
    layer.running_mean.uniform_()
    truth, parts = copy.deepcopy(layer), [*layer.parameters(), *layer.buffers()]
    layer.register_forward_hook(handle := lambda *_: None)
    truth.register_forward_hook(handle)
    norm = convert_batch_norm(nn.Sequential(layer), size)
    norm.begin()
    run_groups(layer, norm, x, MicroBatch(0, (3, 3)))  # and dropped: nothing is committed
    assert type(layer) is not kind
    layer._forward_hooks.clear()  # a local function can't be pickled
    saved = pickled(layer)
    layer.register_forward_hook(handle)
    assert type(saved) is kind and type(layer) is not kind
    assert_same_layer(saved, truth)
    assert restore_batch_norm(layer) is layer
    assert_same_layer(layer, truth)
    assert all(a is b for a, b in zip([*layer.parameters(), *layer.buffers()], parts, strict=True))
    if not issubclass(kind, nn.SyncBatchNorm):  # which trains on GPUs only
        expected = truth(x)
        assert torch.equal(layer(x), expected) and torch.equal(saved(x), expected)
        assert_same_layer(layer, truth)
        assert_same_layer(saved, truth)


def trained(model, count=6):
    """The model after an update by `LargeBatch`, and what runs the next one."""
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(count, 3, 8, 8), torch.randint(2, (count,)))
    plan = BatchPlan(global_batch_size=count, micro_batch_size=3, norm_batch_size=3)
    large_batch = LargeBatch(Accelerator(cpu=True), plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, _, loader = large_batch.prepare(model, optimizer, UpdateLoader(data, plan))
    (update,) = loader
    large_batch.update(update, cross_entropy)
    return large_batch, loader


def network():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 4, 3), BatchNormAct2d(4)
    return nn.Sequential(conv, norm, nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 2))


def test_a_model_in_training_can_be_saved_whole_and_is_trained_on_as_if_it_had_not_been():
    model, truth = network(), network()
    large_batch, loader = trained(model)
    other, other_loader = trained(truth)
    before = pickled(model)
    assert type(before[1]) is BatchNormAct2d
    for run, updates in ((large_batch, loader), (other, other_loader)):
        (update,) = updates
        run.update(update, cross_entropy)
    for a, b in zip(model.state_dict().values(), truth.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(before[1].running_mean, model[1].running_mean)
    trained(before)  # what was loaded trains on


def test_a_model_that_was_restored_evaluates_as_before_and_its_updates_are_refused():
    model = network()
    large_batch, loader = trained(model)
    x = torch.randn(2, 3, 8, 8)
    expected = model.eval()(x)
    state = copy.deepcopy(model.state_dict())
    assert restore_batch_norm(model.train()) is model and model.training
    assert type(model[1]) is BatchNormAct2d and torch.equal(model.eval()(x), expected)
    (update,) = loader
    with pytest.raises(InputError, match=r"restore_batch_norm.*Build a new LargeBatch"):
        large_batch.update(update, cross_entropy)
    assert large_batch.num_updates == 1
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    trained(model.train())  # converted anew
    assert type(model[1]) is not BatchNormAct2d
    copied = restore_batch_norm(copy.deepcopy(model))
    assert type(copied[1]) is BatchNormAct2d and type(model[1]) is not BatchNormAct2d


def test_a_copied_sync_layer_stays_converted_since_a_plain_one_would_talk_to_the_other_ranks():
    layer = nn.SyncBatchNorm(4)
    convert_batch_norm(layer, 3)
    twin = copy.deepcopy(layer)
    assert type(twin) is type(layer) and twin._ghost_slot is None
    assert twin(torch.randn(6, 4)).shape == (6, 4)  # in training, on the CPU


def test_each_of_several_momenta_moves_its_own_layers():
    momenta = (0.1, None, 0.1, 0.7)

    def after(*momenta):
        torch.manual_seed(0)
        sizes = (3, 5, 4, 2)
        net = nn.ModuleList(
            nn.BatchNorm1d(n, momentum=m) for n, m in zip(sizes, momenta, strict=True)
        )
        norm = convert_batch_norm(net.double(), 3)
        for _ in range(2):
            norm.begin()
            for layer in net:
                run_groups(layer, norm, torch.randn(8, layer.num_features, dtype=torch.float64))
            norm.commit()
        return net

    found = after(*momenta)
    for i, momentum in enumerate(momenta):
        alone = after(*[momentum] * len(momenta))[i].state_dict()
        assert found[i].state_dict().keys() == alone.keys()
        for key, value in found[i].state_dict().items():
            assert torch.equal(value, alone[key])
        assert alone["num_batches_tracked"] == 6
