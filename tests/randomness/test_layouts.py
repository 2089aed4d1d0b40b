"""Where the samples are in a tensor decides its masks: learned, not read off its rows."""

from __future__ import annotations

import pytest
import timm
import torch
from accelerate import Accelerator
from forks import run_forked, values
from reference import make_samples, relative_error
from torch import nn
from torch.nn import functional as F
from updates import one_update

from lbaccel import BatchPlan, LargeBatch, UpdateLoader, verify
from lbaccel.batch.plan import MicroBatch
from lbaccel.data.loader import Update

TOKENS, WIDTH = 4, 6


class Network(nn.Module):
    """A linear map, a draw on some tensor, a linear map; `x` is [B, TOKENS, WIDTH]."""

    def __init__(self, draw):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.table = nn.Parameter(torch.randn(64, WIDTH))
        self.query = nn.Parameter(torch.randn(1, WIDTH))
        self.draw = draw
        self.double()

    def forward(self, x):
        return self.last(self.draw(self, self.first(x))).mean(1)


def of_a_table(net, x):  # 64 rows: a multiple of most micro-batches
    return x + F.dropout(net.table, 0.5)[:TOKENS]


def of_one_row(net, x):
    return x + F.dropout(net.query, 0.5)


def tokens_first(net, x):
    return F.dropout(x.transpose(0, 1), 0.5).transpose(0, 1)


def tokens_first_in_rows(net, x):
    y = x.transpose(0, 1).reshape(-1, WIDTH)
    return F.dropout(y, 0.5).view(TOKENS, -1, WIDTH).transpose(0, 1)


def samples_first_in_rows(net, x):
    return F.dropout(x.reshape(-1, WIDTH), 0.5).view(x.shape)


def samples_between(net, x):  # [halves, B, tokens of a half]
    y = x.view(len(x), 2, TOKENS // 2, WIDTH).transpose(0, 1).reshape(-1, WIDTH)
    return F.dropout(y, 0.5).view(2, len(x), TOKENS // 2, WIDTH).transpose(0, 1).reshape(x.shape)


def samples_last(net, x):
    return F.dropout(x.permute(1, 2, 0), 0.5).permute(2, 0, 1)


def query_of_each_sample(net, x):  # depends on no sample, and is drawn for each
    return x + F.dropout(net.query.expand(len(x), 1, WIDTH), 0.5)


def channels_of_tokens_first(net, x):
    return F.dropout1d(x.permute(1, 0, 2), 0.5).permute(1, 0, 2)


def channels_without_samples(net, x):
    return x + F.dropout1d(net.table, 0.5)[:TOKENS]


def alpha_of_a_table(net, x):
    return x + F.alpha_dropout(net.table, 0.5, training=True)[:TOKENS]


def two_views(net, x):
    return F.dropout(torch.cat((x, x * x)), 0.5).view(2, *x.shape).sum(0)


DRAWS = (
    of_a_table, of_one_row, tokens_first, tokens_first_in_rows, samples_first_in_rows,
    samples_between, samples_last, query_of_each_sample, channels_of_tokens_first,
    channels_without_samples, alpha_of_a_table, two_views,
)  # fmt: skip


def mse(model, micro_batch):
    return F.mse_loss(model(micro_batch[0]), micro_batch[1])


def samples(count=8):
    torch.manual_seed(1)
    return (
        torch.randn(count, TOKENS, WIDTH, dtype=torch.float64),
        torch.randn(count, 1, dtype=torch.float64),
    )


def update_of(draw, micro_batch_size, **how):
    return one_update(
        Network(draw), *samples(), micro_batch_size=micro_batch_size, loss_fn=mse, **how
    )


@pytest.mark.parametrize("draw", DRAWS)
def test_a_mask_is_the_same_wherever_the_samples_stand(draw):
    whole, plain = update_of(draw, 8), update_of(lambda net, x: x, 8)
    assert abs(whole[0].loss - plain[0].loss) > 1e-3  # it draws
    for micro_batch_size in (1, 2, 3, 4):
        found = update_of(draw, micro_batch_size)
        assert found[0].loss == pytest.approx(whole[0].loss, rel=1e-13)
        assert relative_error(found[1], whole[1]) < 1e-13, micro_batch_size


def rank_update(rank, draw):
    return update_of(draw, 1, accelerator=Accelerator(cpu=True))[1]


@pytest.mark.parametrize("draw", (of_a_table, of_one_row, tokens_first_in_rows))
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_of_one_sample_a_micro_batch_draw_the_masks_of_one_process(draw, world_size):
    truth = update_of(draw, 8)[1]
    for found in values(run_forked(rank_update, draw, world_size=world_size)):
        assert relative_error(found, truth) < 1e-13


NETWORKS = {  # each drops an eighth of a table of relative positions unless told otherwise
    "vit_relpos_small_patch16_224": {"img_size": 32},
    "swinv2_cr_tiny_224": {
        "img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 3, 6),
    },
    "maxxvit_rmlp_nano_rw_256": {"img_size": 64},
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_that_drop_in_tables_of_positions_give_one_update(name):
    def of(micro_batch_size):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=5, **NETWORKS[name]).double()
        norm = 2 if name.startswith("maxxvit") else None
        images, labels = make_samples(6, size=NETWORKS[name]["img_size"])
        return one_update(
            model, images, labels, micro_batch_size=micro_batch_size, norm_batch_size=norm
        )

    truth = of(6)
    for micro_batch_size in (4, 2):
        assert relative_error(of(micro_batch_size)[1], truth[1]) < 1e-12


# -- what is learned, and when --------------------------------------------------------------------


class Counted(Network):
    """Counts its forwards, and can change its rate."""

    def __init__(self, draw, **rates):
        super().__init__(draw)
        self.forwards = 0
        vars(self).update(rates)

    def forward(self, x):
        self.forwards += 1
        return super().forward(x)


def updates_of(model, *, count=3, micro_batch_size=2, before=lambda model, number: None):
    """The gradients of updates at one and the same weights."""
    data = list(zip(*samples(8), strict=True))
    plan = BatchPlan(global_batch_size=8, micro_batch_size=micro_batch_size)
    large_batch = LargeBatch(Accelerator(cpu=True), plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer, loader = large_batch.prepare(model, optimizer, UpdateLoader(data, plan))
    steps = []
    for number in range(count):
        before(model, number)
        weights = [p.detach().clone() for p in model.parameters()]
        for update in loader:
            large_batch.update(update, mse)
        steps.append([(w - p.detach()) for w, p in zip(weights, model.parameters(), strict=True)])
        with torch.no_grad():
            for weight, parameter in zip(weights, model.parameters(), strict=True):
                parameter.copy_(weight)
    return steps


def largest(a, b):
    return max(
        float((x - y).abs().max())
        for one, two in zip(a, b, strict=True)
        for x, y in zip(one, two, strict=True)
    )


def test_they_are_learned_once_and_not_where_nothing_is_drawn():
    none, some = Counted(lambda net, x: x), Counted(of_a_table, drop=0.5)
    updates_of(none), updates_of(some)
    assert none.forwards == 3 * 4  # updates x micro-batches
    assert some.forwards == 3 * 4 + 2  # two and three samples, once
    hidden = Counted(of_a_table)  # no attribute shows its rate
    updates_of(hidden)
    assert hidden.forwards == 3 * 4 + 2 + 1  # and the attempt that met it


def a_rate_that_grows(net, x):
    if net.drop_rate:
        x = x + F.dropout(net.table, net.drop_rate)[:TOKENS]
    return tokens_first(net, x)


def test_they_are_learned_anew_where_a_rate_changes_which_calls_there_are():
    def grow(model, number):
        model.drop_rate = (0.0, 0.25, 0.25)[number]

    found = [
        updates_of(Counted(a_rate_that_grows, drop_rate=0.0), micro_batch_size=size, before=grow)
        for size in (8, 3)
    ]
    assert largest(*found) < 1e-13
    assert largest(found[0][:2], found[0][1:]) > 1e-3


def test_a_call_that_no_rate_shows_is_learned_when_it_comes():
    def draw(net, x):
        return tokens_first(net, of_a_table(net, x) if net.first.weight.mean() > 0 else x)

    def flip(model, number):
        with torch.no_grad():
            model.first.weight.copy_(model.first.weight.abs() * (1 if number else -1))

    found = [updates_of(Network(draw), micro_batch_size=s, before=flip) for s in (8, 3)]
    assert largest(*found) < 1e-13


def random_depth(net, x):
    """A layer that runs for some micro-batches only."""
    return of_one_row(net, x) if float(torch.rand(())) < 0.5 else x


def test_a_network_whose_calls_vary_by_micro_batch_is_named_once():
    with pytest.warns(UserWarning, match="another plan trains with other") as said:
        updates_of(Network(random_depth), micro_batch_size=1)
    assert len(said) == 1


def of_some_rows(net, x):  # no dimension follows the samples: as many rows as values above 0
    rows = x[x > 0]
    return x + F.dropout(rows, 0.5).sum() / len(x)


def test_a_tensor_whose_samples_stand_nowhere_is_named_by_its_layer():
    with pytest.warns(UserWarning, match=r"the network: \[.*no dimension holds the samples"):
        update_of(of_some_rows, 4)
    certificate = verify(Network(of_some_rows), mse, samples())
    assert not certificate.equivalent
    assert any(f.cause == "unkeyed masks" for f in certificate.findings)


@pytest.mark.parametrize("draw", DRAWS)
def test_verify_finds_these_networks_equivalent(draw):
    assert verify(Network(draw), mse, samples(6)).equivalent


def test_data_that_no_sample_can_be_taken_of_is_said():
    class Bag:  # nothing known: no mapping, no sequence
        def __init__(self, rows):
            self.rows = rows

    def loss_fn(model, bag):
        return F.mse_loss(model(bag.rows[0]), bag.rows[1])

    x, y = samples()
    pairs = [(MicroBatch(i, (4,)), Bag((x[i : i + 4], y[i : i + 4]))) for i in (0, 4)]
    large_batch = LargeBatch(
        Accelerator(cpu=True), BatchPlan(global_batch_size=8, micro_batch_size=4)
    )
    model = Counted(tokens_first, drop=0.5)
    update = Update(0, 8, pairs)
    large_batch.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0), [update])
    with pytest.warns(UserWarning, match="no tensor of the micro-batch has 4 rows"):
        large_batch.update(update, loss_fn)
