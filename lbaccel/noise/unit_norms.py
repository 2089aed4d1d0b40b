"""Norms of the micro-batches' gradients, out of the gradients that accumulation has anyway.

A micro-batch i (whole ghost batches, so that what BatchNorm couples stays inside) hands each
parameter h_i = w_i / B grad(l_i) on its way into `.grad`. A hook takes its norm there: no copy, no
difference of `.grad` before and after, no host synchronisation. With W = sum w_i and the gradient
of the update g, the sum that the estimate needs is

    sum n_i |g_i|^2 = B^3 / W sum |h_i|^2 / w_i      with n_i = w_i B / W, g_i = B h_i / w_i

McCandlish et al. 2018 (arXiv 1812.06162), appendix A.1; `arithmetic.estimate` has the rest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lbaccel.errors import InputError

# Small gradients wait for the end of the backward pass, and one kernel takes the norms of all:
# each launch costs more than its work. On a CPU a large one is better read while it is in a cache.
FEW_ELEMENTS = 2**13
HELD_BYTES = 2**24  # wait at most


class UnitSums(NamedTuple):
    """The sums over the micro-batches of all ranks; fillers and empty ones count nothing."""

    num_units: int  # K
    sum_sq: float  # sum of |h_i|^2 / w_i
    preconditioned_sq: float  # the same of P^(1/2) h_i; nan where there is no P
    preconditioned_share: float  # g^T P g / |g|^2 of the update's gradient; nan where there is none


class UnitNorms:
    """The norms of each micro-batch's gradient, by hooks that live as long as an attempt.

    Args:
        parameters: trainable; whole on every rank.
        optimizer: whose second moments precondition; None without.
        scaler: fp16's, or None.
        world_size: data-parallel processes.

    Raises:
        InputError: an optimizer that is none of Adam's family.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        optimizer: torch.optim.Optimizer | None = None,
        scaler: Any = None,
        world_size: int = 1,
    ) -> None:
        self._parameters, self._scaler, self._world_size = list(parameters), scaler, world_size
        self._optimizer = optimizer
        self._groups: dict[int, dict[str, Any]] = {}
        if optimizer is not None:
            _check_adaptive(optimizer)
        self._norms: list[Tensor] = []
        self._held: list[Tensor] = []
        self._small = _small(self._parameters)
        self._num_units = 0  # with a weight that the host knows
        self._squares: list[Tensor] = []
        self._heard: list[int] = []
        self._sums: Tensor | None = None
        self._scale: Tensor | None = None
        self._share = (math.nan, math.nan)

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Inside, hooks listen; what an attempt before left is forgotten."""
        device = self._parameters[0].device
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._num_units = 0
        self._scale = None
        if self._scaler is not None:
            self._scale = self._scaler.scale(torch.ones((), device=device))
        if self._optimizer is not None:
            groups = self._optimizer.param_groups
            self._groups = {id(p): group for group in groups for p in group["params"]}
        self._forget()
        hooks = [p.register_hook(self._listener(n)) for n, p in enumerate(self._parameters)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._forget()

    def _forget(self) -> None:
        for heard in (self._norms, self._held, self._squares, self._heard):
            heard.clear()

    def _listener(self, number: int) -> Callable[[Tensor], None]:
        """The hook of one parameter: little Python, as it runs with cold caches."""
        norms, squares, heard = self._norms, self._squares, self._heard
        held, parameter = self._held, self._parameters[number]
        # The kernel that the update's norm is taken with: its rounding then cancels in the ratio.
        norm = torch.linalg.vector_norm

        def listen(gradient: Tensor) -> None:
            norms.append(norm(gradient))
            heard.append(number)

        def hold(gradient: Tensor) -> None:
            heard.append(number)
            if parameter.grad is None:  # it becomes `.grad` itself, unless somebody else holds it
                norms.append(norm(gradient))
            else:
                held.append(gradient)

        def listen_to_both(gradient: Tensor) -> None:
            listen(gradient)
            squares.append(self._squared(parameter, gradient))

        if self._optimizer is not None:
            return listen_to_both
        return hold if number in self._small else listen

    def _squared(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
        """g^T P g of one parameter; nan before its first step."""
        gradient = gradient.detach()
        assert self._optimizer is not None
        state = self._optimizer.state.get(parameter)
        if not state:
            return gradient.new_full((), math.nan)
        moment = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
        if moment is None or moment.shape != parameter.shape:  # NovoGrad's: one a tensor
            raise _not_adaptive(self._optimizer)
        group = self._groups[id(parameter)]
        num_steps = state.get("step", group.get("step"))
        root = moment.sqrt()
        if num_steps is not None:
            if isinstance(num_steps, Tensor):
                num_steps = num_steps.double()
            root.div_((1.0 - group["betas"][1] ** num_steps) ** 0.5)
        torch.div(gradient, root.add_(group["eps"]), out=root)
        return torch.dot(root.flatten(), gradient.flatten())

    def add(self, weight: Tensor | float) -> None:
        """End a micro-batch of this weight; 0 (a filler's) counts nothing."""
        if self._held:
            self._norms.extend(torch._foreach_norm(self._held))
        norms, squares = list(self._norms), list(self._squares)
        twice = len(self._heard) > len(set(self._heard))
        self._forget()
        if twice:
            raise InputError(
                "the noise scale: a parameter was given its gradient in two parts in one backward "
                "pass, as re-entrant checkpointing does for a parameter used twice; the norm of a "
                "sum is not known from its parts. Use checkpoint(..., use_reentrant=False), or "
                "noise_scale=None."
            )
        if not norms or (not isinstance(weight, Tensor) and weight == 0.0):
            return
        assert self._sums is not None
        lengths = torch.stack(norms).detach().double()
        total = torch.dot(lengths, lengths)
        third = torch.stack(squares).double().sum() if squares else None
        if isinstance(weight, Tensor):
            third = torch.zeros_like(total) if third is None else third
            sums = torch.stack([torch.ones_like(total), total / weight, third / weight])
            self._sums += torch.where(weight > 0, sums, 0.0)  # its gradient may be nan
            return
        self._num_units += 1
        self._sums[1].add_(total, alpha=1.0 / weight)
        if third is not None:
            self._sums[2].add_(third, alpha=1.0 / weight)

    @contextmanager
    def at_step(self) -> Iterator[None]:
        """Around the optimizer's step: the update's own gradient, as the step is given it."""
        self._share = (math.nan, math.nan)
        if self._optimizer is None:
            yield
            return
        hook = self._optimizer.register_step_pre_hook(lambda *_: self._take_share())
        try:
            yield
        finally:
            hook.remove()

    @torch.no_grad()
    def _take_share(self) -> None:
        # A ratio: clipping has multiplied both by the same number.
        pairs = [(p, p.grad) for p in self._parameters if p.grad is not None]
        preconditioned = torch.stack([self._squared(p, g) for p, g in pairs]).double().sum()
        plain = torch.stack([torch.linalg.vector_norm(g) for _, g in pairs]).double().square().sum()
        self._share = tuple(torch.stack([preconditioned, plain]).tolist())

    def read(self) -> UnitSums:
        """The sums over all ranks, of the last attempt; a collective of 24 bytes."""
        assert self._sums is not None
        sums = self._sums.clone()
        sums[0] += self._num_units
        if self._scale is not None:
            sums = sums / torch.stack([torch.ones_like(self._scale), *[self._scale**2] * 2])
        if self._world_size > 1:
            dist.all_reduce(sums)
        num_units, sum_sq, preconditioned_sq = sums.tolist()
        over, under = self._share
        return UnitSums(
            round(num_units),
            sum_sq,
            preconditioned_sq if self._optimizer is not None else math.nan,
            over / under if under else math.nan,
        )


def _small(parameters: Sequence[nn.Parameter]) -> set[int]:
    """Numbers of the parameters whose gradients wait for each other, the smallest ones."""
    order = sorted(range(len(parameters)), key=lambda n: parameters[n].numel())
    few = [FEW_ELEMENTS if p.device.type == "cpu" else HELD_BYTES for p in parameters]
    bytes_before = itertools.accumulate(parameters[n].nbytes for n in order)
    pairs = zip(order, bytes_before, strict=True)
    return {n for n, b in pairs if b <= HELD_BYTES and parameters[n].numel() <= few[n]}


def _check_adaptive(optimizer: torch.optim.Optimizer) -> None:
    if not all("eps" in g and len(g.get("betas", ())) >= 2 for g in optimizer.param_groups):
        raise _not_adaptive(optimizer)


def _not_adaptive(optimizer: torch.optim.Optimizer) -> InputError:
    return InputError(
        f"the preconditioned noise scale with {type(optimizer).__name__}: it needs second moments "
        "(exp_avg_sq), betas and eps, as Adam's family keeps them. Use preconditioned=False "
        "(--noise-scale plain), or adamw."
    )
