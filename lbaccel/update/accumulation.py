"""The exact update: the gradient of the weighted mean loss over all samples, as a transaction.

With micro-batches i of all ranks, their mean losses l_i and weights w_i (their number of samples,
or what the loss function returns), an update's gradient is

    g = sum_i w_i grad(l_i) / sum_i w_i

Forward and backward add w_i / B grad(l_i) to `.grad` and write nothing else that lasts; the ranks
then agree on success, and only then are gradients, losses and weights summed and committed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lbaccel.batch.plan import MicroBatch
from lbaccel.errors import InputError, RunFailed, told
from lbaccel.update.loss_parts import SLOTS
from lbaccel.update.loss_sums import LossSums, Sums
from lbaccel.update.memory.oom import is_out_of_memory
from lbaccel.update.weightless import Weightless

LossFn = Callable[
    [Any, Any],
    Tensor
    | tuple[Tensor, Tensor | float | None]
    | tuple[Tensor, Tensor | float | None, Mapping[str, Tensor | float]],
]
"""(model, micro-batch) -> mean loss, (mean loss, weight of the micro-batch), or with sums too."""

Stop = Literal["time limit", "interrupt"]
"""Why a run ends after an update, before its time; an interrupt outweighs a time limit."""

STOPS: tuple[Stop, ...] = get_args(Stop)


class StoppedElsewhere(Exception):
    """This rank's attempt ended because another one's failed; `agree` learns why."""


BUCKET_BYTES = 25 * 2**20


class Scope(Protocol):
    """A part that depends on the running samples: BatchNorm's ghost batches, dropout's masks.

    A loss of single samples needs the first two; `preview` and `whole` are of a coupled one.
    """

    def forward(self, micro_batch: MicroBatch) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch."""
        ...

    def backward(self) -> AbstractContextManager[Any]:
        """Around its backward, where a forward is a recompute."""
        ...

    def preview(self, micro_batch: MicroBatch) -> AbstractContextManager[Any]:
        """Around a forward before the one that counts, which it equals; it leaves no trace."""
        ...

    def whole(self, num_samples: int, *, counts: bool) -> AbstractContextManager[Any]:
        """Around a loss on all samples, which every rank computes, and which `counts` on one."""
        ...


def accumulate(
    model: Any,
    micro_batches: Iterable[tuple[MicroBatch, Any]],
    loss_fn: LossFn,
    *,
    num_samples: int,
    scopes: Sequence[Scope] = (),
    backward: Callable[[Tensor], object] = Tensor.backward,
    after: Callable[[Tensor | float], object] | None = None,
) -> Sums:
    """Add the gradients of one rank's micro-batches to `.grad`; no host synchronisation.

    Each loss is multiplied by w_i / `num_samples` before its backward, so that `.grad` never
    leaves the scale of a mean. A filler has weight zero; of a micro-batch of weight zero neither
    loss nor gradient counts, even where they are nan (`Weightless`).

    Args:
        model: handed to `loss_fn` as it is.
        micro_batches: pairs of a `MicroBatch` and its data, on the device.
        loss_fn: (model, data) -> mean loss [], (mean loss [], weight [] or float), or with sums
            over the micro-batch's samples as a third, by name.
        num_samples: samples of the update over all ranks (B).
        scopes: entered around each micro-batch, such as the model's `GhostNorm`.
        backward: runs the backward pass of a scaled loss.
        after: told the weight of each micro-batch after its backward pass; a filler's is 0.

    Raises:
        InputError: the loss is no scalar that requires grad, or only some micro-batches weigh.
    """

    def recomputing(scaled: Tensor) -> None:
        with ExitStack() as recompute:
            for scope in scopes:
                recompute.enter_context(scope.backward())
            backward(scaled)

    with Weightless(model) as weightless:
        sums = LossSums(num_samples, weightless)
        for micro_batch, data in micro_batches:
            with ExitStack() as around:
                for scope in scopes:
                    around.enter_context(scope.forward(micro_batch))
                weight = sums.take(loss_fn(model, data), micro_batch, recomputing)
                if after is not None:
                    after(weight)
    return sums.so_far()


@dataclass(frozen=True)
class Agreement:
    """The facts on which all ranks agree before a gradient is reduced."""

    loss: float  # weighted mean over all samples of the update
    weight: float  # sum of the weights over all ranks
    present: tuple[bool, ...]  # which parameters have a gradient on some rank
    stop: Stop | None  # some rank wants to end the run after this update
    out_of_memory: bool = False  # on some rank, and nothing else went wrong: do it again, smaller
    short_of_memory: bool = False  # some rank's allocator had to empty its cache
    own_weights: bool = False  # the loss function returned weights
    sums: Mapping[str, float] = field(default_factory=dict)  # that it returned, over all samples


def agree(
    sums: Sums | None,
    present: Sequence[bool],
    *,
    world_size: int,
    device: torch.device,
    stop: Stop | None = None,
    short_of_memory: bool = False,
    error: BaseException | None = None,
) -> Agreement:
    """One small all-reduce: did every rank succeed, and what do losses and weights add up to?

    Where memory ran out on some ranks and nothing else happened, nothing is raised and all of them
    learn it: `Agreement.out_of_memory`.

    Args:
        sums: this rank's sums; None where it failed with `error`.
        present: which parameters have a gradient here, in the same order on every rank.
        world_size: data-parallel processes.
        device: where the collective runs.
        stop: this rank wants to end the run after this update.
        short_of_memory: this rank's allocator had to empty its cache.
        error: what this rank raised.

    Raises:
        BaseException: `error` itself, on the rank that failed.
        RunFailed: on the others, with what the failing ranks said.
        InputError: the weights of the update add up to zero, or the ranks' sums differ in name.
    """
    elsewhere = isinstance(error, StoppedElsewhere)
    ran_out = error is not None and is_out_of_memory(error)
    stops = {None: 0, "time limit": 1, "interrupt": world_size + 1}  # a sum tells which there are
    failed = sums is None and not ran_out and not elsewhere
    status = [float(failed), float(ran_out), float(stops[stop])]
    there = [float(here) for here in present]
    head = [*status, float(short_of_memory), 0.0, 0.0, *[0.0] * SLOTS]
    vector = torch.tensor(head + there, dtype=torch.float64).to(device)
    if sums is not None:
        vector[4], vector[5] = sums.loss, sums.weight
        vector[6 : 6 + SLOTS] = sums.samples.vector(sums.loss.device)
    if world_size > 1:
        dist.all_reduce(vector)
    num_failed, num_ran_out, stop_sum, num_short, loss, weight, *rest = vector.tolist()
    added, num_present = rest[:SLOTS], rest[SLOTS:]
    if num_failed and world_size > 1:
        said: list[str | None] = [None] * world_size
        mine = None if elsewhere or error is None else f"{type(error).__name__}: {error}"
        dist.all_gather_object(said, mine)
        if error is None or elsewhere:
            reasons = "; ".join(f"rank {r}: {text}" for r, text in enumerate(said) if text)
            raise RunFailed(
                f"{int(num_failed + num_ran_out)} of {world_size} ranks failed in this update, so "
                f"no rank committed it. {reasons}"
            )
    if error is not None and num_failed:
        raise told(error) if isinstance(error, Exception) else error
    agreed: Stop | None = None
    if stop_sum:
        agreed = "interrupt" if stop_sum > world_size else "time limit"
    if num_ran_out:
        return Agreement(0.0, 0.0, (), agreed, out_of_memory=True)
    if weight == 0.0:
        raise InputError(
            "the weights of this update add up to 0, so its mean loss is not defined. "
            "Every update needs at least one sample, token or class of weight above 0."
        )
    return Agreement(
        loss / weight,
        weight,
        tuple(n > 0 for n in num_present),
        agreed,
        short_of_memory=num_short > 0,
        own_weights=sums is not None and sums.own_weights,
        sums={} if sums is None else sums.samples.read(added, world_size=world_size),
    )


def reduction_bytes(sizes: Sequence[int]) -> int:
    """Bytes of `reduction_buffer` for parameters of these sizes in bytes.

    A bucket is never less than a parameter: the largest one counts where it exceeds 25 MiB.

    >>> reduction_bytes([2**20] * 4), reduction_bytes([2**20] * 40), reduction_bytes([2**30, 8])
    (4194304, 26214400, 1073741824)
    """
    return min(max(BUCKET_BYTES, *sizes), sum(sizes)) if sizes else 0


def reduction_buffer(parameters: list[nn.Parameter]) -> Tensor | None:
    """Bytes for the largest bucket of `reduce_gradients`, to be held before they are needed."""
    if not parameters:
        return None
    return torch.empty(
        reduction_bytes([p.nbytes for p in parameters]),
        dtype=torch.uint8,
        device=parameters[0].device,
    )


@torch.no_grad()
def reduce_gradients(
    parameters: list[nn.Parameter],
    present: tuple[bool, ...],
    *,
    world_size: int,
    divisor: float = 1.0,
    buffer: Tensor | None = None,
) -> None:
    """Sum `.grad` over the ranks in fixed buckets of 25 MiB in a fixed order, then divide.

    A parameter with a gradient on some rank only gets zeros on the others; one with none anywhere
    keeps None, as in one process. `buffer` is what `reduction_buffer` gave; with it, a bucket
    takes no memory that might not be there.
    """
    if world_size > 1:
        bucket: list[Tensor] = []
        size = 0
        for parameter, there in zip(parameters, present, strict=True):
            if not there:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if bucket and (
                size + parameter.grad.nbytes > BUCKET_BYTES
                or bucket[0].dtype != parameter.grad.dtype
            ):
                _all_reduce_bucket(bucket, buffer)
                bucket, size = [], 0
            bucket.append(parameter.grad)
            size += parameter.grad.nbytes
        if bucket:
            _all_reduce_bucket(bucket, buffer)
    if divisor != 1.0:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= divisor


def _all_reduce_bucket(grads: list[Tensor], buffer: Tensor | None) -> None:
    out = None
    num_bytes = sum(g.nbytes for g in grads)
    if buffer is not None and num_bytes <= buffer.nbytes:
        out = buffer[:num_bytes].view(grads[0].dtype)
    flat = torch.cat([g.reshape(-1) for g in grads], out=out)
    dist.all_reduce(flat)
    for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view(grad.shape))


def gather_rows(vector: Tensor) -> Tensor:
    """All ranks' vectors [L] as the rows of a matrix [world_size, L], in order of rank."""
    rows = [torch.empty_like(vector) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, vector)
    return torch.stack(rows)


def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """The Euclidean norm of the whole gradient vector, as a scalar tensor."""
    return get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip_gradients(parameters: list[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Multiply the gradient by min(1, `max_norm` / (`norm` + 1e-6)): torch's own rule.

    Pascanu et al. 2013, algorithm 1; called once, after the sum over all micro-batches and ranks.
    """
    clip_grads_with_norm_(parameters, max_norm, norm)
