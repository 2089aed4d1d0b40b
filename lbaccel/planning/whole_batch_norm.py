"""BatchNorm over the whole batch in a plan: its levels, the bytes on the host, the work."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from lbaccel.batch.plan import BatchPlan, MicroBatch
from lbaccel.planning.cost.devices import GIB
from lbaccel.planning.cost.update import AUTOCAST
from lbaccel.planning.machine import Machine
from lbaccel.planning.network import Trained, image_shape, random_images
from lbaccel.planning.plan import Plan
from lbaccel.randomness.masks import KeyedRandomness
from lbaccel.update.failures import no_global_norm
from lbaccel.update.global_norm.ending import Passes
from lbaccel.update.global_norm.exchange import Exchange
from lbaccel.update.global_norm.passes import GlobalNorm
from lbaccel.update.global_norm.schedule import best_schedule, chain_of
from lbaccel.update.normalization import convert_batch_norm

SAMPLES = 2  # that are run, on the CPU; bytes go with their number
MICRO_BATCH = 64  # where the plan does not pin one
CPU = torch.device("cpu")


def passes_of(
    trained: Trained,
    batch: BatchPlan,
    machine: Machine,
    pinned: int | None,
) -> Passes | None:
    """How an update of this plan runs; None where BatchNorm does not see the whole batch.

    The network runs once on the CPU, on two random samples.

    Args:
        trained: the network and its loss.
        batch: the contract.
        machine: that it runs on, and the host memory that a rank may keep; where that is not said,
            a CPU keeps at most half of its budget, and a card all that the passes take.
        pinned: samples of a micro-batch, where they are given.

    Raises:
        InputError: host memory below what the passes take; DeepSpeed, or a teacher.
    """
    if batch.norm_batch_size != "global":
        return None
    for what, is_there in (
        ("DeepSpeed", machine.zero is not None),
        ("a teacher", trained.teacher is not None),
        ("embed=", trained.embed is not None),
    ):
        if is_there:
            raise no_global_norm(what)
    most = machine.host_memory
    if most is None and machine.device.kind == "cpu":
        most = machine.budget // 2
    tape = _recorded(trained)
    share = -(-batch.global_batch_size // batch.world_size)
    micro = min(pinned or MICRO_BATCH, share)
    chain = chain_of([tape]).scaled(share / SAMPLES, micro / SAMPLES)
    return Passes.of(tape, best_schedule(chain, most))


def _recorded(trained: Trained) -> Any:
    model = copy.deepcopy(trained.built()).to(CPU).train()
    norm = convert_batch_norm(model, "global")
    make_batch = trained.make_batch or random_images(*image_shape(model, trained.img_size))
    randomness = KeyedRandomness(0, CPU)
    runner = GlobalNorm(norm, randomness, device=CPU, exchange=Exchange(1, CPU))
    dtype = AUTOCAST.get(trained.precision)
    cast = partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=dtype is not None)

    def loss_fn(model: Any, data: Any) -> Any:
        with cast():
            return trained.loss_fn(model, data)

    with randomness.update(0):
        return runner.tape_of(model, MicroBatch(0, (SAMPLES,)), make_batch(SAMPLES), loss_fn)[0]


def without_host(machine: Machine, passes: Passes | None) -> Machine:
    """The machine with the budget that a micro-batch has: a CPU's host is the device."""
    if passes is None or machine.device.kind != "cpu":
        return machine
    return replace(machine, budget=max(1, machine.budget - passes.host_bytes))


def with_passes(found: Plan, passes: Passes, *, budget: int) -> Plan:
    """A plan of micro-batches whose BatchNorm layers see all of the update."""
    notes = [*found.notes, str(passes)]
    if found.gradient_accumulation_steps == found.batch.world_size == 1:
        size = found.batch.global_batch_size
        notes.append(
            f"the whole batch fits in one micro-batch: norm_batch_size={size} takes the same "
            "statistics without passes"
        )
    on_host = passes.host_bytes / GIB if found.device.kind == "cpu" else 0.0
    return replace(
        found,
        budget_gib=budget / GIB,
        predicted_peak_gib=found.predicted_peak_gib + on_host,
        predicted_seconds_per_update=found.predicted_seconds_per_update * passes.times_as_long,
        breakdown={**found.breakdown, **({"between passes": on_host} if on_host else {})},
        passes=passes,
        notes=notes,
    )
