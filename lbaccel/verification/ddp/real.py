"""One update by DistributedDataParallel on real gloo ranks: what lbaccel is compared with.

Nothing of lbaccel takes part but the keyed masks, without which dropout could not be compared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from lbaccel.batch.plan import MicroBatch
from lbaccel.errors import RunFailed
from lbaccel.verification.copies import float64_copy, rows_of
from lbaccel.verification.ranks import run_ranks, why_no_ranks
from lbaccel.verification.reference import move_running
from lbaccel.verification.updates import Subject, masks_of

Spans = Sequence[Sequence[tuple[int, int]]]
"""Of each rank, of each of its micro-batches: first sample position, and samples."""


@dataclass(frozen=True)
class RankResult:
    """The loss, gradients and buffers of one rank after the update."""

    loss: float  # mean of its micro-batches' mean losses
    gradients: dict[str, Tensor]  # of rank 0 alone, empty on the others
    gradient_gap: float  # |g - g of rank 0| / |g of rank 0|
    buffers: dict[str, Tensor]
    buffers_next: dict[str, Tensor]  # after the next forward, which moves no statistic


def run_ddp(
    subject: Subject, spans: Spans, *, sync_bn: bool = False, timeout_seconds: float = 600.0
) -> list[RankResult]:
    """One update in as many ranks as there are spans, each with its own samples.

    Each rank runs its K micro-batches under `no_sync` but the last, with the loss divided by K, as
    torch's documentation has it; DDP averages the gradients over the ranks. BatchNorm is each
    rank's own, or synchronised by `synchronise`.

    Raises:
        RunFailed: ranks can't be started, or one of them failed.
    """
    reason = why_no_ranks()
    if reason is not None:
        raise RunFailed(f"DDP needs ranks: {reason}.")

    def update(rank: int) -> RankResult:
        return _update(subject, spans, rank, sync_bn)

    reports = run_ranks(update, world_size=len(spans), timeout_seconds=timeout_seconds)
    for kind, said in reports:
        if kind != "value":
            text = said if isinstance(said, str) else said[1]
            raise RunFailed(f"the update under DDP did not run: {text}.")
    return [value for _, value in reports]


def _update(subject: Subject, spans: Spans, rank: int, sync_bn: bool) -> RankResult:
    model = float64_copy(subject.model)
    if sync_bn:
        synchronise(model)
    _check_rank(spans, rank)
    ddp = DistributedDataParallel(model)
    randomness, mine = masks_of(subject), spans[rank]
    losses = []
    with randomness.update(0):
        for step, (start, size) in enumerate(mine):
            quiet = ddp.no_sync() if step < len(mine) - 1 else contextlib.nullcontext()
            with quiet, randomness.forward(MicroBatch(start, (size,))):
                loss: Any = subject.loss_fn(ddp, rows_of(subject.batch, start, start + size))
                (loss / len(mine)).backward()
            losses.append(float(loss.detach()))
    buffers = _copied(model)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    gap = _gap_to_first(list(gradients.values()))
    start, size = mine[0]
    randomness.layouts = None  # of training
    with torch.no_grad(), randomness.update(0), randomness.forward(MicroBatch(start, (size,))):
        subject.loss_fn(ddp.eval(), rows_of(subject.batch, start, start + size))
    return RankResult(
        loss=sum(losses) / len(losses),
        gradients=gradients if rank == 0 else {},
        gradient_gap=gap,
        buffers=buffers,
        buffers_next=_copied(model),
    )


def _check_rank(spans: Spans, rank: int) -> None:
    assert dist.get_world_size() == len(spans) and dist.get_rank() == rank
    positions = [p for rank in spans for start, size in rank for p in range(start, start + size)]
    assert len(set(positions)) == len(positions), "each sample on one rank"


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.detach().clone() for name, b in model.named_buffers()}


def _gap_to_first(gradients: list[Tensor]) -> float:
    mine = torch.cat([g.flatten() for g in gradients])
    first = mine.clone()
    dist.broadcast(first, 0)
    return float((mine - first).norm() / first.norm().clamp_min(1e-300))


def synchronise(model: nn.Module) -> None:
    """Give every BatchNorm layer the statistics of all ranks' micro-batches, in place.

    torch's SyncBatchNorm takes CUDA tensors alone, so this is its equation out of differentiable
    all-reduces: with n, mu and s over all ranks,

        y = (x - mu) / sqrt(s + eps) gamma + beta,  r <- (1 - m) r + m (mu, s n / (n - 1))
    """
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.forward = _synchronised(layer)  # type: ignore[method-assign]


class _SumOverRanks(torch.autograd.Function):
    """Sum over the ranks; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _summed(gradients[0])


def _summed(x: Tensor) -> Tensor:
    out = x.detach().contiguous().clone()
    dist.all_reduce(out)
    return out


def _all_reduce(x: Tensor) -> Tensor:
    out: Any = _SumOverRanks.apply(x)
    return out


def _synchronised(layer: Any) -> Any:
    def forward(x: Tensor) -> Tensor:
        if not layer.training:
            return type(layer).forward(layer, x)
        dims = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1, *[1] * (x.ndim - 2)]
        count = _summed(torch.tensor(float(x.numel() // x.shape[1])))
        mean = _all_reduce(x.sum(dims)) / count
        centred = x - mean.view(shape)
        variance = _all_reduce(centred.square().sum(dims)) / count
        y = centred * (variance + layer.eps).rsqrt().view(shape)
        if layer.weight is not None:
            y = y * layer.weight.view(shape) + layer.bias.view(shape)
        with torch.no_grad():
            move_running(layer, mean.detach(), variance.detach() * count / (count - 1))
        return layer.act(layer.drop(y)) if hasattr(layer, "act") else y

    return forward
