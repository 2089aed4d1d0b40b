"""The largest eigenvalue of the loss's Hessian, on a few micro-batches of the next update.

A Hessian-vector product is the gradient of (gradient . v) (Pearlmutter 1994), one micro-batch at a
time, with the ghost batches and masks of the update; Lanczos' recursion (Paige 1980) needs three
vectors of the size of the weights, finds the largest eigenvalue where a power iteration would find
the largest in absolute value, and gives a residual.

Own code in place of `curvlinops` (3.0.1): that takes model and loss apart, on (inputs, targets),
through `torch.func`'s vmap, with no place for ghost batches, keyed masks, a loss's own weights or
ranks; and it brings six packages.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from scipy.linalg import eigh_tridiagonal
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lbaccel.batch.plan import MicroBatch
from lbaccel.data.loader import UpdateLoader
from lbaccel.errors import RunFailed, check_number, check_whole
from lbaccel.stability.rehearsal import group_ratios, plain_optimizer, replicated
from lbaccel.update.accumulation import LossFn
from lbaccel.update.engine import LargeBatch
from lbaccel.update.loss_parts import parts_of
from lbaccel.update.memory.oom import is_out_of_memory, let_go
from lbaccel.update.transaction import Transaction

Product = Callable[[Tensor], Tensor]
START_SEED = 0x1A2C


@dataclass(frozen=True)
class Eigenvalue:
    """The largest eigenvalue that Lanczos' recursion found."""

    value: float
    residual: float  # |A x - value x|: an eigenvalue lies this near
    num_products: int


@dataclass(frozen=True)
class Curvature:
    """The largest eigenvalue of the loss's Hessian, the same on every rank."""

    lambda_max: float
    residual: float  # an eigenvalue lies this near
    num_samples: int  # over all ranks
    num_products: int


def largest_eigenvalue(
    product: Product, start: Tensor, *, tolerance: float = 0.05, max_products: int = 20
) -> Eigenvalue:
    """The largest (not the largest absolute) eigenvalue of a symmetric matrix, by Lanczos.

        b_(k+1) q_(k+1) = A q_k - a_k q_k - b_k q_(k-1),    a_k = q_k . A q_k,   |q_k| = 1

    The largest eigenvalue t of the tridiagonal matrix of a and b approaches A's from below; with s
    its eigenvector, |A x - t x| = b_(k+1) |s_k|. Rounding makes copies of eigenvalues that have
    converged, no others (Paige 1980), so nothing is orthogonalised anew.

    Args:
        product: v [n] -> A v [n].
        start: [n], of any direction; a random one meets every eigenvector.
        tolerance: end where the residual is at most this share of |t|.
        max_products: end after so many.

    >>> diagonal = torch.tensor([3.0, 1.0, -8.0], dtype=torch.float64)
    >>> found = largest_eigenvalue(lambda v: diagonal * v, torch.ones_like(diagonal))
    >>> round(found.value, 6), found.num_products
    (3.0, 3)
    """
    q, before = start / torch.linalg.vector_norm(start), None
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        w = product(q)
        if before is not None:
            w = w - beside[-1] * before
        diagonal.append(float(torch.dot(w, q)))
        w = w - diagonal[-1] * q
        norm = float(torch.linalg.vector_norm(w))
        last = len(diagonal) - 1
        values, vectors = eigh_tridiagonal(
            diagonal, beside, select="i", select_range=(last, last), check_finite=True
        )
        value, residual = float(values[0]), norm * abs(float(vectors[-1, 0]))
        done = len(diagonal)
        smallest = torch.finfo(start.dtype).eps * max(map(abs, (*diagonal, *beside)))
        if residual <= tolerance * abs(value) or norm <= smallest or done == max_products:
            return Eigenvalue(value, residual, done)
        before, q = q, w / norm
        beside.append(norm)


def largest_curvature(
    large_batch: LargeBatch,
    loader: UpdateLoader,
    loss_fn: LossFn,
    *,
    num_samples: int = 256,
    tolerance: float = 0.05,
    max_products: int = 20,
) -> Curvature:
    """lambda_max of the Hessian of the mean loss over samples of the next update; changes nothing.

    Where parameter groups have rates eta d_p, it is lambda_max of D^(1/2) H D^(1/2), so that
    eta x lambda_max is what the limit speaks of, with eta the largest rate of a group. Weight decay
    adds its own value and is left out. Few samples see more curvature than many, in the mean, as
    lambda_max is convex. A product takes as long as several updates of `num_samples` (on a CPU 4 to
    5); where memory does not suffice, the micro-batch is halved. Attention runs in plain kernels,
    since fused ones have no second derivative.

    Args:
        large_batch: prepared, in one process or under DDP.
        loader: what `prepare` returned; its next update stays the next one.
        loss_fn: as for `LargeBatch.update`.
        num_samples: over all ranks; whole ghost batches, at least one on each rank.
        tolerance: largest residual, as a share of lambda_max, whose error is of second order in it.
        max_products: Hessian-vector products at most.

    Raises:
        InputError: under ZeRO or FSDP2.
        RunFailed: memory does not suffice for one group, another rank failed, or the curvature is
            not finite.
    """
    check_whole("num_samples", num_samples)
    check_whole("max_products", max_products)
    check_number("tolerance", tolerance)
    with large_batch.rehearsing() as transaction:
        device = large_batch.accelerator.device
        plan, world_size = large_batch.plan, large_batch.plan.world_size
        sharding = replicated(transaction)
        scales = _scales(sharding.parameters, plain_optimizer(sharding))
        unit, share = plan.group_size, -(-num_samples // world_size)
        size = min(plan.micro_batch_size, max(unit, share // unit * unit))
        trial = copy.copy(loader)
        while True:
            trial.load_state_dict(loader.state_dict())
            update = trial.peek()
            assert update.recut is not None
            micro_batches, taken = [], 0
            for m, data in update.recut(size):
                if taken < share and not m.is_filler:
                    micro_batches.append((m, data))
                    taken += m.num_samples
                else:
                    break
            hessian = _Hessian(transaction, micro_batches, loss_fn, scales, world_size)
            try:
                with transaction.randomness.update(update.index):
                    transaction.masks.learn(loss_fn, *_moved(micro_batches[0], device), always=True)
                    found = largest_eigenvalue(
                        hessian, hessian.start(), tolerance=tolerance, max_products=max_products
                    )
            except _RanOut as error:
                let_go(error, large_batch.accelerator.device)
                if size == unit:
                    raise RunFailed(
                        f"memory ran out in a second derivative of {unit} samples, which takes "
                        "about three times what training takes. Use a smaller network or image."
                    ) from None
                size = max(unit, size // 2 // unit * unit)
                continue
            return Curvature(
                found.value, found.residual, int(hessian.num_samples), found.num_products
            )


def _moved(pair: tuple[MicroBatch, Any], device: torch.device) -> tuple[MicroBatch, Any]:
    micro_batch, data = pair
    return micro_batch, send_to_device(data, device)


def _scales(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[float]:
    """The square root of each parameter's rate over the largest of a group."""
    of = {
        id(p): ratio**0.5
        for group, ratio in zip(optimizer.param_groups, group_ratios(optimizer), strict=True)
        for p in group["params"]
    }
    return [of.get(id(p), 0.0) for p in parameters]


class _RanOut(RuntimeError):
    """Memory ran out on some rank, and all of them know."""


class _Hessian:
    """v -> H v over the micro-batches of all ranks; flat vectors, the same on every rank."""

    def __init__(
        self,
        transaction: Transaction,
        micro_batches: list[tuple[MicroBatch, Any]],
        loss_fn: LossFn,
        scales: list[float],
        world_size: int,
    ) -> None:
        self._transaction, self._micro_batches = transaction, micro_batches
        self._loss_fn, self._scales, self._world_size = loss_fn, scales, world_size
        self._parameters = transaction.sharding.parameters
        doubles = any(p.dtype == torch.float64 for p in self._parameters)
        self._dtype = torch.float64 if doubles else torch.float32
        self._device = transaction.accelerator.device
        self.num_samples = 0.0

    def start(self) -> Tensor:
        """A random vector, the same on every rank, from a generator of its own."""
        generator = torch.Generator().manual_seed(START_SEED)
        count = sum(p.numel() for p in self._parameters)
        return torch.randn(count, generator=generator, dtype=self._dtype).to(self._device)

    def __call__(self, v: Tensor) -> Tensor:
        error: Exception | None = None
        # the product, and behind it: weight, samples, ranks that failed, of them out of memory
        vector = torch.zeros(len(v) + 4, dtype=self._dtype, device=self._device)
        try:
            parts = self._parts(v)
            for m, data in self._micro_batches:
                weight, products = self._product(m, data, parts)
                flat = torch.cat([p.reshape(-1).to(self._dtype) for p in products])
                vector[: len(v)] += weight * flat
                vector[-4] += weight
                vector[-3] += m.num_samples
        except Exception as found:
            error = found
            vector[-2] = 1.0
            vector[-1] = float(is_out_of_memory(found))
        if self._world_size > 1:
            dist.all_reduce(vector)
        weight, samples, failed, ran_out = vector[-4:].tolist()
        if failed and failed == ran_out:
            raise _RanOut("out of memory") from error
        if error is not None:
            raise error
        if failed:
            raise RunFailed(
                f"{failed:.0f} of {self._world_size} ranks failed while the curvature was "
                "measured; nothing was changed."
            )
        self.num_samples = samples
        scaled = self._parts(vector[: len(v)] / weight)
        result = torch.cat([part.reshape(-1).to(self._dtype) for part in scaled])
        if not bool(torch.isfinite(result).all()):
            raise RunFailed(
                "the loss's curvature is not finite at these weights, so no stable rate is known. "
                "Use fp32 in place of fp16 or bf16, or other weights."
            )
        return result

    def _parts(self, v: Tensor) -> list[Tensor]:
        """`v` in the shapes of the parameters, each times its scale."""
        pieces = v.split([p.numel() for p in self._parameters])
        return [
            (s * piece).view(p.shape).to(p.dtype)
            for s, piece, p in zip(self._scales, pieces, self._parameters, strict=True)
        ]

    def _product(
        self, micro_batch: MicroBatch, data: Any, v: list[Tensor]
    ) -> tuple[Tensor | float, tuple[Tensor, ...]]:
        """The weight of a micro-batch's mean loss, and the product of its Hessian."""
        norm, randomness = self._transaction.norm, self._transaction.randomness
        module = self._transaction.sharding.module
        with ExitStack() as around:
            around.enter_context(norm.forward(micro_batch))
            around.enter_context(norm.backward())  # its statistics are taken by nobody
            around.enter_context(randomness.forward(micro_batch))
            around.enter_context(sdpa_kernel(SDPBackend.MATH))
            out = self._loss_fn(module, send_to_device(data, self._device))
            loss, weight, _ = parts_of(out)
            weight = float(micro_batch.num_samples) if weight is None else weight
            if isinstance(weight, Tensor):
                weight = weight.detach().to(self._dtype)
            around.enter_context(randomness.backward())
            found = gradients(loss, self._parameters, create_graph=True)
            along = sum((g * part).sum() for g, part in zip(found, v, strict=True))
            assert isinstance(along, Tensor)
            if not along.requires_grad:  # a loss linear in the weights
                return weight, tuple(torch.zeros_like(part) for part in v)
            return weight, gradients(along, self._parameters)


def gradients(
    of: Tensor, parameters: list[nn.Parameter], *, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """The gradient of a number by each parameter; zeros for one that it does not depend on."""
    return torch.autograd.grad(
        of, parameters, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )


def sgd_momentum(optimizer: torch.optim.Optimizer) -> tuple[float, bool] | None:
    """Momentum, and whether it is Nesterov's; None for what is not torch's SGD in one form.

    For adaptive optimizers the limit holds for the Hessian that their second moments precondition
    (Cohen et al. 2022, arXiv 2207.14484), which do not exist before the first updates.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    forms = {
        (g.get("momentum"), g.get("nesterov"), g.get("dampening")) for g in optimizer.param_groups
    }
    if type(optimizer) is not torch.optim.SGD or len(forms) != 1:
        return None
    momentum, nesterov, dampening = forms.pop()
    if dampening:
        return None
    return float(momentum or 0.0), bool(nesterov)
