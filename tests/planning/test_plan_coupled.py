"""A plan for a network whose loss compares the rows of the whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lbaccel import InputError, plan
from lbaccel.batch.plan import BatchPlan
from lbaccel.planning.cost.update import Network, trace_update

WIDTH, ROWS = 64, 32
MIB = 2**20


def make_model():
    return nn.Sequential(nn.Linear(WIDTH, 256), nn.Tanh(), nn.Linear(256, ROWS))


def make_batch(count):
    return (torch.empty(count, WIDTH),)


def embed(model, micro_batch):
    return model(micro_batch[0])


def contrast(model, rows):
    return F.cross_entropy(rows @ rows.T, torch.arange(len(rows)))


def row_by_row(model, micro_batch):
    return model(micro_batch[0]).square().mean()


def planned(count, *, coupled=True, micro=16, **options):
    functions = {"loss_fn": contrast, "embed": embed} if coupled else {"loss_fn": row_by_row}
    return plan(
        make_model(),
        global_batch_size=count,
        micro_batch_size=micro,
        memory="8GiB",
        device="cpu",
        make_batch=make_batch,
        compare=False,
        activation_checkpointing="none",
        **functions,
        **options,
    )


def test_the_rows_of_the_whole_batch_and_the_loss_are_counted():
    """Logits [B, B], their log-softmax and the gradients of both outgrow all else at B = 2048."""
    small, large = planned(64), planned(2048)
    logits = 4 * 2048**2
    grown = (large.predicted_peak_gib - small.predicted_peak_gib) * 1024 * MIB
    assert 2 * logits <= grown <= 4 * logits + 8 * MIB
    plain = planned(2048, coupled=False)
    assert large.predicted_peak_gib > plain.predicted_peak_gib + 2 * logits / 2**30


def test_a_rank_holds_the_rows_of_all_ranks():
    one, two = planned(2048), planned(2048, world_size=2)
    assert two.predicted_peak_gib >= one.predicted_peak_gib


def test_the_trace_has_two_forwards_a_micro_step_and_the_loss_once():
    network = Network(model=make_model(), make_batch=make_batch, loss_fn=contrast, embed=embed)
    batch = BatchPlan(global_batch_size=32, micro_batch_size=16)
    trace = trace_update(network, batch, num_rows=512)
    marks = [e.name for e in trace.events if type(e).__name__ == "Mark"]
    assert marks == [*("preview 0", "preview 1", "loss", "micro-step 0", "micro-step 1", "commit")]
    linear = [k for k in trace.kernels() if k.name == "aten.addmm"]
    assert len(linear) == 2 * 2 * 2  # passes, micro-steps, layers
    plain = Network(model=make_model(), make_batch=make_batch, loss_fn=row_by_row)
    assert trace.peak() > trace_update(plain, batch).peak() + 2 * 4 * 512**2


def test_an_update_takes_the_time_of_one_more_forward():
    """Products: a forward has 2 of 6 in all, a second one makes 8 of them; and the loss."""
    both = planned(64, micro=16).predicted_seconds_per_update
    plain = planned(64, micro=16, coupled=False).predicted_seconds_per_update
    assert 1.1 < both / plain < 2.0


@pytest.mark.parametrize("options", [{"embed": embed}, {"embed": 3, "loss_fn": contrast}])
def test_embed_without_its_loss_or_of_another_kind_is_refused(options):
    with pytest.raises(InputError, match="embed="):
        plan(make_model(), global_batch_size=8, make_batch=make_batch, device="cpu", **options)
