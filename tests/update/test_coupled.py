"""Losses that couple samples: the update of the whole batch, however it is cut."""

from __future__ import annotations

import pytest
from coupled_cases import LOSSES, coupled_update, error_of, full_batch
from hypothesis import given, settings
from hypothesis import strategies as st

COUNT = 11
TOLERANCE = 1e-12


@pytest.mark.parametrize("micro", [11, 4, 1])
@pytest.mark.parametrize("name", LOSSES)
def test_the_update_is_that_of_the_whole_batch(name, micro):
    found = coupled_update(name, COUNT, micro=micro)
    assert error_of(found, full_batch(name, COUNT)) < TOLERANCE


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("micro", [3, 6, 12])
@pytest.mark.parametrize("name", ["clip", "shared"])
def test_ghost_batch_norm_and_dropout_are_those_of_the_whole_batch(name, micro, checkpointing):
    """Statistics move once a ghost batch, and both passes draw the masks of the samples."""
    options = {"norm": 3, "dropout": 0.4}
    found = coupled_update(name, COUNT, micro=micro, checkpointing=checkpointing, **options)
    truth = full_batch(name, COUNT, **options)
    assert error_of(found, truth) < TOLERANCE
    assert truth[2]["image.1.1.num_batches_tracked"] == 4


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_partition_changes_the_update(data):
    count = data.draw(st.integers(2, 17), "samples")
    norm = data.draw(st.none() | st.integers(2, count), "norm_batch_size")
    units = data.draw(st.integers(1, count), "units of a micro-batch")
    name = data.draw(st.sampled_from(LOSSES), "loss")
    dropout = data.draw(st.sampled_from([0.0, 0.5]), "dropout")
    if norm is not None and count // -(-count // norm) < 2:
        norm = count  # no ghost batch of one sample
    options = {"norm": norm, "dropout": dropout}
    if name == "simclr":  # its two views are one call of the network: no ghost batch of samples
        options["norm"] = None
        options["dropout"] = 0.0
    found = coupled_update(name, count, micro=units * (options["norm"] or 1), **options)
    assert error_of(found, full_batch(name, count, **options)) < TOLERANCE
