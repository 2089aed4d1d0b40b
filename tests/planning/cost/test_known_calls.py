"""A call that is worked out once gives what torch gives, and the trace is the same."""

from __future__ import annotations

import gc
from dataclasses import replace
from itertools import groupby

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from lbaccel import BatchPlan
from lbaccel.planning.candidates import Candidate
from lbaccel.planning.cost.devices import CARDS, CPU
from lbaccel.planning.cost.known_calls import KnownCalls, fake_like, fake_tensors, running_mode
from lbaccel.planning.cost.trace import Free, Recorder
from lbaccel.planning.cost.update import Network, image_batch, trace_update
from lbaccel.planning.cost.workspace import CpuWorkspaces, cuda_workspace
from lbaccel.planning.estimate import Estimator
from lbaccel.update.checkpointing import apply_activation_checkpointing
from lbaccel.update.normalization import has_batch_norm


def swin():
    return SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4)
    )


def named(name):
    return lambda: timm.create_model(name, num_classes=10)


NETWORKS = {
    "resnet": (named("test_resnet"), 32),
    "efficientnet": (named("test_efficientnet"), 32),
    "vit": (named("test_vit2"), 160),
    "convnext": (named("test_convnext2"), 64),
    "maxvit": (named("test_maxvit"), 160),
    "swin": (swin, 32),
    "levit": (lambda: timm.create_model("levit_128s", img_size=64, num_classes=10), 64),
}


def runs_sorted(events):
    """The events, those of each run of frees in order of their storages."""
    runs = groupby(events, key=lambda event: isinstance(event, Free))
    return [
        e for _, run in runs for e in sorted(run, key=lambda e: e.id if isinstance(e, Free) else 0)
    ]


def traces_of(make, side, *, known, **options):
    """Traces of two sizes, plain and with recompute, and one in another precision."""
    with torch.device("meta"):
        model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    network = Network(model=model, make_batch=image_batch(3, side), optimizer=optimizer, clips=True)
    norm = 2 if has_batch_norm(model) else None
    found = []
    for size, precision, change in (
        (4, "fp32", None),
        (6, "fp32", None),
        (4, "bf16", None),
        (4, "fp32", lambda model, _: apply_activation_checkpointing(model)),
    ):
        plan = BatchPlan(global_batch_size=2 * size, micro_batch_size=size, norm_batch_size=norm)
        found.append(
            trace_update(network, plan, precision=precision, change=change, known=known, **options)
        )
    return found


SLOW = ("levit", "maxvit")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in NETWORKS]
)
def test_a_trace_with_known_calls_is_that_which_torch_alone_gives(name, monkeypatch):
    make, side = NETWORKS[name]
    kind = "cuda" if name in ("resnet", "swin") else "cpu"
    options = {"device_type": kind}
    options["workspace"] = cuda_workspace if kind == "cuda" else CpuWorkspaces()
    known = KnownCalls()
    found = traces_of(make, side, known=known, **options)
    monkeypatch.setattr(KnownCalls, "call", lambda *_: None)
    alone = traces_of(make, side, known=None, **options)
    gc.collect()  # a model is part of cycles, and its storages go when they are found
    for one, each in zip(found, alone, strict=True):
        assert one.roles == each.roles and len(each.events) > 500
        # What is dropped at once (autocast's casts) goes in any order.
        assert runs_sorted(one.events) == runs_sorted(each.events)


def described(value, arguments):
    """Sizes, strides, dtype and place in the storage, and whose storage it is."""
    if isinstance(value, (tuple, list)):
        return [described(v, arguments) for v in value]
    if not isinstance(value, torch.Tensor):
        return value
    storage = value.untyped_storage()
    shared = [i for i, a in enumerate(arguments) if a.untyped_storage()._cdata == storage._cdata]
    same = [i for i, a in enumerate(arguments) if a is value]
    layout = (tuple(value.shape), value.stride(), value.storage_offset(), value.dtype)
    return (*layout, value.device, storage.nbytes(), shared, same, value.requires_grad)


aten = torch.ops.aten
CALLS = {
    "a sum of two dtypes": lambda x, y: aten.add.Tensor(x, y.to(torch.bfloat16)),
    "by one, whole or not": lambda x, y: [
        aten.mul.Tensor(x.to(torch.bool), one) for one in (1, 1.0, True)
    ],
    "in place": lambda x, y: aten.add_.Tensor(x, y),
    "transposed": lambda x, y: aten.t.default(x),
    "a part": lambda x, y: aten.slice.Tensor(x, 0, 1, 3),
    "parts": lambda x, y: aten.split.Tensor(y, 2),
    "strided": lambda x, y: aten.as_strided.default(y, (2, 2), (3, 1), 5),
    "of an offset": lambda x, y: aten.view.default(y, (3, 8)),
    "another dtype of the bytes": lambda x, y: aten.view.dtype(y, torch.int32),
    "an unsafe view": lambda x, y: aten._unsafe_view.default(y, (24,)),
    "new": lambda x, y: aten.new_empty.default(x, (2, 3)),
    "made": lambda x, y: torch.zeros(3, 5),
    "several": lambda x, y: aten.native_layer_norm.default(x, (6,), None, None, 1e-5),
    "some none": lambda x, y: aten.convolution_backward.default(
        torch.empty(2, 3, 4, 4), torch.empty(2, 3, 4, 4), torch.empty(3, 1, 3, 3), None, (1, 1),
        (1, 1), (1, 1), False, (0, 0), 3, (False, True, False),
    ),
    "in a given place": lambda x, y: aten.native_batch_norm.out(
        x, None, None, None, None, True, 0.1, 1e-5,
        out=y, save_mean=torch.empty(6), save_invstd=torch.empty(6),
    ),
    "an index": lambda x, y: aten.index.Tensor(x, [torch.zeros(2, dtype=torch.long)]),
    "a copy": lambda x, y: aten._to_copy.default(y, dtype=torch.float64),
    "of an expanded one": lambda x, y: aten.relu.default(x[:1].expand(4, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_known_call_gives_what_torch_gives(name, monkeypatch):
    def found(mode):
        with mode:
            results = []
            for offset in (0, 6, 6, 0):
                whole = torch.empty(60)
                arguments = whole[:24].view(4, 6), whole[30 + offset : 54 + offset].view(4, 6)
                results.append(described(CALLS[name](*arguments), arguments))
        return results

    known = found(fake_tensors())
    monkeypatch.setattr(KnownCalls, "call", lambda *_: None)
    assert known == found(fake_tensors())


def test_a_call_on_the_same_sizes_is_worked_out_once(monkeypatch):
    worked_out = []
    remember = KnownCalls.remember
    monkeypatch.setattr(
        KnownCalls,
        "remember",
        lambda self, call, out: (worked_out.append(str(call.key[0])), remember(self, call, out)),
    )
    with fake_tensors() as mode:
        for _ in range(5):
            torch.empty(3, 4) * torch.empty(3, 4)
    with fake_tensors(mode.known):
        torch.empty(3, 4) * torch.empty(3, 4)
    assert worked_out == ["aten.empty.memory_format", "aten.mul.Tensor"]


def test_what_depends_on_values_is_left_to_torch():
    with fake_tensors(allow_non_fake_inputs=True) as mode:
        x, mask = torch.empty(3, 4), torch.ones(3, dtype=torch.bool)
        for _ in range(2):
            assert torch.tensor(3).item() == 3  # a value that torch knows
            with pytest.raises(Exception, match=r"[Dd]ynamic|nonzero"):
                x[mask]
            with pytest.raises(Exception, match=r"item|scalar"):
                x.sum().item()
        functions = {str(key[0]) for key in mode.known.results}
    assert not functions & {"aten.index.Tensor", "aten._local_scalar_dense.default"}


def test_outside_of_the_mode_a_factory_function_makes_a_tensor_with_values():
    from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

    with fake_tensors(), Recorder():
        for _ in range(2):
            assert isinstance(torch.ones(3), FakeTensor)
        with unset_fake_temporarily():
            assert torch.ones(3).tolist() == [1, 1, 1]
            assert running_mode() is None


def test_sizes_that_a_call_changes_are_torchs():
    with fake_tensors():
        for _ in range(2):
            x = torch.empty(2, 3)
            x.unsqueeze_(0)
            assert x.shape == (1, 2, 3)
            moved = torch.empty(6)[:2]
            moved.as_strided_((2,), (1,), 3)  # of the sizes that it had, at another place
            assert moved.storage_offset() == 3
            out = torch.empty(0)
            torch.add(torch.empty(4), 1, out=out)
            assert out.shape == (4,)


def test_a_result_in_a_given_place_is_worked_out_once_where_it_fits():
    with fake_tensors() as mode:
        for _ in range(2):
            out = torch.empty(4)
            torch.add(torch.empty(4), 1, out=out)
    known = [key for key in mode.known.results if str(key[0]) == "aten.add.out"]
    assert len(known) == 1


def test_one_tensor_as_both_operands_costs_its_bytes_once():
    with fake_tensors(), Recorder() as recorder:
        x, y = torch.empty(8), torch.empty(8)
        for _ in range(2):
            x * x
            x * y
    moved = [k.num_bytes for k in recorder.trace.kernels() if k.name == "aten.mul"]
    assert moved == [2 * 32, 3 * 32, 2 * 32, 3 * 32]


def test_the_default_dtype_is_a_part_of_a_call():
    with fake_tensors():
        assert torch.ones(3).dtype == torch.float32
        torch.set_default_dtype(torch.float64)
        try:
            assert torch.ones(3).dtype == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("memory_format", [torch.preserve_format, torch.channels_last])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_fake_copy_has_the_layout_of_torchs(memory_format, device):
    plain = torch.empty(2, 3, 4, 5, device=device)
    for t in (plain, plain.transpose(1, 3), plain[:, :, ::2], nn.Parameter(plain)):
        expected = torch.empty_like(t, memory_format=memory_format)
        with fake_tensors(allow_non_fake_inputs=True):
            found = fake_like(t, memory_format)
            slow = torch.empty_like(t, device="cpu", memory_format=memory_format)
            assert described(found, []) == described(slow, [])
        assert (found.shape, found.stride()) == (expected.shape, expected.stride())
        assert found.device.type == "cpu" and not found.requires_grad


def an_estimator(device=CPU):
    with torch.device("meta"):
        model = timm.create_model("test_resnet", num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    network = Network(model=model, make_batch=image_batch(3, 32), optimizer=optimizer)
    plan = BatchPlan(global_batch_size=16, micro_batch_size=4, norm_batch_size=4)
    return Estimator(network, plan, device, "fp32")


@pytest.mark.parametrize("device", [CPU, CARDS["RTX 3060"]])
def test_an_estimate_of_a_like_contract_is_that_of_an_estimator_of_its_own(device):
    first = an_estimator(device)
    first.estimate(Candidate(8))
    for changes in ({"precision": "bf16"}, {"norm_batch_size": "frozen"}):
        own = an_estimator(device)
        precision = changes.pop("precision", "fp32")
        plan = replace(first.plan, **changes)
        like = first.like(plan=plan, precision=precision)
        own.plan, own.precision = plan, precision
        assert like.estimate(Candidate(8)) == own.estimate(Candidate(8))
        assert like.num_traces == 1 and own.num_traces == 2  # its chain is known


def test_what_a_kernel_costs_is_asked_of_each_workspace():
    known = KnownCalls()
    for workspaces in (known, known.for_another_workspace()):
        asked = []

        def workspace(name, args, kwargs, out, asked=asked):
            asked.append(name)
            return 0

        with fake_tensors(workspaces), Recorder(workspace):
            for _ in range(3):
                torch.empty(3, 4) * torch.empty(3, 4)
        assert asked == ["aten.empty", "aten.mul"]
