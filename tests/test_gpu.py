"""What only CUDA has. `pytest -m gpu` on a machine with a GPU; elsewhere reported as not run."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lbaccel import BatchPlan, LargeBatch, UpdateLoader, apply_activation_checkpointing
from lbaccel.update import ghost_kernel
from lbaccel.update.accumulation import accumulate
from lbaccel.update.normalization import convert_batch_norm
from lbaccel.update.offload import apply_activation_offload
from lbaccel.update.pinned_host import PinnedHost

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: no CUDA device"),
]


def loss_fn(model, micro_batch):
    images, labels = micro_batch
    return F.cross_entropy(model(images), labels)


def run(precision, *, micro=8, updates=2, checkpointing=False, channels_last=False, poison=None):
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=5)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    if checkpointing:
        apply_activation_checkpointing(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, labels = torch.randn(32, 3, 64, 64), torch.randint(5, (32,))
    plan = BatchPlan(global_batch_size=32, micro_batch_size=micro, norm_batch_size=8)
    accelerator = Accelerator(mixed_precision=precision)
    large_batch = LargeBatch(accelerator, plan)
    bare = model
    model, optimizer, loader = large_batch.prepare(
        model, optimizer, UpdateLoader(TensorDataset(images, labels), plan)
    )
    before = copy.deepcopy(bare.state_dict())
    calls = [0]

    def poisoned(model, micro_batch):
        calls[0] += 1
        loss = loss_fn(model, micro_batch)
        return loss * float("inf") if calls[0] == poison else loss

    results = [large_batch.update(u, poisoned) for _ in range(updates) for u in loader]
    return results, before, bare.state_dict(), accelerator


@pytest.mark.parametrize("precision", ["bf16", "fp16", "no"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_loss_falls_in_every_precision_and_layout(precision, channels_last):
    results, *_ = run(precision, updates=10, channels_last=channels_last)
    applied = [r for r in results if r.applied]
    assert applied[-1].loss < applied[0].loss


def test_an_fp16_overflow_in_one_micro_batch_writes_nothing():
    results, before, after, accelerator = run("fp16", updates=1, poison=2)
    assert not results[0].applied
    assert all(torch.equal(after[k].cpu(), v.cpu()) for k, v in before.items())
    assert accelerator.scaler.get_scale() < 65536


@pytest.mark.parametrize("checkpointing", [False, True])
def test_partitions_agree_in_float32(checkpointing):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    (one,), _, a, _ = run("no", micro=8, updates=1)
    (other,), _, b, _ = run("no", micro=32, updates=1, checkpointing=checkpointing)
    assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(40, 24, 7, 9), (40, 24)])
def test_ghost_batches_are_those_of_split_and_join(shape, channels_last, dtype, monkeypatch):
    if channels_last and len(shape) == 2:
        pytest.skip("rows have one layout")
    torch.manual_seed(0)
    x = torch.randn(shape, device="cuda").to(dtype)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    x.requires_grad_()
    weight, bias = (torch.rand(24, device="cuda", requires_grad=True) for _ in range(2))
    upstream, found, sizes = torch.randn_like(x), [], (16, 16, 8)
    for route in (True, False):
        if not route:
            monkeypatch.setattr(ghost_kernel, "_goes_in_place", lambda *_: False)
        mean, var = torch.zeros(24, device="cuda"), torch.ones(24, device="cuda")
        y = ghost_kernel.normalise_runs(
            x, sizes, [(mean, var, 0.1)] * 3, weight=weight, bias=bias, eps=1e-5
        )
        cudnn = dtype is not torch.bfloat16 and len(shape) > 2
        assert y.grad_fn.name().startswith("_Runs") == (route and not cudnn)
        gradients = torch.autograd.grad(y, (x, weight, bias), upstream)
        assert y.stride() == gradients[0].stride() == x.stride()
        found.append((y, mean, var, *gradients))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_accumulation_never_waits_for_the_gpu(precision):
    model = timm.create_model("resnet18", num_classes=5).cuda()
    norm = convert_batch_norm(model, 8)
    plan = BatchPlan(global_batch_size=32, micro_batch_size=16, norm_batch_size=8)
    batches = [
        (
            m,
            (
                torch.randn(m.num_samples, 3, 64, 64).cuda(),
                torch.zeros(m.num_samples).long().cuda(),
            ),
        )
        for m in plan.partition()
    ]
    norm.begin()
    with torch.autocast("cuda", dtype=precision, enabled=precision is not None):
        accumulate(model, batches, loss_fn, num_samples=32, scopes=[norm])  # cuDNN warms up
        torch.cuda.set_sync_debug_mode("error")
        try:
            accumulate(model, batches, loss_fn, num_samples=32, scopes=[norm])
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_masks_are_those_of_the_cpu():
    from lbaccel.batch.plan import MicroBatch
    from lbaccel.randomness.masks import KeyedRandomness

    masks = []
    for device in ("cpu", "cuda"):
        randomness = KeyedRandomness(3, torch.device(device))
        x = torch.ones(7, 5, 33, device=device)
        with randomness.update(11), randomness.forward(MicroBatch(4, (7,))):
            masks.append([F.dropout(x, 0.3).cpu(), F.dropout2d(x[..., None], 0.3).cpu()])
    for one, other in zip(*masks, strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_masks_are_those_of_the_plain_network(mode):
    from lbaccel.batch.plan import MicroBatch
    from lbaccel.randomness.layouts import Layouts, SamplePlace
    from lbaccel.randomness.masks import KeyedRandomness

    def masks(x):
        return F.dropout(F.dropout(x, 0.3) + 1, 0.4), F.dropout2d(x[..., None], 0.3)

    layouts = Layouts((SamplePlace(0, 1, 3), SamplePlace(0, 1, 3), SamplePlace(0, 1, 4)))
    randomness = KeyedRandomness(3, torch.device("cuda"), layouts)
    compiled, x = torch.compile(masks, mode=mode), torch.ones(7, 5, 33, device="cuda")
    for update in range(5):  # a graph of kernels is recorded in the second, and then replayed
        found = []
        for network in (masks, compiled):
            with randomness.update(update), randomness.forward(MicroBatch(4, (7,))):
                found.append([out.clone() for out in network(x)])
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)


def under_a_cap(gib, *, micro, auto=False):
    """Three updates of ResNet-50 at 224 px with the allocator capped; sizes and losses."""
    from lbaccel.update.memory.budget import memory_limit

    torch.manual_seed(0)
    device = torch.device("cuda", 0)
    model = timm.create_model("resnet50", num_classes=5, drop_rate=0.5)
    data = TensorDataset(torch.randn(64, 3, 224, 224), torch.randint(5, (64,)))
    plan = BatchPlan(global_batch_size=64, micro_batch_size=micro, norm_batch_size=4)
    large_batch = LargeBatch(Accelerator(mixed_precision="bf16"), plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model, optimizer, loader = large_batch.prepare(model, optimizer, UpdateLoader(data, plan))
    with memory_limit(int(gib * 2**30), device):
        if auto:
            large_batch.find_micro_batch_size(loader, loss_fn)
        results = [large_batch.update(u, loss_fn) for _ in range(3) for u in loader]
        peak = torch.cuda.max_memory_reserved(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    assert peak <= gib * 2**30
    return results


def test_a_real_out_of_memory_under_a_cap_is_survived():
    results = under_a_cap(2.0, micro=64)
    assert results[0].num_retries > 0 and results[0].micro_batch_size < 64
    free = under_a_cap(32.0, micro=64)
    assert free[0].num_retries == 0
    assert [r.loss for r in results] == pytest.approx([r.loss for r in free], rel=0.02)


def test_auto_finds_a_size_under_a_cap_that_needs_no_retry():
    results = under_a_cap(2.0, micro=4, auto=True)
    assert all(r.num_retries == 0 for r in results)
    assert 4 <= results[0].micro_batch_size < 64


def test_the_fsdp2_config_trains_digits_and_resumes_without_it(tmp_path):
    root = Path(__file__).parent.parent
    train = ["-m", "lbaccel.train", "--data", "digits", "--output", str(tmp_path)]
    train += ["--global-batch-size", "256", "--log-with", "run_folder"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    launch += ["--config_file", "accelerate_configs/fsdp2.yaml"]
    subprocess.run([*launch, *train, "--epochs", "1"], cwd=root, check=True, timeout=300)
    (run_folder,) = tmp_path.iterdir()
    resumed = ["-m", "lbaccel.train", "--resume", str(run_folder), "--epochs", "2"]
    resumed += ["--extend", "stretch"]
    subprocess.run([sys.executable, *resumed], cwd=root, check=True, timeout=300)
    summary = json.loads((run_folder / "summary.json").read_text())
    assert summary["status"] == "done" and summary["num_updates"] == 12


def offloaded(precision, *, channels_last, offloads):
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=5)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    store = PinnedHost()
    if offloads:
        names = [n for n, _ in model.named_children() if n not in ("global_pool", "fc")]
        apply_activation_offload(model, [names], store=store)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images, labels = torch.randn(64, 3, 128, 128), torch.randint(5, (64,))
    plan = BatchPlan(global_batch_size=64, micro_batch_size=32, norm_batch_size=16)
    large_batch = LargeBatch(Accelerator(mixed_precision=precision), plan)
    bare = model
    model, optimizer, loader = large_batch.prepare(
        model, optimizer, UpdateLoader(TensorDataset(images, labels), plan)
    )
    torch.cuda.reset_peak_memory_stats()
    held = []
    results = []
    for _ in range(2):
        results += [large_batch.update(update, loss_fn).loss for update in loader]
        held.append(store.num_bytes)
    return results, bare.state_dict(), torch.cuda.max_memory_allocated(), held


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_activations_on_the_host_change_no_bit_and_leave_the_device(precision, channels_last):
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        plain, moved = (
            offloaded(precision, channels_last=channels_last, offloads=on) for on in (False, True)
        )
    finally:
        torch.backends.cudnn.deterministic = before
    assert moved[0] == plain[0]
    assert all(torch.equal(moved[1][name], plain[1][name]) for name in plain[1])
    assert moved[2] < 0.8 * plain[2], (moved[2], plain[2])
    assert moved[3][0] == moved[3][1] > 0 == plain[3][1]  # the host's buffers are used again


def test_offload_waits_nowhere_on_the_host():
    model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(4)]).cuda()
    apply_activation_offload(model, [[str(i) for i in range(4)]])
    x = torch.randn(1024, 1024, device="cuda")
    model(x).sum().backward()  # the buffers are pinned by now
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
