"""BatchNorm layers that see ghost batches inside an update, and are plain layers outside of it.

A layer is converted by its class alone: its parameters, buffers and hooks stay. Its statistics of
the running update go to views of `GhostNorm`'s vectors, which its slot holds.
"""

from __future__ import annotations

import copy
import copyreg
from typing import TYPE_CHECKING, Any

import torch
from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import handle_torch_function, has_torch_function

from lbaccel.errors import InputError
from lbaccel.update.ghost_kernel import Moments, normalise_runs

if TYPE_CHECKING:
    from lbaccel.update.normalization import GhostNorm

SLOT = "_ghost_slot"  # the attribute that a converted layer has beside its own


class Slot:
    """Where one layer's statistics of the running update lie (views of `GhostNorm`'s vectors)."""

    def __init__(self, norm: GhostNorm, name: str) -> None:
        self.norm, self.name = norm, name
        self.rows_of_samples = False  # the layer's rows are known to be runs of a sample's tokens
        self.mean = self.var = self.spare_mean = self.spare_var = None
        self.values: Tensor | None = None  # [] float64, a channel's values in `mean` and `var`
        # A forward is compiled for the numbers it reads: `calls` is 0 before each micro-batch.
        self.num_groups = 0  # ghost batches of the micro-batches before this one
        self.calls = 0  # forwards in this one that count

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot | None:
        # A copied model (EMA, recalibration) takes no part in updates: its layers are plain.
        return None


def _ghost_forward(self: Any, x: Tensor) -> Tensor:
    slot: Slot | None = self._ghost_slot
    norm = slot.norm if slot is not None else None
    if norm is not None and norm.refusing and self.training and not norm.frozen:
        raise InputError(
            f"BatchNorm layer {self._ghost_slot.name!r} runs in the loss function, which has the "
            "rows of the whole batch on every rank, where ghost batches are not known. Run it in "
            "embed."
        )
    if norm is None or not self.training or not (norm.frozen or norm.micro_batch is not None):
        return type(self)._plain_forward(self, x)
    assert slot is not None
    if norm.frozen:
        mean, var = self.running_mean, self.running_var
        y = nn.functional.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)
    elif norm.over_all:
        y = over_all_samples(x, self)
    else:
        y = _normalise_groups(self, x, slot, norm)
    return self.act(self.drop(y)) if hasattr(self, "act") else y


def over_all_samples(x: Tensor, layer: Any) -> Tensor:
    """Batch norm of `x` by the statistics of all samples of the update.

    Those are not known here. The passes of `lbaccel.update.global_norm` see the call, as one of
    torch's own functions, and run another one in its place; elsewhere (where shapes are looked at)
    it takes those of `x`.
    """
    if has_torch_function((x,)):
        return handle_torch_function(over_all_samples, (x,), x, layer)
    # without the check of `F.batch_norm`: a micro-batch may have one value a channel
    return torch.batch_norm(x, layer.weight, layer.bias, None, None, True, 0.0, layer.eps, False)


def _normalise_groups(layer: Any, x: Tensor, slot: Slot, norm: GhostNorm) -> Tensor:
    assert norm.micro_batch is not None
    num_samples, sizes = norm.micro_batch.num_samples, norm.micro_batch.group_sizes
    if x.shape[0] != num_samples:
        tokens = _tokens(x, slot, num_samples)
        if tokens is None:
            raise InputError(
                f"BatchNorm layer {slot.name!r} got {x.shape[0]} samples where the micro-batch "
                f"holds {num_samples}: ghost batches are cut by sample, so the model must see "
                "each micro-batch once, whole (rows of tokens as a view of [samples, tokens, "
                "channels]). Use norm_batch_size='frozen' for this loss."
            )
        sizes = tuple(size * tokens for size in sizes)
    smallest = min(sizes) * x.shape[2:].numel()
    if smallest < 2:
        raise InputError(
            f"BatchNorm layer {slot.name!r} has one value a channel in a ghost batch of "
            f"{min(norm.micro_batch.group_sizes)} sample: no variance can be taken. Use "
            "norm_batch_size >= 2, larger images, or norm_batch_size='frozen'."
        )
    discard = norm.recomputing or norm.micro_batch.is_filler
    if not discard:
        slot.calls += 1
        if slot.calls > 1 and len(sizes) > 1:
            raise InputError(
                f"BatchNorm layer {slot.name!r} runs {slot.calls} times in one forward, so the "
                f"order of its statistics would depend on the {len(sizes)} ghost batches of a "
                "micro-batch. Use micro_batch_size=norm_batch_size="
                f"{max(norm.micro_batch.group_sizes)}, or 'frozen'."
            )
    moments = [_moments(layer, slot, norm, discard, i) for i in range(len(sizes))]
    y = normalise_runs(
        x,
        sizes,
        moments,
        weight=layer.weight,
        bias=layer.bias,
        eps=layer.eps,
        device_type=norm.device_type,
    )
    if norm.statistics == "per_update" and slot.mean is not None and not discard:
        for size, (mean, var, _) in zip(sizes, moments, strict=True):
            _merge(slot, mean, var, size * x.shape[2:].numel())
    return y


def _tokens(x: Tensor, slot: Slot, num_samples: int) -> int | None:
    """Rows of a sample in `x` [samples x tokens, channels]; None where rows may be anything else.

    A sample's rows must follow one another, or a run of them would be no ghost batch. So `x` is
    a view of a tensor whose first dimension holds the samples, as the autograd graph says, or the
    layer's module is known to make it so. (Where there are as many tokens as samples, the graph
    can't tell [samples, tokens, C] from [tokens, samples, C]; any other micro-batch does.)
    Without a graph, the forward with one that follows tells.
    """
    tokens, rest = divmod(x.shape[0], num_samples)
    if x.ndim != 2 or rest or not tokens:
        return None
    if slot.rows_of_samples or not torch.is_grad_enabled():
        return tokens
    node: Any = x.grad_fn
    before: Any = (
        getattr(node, "_saved_self_sym_sizes", ()) if "View" in type(node).__name__ else ()
    )
    return tokens if before[:1] == (num_samples,) and before[-1] == x.shape[1] else None


def _moments(layer: Any, slot: Slot, norm: GhostNorm, discard: bool, place: int) -> Moments:
    """The buffers that the kernel moves for the ghost batch at `place`: spare ones to discard."""
    if slot.mean is None:  # the layer keeps no running statistics
        return None, None, 0.0
    # A recompute saves as many tensors as the forward did, so it gets buffers as well, to spoil.
    if discard:
        return slot.spare_mean, slot.spare_var, 0.0
    if norm.statistics == "per_ghost":
        momentum = layer.momentum
        if momentum is None:  # a mean over all: one of several calls is one of a single group
            momentum = 1.0 / (slot.num_groups + slot.calls + place)
        return slot.mean, slot.var, momentum
    assert slot.var is not None
    return torch.zeros_like(slot.mean), torch.zeros_like(slot.var), 1.0


def _merge(slot: Slot, mean: Any, var: Any, n: int) -> None:
    """Merge a ghost batch of `n` values a channel into the statistics of the update."""
    assert slot.mean is not None and slot.var is not None and slot.values is not None
    # Not in place: the backward pass may have saved `mean` and `var`.
    merge_moments(slot.mean, slot.var, slot.values, mean, var * (n - 1), n)
    slot.values += n


def merge_moments(mean: Tensor, m2: Tensor, n: Any, mean_b: Tensor, m2_b: Tensor, n_b: Any) -> None:
    """Chan, Golub and LeVeque 1983, eq. 2.1: moments (n, mean, sum of squares) of both sets."""
    delta = mean_b - mean
    mean += delta * (n_b / (n + n_b))
    m2 += m2_b + delta.square_().mul_(n * (n_b / (n + n_b)))


def _ghost_deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    """As `nn.Module` is copied, which `__reduce_ex__` would turn into the plain layer.

    Copies of a SyncBatchNorm layer stay converted: a plain one would talk to the other ranks.
    """
    twin = self.__new__(type(self))
    memo[id(self)] = twin
    twin.__setstate__(copy.deepcopy(self.__dict__, memo))
    return twin


def _pickled_plain(self: Any, protocol: Any) -> tuple[Any, ...]:
    """Pickle keeps the user's own layer, which loads without lbaccel."""
    state = {key: value for key, value in self.__dict__.items() if key != SLOT}
    return copyreg._reconstructor, (plain_class(self), object, None), state  # type: ignore[attr-defined]


def plain_class(layer: nn.Module) -> type[nn.Module]:
    """The class that a converted layer had."""
    return next(base for base, ghost in GHOST_CLASSES.items() if type(layer) is ghost)


def _ghost_class(base: type[nn.Module], plain: Any, **more: Any) -> type[nn.Module]:
    body = {
        "forward": _ghost_forward,
        "_plain_forward": plain,
        "__deepcopy__": _ghost_deepcopy,
        "__reduce_ex__": _pickled_plain,
        "__module__": __name__,
        **more,
    }
    return type(f"Ghost{base.__name__}", (base,), body)


def _any_dim(self: Any, x: Tensor) -> None:
    """SyncBatchNorm checks nothing, and as a plain layer it needs a check to call."""


def _plain_act_forward(self: Any, x: Tensor) -> Tensor:
    y = _BatchNorm.forward(self, x)
    return self.act(self.drop(y)) if hasattr(self, "act") else y


GHOST_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    base: _ghost_class(base, base.forward)
    for base in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d)
}
for _sync in (nn.SyncBatchNorm, SyncBatchNormAct):
    GHOST_CLASSES[_sync] = _ghost_class(_sync, _plain_act_forward, _check_input_dim=_any_dim)
