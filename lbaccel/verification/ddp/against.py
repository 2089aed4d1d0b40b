"""`verify --against ddp`: one update of W GPUs under DDP, and of lbaccel in one process.

With W ranks, K micro-batches of b samples on each, g_rj the mean gradient of micro-batch j of rank
r, s_rj its statistics, r0 the running ones before and m BatchNorm's momentum:

    DDP       g = (1 / W) sum_r (1 / K) sum_j g_rj
    lbaccel   g = sum_rj (n_rj / N) g_rj                    the same where all n_rj are b
    DDP       R_r = (1 - m)^K r0 + A_r, A_r = m sum_j (1 - m)^(K - 1 - j) s_rj
              on rank r; at the next forward every rank gets R_0
    lbaccel   (1 - m)^(W K) r0 + sum_r (1 - m)^(K (W - 1 - r)) A_r
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lbaccel import __version__
from lbaccel.batch.plan import MicroBatch, NormBatchSize
from lbaccel.errors import InputError, check_number, check_seed, check_whole
from lbaccel.update.accumulation import LossFn
from lbaccel.verification.certificate import number_or_none
from lbaccel.verification.copies import aside, float64_batch, float64_copy, unwrapped
from lbaccel.verification.ddp.real import RankResult, Spans, run_ddp
from lbaccel.verification.ddp.report import Comparison, DdpCertificate
from lbaccel.verification.differences import buffer_errors, difference
from lbaccel.verification.updates import Result, Subject, learned, planned

Buffers = dict[str, Tensor]


def verify_against_ddp(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    *,
    gpus: int,
    accumulation: int = 1,
    sync_bn: bool = False,
    uneven: bool = False,
    norm_batch_size: NormBatchSize = None,
    seed: int = 0,
    tolerance: float = 1e-12,
    name: str | None = None,
    data: str | None = None,
    say: Callable[[str], object] | None = None,
) -> DdpCertificate:
    """Run one update under DDP on `gpus` gloo ranks and in one process of lbaccel, and compare.

    Args:
        model: the network, not prepared or wrapped.
        loss_fn: (model, micro-batch) -> mean loss.
        batch: W K b samples, in dimension 0 of every tensor.
        gpus: W, forked processes.
        accumulation: K, micro-batches of a rank.
        sync_bn: BatchNorm over all ranks (see `ddp.synchronise`), and norm_batch_size W b.
        uneven: the last micro-batch of the last rank has half of its samples.
        norm_batch_size: of lbaccel; by default what DDP implies, b or W b.
        seed: of dropout's masks.
        tolerance: largest relative error.
        name: of the model, in the certificate.
        data: what the samples are, in the certificate.
        say: called with a line before each update.

    Returns:
        The `DdpCertificate`; `print` shows it as a table, `equivalent` is the verdict.

    Raises:
        InputError: samples that W K does not divide, or sizes that are none.
        RunFailed: ranks can't be started, or one failed.
    """
    check_number("tolerance", tolerance, at_most=1.0)
    seed = check_seed("seed", seed)
    check_whole("gpus", gpus)
    check_whole("accumulation", accumulation)
    if uneven and sync_bn:
        raise InputError(
            "uneven batches are compared without SyncBatchNorm. Leave one of them out."
        )
    model, say = unwrapped(model), say or (lambda _: None)
    with aside(model):
        in_float64, num_samples = float64_batch(batch)
        per_gpu, rest = divmod(num_samples, gpus * accumulation)
        if rest or not per_gpu or (uneven and per_gpu < 2):
            raise InputError(
                f"{num_samples} samples are not {gpus} GPUs x {accumulation} micro-batches x b of "
                f"{'at least 2' if uneven else 'equal size'}. Give {gpus * accumulation} x b."
            )
        twin = float64_copy(model)
        layers = _layers(twin)
        spans = spans_of(per_gpu, gpus, accumulation, sync_bn=sync_bn, uneven=uneven)
        total = sum(size for rank in spans for _, size in rank)
        if norm_batch_size is None and layers:
            norm_batch_size = per_gpu * gpus if sync_bn else per_gpu
        subject = learned(Subject(twin, loss_fn, in_float64, total, norm_batch_size, seed))
        subject.plan(subject.whole)  # stops at a norm_batch_size that the samples do not hold
        say(f"DistributedDataParallel on {gpus} ranks")
        start = time.monotonic()
        ranks = run_ddp(subject, spans, sync_bn=sync_bn)
        say(f"lbaccel in one process (DDP took {time.monotonic() - start:.0f} s)")
        study = _Study(subject, spans, ranks, layers, tolerance)
        rows = study.uneven() if uneven else study.even(sync_bn=sync_bn)
    return DdpCertificate(
        model=name or type(model).__name__,
        data=data or f"{num_samples} samples",
        gpus=gpus,
        accumulation=accumulation,
        per_gpu_batch=per_gpu,
        num_samples=total,
        sync_bn=sync_bn,
        uneven=uneven,
        norm_batch_size=norm_batch_size,
        momenta=tuple(sorted({m.momentum for m in layers.values() if m.momentum is not None})),
        num_batch_norm_layers=len(layers),
        tolerance=tolerance,
        versions={
            "lbaccel": __version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
        },
        comparisons=tuple(rows),
    )


def spans_of(
    per_gpu: int, gpus: int, accumulation: int, *, sync_bn: bool = False, uneven: bool = False
) -> Spans:
    """Which samples each micro-batch of each rank holds, by sample position.

    A rank's samples are neighbours, as in lbaccel's plans; under SyncBatchNorm those are neighbours
    that share a statistic: micro-batch j of all ranks.

    >>> spans_of(4, 2, 2), spans_of(4, 2, 1, uneven=True)
    ([[(0, 4), (4, 4)], [(8, 4), (12, 4)]], [[(0, 4)], [(4, 2)]])
    >>> spans_of(4, 2, 2, sync_bn=True)
    [[(0, 4), (8, 4)], [(4, 4), (12, 4)]]
    """
    order = [
        [j * gpus + r if sync_bn else r * accumulation + j for j in range(accumulation)]
        for r in range(gpus)
    ]
    spans = [[(place * per_gpu, per_gpu) for place in places] for places in order]
    if uneven:
        start, size = spans[-1][-1]
        spans[-1][-1] = (start, size // 2)
    return spans


def _layers(model: nn.Module) -> dict[str, Any]:
    """The BatchNorm layers that keep running statistics, by name."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    return {name: layer for name, layer in found.items() if layer.running_mean is not None}


class _Study:
    """Both sides of one update, and what is compared of them."""

    def __init__(
        self,
        subject: Subject,
        spans: Spans,
        ranks: Sequence[RankResult],
        layers: dict[str, Any],
        tolerance: float,
    ) -> None:
        self.subject, self.spans, self.ranks = subject, spans, ranks
        self.layers, self.tolerance = layers, tolerance
        self.is_uneven = len({size for rank in spans for _, size in rank}) > 1
        loss = sum(rank.loss for rank in ranks) / len(ranks)
        self.ddp = Result(loss, dict(ranks[0].gradients), ranks[0].buffers, True)
        self.unit = subject.unit
        self.whole = planned(subject, subject.plan(subject.whole))

    def even(self, *, sync_bn: bool) -> list[Comparison]:
        """Of equal batches: all of it is claimed to be the same."""
        one = f"in one micro-batch of {self.subject.num_samples}"
        rows = [
            *self._update("mean over all samples", one),
            self._gradient(
                planned(self.subject, self.subject.plan(self.unit)),
                f"the same, in micro-batches of {self.unit}",
            ),
            self._same_on_ranks(),
        ]
        if not self.layers:
            return rows
        if sync_bn:
            return [*rows, self._synchronised()]
        return [*rows, *self._own_statistics(), self._composed(), self._broadcast()]

    def uneven(self) -> list[Comparison]:
        """Of unequal batches: DDP weighs the ranks equally, lbaccel the samples."""
        own = [MicroBatch(start, (size,)) for rank in self.spans for start, size in rank]
        plan = self.subject.plan(self.unit)
        by_samples = planned(self.subject, plan, only=own)
        each = [planned(self.subject, plan, only=[m]) for m in own]
        rows = [
            *self._update("mean over all samples", "cut as lbaccel cuts it"),
            self._gradient(by_samples, "DDP's own batches, weighted by their samples"),
            self._gradient(_mean_of(each), "DDP's own batches, all with the same weight"),
            self._same_on_ranks(),
        ]
        return [*rows, *self._own_statistics(), self._broadcast()] if self.layers else rows

    # -- one row each ----------------------------------------------------------------------------

    def _update(self, mean: str, how: str) -> list[Comparison]:
        found = difference(self.whole, self.ddp, self.tolerance)
        return [
            self._row("loss", "mean over the ranks", mean, found.loss),
            self._row("gradient", "mean over the ranks", f"{mean}, {how}", found.gradients),
        ]

    def _gradient(self, ours: Result, how: str) -> Comparison:
        error = difference(ours, self.ddp, self.tolerance).gradients
        return self._row("gradient", "mean over the ranks", how, error)

    def _same_on_ranks(self) -> Comparison:
        worst = max(rank.gradient_gap for rank in self.ranks)
        return self._row("gradient", "of every rank", "DDP's rank 0", worst)

    def _own_statistics(self) -> list[Comparison]:
        """Each rank's running statistics, and their mean, out of its ghost batches alone."""
        found = [self._of_rank(rank) for rank in range(len(self.ranks))]
        if None in found:
            reason = (
                f"lbaccel's ghost batches of at most {self.unit} samples do not end where the "
                "ranks' batches do"
            )
            return [Comparison("statistics", "of each rank", "-", "fail", None, reason)]
        ours = [buffers for buffers in found if buffers is not None]
        theirs = [rank.buffers for rank in self.ranks]
        errors = [self._buffers(a, b) for a, b in zip(ours, theirs, strict=True)]
        rows = [
            self._row("statistics", "of rank 0", "its ghost batches alone, in order", errors[0])
        ]
        if len(errors) > 1:
            others = "of the other rank" if len(errors) == 2 else "of the other ranks, the worst"
            worst = max(errors[1:])
            rows.append(self._row("statistics", others, "its ghost batches alone", worst))
            error = self._buffers(_mean(ours), _mean(theirs))
            which = "mean over the ranks (timm's dist_bn=reduce)"
            rows.append(self._row("statistics", which, "mean of these", error))
        return rows

    def _of_rank(self, rank: int) -> Buffers | None:
        """Buffers after lbaccel's update of a rank's ghost batches; None where it has none."""
        mine = self.spans[rank]
        first, end = mine[0][0], sum(mine[-1])
        ghosts = self.subject.plan(self.unit).partition()
        if self.is_uneven:  # lbaccel would cut the update into others
            ghosts = tuple(MicroBatch(start, (size,)) for start, size in mine)
        own = [m for m in ghosts if first <= m.start and m.start + m.num_samples <= end]
        if sum(m.num_samples for m in own) != end - first:
            return None
        return planned(self.subject, self.subject.plan(self.unit), only=own).buffers

    def _composed(self) -> Comparison:
        """lbaccel's own statistics, all ghost batches in order, out of those of DDP's ranks."""
        theirs = composed(
            self.layers, [rank.buffers for rank in self.ranks], num_moves=len(self.spans[0])
        )
        ours = {key: self.whole.buffers[key] for key in theirs}
        error = self._buffers(ours, theirs)
        which = "of all ranks, one after the other"
        return self._row("statistics", which, "of the update: every ghost batch in order", error)

    def _broadcast(self) -> Comparison:
        first = self.ranks[0].buffers
        worst = max(self._buffers(rank.buffers_next, first) for rank in self.ranks)
        return self._row("statistics", "of every rank after its next forward", "rank 0's", worst)

    def _synchronised(self) -> Comparison:
        worst = max(self._buffers(self.whole.buffers, rank.buffers) for rank in self.ranks)
        return self._row("statistics", "of every rank", "of the update", worst)

    def _buffers(self, ours: Buffers, theirs: Buffers) -> float:
        return buffer_errors(ours, theirs, self.tolerance)[0]

    def _row(self, what: str, ddp: str, ours: str, error: float) -> Comparison:
        verdict = "pass" if error <= self.tolerance else "fail"
        return Comparison(what, ddp, ours, verdict, number_or_none(error))


def composed(layers: dict[str, Any], ranks: Sequence[Buffers], *, num_moves: int) -> Buffers:
    """The running statistics that all ranks' batches leave, one rank after the other.

    Out of what each rank has by itself, R_r = c r0 + A_r with c = (1 - m)^K after `num_moves` = K
    moves:

        c^W r0 + sum_r c^(W - 1 - r) (R_r - c r0)

    Without a momentum a layer keeps the plain mean of t statistics: S_r = (t + K) R_r - t r0, and
    (t r0 + sum_r S_r) / (t + W K).
    """
    found, w, k = {}, len(ranks), num_moves
    for name, layer in layers.items():
        before = layer.num_batches_tracked
        found[f"{name}.num_batches_tracked"] = before + w * k
        for buffer in ("running_mean", "running_var"):
            key, r0 = f"{name}.{buffer}", getattr(layer, buffer)
            if layer.momentum is None:
                t = float(before)
                sums = sum(((t + k) * rank[key] - t * r0 for rank in ranks), torch.zeros_like(r0))
                found[key] = (t * r0 + sums) / (t + w * k)
                continue
            c = (1 - layer.momentum) ** k
            value = c**w * r0
            for place, rank in enumerate(ranks):
                value = value + c ** (w - 1 - place) * (rank[key] - c * r0)
            found[key] = value
    return found


def _mean(parts: Sequence[Buffers]) -> Buffers:
    return {key: torch.stack([part[key].double() for part in parts]).mean(0) for key in parts[0]}


def _mean_of(results: Sequence[Result]) -> Result:
    """The mean of gradients and losses, all with the same weight."""
    gradients: dict[str, Tensor | None] = {}
    for name in results[0].gradients:
        found = [g for r in results if (g := r.gradients[name]) is not None]
        gradients[name] = torch.stack(found).sum(0) / len(results) if found else None
    loss = sum(r.loss for r in results) / len(results)
    return Result(loss, gradients, results[0].buffers, True)
