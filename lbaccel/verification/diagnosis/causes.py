"""The causes that `verify` knows, one function each: what shows it, and what mends it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lbaccel.update.reachable import LOSS
from lbaccel.verification.certificate import Diagnosis
from lbaccel.verification.diagnosis.evidence import Evidence
from lbaccel.verification.diagnosis.probe import OUTSIDE, ROOT, trace
from lbaccel.verification.differences import buffer_errors
from lbaccel.verification.updates import Subject

BATCH_NORM = "BatchNorm over the micro-batch"
DOUBLE_UPDATE = "double update under recompute"
RECOMPUTE = "a recompute that differs from its forward"
BUFFER = "a buffer that moves once per micro-batch"
STATE = "a tensor that moves once per micro-batch"
HIDDEN = "a state that the next update reads"
UNKEYED = "unkeyed masks"
COUPLED_LOSS = "a loss that couples samples"
SUM = "sum reduction in place of mean"
COUPLED_MODULE = "a module whose forward couples samples"
OUTSIDE_GRAPH = "a parameter outside the accumulated graph"
CLIPPING = "clipping before the sum"
MIXUP = "mixup across a cut"
FLOAT32 = "computed in less than float64"
RANKS = "another update on each rank"
FAILS = "a micro-batch that fails"
UNKNOWN = "unknown"

TAKE_ANY_NUMBER = (
    "Model and loss function must take micro-batches of any number of samples, the short last one "
    "included."
)
# Seen in torch 2.15 on a CPU: BatchNorm of one sample whose output is flattened and transposed.
KERNEL = (
    " Where nothing of the kind is there, an operation's own gradient depends on the number of "
    "samples: torch.autograd.gradcheck on the layer that follows the last such parameter tells."
)


def _draws(e: Evidence) -> Iterator[Diagnosis]:
    if e.plain is None:
        return
    by_kind: dict[str, list[str]] = {}
    for draw in [*e.parts.draws, *[d for d in e.whole.draws if d not in e.parts.draws]]:
        by_kind.setdefault(draw.what, []).append(draw.layer)
    for what, layers in by_kind.items():
        more = f" and {len(layers) - 1} other layers" if len(layers) > 1 else ""
        yield Diagnosis(
            layers[0],
            UNKEYED,
            f"draws by {what}{more}: same distribution, not the same draw, under another plan",
            "Use what lbaccel keys by sample: nn.Dropout and its kin, F.dropout, DropPath, "
            "PatchDropout, StochasticDepth; in fused attention a dropout of 0; random targets and "
            "augmentation in the data, keyed by sample. Training with other draws is sound, but "
            "another plan is then another update.",
        )


def _batch_norm(e: Evidence) -> Iterator[Diagnosis]:
    names = _plain_batch_norms(e.subject)
    if e.plain is None or not names:
        return
    blamed = [name for name in e.unequal() if name in names]
    executed = [name for name, _ in e.whole.outputs if name in names]
    if not executed:
        return
    sizes = sorted({m.num_samples for m in e.plain.plan.partition()}, reverse=True)
    yield Diagnosis(
        (blamed or executed)[0],
        BATCH_NORM,
        f"the first of {len(names)} BatchNorm layers; in training they normalise over what a "
        f"micro-batch holds, {' or '.join(map(str, sizes))} samples in place of "
        f"{e.subject.num_samples}",
        "Fix what BatchNorm sees, under every plan: norm_batch_size=32 (--norm-batch-size 32), "
        "another number of samples, or 'frozen' (--norm-batch-size frozen).",
    )


def _plain_batch_norms(subject: Subject) -> set[str]:
    if subject.norm_batch_size is not None:
        return set()
    return {
        name
        for name, m in subject.model.named_modules()
        if isinstance(m, _BatchNorm) and (m.training or m.running_mean is None)
    }


def _coupled_module(e: Evidence) -> Iterator[Diagnosis]:
    if e.plain is None:
        return
    explained = [d.layer for d in (*e.parts.draws, *e.whole.draws)] + [
        *_plain_batch_norms(e.subject)
    ]
    for name in e.unequal():
        if not any(_holds(name, layer) for layer in explained):
            yield Diagnosis(
                name,
                COUPLED_MODULE,
                "its output for a sample depends on which others are in the micro-batch (or on "
                "a state or generator of its own)",
                "Let each sample be computed alone (LayerNorm or GroupNorm in place of statistics "
                "over the batch), or keep the batch whole: micro_batch_size=global_batch_size.",
            )
            return


def _holds(module: str, layer: str) -> bool:
    return layer != OUTSIDE and (
        module in (ROOT, layer) or layer.startswith(f"{module}.") or layer == ROOT
    )


def _mixed_inputs(e: Evidence) -> Iterator[Diagnosis]:
    if e.plain is None or not e.inputs_differ():
        return
    changed = trace(
        e.subject, e.subject.plan(e.subject.whole), batch=_other_first_sample(e.subject.batch)
    )
    mixes = changed.first.compare(e.whole.first, e.rows_tolerance, start=1) is False
    if mixes or not any(d.layer == OUTSIDE for d in e.parts.draws):
        yield Diagnosis(
            OUTSIDE,
            MIXUP,
            "the network's input for a sample "
            + ("holds parts of other samples" if mixes else "is another one in each micro-batch"),
            "Mix before the cut: GroupMix in the UpdateLoader takes a sample's partner from its "
            "own ghost batch, or from the neighbouring pair, which no plan parts.",
        )


def _other_first_sample(batch: Any) -> Any:
    return recursively_apply(lambda t: torch.cat([t[-1:], t[1:]]) if t.ndim else t, batch)


def _loss(e: Evidence) -> Iterator[Diagnosis]:
    if e.plain is None or not e.outputs_agree() or e.inputs_differ() or e.losses_agree():
        return
    whole, losses = e.whole.loss, [loss for loss, _ in e.parts.losses]
    if not math.isfinite(e.parts.loss):
        text = f"the loss of a micro-batch is {e.parts.loss}, that of the whole batch {whole:.6g}"
        yield Diagnosis(OUTSIDE, FAILS, text, TAKE_ANY_NUMBER)
        return
    if abs(sum(losses) - whole) <= 1e-9 * abs(whole) and not e.parts.weighs:
        yield Diagnosis(
            OUTSIDE,
            SUM,
            f"the loss of the whole batch is the sum of those of its {len(losses)} micro-batches, "
            f"{whole / e.parts.loss:.4g} times their weighted mean",
            "Return the mean: reduction='mean', or loss / number of samples; an update weighs "
            "each micro-batch by its share.",
        )
    elif not any(d.layer == OUTSIDE for d in e.parts.draws):
        yield Diagnosis(
            OUTSIDE,
            COUPLED_LOSS,
            f"the network's outputs agree sample by sample, the loss does not: {whole:.6g} for "
            f"the whole batch, {e.parts.loss:.6g} as the mean over micro-batches",
            "A mean over tokens, masks or class weights: return (loss, weight), with the sum of "
            "weights that the mean was taken over. A loss that compares samples (contrastive, "
            "in-batch negatives): large_batch.update(update, loss_fn, embed=embed) gives it the "
            "whole batch, where embed(model, micro_batch) returns the rows that it compares, and "
            "loss_fn(model, rows) their loss; verify(..., embed=embed) shows that it holds.",
        )


def _gradients(e: Evidence) -> Iterator[Diagnosis]:
    if e.plain is None or e.plain.difference is None or not e.plain.difference.parameters:
        return
    if e.plain.plan.world_size > 1 or e.parts.draws or e.only_rounding():
        return
    if not e.outputs_agree() or e.inputs_differ() or not e.losses_agree():
        return
    differing = e.plain.difference.parameters
    clipped = _hooked(e.subject.model, [p.name for p in differing])
    called = sorted({*e.parts.clipped, *e.whole.clipped})
    if clipped or called:
        yield Diagnosis(
            OUTSIDE if called else clipped[0],
            CLIPPING,
            f"{', '.join(called)} runs inside it, on the gradient of a part of the batch"
            if called
            else f"{len(clipped)} gradient hooks change a micro-batch's gradient: the sum of what "
            "they return is not what they return of the sum",
            "Clip the summed gradient, once an update: LargeBatch(clip_grad_norm=1.0); and take "
            "hooks that change gradients off.",
        )
        return
    written = [p for p in differing if p.name in e.parts.written]
    worst = (written or list(differing))[0]
    how = f"{worst.error:.2g} away from that of the whole batch (relative)"
    if worst.ratio is not None:
        how = f"{worst.ratio:.4g} times that of the whole batch"
        if abs(worst.ratio - e.plain.num_micro_batches) < 1e-6:
            how += " = the number of micro-batches"
    more = f", and so are {len(differing) - 1} others" if len(differing) > 1 else ""
    yield Diagnosis(
        worst.name,
        OUTSIDE_GRAPH,
        f"outputs and loss agree, its gradient is {how}{more}"
        + ("; the loss function wrote it before it returned" if written else ""),
        "All that trains must come from the loss that is returned: add auxiliary losses to it in "
        "place of a backward() of their own, and leave .grad alone in the loss function."
        + ("" if written or worst.ratio is not None else KERNEL),
    )


def _hooked(model: nn.Module, differing: Sequence[str]) -> list[str]:
    parameters: dict[str, Any] = dict(model.named_parameters())
    found = [
        name
        for name in differing
        if parameters[name]._backward_hooks or parameters[name]._post_accumulate_grad_hooks
    ]
    modules: Iterator[tuple[str, Any]] = model.named_modules()
    return found + [
        name or ROOT for name, m in modules if m._backward_hooks or m._backward_pre_hooks
    ]


def _ranks(e: Evidence) -> Iterator[Diagnosis]:
    """Only ranks differ, and one process in their place does not."""
    if e.plain is None or e.plain.plan.world_size == 1 or e.parts.draws:
        return
    d = e.plain.difference
    if d is not None and d.parameters and e.outputs_agree() and e.losses_agree():
        yield Diagnosis(
            d.parameters[0].name,
            RANKS,
            f"its gradient is {d.parameters[0].error:.2g} away (relative) on two ranks, while the "
            "same micro-batches in one process agree",
            "Let nothing in the model or the loss depend on the rank, or gather over the ranks "
            "(no all_gather of its own: an update sums gradients once).",
        )


def _recomputed(e: Evidence) -> Iterator[Diagnosis]:
    plain = {t.plan: t for t in e.trials if not t.checkpointing and t.buffers is not None}
    for trial in e.trials:
        twin = plain.get(trial.plan)
        if not trial.checkpointing or trial.buffers is None or twin is None:
            continue
        assert twin.buffers is not None and twin.difference and trial.difference
        if trial.difference.update != twin.difference.update:
            continue
        _, names = buffer_errors(trial.buffers, twin.buffers, e.tolerance)
        other_gradient = trial.difference.gradients > e.tolerance >= twin.difference.gradients
        if names:
            yield Diagnosis(
                _owner(names[0]),
                DOUBLE_UPDATE,
                f"with activation checkpointing {_values(names, trial.buffers, twin.buffers)}"
                + ("" if other_gradient else "; the gradients tell nothing of it"),
                _advice_for_buffers(e.subject, names),
            )
        if other_gradient:
            worst = trial.difference.parameters[0]
            yield Diagnosis(
                worst.name,
                RECOMPUTE,
                f"with activation checkpointing its gradient is {worst.error:.2g} away (relative)",
                "A forward must do the same twice: let nothing in it depend on a counter, on a "
                "state that it writes, or on a generator of its own.",
            )
        if names or other_gradient:
            return


def _moving_buffers(e: Evidence) -> Iterator[Diagnosis]:
    batch_norms = _plain_batch_norms(e.subject)
    for trial in e.trials:
        if trial.checkpointing or trial.difference is None:
            continue
        second = trial.difference.update == 2
        names = [b for b in trial.difference.buffer_names if _owner(b) not in batch_norms]
        if names:
            how = f"{names[0]} is another one"
            if trial.buffers is not None:
                truth = e.truth.after if second else e.truth
                assert truth is not None
                how = _values(names, trial.buffers, truth.buffers)
            cut = f"cut into {trial.num_micro_batches} micro-batches"
            if trial.plan.world_size > 1:
                cut += f" on {trial.plan.world_size} ranks"
            if second:
                cut += ", from the second update on"
            buffers = dict(e.subject.model.named_buffers())
            cause = BUFFER if names[0] in buffers else STATE
            if cause == STATE:
                inside = names[0].partition(".")[0] == LOSS
                writer = "the loss function" if inside else f"the forward of {_owner(names[0])}"
                how += f"; {writer} writes it"
            yield Diagnosis(
                _owner(names[0]), cause, f"{cut}, {how}", _advice_for_buffers(e.subject, names)
            )
            return


def _advice_for_buffers(subject: Subject, names: Sequence[str]) -> str:
    if _owner(names[0]) in _plain_batch_norms(subject):
        return (
            "norm_batch_size=32 (--norm-batch-size 32) or 'frozen': lbaccel then moves BatchNorm's "
            "statistics once a ghost batch, at the end of the update, and not in a recompute."
        )
    return (
        "Don't write it in forward, which runs once per micro-batch and again in a recompute: "
        "move it after large_batch.update(...), once an update. A running average of samples: "
        f"declare it, averages={[names[0]]!r} of LargeBatch and verify."
    )


def _owner(buffer: str) -> str:
    return buffer.rpartition(".")[0] or ROOT


def _values(names: Sequence[str], found: dict[str, Tensor], truth: dict[str, Tensor]) -> str:
    """The buffer that says most: a counter where there is one."""
    scalars = [n for n in names if n in found and n in truth and truth[n].numel() == 1]
    name = scalars[0] if scalars else names[0]
    more = f" ({len(names)} buffers differ)" if len(names) > 1 else ""
    if not scalars:
        return f"{name} is another one{more}"
    a, b = found[name].item(), truth[name].item()
    return f"{name} is {a:.6g} where it would be {b:.6g}{more}"


def _second_update(e: Evidence) -> Iterator[Diagnosis]:
    found = list(_moving_buffers(e))
    yield from found
    seconds = [t.difference for t in e.trials if t.difference and t.difference.update == 2]
    shown = seconds[0] if seconds else None
    if not found and shown is not None:
        where = shown.parameters[0].name if shown.parameters else OUTSIDE
        yield Diagnosis(
            where,
            HIDDEN,
            "the first update agrees and the second does not, from equal weights: a forward of the "
            "first left something behind (a number, a list, a cache) that depends on the cut",
            "Let a forward read nothing that an earlier forward wrote, or keep it in a tensor of "
            "the model and declare it as a running average (averages=).",
        )


CAUSES: tuple[Callable[[Evidence], Iterator[Diagnosis]], ...] = (
    _draws,
    _batch_norm,
    _mixed_inputs,
    _coupled_module,
    _loss,
    _gradients,
    _ranks,
    _recomputed,
    _moving_buffers,
)

OF_THE_SECOND = (_second_update,)
