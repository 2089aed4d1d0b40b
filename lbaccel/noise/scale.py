"""The gradient noise scale, out of the gradients that accumulation has anyway.

A micro-batch i (whole ghost batches, so that what BatchNorm couples stays inside) hands each
parameter h_i = w_i / B grad(l_i) on its way into `.grad`. A hook takes its norm there: no copy, no
difference of `.grad` before and after, no host synchronisation. With W = sum w_i and the gradient
of the update g, the sum that the estimate needs is

    sum n_i |g_i|^2 = B^3 / W sum |h_i|^2 / w_i      with n_i = w_i B / W, g_i = B h_i / w_i

McCandlish et al. 2018 (arXiv 1812.06162), appendix A.1; `noise_arithmetic.estimate` has the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lbaccel.errors import InputError, check_whole
from lbaccel.noise.arithmetic import RatioAverage, estimate, same_epoch


class UnitSums(NamedTuple):
    """The sums over the micro-batches of all ranks; fillers and empty ones count nothing."""

    num_units: int  # K
    sum_sq: float  # sum of |h_i|^2 / w_i
    preconditioned_sq: float  # the same of P^(1/2) h_i; nan where there is no P
    preconditioned_share: float  # g^T P g / |g|^2 of the update's gradient; nan where there is none


class NoiseScale:
    """The critical batch size S / |G|^2 of a run, averaged over its updates; for `LargeBatch`.

    S = tr(Sigma) of one sample's gradient and |G|^2 are estimated in each update, without bias, and
    averaged apart (see `RatioAverage` for weights and interval). An update of a single micro-batch
    gives no estimate, and `reason` says so; one that was dropped or skipped counts nothing.

    Args:
        half_life_samples: samples after which an update's weight in the averages has halved; a
            tenth of the run is a good choice.
        training_set_size: N, where samples are drawn by epochs without replacement; None where
            they are drawn independently.
        samples_per_epoch: that an epoch consumes, where it is not N (`last_update="drop"`).
        preconditioned: beside it tr(P Sigma) / G^T P G with P = 1 / (sqrt(v) + eps), v being the
            second moment of an optimizer of Adam's family before the update.

    Raises:
        InputError: a size below one.

    >>> import torch
    >>> from accelerate import Accelerator
    >>> from lbaccel import BatchPlan, LargeBatch, UpdateLoader
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    >>> data = [(x, x.sum(0, keepdim=True)) for x in torch.randn(400, 2)]
    >>> plan = BatchPlan(global_batch_size=40, micro_batch_size=10)
    >>> noise = NoiseScale(half_life_samples=4000, training_set_size=400)
    >>> large_batch = LargeBatch(Accelerator(cpu=True), plan, noise_scale=noise)
    >>> model, optimizer, loader = large_batch.prepare(model, optimizer, UpdateLoader(data, plan))
    >>> def loss_fn(model, micro_batch):
    ...     x, y = micro_batch
    ...     return torch.nn.functional.mse_loss(model(x), y)
    >>> for update in loader:
    ...     result = large_batch.update(update, loss_fn)
    >>> round(noise.average.num_updates), noise.average.ratio > 0
    (10, True)
    """

    def __init__(
        self,
        *,
        half_life_samples: float,
        training_set_size: int | None = None,
        samples_per_epoch: int | None = None,
        preconditioned: bool = False,
    ) -> None:
        if training_set_size is not None:
            check_whole("training_set_size", training_set_size)
        self._epoch = samples_per_epoch or training_set_size
        if self._epoch is not None:
            check_whole("samples_per_epoch", self._epoch)
        self._set_size = math.inf if training_set_size is None else training_set_size
        self.average = RatioAverage(half_life_samples)
        self.preconditioned = RatioAverage(half_life_samples) if preconditioned else None
        self.reason = "no update was done yet."

    def add(
        self, units: UnitSums, *, grad_norm: float, num_samples: int, weight: float, start: int
    ) -> None:
        """Take a written update in; `LargeBatch` calls it.

        Args:
            units: of all ranks.
            grad_norm: |g|, before clipping.
            num_samples: B.
            weight: W, the sum of the micro-batches' weights (B without weights of their own).
            start: samples consumed before it.
        """
        if units.num_units < 2:
            self.reason = (
                f"the last update was one micro-batch of {num_samples} samples, and the spread of "
                f"gradients needs two. Use micro_batch_size <= {max(1, num_samples // 2)}."
            )
            return
        self.reason = ""
        repeat = 1.0
        if self._epoch is not None:
            repeat = same_epoch(start, num_samples, samples_per_epoch=self._epoch)
        size = {
            "num_samples": num_samples,
            "num_units": units.num_units,
            "training_set_size": self._set_size,
            "repeat": repeat,
        }
        factor, update_sq = num_samples**3 / weight, grad_norm**2
        self.average.add(
            estimate(factor * units.sum_sq, update_sq, **size), num_samples=num_samples
        )
        if self.preconditioned is not None and math.isfinite(units.preconditioned_sq):
            found = estimate(
                factor * units.preconditioned_sq, units.preconditioned_share * update_sq, **size
            )
            self.preconditioned.add(found, num_samples=num_samples)

    def metrics(self) -> dict[str, float]:
        """The line of a log; empty before the first estimate. An unbounded figure is infinite."""
        if not self.average.num_updates:
            return {}
        interval = self.average.interval()
        found = {
            "noise/critical_batch_size": self.average.ratio,
            "noise/low": interval.low,
            "noise/high": interval.high,
            "noise/scale_s": self.average.scale_s,
            "noise/grad_norm_sq": self.average.grad_norm_sq,
            "noise/num_updates": self.average.num_updates,
        }
        if self.preconditioned is not None and self.preconditioned.num_updates:
            interval = self.preconditioned.interval()
            found |= {
                "noise/preconditioned_batch_size": self.preconditioned.ratio,
                "noise/preconditioned_low": interval.low,
                "noise/preconditioned_high": interval.high,
            }
        return found

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Plain numbers."""
        state = {"average": self.average.state_dict()}
        if self.preconditioned is not None:
            state["preconditioned"] = self.preconditioned.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Go on from a saved state; what it does not hold starts anew."""
        self.average.load_state_dict(state["average"])
        if self.preconditioned is not None and "preconditioned" in state:
            self.preconditioned.load_state_dict(state["preconditioned"])


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
        for heard in (self._norms, self._squares, self._heard):
            heard.clear()

    def _listener(self, number: int) -> Callable[[Tensor], None]:
        """The hook of one parameter: little Python, as it runs with cold caches."""
        norms, squares, heard = self._norms, self._squares, self._heard
        # The kernel that the update's norm is taken with: its rounding then cancels in the ratio.
        norm = torch.linalg.vector_norm

        def listen(gradient: Tensor) -> None:
            norms.append(norm(gradient))
            heard.append(number)

        def listen_to_both(gradient: Tensor) -> None:
            listen(gradient)
            squares.append(self._squared(self._parameters[number], gradient))

        return listen if self._optimizer is None else listen_to_both

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
        total = torch.stack(norms).detach().double().square().sum()
        third = torch.stack(squares).double().sum() if squares else 0.0 * total
        if isinstance(weight, Tensor):
            sums = torch.stack([torch.ones_like(total), total / weight, third / weight])
            self._sums += torch.where(weight > 0, sums, 0.0)  # its gradient may be nan
        else:
            self._sums += torch.stack([torch.ones_like(total), total / weight, third / weight])

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
        sums = self._sums
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


def _check_adaptive(optimizer: torch.optim.Optimizer) -> None:
    if not all("eps" in g and len(g.get("betas", ())) >= 2 for g in optimizer.param_groups):
        raise _not_adaptive(optimizer)


def _not_adaptive(optimizer: torch.optim.Optimizer) -> InputError:
    return InputError(
        f"the preconditioned noise scale with {type(optimizer).__name__}: it needs second moments "
        "(exp_avg_sq), betas and eps, as Adam's family keeps them. Use preconditioned=False "
        "(--noise-scale plain), or adamw."
    )
