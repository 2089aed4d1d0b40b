"""Traces with activations on the host, beside what the chain says of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lbaccel.batch.plan import BatchPlan
from lbaccel.models import create_backbone
from lbaccel.planning.candidates import Candidate
from lbaccel.planning.cost.devices import CARDS
from lbaccel.planning.cost.update import Network, image_batch
from lbaccel.planning.estimate import Estimator
from lbaccel.planning.segments import Link, predicted_peak, sent_bytes
from lbaccel.update import pinned_host

CARD = CARDS["RTX 3060"]


def estimator(name="resnet18", size=224, device=CARD):
    with torch.device("meta"):
        model = create_backbone(name, num_classes=10)
    norm = 64 if name.startswith("resnet") else None
    batch = BatchPlan(global_batch_size=256, micro_batch_size=64, norm_batch_size=norm)
    network = Network(model=model, make_batch=image_batch(3, size))
    return Estimator(network, batch, device, "fp32")


@pytest.mark.parametrize("runs", [[(0, 13)], [(1, 3), (5, 8)], [(i, i) for i in range(4, 12)]])
def test_the_chains_figures_of_an_offload_are_those_of_its_trace(runs, monkeypatch):
    monkeypatch.setattr(pinned_host, "LEAST_BYTES", 1)  # the chain counts small tensors as well
    known = estimator()
    plain = known.estimate(Candidate(64))
    assert plain.chain is not None
    units = known.units
    names = tuple(tuple(u.name for u in units[a : b + 1]) for a, b in runs)
    moved = known.estimate(Candidate(64, offload=names))
    # inside of a unit the chain has the plain peak, though parts of it are gone by then
    predicted = predicted_peak(plain.chain, [], runs)
    assert 0.9 * predicted <= moved.traced <= 1.001 * predicted
    assert moved.traced < 0.9 * plain.traced
    sent = sent_bytes(plain.chain, runs)
    seconds = Link(CARD.host_bandwidth, 0).seconds(sent)
    added = moved.micro_step_seconds - plain.micro_step_seconds
    assert added == pytest.approx(seconds, rel=0.02) and sent > 2**20
    assert sent <= moved.host_bytes <= 2 * sent  # torch pins powers of two
    assert plain.host_bytes == 0


def test_looking_on_changes_no_figure_of_a_plan(monkeypatch):
    looked = estimator().estimate(Candidate(64))
    monkeypatch.setattr("lbaccel.planning.estimate.hand_to", lambda *_: None)
    alone = estimator().estimate(Candidate(64))
    assert looked.chain is not None and any(unit.sent for unit in looked.chain.units)
    assert alone.chain is not None and not any(unit.sent for unit in alone.chain.units)
    assert replace(looked, chain=None) == replace(alone, chain=None)
    cleared = [replace(u, sent=0, sent_input=0, hidden=0) for u in looked.chain.units]
    assert cleared == list(alone.chain.units)


def test_a_vit_keeps_the_inputs_of_its_blocks_and_sends_the_rest():
    known = estimator("vit_tiny_patch16_224", 224)
    chain = known.estimate(Candidate(64)).chain
    assert chain is not None
    by_name = dict(zip((u.name for u in known.units), chain.units, strict=True))
    tokens = 64 * 197 * 192 * 4
    block = by_name["blocks.3"]
    # its input is saved by the first LayerNorm; the one before saves no output of its own
    assert block.output == block.sent_input == tokens
    assert block.saved - block.output <= block.hidden <= block.sent < 20 * tokens
    assert block.stuck == 0
