"""Losses that couple samples over real gloo ranks: negatives of all ranks, and one transaction."""

from __future__ import annotations

import copy

import forks
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from coupled_cases import (
    LOSSES,
    clip,
    coupled_update,
    embed,
    error_of,
    full_batch,
    make_data,
    make_network,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from lbaccel import BatchPlan, InputError, LargeBatch, RunFailed, UpdateLoader

COUNT = 11  # on three ranks 4, 4 and 3
NORM = 3  # seven ghost batches of 20 samples: on three ranks 3, 2 and 2, so two run a filler


def errors(rank: int) -> dict[str, float]:
    found = {}
    for name in LOSSES:
        for micro in (2, 5):
            got = coupled_update(name, COUNT, micro=micro)
            found[f"{name} {micro}"] = error_of(got, full_batch(name, COUNT))
    for name in ("clip", "shared"):
        options = {"norm": NORM, "dropout": 0.3}
        for checkpointing in (False, True):
            got = coupled_update(name, 20, micro=NORM, checkpointing=checkpointing, **options)
            key = f"{name} with BatchNorm, {checkpointing}"
            found[key] = error_of(got, full_batch(name, 20, **options))
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_ranks_give_the_update_of_the_whole_batch(world_size):
    for found in forks.values(forks.run_forked(errors, world_size=world_size, timeout=300)):
        assert max(found.values()) < 1e-12, found


def prepared(*, micro=4, count=12):
    accelerator = Accelerator(cpu=True)
    plan = BatchPlan(
        global_batch_size=count, micro_batch_size=micro, world_size=accelerator.num_processes
    )
    large_batch = LargeBatch(accelerator, plan)
    plain = make_network()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    images, texts, labels, _ = make_data(count)
    data = TensorDataset(images, texts, labels, torch.arange(count))
    loader = UpdateLoader(data, plan, rank=accelerator.process_index)
    model, _, loader = large_batch.prepare(plain, optimizer, loader)
    return large_batch, loader, plain, model


def surroundings(rank: int) -> list:
    """Wrapper, ranks, the samples that each embedded, and the rows that the loss saw."""
    large_batch, loader, _, model = prepared()
    assert isinstance(model, DistributedDataParallel)
    mine, seen = [], []

    def noting(model, micro_batch):
        if torch.is_grad_enabled():
            mine.extend(micro_batch[3].tolist())
        return embed(model, micro_batch)

    def loss_fn(model, rows):
        seen.append(rows[-1].tolist())
        return clip(model, rows)[0]

    (update,) = loader
    large_batch.update(update, loss_fn, embed=noting)
    said = [None] * dist.get_world_size()
    dist.all_gather_object(said, (dist.get_world_size(), sorted(set(mine)), seen))
    return said


def test_ranks_embed_other_samples_and_see_all_rows_in_the_order_of_the_update():
    from updates import visiting_order

    order = visiting_order(12).tolist()
    for said in forks.values(forks.run_forked(surroundings, world_size=2)):
        assert [world for world, _, _ in said] == [2, 2]
        assert [mine for _, mine, _ in said] == [sorted(order[:6]), sorted(order[6:])]
        assert [seen for _, _, seen in said] == [[order], [order]]


def failing(rank: int, where: str, error: str) -> tuple:
    """Rank 1 fails once, in a pass or in the loss."""
    large_batch, loader, plain, _ = prepared()
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    calls = {"first": 0, "second": 0, "loss": 0}

    def fail(here):
        calls[here] += 1
        if rank == 1 and here == where and calls[here] == (1 if here == "loss" else 2):
            raise {"memory": torch.OutOfMemoryError("here"), "other": ZeroDivisionError("so")}[
                error
            ]

    seen = []

    def embed_fn(model, micro_batch):
        start = micro_batch[0].sum().item()
        fail("second" if start in seen else "first")
        seen.append(start)
        return embed(model, micro_batch)

    def loss_fn(model, rows):
        fail("loss")
        return clip(model, rows)

    (update,) = loader
    try:
        result = large_batch.update(update, loss_fn, embed=embed_fn)
        return result.num_retries, result.micro_batch_size, dict(plain.state_dict())
    except (RunFailed, ZeroDivisionError) as raised:
        same = all(torch.equal(v, plain.state_dict()[k]) for k, v in before.items())
        return type(raised).__name__, str(raised), same


def smaller(rank: int) -> dict:
    large_batch, loader, plain, _ = prepared(micro=2)
    (update,) = loader
    large_batch.update(update, clip, embed=embed)
    return dict(plain.state_dict())


@pytest.mark.parametrize("where", ["first", "second", "loss"])
def test_a_rank_that_runs_out_of_memory_makes_all_do_both_passes_again(where):
    found = forks.values(forks.run_forked(failing, where, "memory", world_size=2))
    truth = forks.values(forks.run_forked(smaller, world_size=2))[0]
    for retries, micro, weights in found:
        assert (retries, micro) == (1, 2)
        assert all(torch.equal(v, truth[k]) for k, v in weights.items())


@pytest.mark.parametrize("where", ["first", "second", "loss"])
def test_a_rank_that_fails_ends_the_update_on_all_with_its_reason(where):
    found = forks.values(forks.run_forked(failing, where, "other", world_size=2))
    assert [name for name, _, _ in found] == ["RunFailed", "ZeroDivisionError"]
    assert "rank 1: ZeroDivisionError: so" in found[0][1]
    assert all(same for _, _, same in found)


def other_rows(rank: int) -> str:
    large_batch, loader, _, _ = prepared()
    (update,) = loader
    width = 3 + rank

    def embed_fn(model, micro_batch):
        return model(micro_batch[0])[:, :width]

    with pytest.raises(InputError) as error:
        large_batch.update(update, lambda model, e: e.sum(), embed=embed_fn)
    return str(error.value)


def test_ranks_with_rows_of_other_shapes_are_told_so():
    for text in forks.values(forks.run_forked(other_rows, world_size=2)):
        assert "rank 0: torch.float64 [3] with a gradient; rank 1: torch.float64 [4]" in text


def functional_masks(rank: int) -> float:
    """A mask that no module shows: the ranks learn it together, and do the attempt again."""
    large_batch, loader, _, _ = prepared()
    (update,) = loader
    calls = []

    def embed_fn(model, micro_batch):
        a, b = model(micro_batch[0], micro_batch[1])
        if rank == 1 or calls:  # rank 0 meets it in the second attempt
            a = torch.nn.functional.dropout(a, 0.5)
        calls.append(1)
        return a, b

    def loss_fn(model, rows):
        return (rows[0] @ rows[1].T).square().mean()

    return large_batch.update(update, loss_fn, embed=embed_fn).loss


def test_masks_that_one_rank_meets_first_are_learned_by_all():
    found = forks.values(forks.run_forked(functional_masks, world_size=2))
    assert found[0] == found[1] and found[0] > 0


def continued(rank: int, state: list | None, updates: int) -> list:
    """So many updates of a run, from what another number of ranks has left."""
    accelerator = Accelerator(cpu=True)
    plan = BatchPlan(global_batch_size=5, micro_batch_size=2, world_size=accelerator.num_processes)
    large_batch, plain = LargeBatch(accelerator, plan), make_network(dropout=0.3)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    data = TensorDataset(*make_data(15))
    loader = UpdateLoader(data, plan, rank=accelerator.process_index)
    _, optimizer, loader = large_batch.prepare(plain, optimizer, loader)
    if state is not None:
        for thing, of_it in zip((plain, optimizer, loader, large_batch), state, strict=True):
            thing.load_state_dict(of_it)
    for _, update in zip(range(updates), loader, strict=False):
        large_batch.update(update, clip, embed=embed)
    return copy.deepcopy([x.state_dict() for x in (plain, optimizer, loader, large_batch)])


def test_a_run_moves_between_one_two_and_three_ranks():
    def run(world_size: int, state: list | None, updates: int) -> list:
        outcomes = forks.run_forked(continued, state, updates, world_size=world_size)
        return forks.values(outcomes)[0]

    whole, moved = run(1, None, 3), None
    for world_size in (1, 2, 3):
        moved = run(world_size, moved, 1)
    assert moved is not None and moved[3]["num_updates"] == whole[3]["num_updates"] == 3
    assert any(
        (v - make_network(dropout=0.3).state_dict()[k]).abs().max() > 1e-3
        for k, v in whole[0].items()
    )
    for key, value in whole[0].items():
        assert torch.allclose(moved[0][key], value, rtol=1e-11, atol=1e-12), key
