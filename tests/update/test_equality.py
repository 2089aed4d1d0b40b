"""The contract: every partition, with and without checkpointing, gives the reference's update."""

from __future__ import annotations

import copy

import pytest
import torch
from reference import (
    MODELS,
    WITHOUT_BATCH_NORM,
    largest_relative_error,
    make_model,
    make_samples,
    relative_error,
    train_ghost_batches_in_turn,
)
from updates import one_update, visiting_order

COUNT = 11
NORM = 3
# Of 11 samples in ghost batches of 3, 3, 3, 2: one a micro-batch, ragged 6 + 5, and all at once.
PARTITIONS = {"single groups": 3, "ragged": 6, "whole": 12}
FAST = ("resnet10t", "vit_tiny_patch16_224")


def image_size(name):
    """BatchNorm over 3 images of one pixel is badly conditioned: deep networks get 64 px."""
    return 32 if name in FAST else 64


def cells():
    for name in MODELS:
        marks = [] if name in FAST else [pytest.mark.slow]
        for partition in PARTITIONS:
            for checkpointing in (False, True):
                yield pytest.param(name, partition, checkpointing, marks=marks)


@pytest.fixture(scope="module")
def references():
    return {}


def reference_of(name, references):
    if name not in references:
        images, labels = make_samples(COUNT, size=image_size(name))
        order = visiting_order(COUNT)
        norm = None if name in WITHOUT_BATCH_NORM else NORM
        model = make_model(name)
        references[name] = train_ghost_batches_in_turn(model, images[order], labels[order], norm)
    return references[name]


@pytest.mark.parametrize(("name", "partition", "checkpointing"), list(cells()))
def test_update_equals_reference(name, partition, checkpointing, references):
    loss, gradients, buffers = reference_of(name, references)
    images, labels = make_samples(COUNT, size=image_size(name))
    norm = None if name in WITHOUT_BATCH_NORM else NORM
    result, found, found_buffers = one_update(
        make_model(name),
        images,
        labels,
        micro_batch_size=PARTITIONS[partition],
        norm_batch_size=norm,
        checkpointing=checkpointing,
    )
    assert result.loss == pytest.approx(loss, rel=1e-12)
    assert relative_error(found, gradients) < 1e-12
    assert largest_relative_error(found_buffers, buffers) < 1e-12


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224"])
def test_single_samples_equal_the_full_batch_without_batch_norm(name, references):
    loss, gradients, _ = reference_of(name, references)
    images, labels = make_samples(COUNT)
    result, found, _ = one_update(make_model(name), images, labels, micro_batch_size=1)
    assert result.loss == pytest.approx(loss, rel=1e-12)
    assert relative_error(found, gradients) < 1e-12


def test_frozen_batch_norm_gives_the_gradient_of_the_network_in_eval_mode():
    images, labels = make_samples(COUNT)
    model = make_model("resnet10t")
    twin = copy.deepcopy(model).eval()
    torch.nn.functional.cross_entropy(twin(images), labels).backward()
    truth = {n: p.grad for n, p in twin.named_parameters()}
    for micro in (1, 4, 11):
        _, found, buffers = one_update(
            copy.deepcopy(model), images, labels, micro_batch_size=micro, norm_batch_size="frozen"
        )
        assert relative_error(found, truth) < 1e-12
        assert largest_relative_error(buffers, dict(model.named_buffers())) == 0.0


def test_the_naive_loop_over_micro_batches_is_not_the_reference(references):
    """The matrix could fail: BatchNorm over other groups gives another gradient."""
    _, gradients, buffers = reference_of("resnet10t", references)
    images, labels = make_samples(COUNT)
    _, found, found_buffers = one_update(
        make_model("resnet10t"), images, labels, micro_batch_size=4, norm_batch_size=4
    )
    assert relative_error(found, gradients) > 1e-3
    assert largest_relative_error(found_buffers, buffers) > 1e-3


@pytest.mark.parametrize("micro", [3, 6, 12])
def test_statistics_once_an_update_keep_the_gradients_and_merge_all_ghost_batches(
    micro, references
):
    _, gradients, _ = reference_of("resnet10t", references)
    images, labels = make_samples(COUNT)
    model = make_model("resnet10t")
    first = model.conv1[0]
    with torch.no_grad():
        x = first(images)
    _, found, buffers = one_update(
        model, images, labels, micro_batch_size=micro, norm_batch_size=NORM,
        bn_statistics="per_update",
    )  # fmt: skip
    assert relative_error(found, gradients) < 1e-12
    values = x.transpose(0, 1).flatten(1)
    torch.testing.assert_close(
        buffers["conv1.1.running_mean"], 0.1 * values.mean(1), rtol=1e-12, atol=1e-15
    )
    torch.testing.assert_close(
        buffers["conv1.1.running_var"], 0.9 + 0.1 * values.var(1), rtol=1e-12, atol=1e-15
    )
