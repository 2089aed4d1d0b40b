"""Activations in the host's memory: to the bit, copied once, and gone from the device."""

from __future__ import annotations

import copy
import gc
import pickle

import forks
import pytest
import timm
import torch
from accelerate import Accelerator
from offloading import CopyStore
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from updates import cross_entropy

from lbaccel import BatchPlan, LargeBatch, UpdateLoader, apply_segments
from lbaccel.errors import InputError
from lbaccel.randomness.masks import KeyedRandomness
from lbaccel.update import pinned_host
from lbaccel.update.accumulation import accumulate
from lbaccel.update.checkpointing import apply_activation_checkpointing
from lbaccel.update.normalization import convert_batch_norm, has_batch_norm
from lbaccel.update.offload import apply_activation_offload
from lbaccel.update.pinned_host import PinnedHost

SIZE = 32
STEM = ["conv1", "bn1", "act1", "maxpool"]
RESNET = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
VIT = [f"blocks.{i}" for i in range(3)]


@pytest.fixture(autouse=True)
def small_tensors_go_too(monkeypatch):
    monkeypatch.setattr(pinned_host, "LEAST_BYTES", 4096)


def resnet():
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=5, drop_path_rate=0.2)


def vit():
    torch.manual_seed(0)
    masks = {"drop_path_rate": 0.5, "proj_drop_rate": 0.3, "pos_drop_rate": 0.2, "drop_rate": 0.2}
    return timm.create_model("test_vit", img_size=SIZE, depth=3, num_classes=5, **masks)


def samples(count, dtype=torch.float64, size=SIZE):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.randint(5, (count,), generator=generator)


def update(model, *, precision="fp64", channels_last=False, statistics="per_ghost", index=0):
    """Loss, gradients and buffers of an update of 10 samples in micro-batches of 4, 4 and 2."""
    norm_batch_size = 2 if has_batch_norm(model) else None
    plan = BatchPlan(global_batch_size=10, micro_batch_size=4, norm_batch_size=norm_batch_size)
    norm = convert_batch_norm(model, norm_batch_size, statistics=statistics)
    randomness = KeyedRandomness(0, torch.device("cpu"))
    images, labels = samples(10, torch.float64 if precision == "fp64" else torch.float32)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model.train().zero_grad()

    def loss_fn(model, data):
        images, labels = data
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images.contiguous(memory_format=layout))
        return F.cross_entropy(logits.to(images.dtype), labels)

    norm.begin()
    # as LargeBatch does, autocast's casts of the weights are kept over the micro-batches
    with randomness.update(index), torch.autocast("cpu", torch.bfloat16, enabled=False):
        sums = accumulate(
            model,
            [
                (m, (images[m.start :][: m.num_samples], labels[m.start :][: m.num_samples]))
                for m in plan.partition()
            ],
            loss_fn,
            num_samples=10,
            scopes=(norm, randomness),
        )
    norm.commit()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    return sums.loss.item(), gradients, {n: b.clone() for n, b in model.named_buffers()}


def assert_equal(found, expected):
    assert found[0] == expected[0]
    for some, others in zip(found[1:], expected[1:], strict=True):
        assert some.keys() == others.keys()
        for name in others:
            assert torch.equal(some[name], others[name]), name


RUNS = {
    "resnet whole": (resnet, [[*STEM, *RESNET]]),
    "resnet blocks": (resnet, RESNET),
    "resnet runs": (resnet, [["bn1", "act1"], RESNET[1:4], [RESNET[5]]]),
    "vit whole": (vit, [["patch_embed", "pos_drop", "norm_pre", *VIT, "norm"]]),
    "vit blocks": (vit, VIT),
}


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_loss_gradients_and_statistics_stay_to_the_bit(runs, precision, channels_last):
    make, blocks = RUNS[runs]
    dtype = torch.float64 if precision == "fp64" else torch.float32
    layout = torch.channels_last if channels_last else torch.contiguous_format
    plain, moved = (make().to(dtype).to(memory_format=layout) for _ in range(2))
    keys, store = list(plain.state_dict()), CopyStore()
    apply_activation_offload(moved, blocks, store=store)
    assert list(moved.state_dict()) == keys
    for index in range(2):  # the buffers of the first update are used again
        options = {"precision": precision, "channels_last": channels_last, "index": index}
        expected, found = update(plain, **options), update(moved, **options)
        assert_equal(found, expected)
        store.buffers_after.append(store.buffers.num_bytes)
    assert store.num_puts == store.num_gets > 0 and store.live == 0
    assert store.buffers_after[0] == store.buffers_after[1]


def test_statistics_merged_over_the_update_stay_to_the_bit():
    plain, moved = resnet().double(), resnet().double()
    apply_activation_offload(moved, [[*STEM, *RESNET]], store=CopyStore())
    options = {"statistics": "per_update"}
    assert_equal(update(moved, **options), update(plain, **options))


@pytest.mark.parametrize(
    ("segments", "blocks"),
    [
        ([RESNET[:3]], [[RESNET[0]]]),  # the input of a segment, which is all that it keeps
        ([RESNET[:3]], [[*STEM], RESNET[3:]]),
        ([STEM, *([name] for name in RESNET)], [[STEM[0]], RESNET]),
    ],
)
def test_segments_and_offload_together_stay_to_the_bit(segments, blocks):
    plain, moved, store = resnet().double(), resnet().double(), CopyStore()
    apply_segments(moved, segments)
    apply_activation_offload(moved, blocks, store=store)
    assert_equal(update(moved), update(plain))
    assert store.num_puts == store.num_gets > 0
    if len(segments) > 1:  # of each micro-batch: the inputs of the stem and of eight blocks
        assert store.num_puts == 3 * (1 + len(RESNET))


class Watch:
    """Bytes of storages that are alive, by torch's own memory events."""

    def __enter__(self):
        self.profiler = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        )
        self.profiler.__enter__()
        return self

    def __exit__(self, *args):
        self.profiler.__exit__(*args)
        events = self.profiler.profiler.kineto_results.events()
        self.num_bytes = sum(e.nbytes() for e in events if e.name() == "[memory]")


class Nowhere(CopyStore):
    """Keeps no value, so that what is left is what the graph holds on the device."""

    def put(self, flat):
        self.num_puts += 1
        return flat.numel()

    def get(self, kept, dtype):
        return torch.zeros(kept, dtype=dtype)

    def release(self, kept):
        pass


def bytes_held(model, x):
    """Bytes that a forward leaves alive: its output and what its graph holds."""
    model(x)  # what is made once is made
    gc.collect()
    with Watch() as watch:
        out = model(x)
    del out
    return watch.num_bytes


def test_nothing_large_is_left_on_the_device_but_the_ends_of_a_run():
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(6)])
    x = torch.randn(512, 64, requires_grad=True)
    one = x.nbytes
    plain = bytes_held(model, x)
    assert 12 * one <= plain < 13 * one  # a Linear keeps its input, GELU too; x is there anyway
    whole = copy.deepcopy(model)
    apply_activation_offload(whole, [[str(i) for i in range(6)]], store=Nowhere())
    assert bytes_held(whole, x) < 1.1 * one  # its output
    each = copy.deepcopy(model)
    apply_activation_offload(each, [str(i) for i in range(6)], store=Nowhere())
    assert 6 * one <= bytes_held(each, x) < 6.2 * one  # the input of each, and the output


@pytest.mark.parametrize("inplace", [False, True])
def test_a_tensor_that_two_modules_save_is_copied_once_and_comes_back_once(inplace):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=inplace), nn.Conv2d(8, 8, 3), nn.ReLU()
    )
    store = CopyStore()
    apply_activation_offload(model, [["0", "1", "2", "3"]], store=store)
    model(torch.randn(4, 3, 16, 16)).sum().backward()
    # both outputs of ReLU; the first is the second convolution's input
    assert (store.num_puts, store.num_gets, store.live) == (2, 2, 0)


def test_a_tensor_that_is_written_between_two_saves_is_copied_twice():
    class Writes(nn.Module):
        def forward(self, x):
            a = x * 1.0
            b = a.sin()  # saves a
            a.add_(1.0)
            return b + a.cos()  # saves what a is now

    x, store = torch.randn(64, 64, requires_grad=True), CopyStore()
    model = nn.Sequential(nn.Identity(), Writes())
    apply_activation_offload(model, ["1"], store=store)
    model(x).sum().backward()
    expected = x.detach().cos() - (x.detach() + 1.0).sin()
    assert torch.equal(x.grad, expected) and store.num_puts == 2


def test_views_of_one_storage_share_its_copy():
    class Parts(nn.Module):
        def forward(self, x):
            q, k, v = x.reshape(2, 16, 3, 64).permute(2, 0, 1, 3).unbind(0)
            return q.sin() + k.cos() + v.sin()  # each keeps its part of tanh's output

    x, store = torch.randn(2, 16, 192, requires_grad=True), CopyStore()
    model = nn.Sequential(nn.Tanh(), Parts())
    plain = torch.autograd.grad(model(x).sum(), x)[0]
    apply_activation_offload(model, [["0", "1"]], store=store)
    assert torch.equal(torch.autograd.grad(model(x).sum(), x)[0], plain)
    assert store.sizes == [x.nbytes] and store.num_gets == 1


STRIDED = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "expanded": lambda x: x[:1].expand(8, -1, -1, -1),
    "transposed": lambda x: x.transpose(1, 3),
    "a slice": lambda x: x[1::2, :, 1:, ::2],
    "turned over": lambda x: x.flip(0),
    "half of the storage": lambda x: x[2:],
}


@pytest.mark.parametrize("make", STRIDED.values(), ids=STRIDED)
def test_a_saved_tensor_comes_back_with_its_strides_and_offset(make):
    seen = {}

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            seen["back"] = (x.stride(), x.storage_offset(), x.untyped_storage().nbytes(), x.clone())
            return 2 * grad * x

    class Run(nn.Module):
        def forward(self, x):
            y = make(x * 1.0)
            seen["saved"] = (y.stride(), y.storage_offset(), y.untyped_storage().nbytes(), y)
            return Square.apply(y)

    store, model = CopyStore(), nn.Sequential(Run())
    apply_activation_offload(model, ["0"], store=store)
    x = torch.randn(8, 6, 8, 8, requires_grad=True)
    model(x).sum().backward()
    assert store.num_puts == 1
    assert seen["back"][:3] == seen["saved"][:3]
    assert torch.equal(seen["back"][3], seen["saved"][3])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("frozen", [False, True])
def test_weights_their_views_and_their_casts_stay(precision, frozen):
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64, bias=False))
    if frozen:
        model[1].weight.requires_grad_(False)
    store = CopyStore()
    apply_activation_offload(model, [["0", "1"]], store=store)
    x = torch.randn(20, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        model(x).float().sum().backward()
    weights = {p.numel() for p in model.parameters()}
    if frozen and precision == "bf16":  # its cast is no part of autocast's cache: it is let go
        weights -= {model[1].weight.numel()}
    assert not weights & set(store.elements)


def test_a_weight_of_another_module_stays():
    class Tied(nn.Module):
        def __init__(self, of):
            super().__init__()
            self.of = [of]  # no module of its own

        def forward(self, x):
            return F.linear(x, self.of[0].weight.t())

    first = nn.Linear(64, 96)
    model, store = nn.Sequential(first, Tied(first)), CopyStore()
    apply_activation_offload(model, [["0", "1"]], store=store)
    model(torch.randn(20, 64, requires_grad=True)).sum().backward()
    assert 64 * 96 not in store.elements and 20 * 96 in store.elements


def test_small_tensors_stay(monkeypatch):
    monkeypatch.setattr(pinned_host, "LEAST_BYTES", 20 * 64 * 4 + 1)
    model, store = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 80)), CopyStore()
    apply_activation_offload(model, [["0", "1", "2"]], store=store)
    model(torch.randn(20, 64)).tanh().sum().backward()
    assert store.num_puts == 0


def test_a_kept_tensor_that_is_written_before_backward_is_an_error_as_in_plain_torch():
    model, store = nn.Sequential(nn.Linear(4, 4, bias=False)), CopyStore()
    apply_activation_offload(model, ["0"], store=store)
    out = model(torch.randn(2, 4, requires_grad=True))
    with torch.no_grad():
        model[0].weight.add_(1.0)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: a tensor \[4, 4\]"):
        out.sum().backward()


def test_second_derivatives_are_the_same():
    plain = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)).double()
    moved, store = copy.deepcopy(plain), CopyStore()
    apply_activation_offload(moved, [["0", "1", "2"]], store=store)
    x = torch.randn(20, 64, dtype=torch.float64)
    second = []
    for model in (plain, moved):
        weights = list(model.parameters())
        first = torch.autograd.grad(model(x).square().sum(), weights, create_graph=True)
        product = sum(g.square().sum() for g in first)
        second.append(torch.autograd.grad(product, weights))
    assert store.num_puts > 0
    assert all(torch.equal(a, b) for a, b in zip(*second, strict=True))


def test_a_graph_that_is_kept_is_walked_twice():
    model, store = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)), CopyStore()
    apply_activation_offload(model, [["0", "1", "2"]], store=store)
    loss = model(torch.randn(20, 64)).square().sum()
    loss.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    loss.backward()
    assert all(torch.equal(p.grad, once[n]) for n, p in model.named_parameters())
    del loss
    assert store.live == 0


def test_a_graph_that_is_dropped_gives_its_buffers_back():
    model, store = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)), CopyStore()
    apply_activation_offload(model, [["0", "1", "2"]], store=store)
    for _ in range(3):
        model(torch.randn(20, 64))
    assert store.live == 0 and store.buffers.num_bytes == 8192  # one, used three times


def test_evaluation_moves_nothing_and_copies_are_independent():
    model, store = resnet(), CopyStore()
    apply_activation_offload(model, RESNET, store=store)
    images = samples(2, torch.float32)[0]
    with torch.no_grad():
        model.eval()(images)
    assert store.num_puts == 0
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert not twin(images).any() and model(images).any()
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(images), model(images))


def test_a_lack_of_room_takes_the_recovery_and_the_update_is_that_of_a_smaller_micro_batch():
    def trained(micro, *, blocks=(), room=None):
        torch.manual_seed(0)
        model = timm.create_model("resnet18", num_classes=5).double()
        store = CopyStore(room=room)
        apply_activation_offload(model, blocks, store=store)
        images, labels = samples(16)
        plan = BatchPlan(global_batch_size=16, micro_batch_size=micro, norm_batch_size=2)
        large_batch = LargeBatch(Accelerator(cpu=True), plan)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = UpdateLoader(TensorDataset(images, labels), plan)
        bare = model
        model, optimizer, loader = large_batch.prepare(model, optimizer, loader)
        (update,) = loader
        return large_batch.update(update, cross_entropy), bare.state_dict(), store

    blocks = [[*STEM, *RESNET]]
    _, _, all_of_it = trained(8, blocks=blocks)
    short, found, store = trained(16, blocks=blocks, room=all_of_it.most + 1)
    fits, expected, _ = trained(8)
    assert short.num_retries == 1 and short.micro_batch_size == 8 and store.live == 0
    assert short.loss == fits.loss and fits.num_retries == 0
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def on_a_rank(rank):
    """One update of resnet18 with and without offload, on one of several ranks."""
    found = []
    for blocks in ([], [[*STEM, *RESNET[:4]], RESNET[4:]]):
        torch.manual_seed(0)
        model, store = timm.create_model("resnet18", num_classes=5).double(), CopyStore()
        apply_activation_offload(model, blocks, store=store)
        images, labels = samples(14)
        plan = BatchPlan(global_batch_size=14, micro_batch_size=4, world_size=2, norm_batch_size=2)
        large_batch = LargeBatch(Accelerator(cpu=True), plan)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = UpdateLoader(TensorDataset(images, labels), plan, rank=rank)
        bare = model
        model, optimizer, loader = large_batch.prepare(model, optimizer, loader)
        seen = []

        def loss_fn(model, data, seen=seen):
            seen += data[0].sum((1, 2, 3)).tolist()
            return cross_entropy(model, data)

        (update,) = loader
        loss = large_batch.update(update, loss_fn).loss
        weights = {n: t.clone() for n, t in bare.state_dict().items()}
        found.append((loss, weights, store.num_puts, type(model).__name__, seen))
    (loss, weights, none, *_), (again, moved, some, wrapper, seen) = found
    equal = loss == again and all(torch.equal(moved[n], weights[n]) for n in weights)
    return equal, none, some, wrapper, seen


def test_two_ranks_give_the_same_update_to_the_bit():
    first, second = forks.values(forks.run_forked(on_a_rank, world_size=2, timeout=300))
    for equal, none, some, wrapper, _ in (first, second):
        assert equal and none == 0 < some and wrapper == "DistributedDataParallel"
    assert len(first[4] + second[4]) == len(set(first[4] + second[4])) == 14


def test_on_a_cpu_nothing_is_moved():
    model = nn.Sequential(nn.Linear(64, 64))
    apply_activation_offload(model, ["0"])
    assert not PinnedHost().takes(torch.randn(64, 64))
    model(torch.randn(64, 64, requires_grad=True)).sum().backward()


def test_what_can_not_be_offloaded_is_refused_and_nothing_is_applied():
    model = resnet()
    cases = [
        ([["layer9"]], r"\['layer9'\] are no modules of ResNet.*layer4"),
        ([[""]], "are no modules"),
        ([["layer1.0", "layer1.0"]], "each of them once"),
        (["layer1", "layer1.0"], r"\['layer1.0'\] lie in others"),
        ([[]], "Each run names modules"),
    ]
    for blocks, says in cases:
        with pytest.raises(InputError, match=says):
            apply_activation_offload(model, blocks)
    apply_segments(model, [RESNET[:2]])
    for name in (RESNET[1], f"{RESNET[0]}.conv1"):
        with pytest.raises(InputError, match=rf"\['{name}'\] run inside what is recomputed"):
            apply_activation_offload(model, [name])
    apply_activation_offload(model, [RESNET[3]])
    with pytest.raises(InputError, match="are offloaded already"):
        apply_activation_offload(model, RESNET[2:])
    with pytest.raises(InputError, match=r"or offloaded\. Give all segments at once"):
        apply_segments(model, [RESNET[2:5]])
    by_itself = vit()
    apply_activation_checkpointing(by_itself)
    with pytest.raises(InputError, match="run inside what is recomputed"):
        apply_activation_offload(by_itself, VIT)
    wrapped = resnet()
    apply_activation_checkpointing(wrapped, RESNET[:2])
    with pytest.raises(InputError, match=r"run inside what is recomputed.*\(apply_segments\)"):
        apply_activation_offload(wrapped, RESNET[:1])
    compiled = nn.Sequential(nn.Linear(2, 2))
    compiled.compile(backend="eager")
    with pytest.raises(InputError, match=r"the model is compiled.*model.compile\(\)"):
        apply_activation_offload(compiled, ["0"])


def test_a_model_that_is_compiled_after_the_offload_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    apply_activation_offload(model, [["0", "1"]], store=CopyStore())
    model(torch.randn(3, 4)).sum().backward()  # as it is, it runs
    model.compile(backend="eager")
    with pytest.raises(InputError, match=r"the model is compiled.*model.compile\(\)"):
        model(torch.randn(3, 4))
