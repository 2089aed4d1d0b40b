"""BatchNorm under accumulation and recompute: ghost batches, statistics at commit, recalibration.

Statistics of a ghost batch never touch the running buffers during an update. A layer's forward
hands torch's kernel an accumulator A in place of the buffer r (A starts at 0, momentum m):

    A <- (1 - m) A + m s_g          for each ghost batch g of this rank, in order

and `GhostNorm.commit` writes, with G_k the number of ghost batches on the ranks after rank k,

    r <- (1 - m)^G r + sum_k (1 - m)^(G_k) A_k

which is what training the G ghost batches one after the other would leave (Hoffer et al. 2017,
algorithm 1, with the statistics moved once a ghost batch). The accumulators cost no kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from timm.models.levit import LinearNorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lbaccel.batch.plan import MicroBatch, NormBatchSize
from lbaccel.errors import InputError
from lbaccel.update.ghost_layers import GHOST_CLASSES, SLOT, Slot, merge_moments, plain_class

BatchNormStatistics = Literal["per_ghost", "per_update"]
Gather = Callable[[Tensor], Tensor]
"""Takes a vector [L] of this rank, returns the matrix [world_size, L] of all ranks' vectors."""


class GhostNorm:
    """The BatchNorm layers of one model, and their statistics of the running update.

    Built by `convert_batch_norm`. `recomputing` is set around backward by the update, so that
    activation checkpointing's second forward leaves no trace.
    """

    def __init__(
        self, *, frozen: bool, statistics: BatchNormStatistics, over_all: bool = False
    ) -> None:
        self.frozen = frozen
        self.over_all = over_all  # one statistic for all samples of the update
        self.statistics: BatchNormStatistics = "per_update" if over_all else statistics
        self.micro_batch: MicroBatch | None = None
        self.recomputing = False
        self.refusing = False  # around a loss that every rank computes
        self.restored = False  # its layers are plain again: an update would be another one
        self.device_type: str | None = None  # that a trace stands for; None: that of the tensors
        self.layers: list[Any] = []
        self._pending: Tensor | None = None
        self._spare: Tensor | None = None
        self._values = torch.zeros(0)

    def __len__(self) -> int:
        return len(self.layers)

    @contextmanager
    def forward(self, micro_batch: MicroBatch) -> Iterator[None]:
        """Inside, the layers see the ghost batches of `micro_batch`, in forward and recompute.

        Raises:
            InputError: `restore_batch_norm` took its layers back.
        """
        if self.restored:
            raise InputError(
                "restore_batch_norm(model) came before this update, so BatchNorm would no longer "
                "see ghost batches. Build a new LargeBatch and call its prepare(model, ...), or "
                "restore a copy: restore_batch_norm(copy.deepcopy(model))."
            )
        self.micro_batch = micro_batch
        try:
            yield
        finally:
            self.micro_batch, self.recomputing = None, False
            for layer in self.layers:
                slot = layer._ghost_slot
                slot.num_groups += slot.calls * len(micro_batch.group_sizes)
                slot.calls = 0

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Inside, a forward of a layer is a recompute and takes no statistic."""
        self.recomputing = True
        try:
            yield
        finally:
            self.recomputing = False

    @contextmanager
    def preview(self, micro_batch: MicroBatch) -> Iterator[None]:
        """Inside, the layers see the ghost batches and take no statistic."""
        with self.forward(micro_batch), self.backward():
            yield

    @contextmanager
    def whole(self, num_samples: int, *, counts: bool) -> Iterator[None]:
        """Inside, a layer in training that would take statistics is refused."""
        self.refusing = True
        try:
            yield
        finally:
            self.refusing = False

    def begin(self) -> None:
        """Forget what an update left behind and start the next (statistics of a dropped update)."""
        if self.frozen or not self.layers:
            return
        tracked = [layer for layer in self.layers if layer.running_mean is not None]
        if (tracked and self._pending is None) or self._moved(tracked):
            self._allocate(tracked)
        if self._pending is not None:
            self._pending.zero_()
            self._values.zero_()
        for layer in self.layers:
            layer._ghost_slot.num_groups = 0

    def _moved(self, tracked: list[Any]) -> bool:
        pending = self._pending
        if pending is None:
            return False
        buffer = tracked[0].running_mean
        return pending.device != buffer.device or pending.dtype != buffer.dtype

    def _allocate(self, tracked: list[Any]) -> None:
        like = {(b.dtype, b.device) for layer in tracked for b in (layer.running_mean,)}
        if len(like) > 1:
            raise InputError(
                f"BatchNorm buffers have several dtypes or devices {sorted(map(str, like))}; "
                "cast and move the model as a whole."
            )
        sizes = [layer.num_features for layer in tracked]
        dtype, device = like.pop()
        self._pending = torch.zeros(2 * sum(sizes), dtype=dtype, device=device)
        self._spare = torch.zeros_like(self._pending)
        self._values = self._pending.new_zeros(len(tracked), dtype=torch.float64)
        for layer, values in zip(tracked, self._values, strict=True):
            layer._ghost_slot.values = values
        for vector, names in ((self._pending, "mean var"), (self._spare, "spare_mean spare_var")):
            halves = vector.view(2, -1)
            for name, half in zip(names.split(), halves, strict=True):
                for layer, view in zip(tracked, half.split(sizes), strict=True):
                    setattr(layer._ghost_slot, name, view)

    @torch.no_grad()
    def commit(self, gather: Gather | None = None) -> None:
        """Write the update's statistics to the running buffers, once, in order of the ranks.

        Args:
            gather: collects a vector of every rank (one collective); None in one process.
        """
        if self.frozen or self._pending is None:
            return
        tracked = [layer for layer in self.layers if layer.running_mean is not None]
        slots = [layer._ghost_slot for layer in tracked]
        per_ghost, counts = self.statistics == "per_ghost", self._values
        if per_ghost:
            counts = self._values.new_tensor([slot.num_groups for slot in slots])
        # Counts ride along in float64, exact to 2^53.
        vector = torch.cat([counts, self._pending.double()])
        rows = vector[None] if gather is None else gather(vector)
        counts, moments = rows[:, : len(slots)], rows[:, len(slots) :]
        moments = moments.view(len(rows), 2, -1)
        if per_ghost:
            _write_per_ghost(tracked, counts, moments)
            return
        sizes = [layer.num_features for layer in tracked]
        for i, (layer, of_layer) in enumerate(zip(tracked, moments.split(sizes, 2), strict=True)):
            _write_per_update(layer, counts[:, i], of_layer[:, 0], of_layer[:, 1])


def _write_per_ghost(layers: list[Any], counts: Tensor, moments: Tensor) -> None:
    """The equation of the module, for all layers by the same few kernels.

    Args:
        layers: that keep running statistics.
        counts: float64 [ranks, layers], ghost batches.
        moments: float64 [ranks, 2, channels of all layers], A of mean and variance.
    """
    sizes = [layer.num_features for layer in layers]
    total = counts.sum(0)
    after = counts.flip(0).cumsum(0).flip(0) - counts
    decay, weights = torch.empty_like(total), torch.empty_like(counts)
    for momentum in {layer.momentum for layer in layers}:
        here = [i for i, layer in enumerate(layers) if layer.momentum == momentum]
        place = slice(None) if len(here) == len(layers) else here
        if momentum is None:  # cumulative average: A_k is the mean over rank k's ghost batches
            keep = torch.stack([layers[i].num_batches_tracked for i in here]).double()
            both = (keep + total[place]).clamp(min=1)
            decay[place], weights[:, place] = keep / both, counts[:, place] / both
        else:
            decay[place] = (1 - momentum) ** total[place]
            weights[:, place] = (1 - momentum) ** after[:, place]
    channels = torch.tensor(sizes).to(counts.device)
    each = torch.arange(len(sizes), device=counts.device).repeat_interleave(
        channels, output_size=sum(sizes)
    )
    buffers = [[layer.running_mean for layer in layers], [layer.running_var for layer in layers]]
    before = torch.stack([torch.cat(part) for part in buffers])
    now = decay[each] * before.double() + (weights[:, None, each] * moments).sum(0)
    found = [part for half in now.to(before.dtype) for part in half.split(sizes)]
    torch._foreach_copy_([*buffers[0], *buffers[1]], found)
    numbers = [layer.num_batches_tracked for layer in layers]
    torch._foreach_add_(numbers, list(total.to(numbers[0].dtype)))


def _write_per_update(layer: Any, counts: Tensor, means: Tensor, sums: Tensor) -> None:
    n, mean, m2 = counts[0].clone(), means[0].clone(), sums[0].clone()
    for k in range(1, len(counts)):
        if counts[k] > 0:
            merge_moments(mean, m2, n, means[k].clone(), sums[k].clone(), counts[k])
            n += counts[k]
    if n == 0:
        return
    layer.num_batches_tracked += 1
    m = layer.momentum
    m = 1.0 / float(layer.num_batches_tracked) if m is None else m
    for buffer, value in ((layer.running_mean, mean), (layer.running_var, m2 / (n - 1))):
        buffer.copy_((1 - m) * buffer.double() + m * value)


def convert_batch_norm(
    model: nn.Module,
    norm_batch_size: NormBatchSize,
    *,
    statistics: BatchNormStatistics = "per_ghost",
) -> GhostNorm:
    """Make every BatchNorm layer of `model` see ghost batches inside an update, in place.

    Only the class of the layers changes: parameters, buffers and `state_dict` stay, and outside
    an update the layers do what they did. With "frozen" they normalise by their running
    statistics in training as well (gamma and beta still train). Pickle (`torch.save(model)`) keeps
    the plain layers, and `restore_batch_norm` gives them back.

    Args:
        model: any module; nn.BatchNorm1d to 3d, nn.SyncBatchNorm, and timm's BatchNormAct2d.
        norm_batch_size: samples of a statistic, "global" (all of the update), "frozen", or None
            (then there must be no layer).
        statistics: "per_ghost" moves running statistics once a ghost batch, "per_update" once an
            update by merged moments (few updates then leave them far behind the weights).

    Returns:
        The `GhostNorm` to hand to the update; `len()` is the number of layers.

    Raises:
        InputError: BatchNorm layers but no `norm_batch_size`, or a layer of an unknown subclass.
    """
    if statistics not in ("per_ghost", "per_update"):
        raise InputError(f"statistics={statistics!r} is not 'per_ghost' or 'per_update'.")
    norm = GhostNorm(
        frozen=norm_batch_size == "frozen",
        statistics=statistics,
        over_all=norm_batch_size == "global",
    )
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, _BatchNorm)]
    if found and norm_batch_size is None:
        raise InputError(
            f"the model has {len(found)} BatchNorm layers (first: {found[0][0]!r}), and the plan "
            "has no norm_batch_size: what BatchNorm sees decides the result. Give "
            "BatchPlan(norm_batch_size=32), another number of samples, or 'frozen'."
        )
    ghost_classes = set(GHOST_CLASSES.values())
    for name, layer in found:
        if type(layer) not in GHOST_CLASSES and type(layer) not in ghost_classes:
            raise InputError(
                f"BatchNorm layer {name!r} is a {type(layer).__name__}, which lbaccel does not "
                f"know how to cut. Known: {', '.join(c.__name__ for c in GHOST_CLASSES)}."
            )
        if norm.frozen and layer.running_mean is None:
            raise InputError(
                f"BatchNorm layer {name!r} keeps no running statistics (track_running_stats="
                "False), so there are none to freeze. Use norm_batch_size=32 or another number."
            )
    for name, layer in found:
        layer.__class__ = GHOST_CLASSES.get(type(layer), type(layer))  # type: ignore[assignment]
        layer._ghost_slot = Slot(norm, name)  # type: ignore[assignment]
        norm.layers.append(layer)
    for module in model.modules():
        if isinstance(module, LinearNorm):  # of LeViT: [samples, tokens, C], with its rows in a run
            slot = getattr(module.bn, SLOT, None)
            if slot is not None:
                slot.rows_of_samples = True
    return norm


def restore_batch_norm(model: nn.Module) -> nn.Module:
    """Take `convert_batch_norm` back in place: every BatchNorm layer is of its own class again.

    Parameters, buffers and hooks stay the same objects, so `state_dict` and optimizer do too, and
    the model does to the bit what it did before it was converted, with the statistics of today.
    Call it when training has ended: an update of the `LargeBatch` that prepared the model is
    refused from then on. Layers that were not converted are left alone.

    Args:
        model: any module, wrapped (as by DDP) or not.

    Returns:
        `model` itself.

    >>> import torch
    >>> from lbaccel import convert_batch_norm, restore_batch_norm
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    >>> norm = convert_batch_norm(model, 32)  # `LargeBatch.prepare` does it
    >>> type(model[1]).__name__
    'GhostBatchNorm1d'
    >>> restore_batch_norm(model) is model, type(model[1]).__name__
    (True, 'BatchNorm1d')
    """
    ghost_classes = set(GHOST_CLASSES.values())
    for layer in model.modules():
        if type(layer) in ghost_classes:
            slot = vars(layer).pop(SLOT)
            layer.__class__ = plain_class(layer)  # type: ignore[assignment]
            if slot is not None:
                slot.norm.restored, slot.norm.layers = True, []
    return model


def has_batch_norm(model: nn.Module) -> bool:
    """Whether `model` holds a BatchNorm layer."""
    return any(isinstance(m, _BatchNorm) for m in model.modules())


def recalibrate(
    model: nn.Module, batches: Iterable[Any], *, device: torch.device | str | None = None
) -> nn.Module:
    """A copy of `model` whose running statistics are the mean over `batches` of training samples.

    r = (1 / K) sum_k s_k over the K batches, as `torch.optim.swa_utils.update_bn` does; take
    batches of `norm_batch_size` samples. The model itself is left alone.

    Args:
        model: the network, unwrapped.
        batches: inputs [n, C, H, W], or tuples that begin with them.
        device: where to move the inputs.
    """
    twin = copy.deepcopy(model)
    torch.optim.swa_utils.update_bn(batches, twin, device=device)  # type: ignore[arg-type]
    return twin
