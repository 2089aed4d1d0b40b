"""A probe of a network inside an update: outputs by row, random draws, gradients it changes.

Rows are remembered by two numbers each (a projection and an absolute sum), so that a probe takes
no memory to speak of.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lbaccel.batch.plan import BatchPlan
from lbaccel.update.accumulation import LossFn, accumulate
from lbaccel.update.averages import RunningAverages
from lbaccel.update.embeddings import Coupled
from lbaccel.update.loss_parts import parts_of
from lbaccel.verification.copies import tensors_in
from lbaccel.verification.updates import Subject, converted, masks_of, micro_batches, scopes_of

OUTSIDE = "the loss function"
ROOT = "the model itself"
Key = tuple[str, int]  # module, and how many times it ran before in the micro-batch


@dataclass
class Rows:
    """Fingerprints of the rows of a call's tensors, over the micro-batches of an update."""

    prints: list[Tensor] = field(default_factory=list)  # float64 [samples, 2 t]
    shapes: set[Any] = field(default_factory=set)  # rows per sample of each tensor, or None

    def compare(self, other: Rows, tolerance: float, *, start: int = 0) -> bool | None:
        """Equal from sample `start` on, different, or None where the rows are no samples."""
        if self.shapes != other.shapes or len(self.shapes) != 1 or None in self.shapes:
            return None
        if self.shapes == {()}:
            return None
        a, b = torch.cat(self.prints)[start:], torch.cat(other.prints)[start:]
        if a.shape != b.shape:
            return None
        scale = b[:, 1::2].abs().amax().clamp(min=1e-300)
        same = ((a - b).abs() <= tolerance * scale) | (a == b) | (a.isnan() & b.isnan())
        return bool(same.all())


@dataclass(frozen=True)
class Draw:
    """A random number that no key reaches."""

    layer: str
    what: str


@dataclass
class ProbeTrace:
    """The observations of a probe in the micro-batches of all ranks, in order."""

    inputs: dict[Key, Rows] = field(default_factory=dict)
    outputs: dict[Key, Rows] = field(default_factory=dict)  # in order of completion
    first: Rows = field(default_factory=Rows)  # what the first module of each micro-batch got
    losses: list[tuple[float, float]] = field(default_factory=list)  # (mean loss, weight)
    weighs: bool = False
    draws: dict[Draw, None] = field(default_factory=dict)  # an ordered set
    rounded: str | None = None  # the first module, or the loss, that is not in float64
    written: dict[str, None] = field(default_factory=dict)  # gradients changed inside the loss
    clipped: list[str] = field(default_factory=list)  # functions called inside the loss

    @property
    def loss(self) -> float:
        """The weighted mean."""
        return sum(x * w for x, w in self.losses) / (sum(w for _, w in self.losses) or 1.0)


def trace(subject: Subject, plan: BatchPlan, *, batch: Any = None) -> ProbeTrace:
    """Run the micro-batches of all ranks of `plan` in one process, and watch.

    Args:
        subject: what is verified.
        plan: how to cut it.
        batch: samples in place of the subject's.
    """
    model = subject.fresh()
    if batch is not None:
        subject = replace(subject, batch=batch)
    if isinstance(subject.loss_fn, Coupled):
        subject = replace(subject, loss_fn=_row_means(subject.loss_fn))
    norm = converted(model, subject.norm_batch_size)
    norm.begin()
    averages = RunningAverages(subject.averages)
    averages.begin(model, subject.loss_fn)
    randomness = masks_of(subject)
    seen = ProbeTrace()
    watcher = _Watcher(seen, model, subject, randomness)
    pairs = [m for rank in range(plan.world_size) for m in plan.partition(rank)]
    with watcher.installed(), randomness.update(0):
        accumulate(
            model,
            micro_batches(subject, [m for m in pairs if not m.is_filler]),
            watcher.loss_fn,
            num_samples=subject.num_samples,
            scopes=(*scopes_of(subject, norm, randomness), averages),
        )
    return seen


def _row_means(coupled: Coupled) -> LossFn:
    """A loss of single samples, of the same rows: what couples samples, then, is the network."""

    def loss_fn(model: Any, data: Any) -> Tensor:
        rows = [t for t in tensors_in(coupled.embed(model, data)) if t.requires_grad]
        return sum((t.flatten(1).sum(1).mean() for t in rows), torch.zeros(()))

    return loss_fn


class _Watcher:
    """Hooks on every module, a dispatch mode, and a loss function that is watched."""

    def __init__(
        self, seen: ProbeTrace, model: nn.Module, subject: Subject, randomness: Any
    ) -> None:
        self.seen, self.model, self.subject = seen, model, subject
        self.names = {m: name or ROOT for name, m in model.named_modules()}
        self.stack: list[str] = []
        self.calls: dict[str, int] = {}
        self.keys: list[Key] = []
        self.active = False
        self.num_samples = 0
        self.fused = False
        self.host = _host_states()
        self.mode = _Draws(self)
        randomness.keys = self.mode.without(randomness.keys)  # its token is no draw

    def layer(self) -> str:
        return self.stack[-1] if self.stack else OUTSIDE

    def drew(self, what: str) -> None:
        self.seen.draws.setdefault(Draw(self.layer(), what))

    def check_host(self) -> None:
        states = _host_states()
        for what, before, after in zip(("numpy", "Python"), self.host, states, strict=True):
            if before != after:
                self.drew(f"{what}'s random")
        self.host = states

    @contextmanager
    def installed(self) -> Iterator[None]:
        with ExitStack() as handles:
            for module in self.names:
                before = module.register_forward_pre_hook(self.before, with_kwargs=True)
                after = module.register_forward_hook(self.after, with_kwargs=True)
                handles.callback(before.remove)
                handles.callback(after.remove)
            for name in ("clip_grad_norm_", "clip_grad_value_"):
                handles.enter_context(_replaced(nn.utils, name, self.clip(name)))
                handles.enter_context(_replaced(nn.utils.clip_grad, name, self.clip(name)))
            fused = self.fused_attention(F.scaled_dot_product_attention)
            handles.enter_context(_replaced(F, "scaled_dot_product_attention", fused))
            yield

    def clip(self, name: str) -> Any:
        plain = getattr(nn.utils, name)

        def clip(*args: Any, **kwargs: Any) -> Any:
            self.seen.clipped.append(name)
            return plain(*args, **kwargs)

        return clip

    def fused_attention(self, plain: Any) -> Any:
        def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Any:
            self.fused = True
            try:
                return plain(*args, **kwargs)
            finally:
                self.fused = False

        return scaled_dot_product_attention

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.active:  # a recompute of the user's own checkpointing
            return
        self.check_host()
        name = self.names[module]
        if not self.calls:
            self._add(self.seen.first, (args, kwargs))
        key = (name, self.calls.get(name, 0))
        self.calls[name] = key[1] + 1
        self.stack.append(name)
        self.keys.append(key)
        self._add(self.seen.inputs.setdefault(key, Rows()), (args, kwargs))

    def after(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if not self.active:
            return
        self.check_host()
        self.stack.pop()
        key = self.keys.pop()
        self._add(self.seen.outputs.setdefault(key, Rows()), out)
        if self.seen.rounded is None and _is_rounded(out):
            self.seen.rounded = key[0]

    def _add(self, rows: Rows, tree: Any) -> None:
        found: list[Tensor] = []
        shapes: list[int | None] = []
        for tensor in tensors_in(tree):
            per_sample = tensor.shape[0] / self.num_samples if tensor.ndim else 0.5
            shapes.append(int(per_sample) if per_sample == int(per_sample) else None)
            if shapes[-1]:
                found.append(_fingerprint(tensor.detach(), self.num_samples))
        rows.shapes.add(None if None in shapes else tuple(shapes))
        rows.prints.append(torch.cat(found, 1) if found else torch.empty(0, 0))

    def loss_fn(self, model: Any, data: Any) -> Any:
        self.calls, self.stack, self.keys = {}, [], []
        self.num_samples = next(t.shape[0] for t in tensors_in(data) if t.ndim)
        before = {n: None if p.grad is None else p.grad.clone() for n, p in self._parameters()}
        self.host, self.active = _host_states(), True
        try:
            with self.mode:
                out = self.subject.loss_fn(model, data)
        finally:
            self.active = False
        self.check_host()
        for name, p in self._parameters():
            old = before[name]
            if p.grad is not None and (old is None or not torch.equal(old, p.grad)):
                self.seen.written.setdefault(name)
        loss, weight, _ = parts_of(out)
        self.seen.weighs = weight is not None
        weight = self.num_samples if weight is None else weight
        self.seen.losses.append((_number(loss), _number(weight)))
        if self.seen.rounded is None and _is_rounded(loss):
            self.seen.rounded = OUTSIDE
        return out

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters()


class _Draws(TorchDispatchMode):
    """Sees every operation that draws: the generator has moved, or it has one of its own."""

    def __init__(self, watcher: _Watcher) -> None:
        super().__init__()
        self.watcher, self.paused = watcher, False

    def without(self, function: Any) -> Any:
        def keyed(*args: Any, **kwargs: Any) -> Any:
            self.paused = True
            try:
                return function(*args, **kwargs)
            finally:
                self.paused = False

        return keyed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused or torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        before = torch.get_rng_state()
        out = func(*args, **kwargs)
        if kwargs.get("generator") is not None or not torch.equal(before, torch.get_rng_state()):
            fused = "dropout inside scaled_dot_product_attention"
            name = f"torch's {func._schema.name.removeprefix('aten::')}"
            self.watcher.drew(fused if self.watcher.fused else name)
        return out


def _fingerprint(tensor: Tensor, num_samples: int) -> Tensor:
    x = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    x = x.reshape(num_samples, -1).double()
    if not x.shape[1]:
        return x.new_zeros(num_samples, 2)
    weights = torch.cos(torch.arange(x.shape[1], dtype=torch.float64) * math.sqrt(2) + 0.5)
    return torch.stack([x @ weights, x.abs().sum(1)], 1)


def _is_rounded(out: Any) -> bool:
    return any(t.is_floating_point() and t.dtype != torch.float64 for t in tensors_in(out))


def _number(value: Any) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)


def _host_states() -> tuple[Any, Any]:
    state: Any = np.random.get_state()
    return (state[1].tobytes(), *state[2:]), random.getstate()


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    plain = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, plain)
