"""Losses that couple samples: networks, data, and the plain full batch, their measure."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from updates import KeepGradients, visiting_order

from lbaccel import BatchPlan, LargeBatch, UpdateLoader, apply_activation_checkpointing
from lbaccel.batch.plan import MicroBatch
from lbaccel.randomness.masks import KeyedRandomness

LOSSES = ("simclr", "clip", "siglip", "supcon", "weighted", "shared")
WIDTH = 6


class Network(nn.Module):
    """Two towers and what a loss may own: a temperature, a bias, prototypes."""

    def __init__(self, *, norm=False, dropout=0.0):
        super().__init__()
        self.image = tower(5, norm=norm, dropout=dropout)
        self.text = tower(3, norm=norm, dropout=dropout)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.bias = nn.Parameter(torch.tensor(-1.5))
        self.prototypes = nn.Linear(4, 3, bias=False)

    def forward(self, images, texts=None):
        a = F.normalize(self.image(images), dim=1)
        return a if texts is None else (a, F.normalize(self.text(texts), dim=1))


def tower(inputs, *, norm, dropout):
    middle = nn.BatchNorm1d(WIDTH) if norm else nn.Tanh()
    block = nn.Sequential(nn.Linear(WIDTH, WIDTH), middle, nn.Dropout(dropout))
    return nn.Sequential(nn.Linear(inputs, WIDTH), block, nn.Tanh(), nn.Linear(WIDTH, 4))


def make_network(**options):
    torch.manual_seed(0)
    return Network(**options).double()


def make_data(count):
    """Images, texts, labels, and weights of samples."""
    generator = torch.Generator().manual_seed(count)
    kwargs = {"generator": generator, "dtype": torch.float64}
    images, texts = torch.randn(count, 5, **kwargs), torch.randn(count, 3, **kwargs)
    labels = torch.randint(3, (count,), generator=generator)
    return images, texts, labels, torch.rand(count, **kwargs)


def bare(model):
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def embed(model, micro_batch):
    images, texts, labels, weights = micro_batch
    return (*model(images, texts), labels, weights)


def two_views(model, micro_batch):
    images, *_ = micro_batch
    both = model(torch.cat([images, images.flip(1)]))
    return both.unflatten(0, (2, -1)).transpose(0, 1)  # [samples, 2, d]


def rows_and_prototypes(model, micro_batch):
    images, texts, labels, _ = micro_batch
    a, b = model(images, texts)
    return a + b @ bare(model).prototypes.weight.T @ bare(model).prototypes.weight, b, labels


def simclr(model, views):
    """NT-Xent (Chen et al. 2020, equation 1)."""
    z = views.transpose(0, 1).flatten(0, 1)
    logits = (z @ z.T / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))


def clip(model, rows):
    a, b, _, _ = rows
    logits = bare(model).scale.exp() * a @ b.T
    target = torch.arange(len(a))
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return loss, None, {"right": (logits.argmax(1) == target).sum()}


def siglip(model, rows):
    a, b, _, _ = rows
    logits = bare(model).scale.exp() * a @ b.T + bare(model).bias
    return -F.logsigmoid((2 * torch.eye(len(a), dtype=a.dtype) - 1) * logits).sum(1).mean()


def supcon(model, rows):
    a, _, labels, _ = rows
    assert labels.dtype == torch.int64 and not labels.requires_grad
    others = ~torch.eye(len(a), dtype=torch.bool)
    log_share = F.log_softmax((a @ a.T / 0.3).masked_fill(~others, -1e9), 1)
    same = (labels[:, None] == labels) & others
    return -((same * log_share).sum(1) / same.sum(1).clamp(min=1)).mean()


def weighted(model, rows):
    a, b, _, weights = rows
    assert not weights.requires_grad
    each = F.cross_entropy(a @ b.T, torch.arange(len(a)), reduction="none")
    return (weights * each).sum() / weights.sum()


def shared(model, rows):
    a, b, labels = rows
    of_class = F.cross_entropy(bare(model).prototypes(a), labels)
    return of_class + F.mse_loss(a @ b.T, torch.eye(len(a), dtype=a.dtype))


EMBEDS = {"simclr": two_views, "shared": rows_and_prototypes}


def functions(name):
    return globals()[name], EMBEDS.get(name, embed)


def full_batch(name, count, *, norm=None, dropout=0.0, seed=0):
    """Loss, gradients, buffers and sums of plain torch: one forward, one backward.

    Of lbaccel it takes the order of the samples, and the masks keyed by sample.
    """
    loss_fn, embed_fn = functions(name)
    model = make_network(norm=norm is not None, dropout=dropout).train()
    order = torch.as_tensor(visiting_order(count))
    data = [t[order] for t in make_data(count)]
    groups = 1 if norm is None else -(-count // norm)
    sizes = [count // groups + (g < count % groups) for g in range(groups)]
    keys = KeyedRandomness(seed, torch.device("cpu"))
    parts, start = [], 0
    with keys.update(0):
        for size in sizes:  # one ghost batch after the other
            with keys.forward(MicroBatch(start, (size,))):
                rows = embed_fn(model, tuple(t[start : start + size] for t in data))
            parts.append(rows if isinstance(rows, tuple) else (rows,))
            start += size
    columns = tuple(torch.cat(column) for column in zip(*parts, strict=True))
    out = loss_fn(model, columns if len(columns) > 1 else columns[0])
    loss, sums = (out[0], out[2]) if isinstance(out, tuple) else (out, {})
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    sums = {key: float(value) for key, value in sums.items()}
    return loss.item(), gradients, dict(model.named_buffers()), sums


def coupled_update(name, count, *, micro, norm=None, dropout=0.0, checkpointing=False):
    """The same by `LargeBatch.update`, in this process or as one rank of several."""
    accelerator = Accelerator(cpu=True)
    loss_fn, embed_fn = functions(name)
    model = make_network(norm=norm is not None, dropout=dropout)
    if checkpointing:
        apply_activation_checkpointing(model, ["image.1", "text.1"])
    names = [n for n, _ in model.named_parameters()]
    plan = BatchPlan(
        global_batch_size=count,
        micro_batch_size=micro,
        world_size=accelerator.num_processes,
        norm_batch_size=norm,
    )
    large_batch = LargeBatch(accelerator, plan)
    data = TensorDataset(*make_data(count))
    loader = UpdateLoader(data, plan, rank=accelerator.process_index)
    optimizer = KeepGradients(model.parameters(), lr=0.0)
    plain = model
    model, optimizer, loader = large_batch.prepare(model, optimizer, loader)
    (update,) = loader
    result = large_batch.update(update, loss_fn, embed=embed_fn)
    gradients = {names[i]: g for i, g in optimizer.optimizer.seen.items()}
    return result, gradients, dict(plain.named_buffers())


def error_of(found, truth):
    """The largest relative error of loss, gradient and buffers; the sums must be equal."""
    (result, gradients, buffers), (loss, true_gradients, true_buffers, sums) = found, truth
    assert gradients.keys() == true_gradients.keys(), gradients.keys() ^ true_gradients.keys()
    assert result.sums == sums
    errors = [abs(result.loss - loss) / (abs(loss) or 1.0)]  # no pair: the loss is 0
    for mine, theirs in ((gradients, true_gradients), (buffers, true_buffers)):
        gap = sum(float((mine[k] - v).square().sum()) for k, v in theirs.items()) ** 0.5
        size = sum(float(v.square().sum()) for v in theirs.values()) ** 0.5
        errors.append(gap / (size or 1.0))
    return max(errors)
