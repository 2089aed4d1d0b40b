"""A tensor that forwards carry on is an error in the first update; caches and counters pass."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from test_averages import HOWS, OfTheLoss, network, plain_loss
from test_averages import planned as run
from torch import nn
from torch.nn import functional as F

from lbaccel import BatchPlan, InputError, LargeBatch, UpdateLoader
from lbaccel.update.reachable import reachable


@pytest.mark.parametrize("micro", [4, 23])
@pytest.mark.parametrize("how", HOWS)
def test_a_tensor_that_forwards_carry_is_named_before_a_weight_is_written(how, micro):
    model = network(how)
    before = model[1].weight.clone()
    with pytest.raises(InputError, match=r"(?s)'0\.0\.1\.centers'.*averages=.*allow_writes="):
        run(model, plain_loss, micro)
    assert torch.equal(model[1].weight, before)


def test_the_loss_function_s_own_tensors_are_watched_too():
    model = nn.Sequential(nn.Linear(3, 4)).double()
    with pytest.raises(InputError, match=r"loss_fn\.teacher.*more"):
        run(model, OfTheLoss(model), 5, allow_writes=["loss_fn.mean"])
    run(model, OfTheLoss(model), 5, allow_writes=["loss_fn.mean", "loss_fn.teacher"])


def test_a_trial_leaves_the_state_that_the_forward_left():
    """What is allowed moves once a micro-batch, as without the watch."""
    model, twin = network("buffer"), network("buffer")
    counts = nn.Module()
    counts.register_buffer("scale", torch.ones(3, dtype=torch.float64))

    def loss_fn(model, micro_batch):
        counts.scale.mul_(1.5)
        return plain_loss(model, (micro_batch[0] * counts.scale, micro_batch[1]))

    with pytest.raises(InputError, match=r"loss_fn\.counts\.scale"):
        run(model, loss_fn, 12, num_updates=1, allow_writes=["0.0.1.centers"])
    assert counts.scale.tolist() == [1.5] * 3  # of the one micro-batch that ran
    run(twin, loss_fn, 12, num_updates=1, allow_writes=["0.0.1.centers", "loss_fn.counts"])
    assert counts.scale.tolist() == [1.5**3] * 3


class Harmless(nn.Module):
    """Caches by shape, notes, counters, a list and a dict that grow."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("rope", None)
        self.register_buffer("last", torch.zeros(6, dtype=torch.float64))
        self.seen, self.by_shape, self.calls = [], {}, 0
        self.cache = torch.zeros(0)
        self.note = torch.zeros(())

    def forward(self, x):
        self.count += 1
        self.calls += 1
        if self.rope is None:
            self.rope = torch.arange(6.0, dtype=x.dtype).cos()
        if len(self.cache) != len(x):
            self.cache = torch.ones(len(x), 1, dtype=x.dtype)
        self.by_shape.setdefault(len(x), torch.ones(6, dtype=x.dtype))
        self.seen.append(x.detach().mean())
        self.last.copy_(x.detach()[0])
        self.note = (x**2).mean()  # an auxiliary loss, with its graph
        self.attention = x
        return x * self.rope * self.cache * self.by_shape[len(x)]


def test_caches_notes_and_counters_are_no_error():
    for micro in (3, 4, 23):
        model = network("buffer")
        model[0][0][1] = Harmless()

        def loss_fn(model, micro_batch):
            return plain_loss(model, micro_batch) + 0.1 * model[0][0][1].note

        run(model, loss_fn, micro)
        assert int(model[0][0][1].count) >= 3


def test_a_sound_network_runs_each_micro_batch_once():
    calls = []

    def loss_fn(model, micro_batch):
        calls.append(len(micro_batch[0]))
        return plain_loss(model, micro_batch)

    model = network("buffer")
    model[0][0][1] = nn.Tanh()
    run(model, loss_fn, 6, num_updates=2)
    assert calls == [6, 6, 6, 5] * 2


def test_spectral_normalisation_is_found_and_its_vectors_may_be_declared():
    model = network("buffer")
    model[0][0][1] = nn.Tanh()
    model[1] = nn.utils.parametrizations.spectral_norm(model[1])
    with pytest.raises(InputError, match="_u"):
        run(model, plain_loss, 6)


def test_the_walk_finds_what_objects_lists_closures_and_globals_hold():
    held = SimpleNamespace(queue=[torch.zeros(1)], table={"a": torch.zeros(2)})
    cell = torch.zeros(3)

    def loss_fn(model, micro_batch, *, extra=torch.zeros(4)):  # noqa: B008
        return held.queue[0] + cell + OF_MODULE + extra

    loss_fn.mean = torch.zeros(5)
    paths = set(reachable(None, loss_fn).places)
    assert paths == {
        "loss_fn.held.queue[0]",
        "loss_fn.held.table['a']",
        "loss_fn.cell",
        "loss_fn.OF_MODULE",
        "loss_fn.kwdefaults['extra']",
        "loss_fn.mean",
    }
    with pytest.raises(InputError, match=r"allow_writes='loss_fn.helt' holds no tensor"):
        reachable(None, loss_fn).named(["loss_fn.helt"], option="allow_writes")


OF_MODULE = torch.zeros(6)

FAMILIES = [
    "beit_base_patch16_224",
    "convnext_atto",
    "densenet121",
    "dla34",
    "edgenext_xx_small",
    "efficientnet_b0",
    "eva02_tiny_patch14_224",
    "fastvit_t8",
    "ghostnet_050",
    "hrnet_w18_small",
    "levit_128s",
    "coat_tiny",
    "maxvit_rmlp_pico_rw_256",
    "mobilenetv3_small_050",
    "mobilevit_xxs",
    "naflexvit_base_patch16_gap",
    "nf_regnet_b0",
    "poolformer_s12",
    "pvt_v2_b0",
    "regnetx_002",
    "repvgg_a0",
    "resnet10t",
    "twins_svt_small",
    "swin_tiny_patch4_window7_224",
    "swinv2_cr_tiny_ns_224",
    "tiny_vit_5m_224",
    "vgg11_bn",
    "volo_d1_224",
    "vit_relpos_small_patch16_224",
    "vit_tiny_patch16_224",
    "xcit_nano_12_p16_224",
    "mixer_s32_224",
]
FIXED_SIZE = ("mixer_s32_224", "coat_tiny", "volo_d1_224")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_no_timm_family_is_taken_for_one_that_carries_a_tensor(name):
    import timm

    fixed = name in FIXED_SIZE
    size, where = (224, {}) if fixed else (64, {"img_size": 64})
    try:
        model = timm.create_model(name, num_classes=4, **where)
    except TypeError:  # a convolutional network takes any size
        model = timm.create_model(name, num_classes=4)
    x, y = torch.randn(5, 3, size, size), torch.randint(4, (5,))
    plan = BatchPlan(global_batch_size=5, micro_batch_size=2, norm_batch_size="frozen")
    large_batch = LargeBatch(Accelerator(cpu=True), plan)
    loader = UpdateLoader(torch.utils.data.TensorDataset(x, y), plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    calls = []
    model, optimizer, loader = large_batch.prepare(model, optimizer, loader)
    (update,) = loader

    def loss_fn(model, micro_batch):
        if torch.is_grad_enabled():  # not the samples on which masks are learned
            calls.append(1)
        return F.cross_entropy(model(micro_batch[0]), micro_batch[1])

    assert large_batch.update(update, loss_fn).applied
    assert len(calls) == 3  # nothing was even tried
