"""The exact update of a loss that couples samples, such as a contrastive one, in two passes.

With micro-batches i of all ranks, their rows e_i = f(w, x_i), and the loss L(w, e) of the rows e of
the whole batch, the gradient of an update is

    g = dL/dw + sum_i (dL/de_i) (de_i/dw)

The first pass computes each e_i without a graph. Then every rank has all rows and computes L and
dL/de; the first rank takes dL/dw, of what the loss itself reads of the model (a temperature). The
second pass computes each e_i again, with a graph, and goes back from dL/de_i. It costs one more
forward than a loss of single samples, and the memory of a micro-batch beside the rows.

Gao, Zhang, Han and Callan 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited
Setup" (arXiv 2101.06983), sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lbaccel.batch.plan import MicroBatch
from lbaccel.errors import InputError
from lbaccel.randomness.layouts import NotLearned
from lbaccel.update import accumulation
from lbaccel.update.accumulation import Scope
from lbaccel.update.embeddings import Coupled, RankRows, check_columns, gather, tensors_of
from lbaccel.update.loss_parts import SampleSums, parts_of
from lbaccel.update.loss_sums import Sums

MicroBatches = Iterable[tuple[MicroBatch, Any]]


def accumulate(
    model: Any,
    micro_batches: MicroBatches,
    loss_fn: Coupled,
    *,
    again: Callable[[], MicroBatches],
    num_samples: int,
    rank: int = 0,
    world_size: int = 1,
    scopes: Sequence[Scope] = (),
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> Sums:
    """Add the gradient of one rank's micro-batches to `.grad`, of a loss on the whole batch.

    The ranks meet once, between the passes: rows are gathered, and a rank that failed says so. In a
    pass there is no host synchronisation.

    Args:
        model: handed to both functions as it is.
        micro_batches: pairs of a `MicroBatch` and its data, on the device, for the first pass.
        loss_fn: the loss, and what makes its rows.
        again: the same pairs, for the second pass.
        num_samples: samples of the update over all ranks.
        rank: this process.
        world_size: data-parallel processes.
        scopes: entered around each micro-batch, and around the loss.
        backward: runs the backward pass of a scalar.

    Raises:
        InputError: rows or a loss of another kind than they must be.
        NotLearned: here or on another rank, the first pass called for masks that were not learned.
    """
    rows, error = RankRows(), None
    try:
        _first_pass(model, micro_batches, loss_fn, rows, scopes)
    except Exception as raised:
        error = raised
    torch.clear_autocast_cache()  # older torch would go on with casts made without a graph
    counts = [rows.count]
    if world_size > 1:
        found = _meet(rows, error, world_size)
        if found is None:  # another rank failed, and says so where the ranks agree
            return Sums(torch.zeros(()), torch.zeros(()), False)
        counts = found
    if error is not None:
        raise error
    own = rows.take()
    whole = own if world_size == 1 else gather(own, counts)
    del own
    if loss_fn.trial:  # of the size that the update will have
        at = torch.arange(num_samples, device=whole[0].device) % len(whole[0])
        whole = [column[at] for column in whole]
    start = sum(counts[:rank])
    step = _loss(model, loss_fn, rows, whole, scopes=scopes, counts=rank == 0)
    second = _SecondPass(loss_fn, rows, step.gradients, start, whole=num_samples)
    del whole
    second.own, step.own = step.own, []
    try:
        accumulation.accumulate(
            model,
            second.following(again()),
            second,
            num_samples=num_samples,
            scopes=scopes,
            backward=backward,
        )
    except NotLearned as unlearned:  # the other ranks are past the point where they meet
        raise InputError(
            f"embed called for other masks in its second forward than in its first ({unlearned}). "
            "A forward must do the same twice: let nothing in it depend on a counter or on a state "
            "that it writes."
        ) from unlearned
    count = torch.tensor(float(rows.count), dtype=torch.float64, device=step.loss.device)
    return Sums(step.loss.double() * count, count, False, step.samples)


def _first_pass(
    model: Any, micro_batches: MicroBatches, embed: Coupled, rows: RankRows, scopes: Sequence[Scope]
) -> None:
    """The rows of each micro-batch; the first runs with a graph, which tells what trains."""
    for number, (micro_batch, data) in enumerate(micro_batches):
        with _around([scope.preview(micro_batch) for scope in scopes]):
            with torch.set_grad_enabled(number == 0):
                out = embed(model, data)
            rows.add(out, micro_batch)
            del out


def _meet(rows: RankRows, error: BaseException | None, world_size: int) -> list[int] | None:
    """RankRows of each rank; None where another rank failed. A collective, and the only wait.

    Raises:
        Exception: `error` itself, where it is no lack of masks alone.
        NotLearned: no rank failed otherwise, and this or another one lacks masks.
        InputError: the ranks' rows differ in kind.
    """
    kind = "rows"
    if error is not None:
        kind = "not learned" if isinstance(error, NotLearned) else "failed"
    said: list[Any] = [None] * world_size
    dist.all_gather_object(said, (kind, rows.count, rows.columns))
    kinds = [k for k, _, _ in said]
    if "failed" in kinds:
        if kind == "failed":
            assert error is not None
            raise error
        return None
    if "not learned" in kinds:
        raise error or NotLearned("on another rank")
    check_columns([columns for _, _, columns in said])
    return [count for _, count, _ in said]


class _Step:
    """The loss of the whole batch, and what the second pass goes back from."""

    def __init__(self, loss: Tensor, samples: SampleSums) -> None:
        self.loss, self.samples = loss, samples
        self.gradients: list[Tensor | None] = []  # by column, of all rows
        self.own: list[tuple[Tensor, Tensor]] = []  # what the loss read of the model, its gradient


def _loss(
    model: Any,
    coupled: Coupled,
    rows: RankRows,
    whole: list[Tensor],
    *,
    scopes: Sequence[Scope],
    counts: bool,
) -> _Step:
    """The loss and its gradients; one rank `counts`, the others compute the same."""
    leaves = [t.requires_grad_(c.trained) for t, c in zip(whole, rows.columns, strict=True)]
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    if not trained:
        raise InputError(
            "none of the tensors that embed returned has a gradient: the network must have made "
            "them, outside of torch.no_grad() and without detach()."
        )
    parameters = list(model.parameters()) if counts and hasattr(model, "parameters") else []
    parameters = [p for p in parameters if p.requires_grad]
    of_all = [scope.whole(len(whole[0]), counts=counts) for scope in scopes]
    with _told_of_shards(), _around(of_all):
        loss, samples = _checked(coupled.loss_fn(model, rows.given(leaves)), counts=counts)
        with _around([scope.backward() for scope in scopes]), _without_hooks(parameters):
            found = torch.autograd.grad(loss, [*trained, *parameters], allow_unused=True)
    of_rows = iter(found)
    step = _Step(loss.detach(), samples)
    step.gradients = [next(of_rows) if leaf.requires_grad else None for leaf in leaves]
    if all(g is None for g in step.gradients):
        raise _independent()
    step.own = [(p, g) for p, g in zip(parameters, of_rows, strict=True) if g is not None]
    return step


@contextmanager
def _told_of_shards() -> Iterator[None]:
    """Say in words where the loss computes with a parameter of which this rank holds a part."""
    try:
        yield
    except RuntimeError as error:
        if "DTensor" not in str(error):
            raise
        raise InputError(
            "the loss reads a parameter of the model under FSDP2, where a rank holds a part of it. "
            "Let embed return it as rows, from inside the model's forward: "
            "logit_scale.expand(len(images))."
        ) from error


def _checked(out: Any, *, counts: bool) -> tuple[Tensor, SampleSums]:
    """The loss, and the sums beside it, which count on one rank.

    Raises:
        InputError: a weight, or a loss that is no scalar or has no gradient.
    """
    loss, weight, sums = parts_of(out)
    if weight is not None:
        raise InputError(
            "the loss function returned (loss, weight) with embed=: it has the rows of the whole "
            "batch, so there is nothing left to weigh. Return the mean loss over all of them, or "
            "(mean loss, None, sums)."
        )
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InputError(
            f"the loss function returned {shape}: with embed= it must return the mean loss of the "
            "whole batch, a scalar (loss.mean())."
        )
    if not loss.requires_grad:
        raise _independent()
    samples = SampleSums()
    samples.add(sums, counts=counts)
    return loss, samples


def _independent() -> InputError:
    return InputError(
        "the loss does not depend on the rows that embed returned: loss_fn(model, embeddings) must "
        "compute it from its second argument, outside of torch.no_grad() and without detach()."
    )


@contextmanager
def _without_hooks(parameters: Sequence[Any]) -> Iterator[None]:
    """Gradient hooks wait for the second pass, where the gradient goes on into `.grad`."""
    kept = [(p, p._backward_hooks) for p in parameters if p._backward_hooks]
    for parameter, _ in kept:
        parameter._backward_hooks = None
    try:
        yield
    finally:
        for parameter, hooks in kept:
            parameter._backward_hooks = hooks


class _SecondPass:
    """As a loss function: sum(e_i dL/de_i), whose gradient is that of the coupled loss.

    Its weight is the whole batch's, so that nothing scales it.
    """

    def __init__(
        self,
        coupled: Coupled,
        rows: RankRows,
        gradients: Sequence[Tensor | None],
        start: int,
        *,
        whole: int,
    ) -> None:
        self._embed, self._rows, self._whole = coupled.embed, rows, whole
        stop = start + rows.count
        # Copies, so that the rest may go.
        self._gradients = [
            g[start:stop].clone()
            if g is not None and rows.count < len(g) and not coupled.trial
            else g
            for g in gradients
        ]
        self._at = 0
        self._now: MicroBatch | None = None
        self.own: list[tuple[Tensor, Tensor]] = []  # they go with the first micro-batch

    def following(self, micro_batches: MicroBatches) -> Iterator[tuple[MicroBatch, Any]]:
        """The micro-batches, each told to this object before it runs.

        Raises:
            InputError: they are others than in the first pass.
        """
        before = iter(self._rows.micro_batches)
        for micro_batch, data in micro_batches:
            if micro_batch != next(before, None):
                raise _read_otherwise()
            self._now = micro_batch
            yield micro_batch, data
            self._at += 0 if micro_batch.is_filler else micro_batch.num_samples
        if next(before, None) is not None:
            raise _read_otherwise()

    def __call__(self, model: Any, data: Any) -> tuple[Tensor, float]:
        assert self._now is not None
        tensors = tensors_of(self._embed(model, data), self._now)
        if len(tensors) != len(self._gradients) or any(
            t.requires_grad != c.trained for t, c in zip(tensors, self._rows.columns, strict=True)
        ):
            raise InputError(
                "embed returned tensors with a gradient for some micro-batches of this update, and "
                "without one for others. Let each micro-batch take the same way."
            )
        rows = slice(self._at, self._at + self._now.num_samples)
        terms = []
        for tensor, gradient in zip(tensors, self._gradients, strict=True):
            if gradient is not None:
                of_rows = torch.ones_like(tensor) if self._now.is_filler else gradient[rows]
                terms.append((tensor * of_rows.conj()).real.sum())
        own, self.own = self.own, []
        terms += [(parameter * gradient).sum() for parameter, gradient in own]
        return sum(terms[1:], terms[0]), float(self._whole)


def _read_otherwise() -> InputError:
    return InputError(
        "this update had other micro-batches when it was read again: with embed= an update is read "
        "twice. Take it from an UpdateLoader, or give its micro-batches as a list."
    )


@contextmanager
def _around(contexts: Iterable[AbstractContextManager[Any]]) -> Iterator[None]:
    """Contexts that are entered in order, as one."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
