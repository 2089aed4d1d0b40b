"""Sums over samples beside the loss: the same under every plan, and each sample once."""

from __future__ import annotations

import forks
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lbaccel import BatchPlan, InputError, LargeBatch, UpdateLoader
from lbaccel.update.loss_parts import MOST_SUMS, SLOTS, SampleSums, parts_of

COUNT = 11


def samples():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(COUNT, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (COUNT,), generator=generator)


def network():
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


def counting(model, micro_batch):
    x, y = micro_batch
    logits = model(x)
    sums = {"seen": float(len(y)), "right": (logits.argmax(1) == y).sum(), "x": x.sum()}
    return F.cross_entropy(logits, y), None, sums


def truth():
    x, y = samples()
    right = (network()(x).argmax(1) == y).sum().item()
    return {"seen": COUNT, "right": right, "x": pytest.approx(x.sum().item(), rel=1e-12)}


def updated(loss_fn, *, micro):
    accelerator = Accelerator(cpu=True)
    plan = BatchPlan(
        global_batch_size=COUNT, micro_batch_size=micro, world_size=accelerator.num_processes
    )
    large_batch, model = LargeBatch(accelerator, plan), network()
    loader = UpdateLoader(TensorDataset(*samples()), plan, rank=accelerator.process_index)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, _, loader = large_batch.prepare(model, optimizer, loader)
    return large_batch.update(next(iter(loader)), loss_fn)


@pytest.mark.parametrize("micro", [1, 3, 11])
def test_the_sums_are_those_over_the_whole_batch(micro):
    assert dict(updated(counting, micro=micro).sums) == truth()


def test_a_loss_function_without_sums_has_none():
    assert updated(lambda m, b: counting(m, b)[0], micro=4).sums == {}


def test_an_update_that_is_done_again_counts_each_sample_once():
    calls = [0]

    def runs_out(model, micro_batch):
        calls[0] += 1
        found = counting(model, micro_batch)
        if calls[0] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found

    result = updated(runs_out, micro=4)
    assert result.num_retries == 1 and dict(result.sums) == truth()


def forked(rank, micro):
    return dict(updated(counting, micro=micro).sums)


@pytest.mark.parametrize(("world_size", "micro"), [(2, 4), (3, 1)])
def test_ranks_add_them_up_and_a_filler_counts_nothing(world_size, micro):
    """Of 11 samples three ranks have 4, 4 and 3: the last one runs a filler."""
    for found in forks.values(forks.run_forked(forked, micro, world_size=world_size)):
        assert found == truth()


def other_names(rank):
    def loss_fn(model, micro_batch):
        loss, _, sums = counting(model, micro_batch)
        return loss, None, {f"{name}{rank}": value for name, value in sums.items()}

    try:
        updated(loss_fn, micro=4)
    except InputError as error:
        return str(error)


def test_ranks_that_hand_on_other_names_all_end():
    for said in forks.values(forks.run_forked(other_names, world_size=2)):
        assert "sums of other names on some ranks" in said


@pytest.mark.parametrize("others", [(1, -1), (2, -2), (-5, 0), (1, 1)])
def test_names_that_differ_are_noticed_on_each_rank(others):
    """A rank whose mark is the mean of all must notice too, or it waits for the others."""
    sums = SampleSums()
    sums.add({"right": 1.0}, counts=True)
    *_, mark, _ = sums.vector(None).tolist()
    marks = [mark, *(mark + other for other in others)]
    added = [0.0] * MOST_SUMS + [sum(marks), sum(m * m for m in marks)]
    with pytest.raises(InputError, match="other names"):
        sums.read(added, world_size=3)
    same = [3.0] + [0.0] * (MOST_SUMS - 1) + [3 * mark, 3 * mark**2]
    assert sums.read(same, world_size=3) == {"right": 3.0}


def test_no_sum_is_read_on_the_host_before_the_ranks_agree():
    """On the meta device there is nothing to read: item() raises."""
    sums = SampleSums()
    for _ in range(3):
        sums.add({"right": torch.ones((), device="meta"), "seen": 2.0}, counts=True)
    assert sums.vector(torch.device("meta")).shape == (SLOTS,)


def test_a_graph_is_not_kept_alive_by_a_sum():
    x = torch.ones((), requires_grad=True)
    sums = SampleSums()
    sums.add({"x": x * 2}, counts=True)
    assert not sums.vector(None).requires_grad


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ((1, 2, 3, 4), "a tuple of 4"),
        ((1, 2, 3), "a tuple of 3"),
        ((), "a tuple of 0"),
    ],
)
def test_a_result_of_another_form_is_refused_with_the_three_that_there_are(out, says):
    with pytest.raises(InputError, match=f"{says}: return the mean loss, "):
        parts_of(out)


def test_sums_that_are_no_numbers_or_too_many_are_refused():
    with pytest.raises(InputError, match=r"the sum 'right' in shape \(3,\)"):
        SampleSums().add({"right": torch.ones(3)}, counts=True)
    with pytest.raises(InputError, match=f"at most {MOST_SUMS}"):
        SampleSums().add({str(i): 1.0 for i in range(MOST_SUMS + 1)}, counts=True)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "as None, which is no number"),
        (True, "as True, which is no number"),
        ("3", "as '3', which is no number"),
        (torch.ones(2), r"in shape \(2,\)"),
        (torch.tensor(1j), "one real number"),
        (torch.ones(1, device="meta"), "on meta, and on cpu before"),
    ],
)
def test_a_sum_that_can_not_be_added_is_refused_where_it_is_returned(value, says):
    """Later, in the reduction, the other ranks would wait for this one."""
    sums = SampleSums()
    sums.add({"hits": torch.tensor(1)}, counts=True)
    with pytest.raises(InputError, match=says):
        sums.add({"hits": value}, counts=True)
