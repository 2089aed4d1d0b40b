"""Averages, casts, resume, reading and refusals of an update whose loss couples samples."""

from __future__ import annotations

import copy

import forks
import pytest
import torch
from accelerate import Accelerator
from coupled_cases import clip, embed, full_batch, make_data, make_network, siglip
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset
from updates import visiting_order

from lbaccel import BatchPlan, InputError, LargeBatch, NoiseScale, UpdateLoader
from lbaccel.data.loader import Update
from lbaccel.errors import Diverged

COUNT = 11


def prepared(
    model=None, *, micro=4, count=COUNT, data=None, lr=0.1, mixed=None, accelerator=None, **options
):
    accelerator = accelerator or Accelerator(cpu=True, mixed_precision=mixed)
    model = make_network() if model is None else model
    plan = BatchPlan(
        global_batch_size=count, micro_batch_size=micro, world_size=accelerator.num_processes
    )
    large_batch = LargeBatch(accelerator, plan, **options)
    data = TensorDataset(*make_data(count)) if data is None else data
    loader = UpdateLoader(data, plan, rank=accelerator.process_index)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    plain = model
    model, optimizer, loader = large_batch.prepare(model, optimizer, loader)
    return large_batch, loader, plain, optimizer


class Centred(nn.Module):
    """A network that moves an average of its samples, in place, by another tensor, or by .data."""

    def __init__(self, how):
        super().__init__()
        self.net, self.how = make_network(), how
        self.register_buffer("centre", torch.zeros(4, dtype=torch.float64))

    def forward(self, images, texts):
        a, b = self.net(images, texts)
        out = a - self.centre.clone()
        moved = 0.9 * self.centre + 0.1 * a.detach().mean(0)
        if self.how == "in place":
            self.centre.copy_(moved)
        elif self.how == "data":
            self.centre.data.copy_(moved)
        else:
            self.centre = moved
        return out, b


class CentredLoss:
    """A loss that moves an average of all rows, as DINO does its centre."""

    def __init__(self, how):
        self.mean, self.how = torch.zeros(4, dtype=torch.float64), how

    def __call__(self, model, rows):
        a, b, *_ = rows
        loss = F.mse_loss((a - self.mean.clone()) @ b.T, torch.eye(len(a), dtype=a.dtype))
        moved = 0.9 * self.mean + 0.1 * a.detach().mean(0)
        if self.how == "in place":
            self.mean.copy_(moved)
        elif self.how == "data":
            self.mean.data.copy_(moved)
        else:
            self.mean = moved
        return loss


def averages_of(rank, how):
    model, loss_fn = Centred(how), CentredLoss(how)
    large_batch, loader, plain, _ = prepared(
        model, averages=["centre", "loss_fn.mean"], lr=0.0, micro=3
    )
    found = []
    for _ in range(2):
        (update,) = loader
        large_batch.update(update, loss_fn, embed=embed)
        found.append((plain.centre.clone(), loss_fn.mean.clone()))
    return found


@pytest.mark.parametrize("how", ["in place", "another tensor", "data"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_averages_of_network_and_loss_move_once_an_update(how, world_size):
    order = [visiting_order(COUNT)]  # one epoch after the other has all samples
    images, texts, *_ = make_data(COUNT)
    a = make_network()(images[order[0]], texts[order[0]])[0].detach()
    centre = mean = torch.zeros(4, dtype=torch.float64)
    truth = []
    for _ in range(2):
        seen = a - centre
        centre, mean = 0.9 * centre + 0.1 * a.mean(0), 0.9 * mean + 0.1 * seen.mean(0)
        truth.append((centre, mean))
    for found in forks.values(forks.run_forked(averages_of, how, world_size=world_size)):
        for (c, m), (true_c, true_m) in zip(found, truth, strict=True):
            torch.testing.assert_close(c, true_c, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(m, true_m, rtol=1e-12, atol=1e-14)


def test_a_tensor_that_embed_carries_from_forward_to_forward_is_named():
    model = Centred("in place")
    large_batch, loader, _, _ = prepared(model)
    (update,) = loader
    with pytest.raises(InputError, match=r"moves the buffer 'centre'.*averages=\['centre'\]"):
        large_batch.update(update, CentredLoss("in place"), embed=embed)


class SkipsAtFirst(nn.Module):
    """Its text tower runs in a short micro-batch alone, as a layer that is dropped at times."""

    def __init__(self):
        super().__init__()
        self.net = make_network().float()

    def forward(self, images, texts):
        a = F.normalize(self.net.image(images), dim=1)
        return a, F.normalize(self.net.text(texts), dim=1) if len(images) < 4 else a


def test_weights_cast_in_the_pass_without_a_graph_are_not_those_of_the_pass_with_one():
    """bf16: autocast keeps casts over micro-batches, and one made without a graph has none."""
    model = SkipsAtFirst()
    data = [t.float() if t.is_floating_point() else t for t in make_data(COUNT)]
    truth = copy.deepcopy(model)
    images, texts = (t[torch.as_tensor(visiting_order(COUNT))] for t in data[:2])
    with torch.autocast("cpu", torch.bfloat16):
        parts = [truth(images[r], texts[r]) for r in torch.arange(COUNT).split(4)]
    rows = [torch.cat(column).float() for column in zip(*parts, strict=True)]
    F.cross_entropy(5 * rows[0] @ rows[1].T, torch.arange(COUNT)).backward()
    large_batch, loader, plain, _ = prepared(
        model, data=TensorDataset(*data), mixed="bf16", lr=0.0, micro=4
    )
    seen = {}
    for name, parameter in plain.named_parameters():
        parameter.register_hook(lambda g, n=name: seen.__setitem__(n, seen.get(n, 0) + g))
    (update,) = loader

    def loss_fn(model, rows):
        return F.cross_entropy(5 * rows[0] @ rows[1].T, torch.arange(COUNT))

    large_batch.update(update, loss_fn, embed=embed)
    true = {n: p.grad for n, p in truth.named_parameters() if p.grad is not None}
    assert "net.text.0.weight" in true
    assert seen.keys() == true.keys()
    gap = sum(float((seen[n] - g).square().sum()) for n, g in true.items()) ** 0.5
    assert gap < 0.02 * sum(float(g.square().sum()) for g in true.values()) ** 0.5


def test_a_gradient_hook_on_the_temperature_runs_once():
    model = make_network()
    handle = model.scale.register_hook(lambda g: 2 * g)
    large_batch, loader, plain, _ = prepared(model)
    seen = []
    plain.scale.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    (update,) = loader
    large_batch.update(update, clip, embed=embed)
    (gradient,) = seen
    torch.testing.assert_close(
        gradient, 2 * full_batch("clip", COUNT)[1]["scale"], rtol=1e-12, atol=0
    )
    handle.remove()
    assert not model.scale._backward_hooks


def test_fp16s_scaler_scales_each_gradient_once_and_an_overflow_skips_the_update():
    """A scale that is a power of two comes out to the bit."""

    def in_float32(model, micro_batch):
        return tuple(t.float() for t in embed(model, micro_batch))

    def trained(scale, embed=embed):
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        large_batch, loader, plain, _ = prepared(lr=0.01, accelerator=accelerator)
        (update,) = loader
        result = large_batch.update(update, lambda m, rows: 1e3 * clip(m, rows)[0], embed=embed)
        return result, plain.state_dict()

    (_, one), (_, many) = trained(1.0), trained(2.0**12)
    assert all(torch.equal(v, many[k]) for k, v in one.items())
    result, weights = trained(3e38, in_float32)  # the scaled gradient of a row is inf
    assert not result.applied
    assert all(torch.equal(v, weights[k]) for k, v in make_network().state_dict().items())


def test_a_run_that_was_cut_goes_on_to_the_bit_and_a_dropped_update_moves_no_weight():
    def run(stop_after=None, state=None):
        large_batch, loader, plain, optimizer = prepared(
            make_network(dropout=0.3), count=5, data=TensorDataset(*make_data(15)), micro=2
        )
        if state is not None:
            for thing, of_it in zip((plain, optimizer, loader, large_batch), state, strict=True):
                thing.load_state_dict(of_it)
        for update in loader:
            large_batch.update(update, clip, embed=embed)
            if large_batch.num_updates == stop_after:
                break
        return copy.deepcopy([x.state_dict() for x in (plain, optimizer, loader, large_batch)])

    whole, resumed = run(), run(state=run(stop_after=1))
    assert all(torch.equal(v, resumed[0][k]) for k, v in whole[0].items())
    assert resumed[3]["num_updates"] == 3

    large_batch, loader, plain, _ = prepared(drops=lambda loss, update: True)
    before = copy.deepcopy(plain.state_dict())
    (update,) = loader
    assert large_batch.update(update, clip, embed=embed).dropped
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in before.items())


class Counted(Dataset):
    """Counts how often each sample was read."""

    def __init__(self):
        self.data, self.reads = TensorDataset(*make_data(COUNT)), [0] * COUNT

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        self.reads[index] += 1
        return self.data[index]


@pytest.mark.parametrize(("room", "reads"), [(1e12, 1), (300, 2)])
def test_samples_are_read_once_where_the_host_has_room(monkeypatch, room, reads):
    monkeypatch.setattr("lbaccel.update.read_twice.free_host_bytes", lambda: room)
    data = Counted()
    large_batch, loader, _, _ = prepared(data=data)
    (update,) = loader
    loss = large_batch.update(update, clip, embed=embed).loss
    assert data.reads == [reads] * COUNT
    assert loss == pytest.approx(full_batch("clip", COUNT)[0], rel=1e-12)


def test_a_loss_draws_alike_under_every_plan():
    """Noise in the loss is drawn for the whole batch, by (seed, update)."""

    def loss_fn(model, rows):
        a, b, *_ = rows
        return F.mse_loss(F.dropout(a + 0.1 * torch.randn_like(a), 0.3) @ b.T, b @ b.T)

    def loss(micro):
        large_batch, loader, _, _ = prepared(micro=micro)
        torch.rand(micro)  # the state before says nothing
        (update,) = loader
        return large_batch.update(update, loss_fn, embed=embed).loss

    assert loss(11) == pytest.approx(loss(2), rel=1e-12)


def test_the_search_of_a_micro_batch_gives_the_loss_the_rows_of_an_update():
    large_batch, loader, plain, _ = prepared(micro=2, count=40, data=TensorDataset(*make_data(40)))
    before = copy.deepcopy(plain.state_dict())
    sizes = []

    def loss_fn(model, rows):
        sizes.append(len(rows[0]))
        return clip(model, rows)

    def embed_fn(model, micro_batch):
        if len(micro_batch[0]) > 13:
            raise torch.OutOfMemoryError("too much")
        return embed(model, micro_batch)

    assert large_batch.find_micro_batch_size(loader, loss_fn, embed=embed_fn) == 13
    assert set(sizes) == {40}
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in before.items())


def in_place(model, micro_batch):
    micro_batch[0].sub_(0.5)
    return embed(model, micro_batch)


def first_rows(model, micro_batch):
    return embed(model, micro_batch)[0][1:]


def some_with_gradient(model, micro_batch):
    a = embed(model, micro_batch)[0]
    return a if len(a) > 3 else a.detach()


def other_lengths(model, micro_batch):
    a = embed(model, micro_batch)[0]
    return a[:, : len(a)]


def no_gradient(model, micro_batch):
    return embed(model, micro_batch)[0].detach()


def alone(function):
    return lambda model, rows: function(rows if isinstance(rows, torch.Tensor) else rows[0])


SQUARE = alone(lambda a: (a @ a.T).square().mean())


@pytest.mark.parametrize(
    ("embed_fn", "loss_fn", "words"),
    [
        (3, SQUARE, r"embed=3 is no function\. Write: def embed\(model, micro_batch\)"),
        (nn.Linear, SQUARE, r"is no function"),
        (lambda model: model, SQUARE, r"does not take these two"),
        (lambda m, d: [m(d[0])], SQUARE, r"embed returned a list.*a tensor, or a tuple of tensors"),
        (lambda m, d: (m(d[0]), None), SQUARE, r"a tuple that holds None"),
        (lambda m, d: m(d[0]).mean(), SQUARE, r"shape \(\) for a micro-batch of 4 samples"),
        (lambda m, d: (), SQUARE, r"an empty tuple"),
        (first_rows, SQUARE, r"shape \(3, 4\) for a micro-batch of 4 samples.*one row a sample"),
        (other_lengths, SQUARE, r"\[4\].*\[3\].*pad them to one length"),
        (no_gradient, SQUARE, r"none of the tensors that embed returned has a gradient"),
        (some_with_gradient, SQUARE, r"with a gradient for some micro-batches.*and without one"),
        (in_place, SQUARE, r"embed writes into the tensors.*images = images - mean"),
        (embed, alone(lambda a: a.mean(1)), r"returned shape \(11,\).*loss\.mean\(\)"),
        (embed, alone(lambda a: 1.0), r"returned float: with embed= it must return the mean"),
        (embed, alone(lambda a: a.detach().mean()), r"does not depend on the rows"),
        (embed, lambda model, rows: model.scale * 1.0, r"does not depend on the rows"),
        (embed, alone(lambda a: (a.mean(), 11.0)), r"\(loss, weight\) with embed=.*mean loss over"),
        (embed, alone(lambda a: (a.mean(), None, {}, 1)), r"tuple of 4"),
        (embed, lambda rows: rows[0].mean(), r"the lambda|<lambda> does not take these two"),
    ],
)
def test_input_that_is_wrong_ends_in_a_sentence(embed_fn, loss_fn, words):
    large_batch, loader, plain, _ = prepared()
    before = copy.deepcopy(plain.state_dict())
    (update,) = loader
    with pytest.raises(InputError, match=words):
        large_batch.update(update, loss_fn, embed=embed_fn)
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in before.items())
    assert large_batch.update(loader.peek(), clip, embed=embed).applied  # and the next one works


def test_a_loss_that_is_nan_writes_nothing():
    large_batch, loader, plain, _ = prepared()
    before = copy.deepcopy(plain.state_dict())
    (update,) = loader
    with pytest.raises(Diverged, match="the loss is nan"):
        large_batch.update(update, alone(lambda a: (a * torch.nan).mean()), embed=embed)
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in before.items())


def test_the_noise_scale_is_refused_with_what_to_type():
    large_batch, loader, _, _ = prepared(noise_scale=NoiseScale(half_life_samples=1000))
    (update,) = loader
    with pytest.raises(InputError, match=r"noise_scale= with embed=.*noise_scale=None"):
        large_batch.update(update, clip, embed=embed)


def test_batch_norm_inside_the_loss_is_refused():
    class WithHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(5, 4).double()
            self.head = nn.BatchNorm1d(4).double()

        def forward(self, x):
            return self.body(x)

    model = WithHead()
    plan = BatchPlan(global_batch_size=11, micro_batch_size=4, norm_batch_size=4)
    large_batch = LargeBatch(Accelerator(cpu=True), plan)
    loader = UpdateLoader(TensorDataset(make_data(11)[0]), plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, _, loader = large_batch.prepare(model, optimizer, loader)
    (update,) = loader
    with pytest.raises(InputError, match=r"BatchNorm layer 'head' runs in the loss.*in embed"):
        large_batch.update(
            update, lambda m, e: m.head(e).square().mean(), embed=lambda m, d: m(d[0])
        )


@pytest.mark.parametrize("kind", [list, iter])
def test_an_update_made_by_hand_is_a_list_or_stays_for_the_second_pass(kind):
    large_batch, _, _, _ = prepared()
    data = make_data(COUNT)
    pairs = [
        (m, tuple(t[m.start : m.start + m.num_samples] for t in data))
        for m in large_batch.plan.partition()
    ]
    result = large_batch.update(Update(0, COUNT, kind(pairs)), siglip, embed=embed)
    assert result.applied


class Tokens(nn.Module):
    """BatchNorm over rows of tokens, which a graph alone tells from other rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm, self.head = nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)

    def forward(self, x):  # [samples, 3, 5]
        return self.head(self.norm(self.body(x).view(-1, 5)).view(len(x), 3, 5).mean(1))


def test_batch_norm_over_tokens_runs_in_the_pass_without_a_graph_too():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 3, 5, generator=generator, dtype=torch.float64)
    truth = Tokens().double()
    order = torch.as_tensor(visiting_order(12))
    rows = torch.cat([truth(part) for part in x[order].split(4)])
    loss = (rows @ rows.T).square().mean()
    found = []
    for micro in (4, 8):
        model = Tokens().double()
        plan = BatchPlan(global_batch_size=12, micro_batch_size=micro, norm_batch_size=4)
        large_batch = LargeBatch(Accelerator(cpu=True), plan)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = UpdateLoader(TensorDataset(x), plan)
        model, _, loader = large_batch.prepare(model, optimizer, loader)
        (update,) = loader
        result = large_batch.update(
            update, lambda m, z: (z @ z.T).square().mean(), embed=lambda m, d: m(d[0])
        )
        assert result.loss == pytest.approx(loss.item(), rel=1e-12)
        torch.testing.assert_close(
            model.norm.running_mean, truth.norm.running_mean, rtol=1e-12, atol=1e-14
        )
        found.append(model.head.weight.clone())
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_a_first_pass_is_no_sign_that_a_shape_fits_in_a_budget(monkeypatch):
    """A forward takes less than its backward: the memory stays watched until both went well."""
    from collections import Counter

    from lbaccel.batch.plan import MicroBatch
    from lbaccel.update.memory import host_limit

    class Limit:
        def __init__(self):
            self.went_well, self.checks = Counter(), 0

        def check(self):
            self.checks += 1

    limit, watch = Limit(), host_limit.Watch()
    monkeypatch.setattr(host_limit, "_active", limit)
    watch.look_at((torch.zeros(2, 3),))
    for _ in range(5):
        with watch.preview(MicroBatch(0, (2,))):
            torch.ones(2).sum()
    assert limit.checks >= 5 and not limit.went_well
    with watch.forward(MicroBatch(0, (2,))):
        torch.ones(2).sum()
    assert sum(limit.went_well.values()) == 1
