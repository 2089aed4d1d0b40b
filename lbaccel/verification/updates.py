"""One update of a copy of the model under a plan, by the pieces that `LargeBatch` is made of."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lbaccel.batch.plan import BatchPlan, MicroBatch, NormBatchSize
from lbaccel.errors import RunFailed
from lbaccel.randomness.generators import generator_states
from lbaccel.randomness.layouts import Layouts
from lbaccel.randomness.masks import KeyedRandomness
from lbaccel.update import accumulation, coupled
from lbaccel.update.accumulation import LossFn, Scope
from lbaccel.update.averages import RunningAverages
from lbaccel.update.checkpointing import apply_activation_checkpointing
from lbaccel.update.compiled import compile_in_place
from lbaccel.update.embeddings import Coupled
from lbaccel.update.failures import no_global_norm
from lbaccel.update.global_norm.exchange import Exchange
from lbaccel.update.global_norm.passes import GlobalNorm
from lbaccel.update.mask_layouts import learn_mask_layouts
from lbaccel.update.normalization import GhostNorm, convert_batch_norm
from lbaccel.update.reachable import reachable
from lbaccel.update.writes import carried, marks
from lbaccel.verification.copies import CPU, float64_copy, rows_of


@dataclass(frozen=True)
class Subject:
    """The subject of a verification: a model copy that never runs, a loss function, samples."""

    model: nn.Module
    loss_fn: LossFn
    batch: Any
    num_samples: int
    norm_batch_size: NormBatchSize
    seed: int
    blocks: tuple[str, ...] | None = None  # to recompute, in place of lbaccel's choice
    layouts: Layouts | None = None  # of its masks, see `learned`
    averages: tuple[str, ...] = ()  # as for `LargeBatch`
    watched: tuple[str, ...] = ()  # what a forward moves beside the buffers
    reset: Callable[[], None] = lambda: None  # the loss function's own tensors
    compiled: bool = False  # plans run through torch.compile, the reference never does

    def fresh(self) -> nn.Module:
        """A copy of the model, and the loss function as it was at the start."""
        self.reset()
        return float64_copy(self.model)

    @property
    def unit(self) -> int:
        """Samples that a plan must not cut: a ghost batch, or one."""
        return self.norm_batch_size if isinstance(self.norm_batch_size, int) else 1

    @property
    def whole(self) -> int:
        """The micro-batch that holds all samples."""
        return -(-self.num_samples // self.unit) * self.unit

    def plan(self, micro_batch_size: int, world_size: int = 1) -> BatchPlan:
        """The plan of this batch with the given micro-batches and ranks."""
        return BatchPlan(
            global_batch_size=self.num_samples,
            micro_batch_size=micro_batch_size,
            world_size=world_size,
            norm_batch_size=self.norm_batch_size,
        )


def learned(subject: Subject) -> Subject:
    """The subject with the layouts of its masks, as `LargeBatch` learns them."""
    model = subject.fresh()
    norm, randomness = converted(model, subject.norm_batch_size), masks_of(subject)
    with randomness.update(0):
        try:
            layouts = learn_mask_layouts(
                model,
                subject.loss_fn,
                rows_of(subject.batch, 0, subject.num_samples),
                num_samples=subject.num_samples,
                module=model,
                randomness=randomness,
                norm=norm,
                averages=RunningAverages(subject.averages),
            )
        except Exception:  # the update goes by rows then, and shows what differs
            return subject
    return replace(subject, layouts=layouts)


def masks_of(subject: Subject) -> KeyedRandomness:
    """The draws of an update of the subject."""
    return KeyedRandomness(subject.seed, CPU, subject.layouts)


@dataclass(frozen=True)
class Result:
    """The result of an update: all that an optimizer and the next update read."""

    loss: float
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]  # and all else that a forward moves
    random_state_kept: bool
    after: Result | None = None  # the update that follows


def planned(
    subject: Subject,
    plan: BatchPlan,
    *,
    rank: int = 0,
    checkpointing: bool = False,
    only: Sequence[MicroBatch] | None = None,
    follow: Mapping[str, Tensor | None] | None = None,
) -> Result:
    """The update of one rank under a plan, out of the pieces that `LargeBatch.update` is made of.

    With several ranks the default process group must run. With `only` the update is made of these
    micro-batches, in one process. With `follow`, a gradient, the weights are moved along it and a
    second update is made, from the state that the first one left.
    """
    partition = plan.partition(rank) if only is None else only
    num_samples = subject.num_samples if only is None else sum(m.num_samples for m in only)
    model = subject.fresh()
    if checkpointing:
        apply_activation_checkpointing(model, subject.blocks)
    if subject.compiled:
        torch._dynamo.reset()  # each copy of the model counts towards its limit of versions
        compile_in_place(model, CPU)
    norm = converted(model, subject.norm_batch_size)
    randomness = masks_of(subject)
    averages = RunningAverages(subject.averages)

    scopes = (*scopes_of(subject, norm, randomness), averages)
    if norm.over_all and norm.layers:
        accumulate = _passes(subject, norm, randomness, plan.world_size)
    else:
        way = _way(subject, partition, rank=rank, world_size=plan.world_size)
        accumulate = partial(way, scopes=scopes)

    def update(index: int) -> Result:
        before = stirred_states()
        norm.begin()
        averages.begin(model, subject.loss_fn)
        error = sums = None
        with randomness.update(index):
            try:
                pairs = micro_batches(subject, partition)
                sums = accumulate(model, pairs, subject.loss_fn, num_samples=num_samples)
            except Exception as raised:
                error = raised
            agreement = _reduce(model, sums, error, plan.world_size, num_samples)
        norm.commit(accumulation.gather_rows if plan.world_size > 1 else None)
        averages.commit(num_samples, world_size=plan.world_size)
        return result_of(subject, model, agreement.loss, before)

    first = update(0)
    if follow is None:
        return first
    move_along(model, follow)
    return replace(first, after=update(1))


def _passes(
    subject: Subject, norm: GhostNorm, randomness: KeyedRandomness, world_size: int
) -> Callable[..., accumulation.Sums]:
    """The passes over BatchNorm of the whole batch, as in `Transaction`.

    Raises:
        InputError: rows that a loss compares, or averages, which have no place in them.
    """
    if isinstance(subject.loss_fn, Coupled):
        raise no_global_norm("embed=")
    if subject.averages:
        raise no_global_norm("averages that a forward moves")
    exchange = Exchange(world_size, CPU)
    return GlobalNorm(norm, randomness, device=CPU, exchange=exchange).accumulate


def _way(
    subject: Subject, partition: Sequence[MicroBatch], *, rank: int, world_size: int
) -> Callable[..., accumulation.Sums]:
    """The function that adds up the gradients, as in `Transaction`."""
    if not isinstance(subject.loss_fn, Coupled):
        return accumulation.accumulate
    again = partial(micro_batches, subject, partition)
    return partial(coupled.accumulate, again=again, rank=rank, world_size=world_size)


def _reduce(
    model: nn.Module,
    sums: accumulation.Sums | None,
    error: Exception | None,
    world_size: int,
    num_samples: int,
) -> accumulation.Agreement:
    """The agreement of the ranks, and the gradient of all of them in `.grad`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    present = [p.grad is not None for p in parameters]
    agreement = accumulation.agree(sums, present, world_size=world_size, device=CPU, error=error)
    if agreement.out_of_memory:
        raise error or RunFailed("memory ran out on the other rank.")
    assert sums is not None
    accumulation.reduce_gradients(
        parameters,
        agreement.present,
        world_size=world_size,
        divisor=agreement.weight / num_samples if sums.own_weights else 1.0,
    )
    return agreement


@torch.no_grad()
def move_along(model: nn.Module, gradients: Mapping[str, Tensor | None]) -> None:
    """A step down a given gradient, of a thousandth of the weights' length; `.grad` is cleared.

    All plans follow the same gradient, so that they enter their second update with equal weights.
    """
    parameters = dict(model.named_parameters())
    pairs = [(parameters[name], g) for name, g in gradients.items() if g is not None]
    length = sum(float(p.square().sum()) for p, _ in pairs) ** 0.5
    norm = sum(float(g.square().sum()) for _, g in pairs) ** 0.5
    for p, g in pairs:
        p.sub_(g, alpha=1e-3 * (length or 1.0) / (norm or 1.0))
    for p in parameters.values():
        p.grad = None


def whole_loss(subject: Subject, model: nn.Module, randomness: KeyedRandomness) -> Any:
    """The result of the loss function for the whole batch, from one forward of it."""
    loss_fn, data = subject.loss_fn, rows_of(subject.batch, 0, subject.num_samples)
    out = loss_fn(model, data)
    if isinstance(loss_fn, Coupled):
        with randomness.whole(subject.num_samples, counts=True):
            return loss_fn.loss_fn(model, out)
    return out


def watched(subject: Subject) -> tuple[str, ...]:
    """Parameters and plain tensors that a forward moves from their last value."""
    model = subject.fresh()
    norm = converted(model, subject.norm_batch_size)
    norm.begin()
    randomness = masks_of(subject)
    (whole,) = subject.plan(subject.whole).partition()
    found = reachable(model, subject.loss_fn)

    def forward() -> Any:
        with norm.forward(whole), norm.backward(), randomness.forward(whole):
            return whole_loss(subject, model, randomness)

    with randomness.update(0):
        before = marks(found.places)
        try:
            forward()
            paths = carried(found, before, forward)
        except Exception:  # the reference says why, in words
            return ()
    return tuple(path for path in paths if found.places[path].kind != "buffer")


def converted(model: nn.Module, norm_batch_size: NormBatchSize) -> GhostNorm:
    """The layers as a plan would have them; without `norm_batch_size` the model as it is."""
    if norm_batch_size is None:
        return GhostNorm(frozen=False, statistics="per_ghost")
    return convert_batch_norm(model, norm_batch_size)


def scopes_of(subject: Subject, norm: GhostNorm, randomness: KeyedRandomness) -> tuple[Scope, ...]:
    """The scopes that `LargeBatch` enters around each micro-batch."""
    return (norm, randomness)


def micro_batches(
    subject: Subject, partition: Iterable[MicroBatch]
) -> Iterable[tuple[MicroBatch, Any]]:
    """Micro-batches with their samples."""
    for m in partition:
        yield m, rows_of(subject.batch, m.start, m.start + m.num_samples)


def samples_of(partition: Iterable[MicroBatch]) -> list[int]:
    """Sample positions that a rank's micro-batches hold, fillers left out."""
    spans = [range(m.start, m.start + m.num_samples) for m in partition if not m.is_filler]
    return [position for span in spans for position in span]


def check_ranks(plan: BatchPlan, rank: int) -> None:
    """Assert in a rank that it is one of as many as planned, and sees samples of its own."""
    assert dist.get_world_size() == plan.world_size and dist.get_rank() == rank
    said: list[Any] = [None] * plan.world_size
    dist.all_gather_object(said, samples_of(plan.partition(rank)))
    assert all(said), "every rank has a sample"
    seen = sorted(position for positions in said for position in positions)
    assert seen == list(range(plan.global_batch_size)), "each sample on one rank"


def result_of(subject: Subject, model: nn.Module, loss: float, before: Any) -> Result:
    """The result of an update in a copy; `before` holds the generators' states before it."""
    states = {name: b.clone() for name, b in model.named_buffers()}
    if subject.watched:
        places = reachable(model, subject.loss_fn).places
        found = {path: places[path].tensor for path in subject.watched if path in places}
        states |= {path: t.detach().clone() for path, t in found.items() if t is not None}
    return Result(
        loss,
        {name: p.grad for name, p in model.named_parameters() if p.requires_grad},
        states,
        _same_states(before, generator_states(CPU)),
    )


def stirred_states() -> Any:
    """The generators' states after a draw of each: not those that a former update may have left."""
    torch.rand(())
    np.random.rand()
    random.random()
    return generator_states(CPU)


def _same_states(a: Any, b: Any) -> bool:
    return torch.equal(a[0], b[0]) and str(a[2]) == str(b[2]) and a[3] == b[3]
