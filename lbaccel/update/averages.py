"""Running averages that a forward writes, moved once an update as by the whole batch.

A forward that moves an average r by its samples, r <- (1 - m) r + m s with s a mean over them, does
so once a micro-batch. Here each of the micro-batches i, of n_i samples, begins at the r of before
the update and leaves some a_i; the end of the update writes

    r <- r + (1 / B) sum_i n_i (a_i - r),   B = sum_i n_i over all ranks

which is (1 - m) r + m times the mean over all samples, whatever m is: the whole batch's r.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lbaccel.batch.plan import MicroBatch
from lbaccel.errors import InputError
from lbaccel.update.reachable import LOSS, Place, is_below, reachable


@dataclass
class _Average:
    """One declared tensor, and its sum over the running update's micro-batches."""

    place: Place
    tensor: Tensor  # the user's own, which stays where it is
    start: Tensor  # a copy from before the update
    version: int
    total: Tensor  # sum_i n_i (a_i - r) on this rank
    in_place: bool  # whether something was seen to write into it


class RunningAverages:
    """The tensors that the user declared as running averages of samples; see the module.

    It is a `Scope`: every forward, and every recompute, of an update sees the average of before the
    update. An attempt that fails leaves it there.

    Args:
        names: paths of tensors, or of what holds them: "head.centers", "teacher", "loss_fn.mean".
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        if isinstance(names, str):
            raise InputError(f"averages={names!r}: give a list of names, averages=[{names!r}].")
        self.names = tuple(names)
        self._micro_batch: MicroBatch | None = None
        self._averages: dict[str, _Average] = {}
        self._stage = "forward"
        self._in_place: dict[str, bool] = {}
        self._looked: set[str] = set()  # at the stages of an update that may write

    def holds(self, path: str) -> bool:
        """Whether the tensor at `path` was declared."""
        return any(is_below(path, name) for name in self.names)

    def check(self, model: nn.Module) -> None:
        """Stop at a name of the model's that holds no tensor, before anything runs."""
        self._find(model, [name for name in self.names if not is_below(name, LOSS)])

    def begin(self, model: nn.Module, loss_fn: Any) -> None:
        """Start an update, or an attempt at it: remember where each average stands.

        Raises:
            InputError: a name without a tensor, or a tensor that can't be an average.
        """
        if not self.names:
            return
        self._averages = {}
        for path, place in self._find(model, self.names, loss_fn).items():
            tensor = place.tensor
            assert tensor is not None
            wide = torch.promote_types(tensor.dtype, torch.float32)
            start = tensor.detach().clone()
            total = torch.zeros_like(start, dtype=wide)
            self._averages[path] = _Average(
                place, tensor, start, tensor._version, total, self._in_place.get(path, False)
            )

    def _find(
        self, model: nn.Module, names: Sequence[str], loss_fn: Any = None
    ) -> dict[str, Place]:
        found = reachable(model, loss_fn).named(names, option="averages") if names else {}
        for path, place in found.items():
            tensor = place.tensor
            assert tensor is not None
            reason = None
            if tensor.requires_grad:
                reason = "is trained by the optimizer: freeze it, requires_grad_(False)"
            elif not tensor.is_floating_point():
                reason = f"is of {tensor.dtype}: name the floating tensors beside it alone"
            elif type(tensor) not in (Tensor, nn.Parameter):
                reason = f"is a {type(tensor).__name__}, of which a rank holds a part"
            if reason is not None:
                raise InputError(f"averages: {path!r} {reason}.")
        return found

    def forget(self) -> None:
        """Drop what the running attempt added up; each average stands as before the update."""
        self._averages = {}

    @contextmanager
    def forward(self, micro_batch: MicroBatch) -> Iterator[None]:
        """Inside, a forward may move the averages; after it, they are as before."""
        self._micro_batch = micro_batch
        try:
            yield
        finally:
            self._micro_batch = None
            self._put_back()

    @contextmanager
    def preview(self, micro_batch: MicroBatch) -> Iterator[None]:
        """Inside, a forward may move the averages, and it counts nothing."""
        with self.forward(micro_batch):
            yield
            self._look("forward")

    @contextmanager
    def whole(self, num_samples: int, *, counts: bool) -> Iterator[None]:
        """Around a loss on all samples; what it leaves counts once over the ranks."""
        self._stage = "loss"
        try:
            with self.forward(MicroBatch(0, (num_samples,), is_filler=not counts)):
                yield
        finally:
            self._stage = "forward"

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Take what the forward left, and let a recompute see what its forward saw.

        Raises:
            InputError: the gradient goes through an average that the forward had moved.
        """
        self._take()
        self._put_back()
        try:
            yield
        except RuntimeError as error:
            if not self._averages or "modified by an inplace operation" not in str(error):
                raise
            raise InputError(
                f"the gradient goes through a tensor of averages={list(self.names)} that the "
                "forward moved, by its own micro-batch alone. Read the average first and move it "
                "after, and give the graph a copy: mean = self.mean.clone()."
            ) from error

    @torch.no_grad()
    def _take(self) -> None:
        assert self._micro_batch is not None
        self._look(self._stage)
        for path, average in self._averages.items():
            now = average.place.tensor
            if now is None or now.shape != average.start.shape:
                shape = None if now is None else tuple(now.shape)
                raise InputError(
                    f"averages: {path!r} of shape {tuple(average.start.shape)} is {shape} after a "
                    "forward. An average keeps its shape."
                )
            if not self._micro_batch.is_filler:
                step = now.detach().to(average.total.dtype) - average.start
                average.total.add_(step, alpha=self._micro_batch.num_samples)

    def _look(self, stage: str) -> None:
        """Once, at the first of each stage: `.data` is written without a word to autograd."""
        if stage in self._looked:
            return
        self._looked.add(stage)
        for path, average in self._averages.items():
            moved = average.tensor._version != average.version
            average.in_place |= moved or not torch.equal(average.tensor, average.start)
            self._in_place[path] = average.in_place

    @torch.no_grad()
    def _put_back(self) -> None:
        for average in self._averages.values():
            if average.place.tensor is not average.tensor:
                average.place.put(average.tensor)
            # A graph that saved a tensor which nobody wrote must not see it written now.
            if average.in_place or average.tensor._version != average.version:
                average.tensor.copy_(average.start)
                average.version = average.tensor._version

    @torch.no_grad()
    def commit(self, num_samples: int, *, world_size: int = 1) -> None:
        """Write each average once, from the micro-batches of all ranks; a collective.

        Args:
            num_samples: of the update, over all ranks (B).
            world_size: data-parallel processes.
        """
        for average in self._averages.values():
            if world_size > 1:
                dist.all_reduce(average.total)
            average.tensor.copy_(average.start + average.total / num_samples)
        self._averages = {}
