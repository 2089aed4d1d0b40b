"""BatchNorm over rows of tokens: a ghost batch of samples is a run of its rows."""

from __future__ import annotations

import forks
import pytest
import timm
import torch
from accelerate import Accelerator
from reference import (
    largest_relative_error,
    make_samples,
    relative_error,
    train_ghost_batches_in_turn,
)
from torch import nn
from updates import cross_entropy, one_update, visiting_order

from lbaccel import InputError, verify

COUNT, NORM, CLASSES = 11, 4, 5  # ghost batches of 4, 4 and 3 samples


class Rows(nn.Module):
    """Linear, BatchNorm over all tokens, mean over tokens; `order` says which rows lie together."""

    def __init__(self, order: str, frozen: bool = False):
        super().__init__()
        self.linear, self.bn, self.fc = nn.Linear(48, 6), nn.BatchNorm1d(6), nn.Linear(6, CLASSES)
        self.order = order
        self.linear.requires_grad_(not frozen)

    def forward(self, images):
        x = (
            images.unfold(2, 4, 4)
            .unfold(3, 4, 4)
            .permute(0, 2, 3, 1, 4, 5)
            .flatten(3)
            .flatten(1, 2)
        )
        x = self.linear(x)
        if self.order == "samples":
            x = self.bn(x.flatten(0, 1)).reshape_as(x)
        elif self.order == "samples, not contiguous":
            x = self.bn(x.transpose(0, 1).contiguous().transpose(0, 1).flatten(0, 1)).reshape_as(x)
        else:
            tokens_first = x.transpose(0, 1)
            y = self.bn(tokens_first.flatten(0, 1)).reshape(tokens_first.shape)
            x = y.transpose(0, 1)
        return self.fc(x.tanh().mean(1))


def make_model(name):
    torch.manual_seed(0)
    if name in ("samples", "samples, not contiguous", "tokens"):
        return Rows(name).double()
    model = timm.create_model(name, num_classes=CLASSES, img_size=64).double().train()
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # timm starts gains at 0: means of nothing but rounding
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def samples_of(name):
    return make_samples(COUNT, size=64 if name.startswith("levit") else 8)


def errors(name, micro, *, checkpointing=False, accelerator=None):
    """The errors of loss, gradients and buffers against plain BatchNorm, one ghost batch a time."""
    images, labels = samples_of(name)
    order = visiting_order(COUNT)
    loss, gradients, buffers = train_ghost_batches_in_turn(
        make_model(name), images[order], labels[order], NORM
    )
    result, found, found_buffers = one_update(
        make_model(name),
        images,
        labels,
        micro_batch_size=micro,
        norm_batch_size=NORM,
        checkpointing=checkpointing,
        accelerator=accelerator,
    )
    return (
        abs(result.loss - loss) / loss,
        relative_error(found, gradients),
        largest_relative_error(found_buffers, buffers),
    )


@pytest.mark.parametrize("micro", [4, 8, 12])
@pytest.mark.parametrize("name", ["samples", "samples, not contiguous"])
def test_rows_of_samples_are_cut_by_sample(name, micro):
    assert max(errors(name, micro)) < 1e-12


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("name", "micro"),
    [
        ("levit_128s", 4),
        ("levit_128s", 8),
        *(
            pytest.param(n, m, marks=pytest.mark.slow)
            for n in ("levit_192", "levit_256d")
            for m in (8, 12)
        ),
    ],
)
def test_levit_equals_plain_ghost_batches_in_turn(name, micro, checkpointing):
    assert max(errors(name, micro, checkpointing=checkpointing)) < 1e-12


def on_a_rank(rank):
    return errors("levit_128s", 4, accelerator=Accelerator(cpu=True))


def test_levit_on_three_ranks_equals_plain_ghost_batches_in_turn():
    for found in forks.values(forks.run_forked(on_a_rank, world_size=3, timeout=300)):
        assert max(found) < 1e-12


def test_rows_that_are_not_known_to_lie_sample_by_sample_are_refused():
    """Four tokens of eight samples, tokens first: a run of rows would mix the ghost batches."""
    with pytest.raises(InputError, match=r"BatchNorm layer 'bn' got 32 samples where .* holds 8"):
        errors("tokens", 8)


def test_rows_without_a_graph_are_refused_but_for_levits_own():
    images, labels = make_samples(COUNT, size=8)
    with pytest.raises(InputError, match="a view of"):
        one_update(
            Rows("samples", frozen=True).double(),
            images,
            labels,
            micro_batch_size=8,
            norm_batch_size=NORM,
        )
    levit = make_model("levit_128s")
    for parameter in levit.parameters():
        parameter.requires_grad_(False)
    levit.head.linear.requires_grad_(True)
    images, labels = samples_of("levit_128s")
    result, *_ = one_update(levit, images, labels, micro_batch_size=8, norm_batch_size=NORM)
    assert result.loss > 0


def test_verify_takes_rows_of_samples():
    images, labels = make_samples(COUNT, size=8)
    found = verify(make_model("samples"), cross_entropy, (images, labels), norm_batch_size=NORM)
    assert found.equivalent
