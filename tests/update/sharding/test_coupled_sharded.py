"""Coupled losses under DeepSpeed ZeRO and FSDP2, on two gloo ranks."""

from __future__ import annotations

import os
from importlib.util import find_spec

import forks
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lbaccel import BatchPlan, LargeBatch
from lbaccel.data.loader import Update

COUNT = 20


def zero(rank, stage):
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    import coupled_zero

    return coupled_zero.run(stage)


@pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="not run: pip install 'lbaccel[deepspeed]'"
)
@pytest.mark.parametrize("stage", [0, 1, 2, pytest.param(3)])
def test_zero_gives_the_update_of_the_whole_batch_and_refuses_its_stage_3(stage):
    if torch.cuda.is_available():
        pytest.skip("DeepSpeed of the parent has taken the GPU")
    for found in forks.values(forks.run_forked(zero, stage, world_size=2, timeout=300)):
        if stage == 3:
            assert "embed= under ZeRO-3" in found and "Use ZeRO-2, DDP or FSDP2" in found
        else:
            assert found < 1e-5, found


def make_model():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Tanh()) for _ in range(2)]
    return nn.Sequential(nn.Linear(5, 16), *blocks, nn.Linear(16, 3)).double()


def embed(model, micro_batch):
    return F.normalize(model(micro_batch[0]), dim=1), micro_batch[1]


def loss_fn(model, rows):
    z, labels = rows
    same = (labels[:, None] == labels).to(z.dtype)
    return F.binary_cross_entropy_with_logits(5 * z @ z.T, same), None, {"pairs": same.sum()}


def samples(number):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(COUNT, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (COUNT,), generator=generator)


def fsdp(rank, own):
    """Three updates; seven ghost batches, so that the last rank runs a filler."""
    accelerator = Accelerator(cpu=True)
    plan = BatchPlan(
        global_batch_size=COUNT,
        micro_batch_size=3,
        world_size=accelerator.num_processes,
        norm_batch_size=3,
    )
    large_batch = LargeBatch(accelerator, plan)
    model = make_model()
    for block in model:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, _, _ = large_batch.prepare(model, optimizer, [])
    assert isinstance(model, FSDPModule)

    def with_own(model, rows):
        return loss_fn(model, rows)[0] + model[3].bias.sum()

    history = []
    for number in range(3):
        pairs = [
            (m, tuple(t[m.start : m.start + m.num_samples] for t in samples(number)))
            for m in plan.partition(rank)
        ]
        assert any(m.is_filler for m, _ in pairs) == (rank == 1)
        result = large_batch.update(
            Update(number, COUNT, pairs), with_own if own else loss_fn, embed=embed
        )
        state = model.state_dict()
        whole = {
            k: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for k, v in state.items()
        }
        history.append((result.loss, result.sums, whole))
    return history


def reference():
    model = make_model()
    optimizer, history = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), []
    for number in range(3):
        x, labels = samples(number)
        optimizer.zero_grad()
        parts = [F.normalize(model(x[r]), dim=1) for r in torch.arange(COUNT).tensor_split(7)]
        loss, _, sums = loss_fn(model, (torch.cat(parts), labels))
        loss.backward()
        optimizer.step()
        state = {k: v.clone() for k, v in model.state_dict().items()}
        history.append((loss.item(), float(sums["pairs"]), state))
    return history


def test_fsdp2_gives_the_update_of_the_whole_batch():
    truth = reference()
    for history in forks.values(forks.run_forked(fsdp, False, world_size=2, timeout=300)):
        for (loss, sums, state), (true_loss, pairs, true_state) in zip(history, truth, strict=True):
            assert loss == pytest.approx(true_loss, rel=1e-12)
            assert sums == {"pairs": pairs}
            for key, value in true_state.items():
                torch.testing.assert_close(state[key], value, rtol=1e-11, atol=1e-13, msg=key)


def test_a_parameter_that_the_loss_reads_under_fsdp2_is_refused_with_what_to_type():
    for outcome in forks.run_forked(fsdp, True, world_size=2, timeout=300):
        assert outcome.exit_code == 1
        assert "Let embed return it as rows" in outcome.error
