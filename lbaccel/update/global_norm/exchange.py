"""Words between the ranks after each pass of an attempt, also where one of them fails.

A rank that fails meets the others in the next exchange and says so; all of them then leave the
attempt and meet where every attempt ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from lbaccel.errors import InputError
from lbaccel.randomness.layouts import NotLearned
from lbaccel.update.accumulation import StoppedElsewhere, gather_rows
from lbaccel.update.global_norm.statistics import Statistics


class Exchange:
    """Collectives of one attempt.

    Args:
        world_size: data-parallel processes.
        device: where collectives run.
    """

    def __init__(self, world_size: int, device: torch.device) -> None:
        self.world_size, self._device = world_size, device
        self._left = 0

    @contextmanager
    def of_an_attempt(self) -> Iterator[Exchange]:
        """Around an attempt: its failure reaches the ranks that wait for this one.

        Raises:
            StoppedElsewhere: another rank failed.
            NotLearned: another rank must learn its masks, so that all of them try again.
        """
        self._left = 1
        try:
            yield self
        except StoppedElsewhere:
            raise
        except Exception as error:
            if self.world_size > 1 and self._left:
                unlearned = isinstance(error, NotLearned)
                failed, _ = self._status(failed=not unlearned, unlearned=unlearned)
                if failed and unlearned:
                    raise StoppedElsewhere from error
            raise

    def agree_on(self, depths: Sequence[int]) -> int:
        """The number of levels, which all micro-batches of all ranks must have.

        Raises:
            InputError: they differ.
        """
        low, high = min(depths), max(depths)
        if self.world_size > 1:
            self._meet()
            ends = torch.tensor([-low, high], device=self._device)
            dist.all_reduce(ends, op=dist.ReduceOp.MAX)
            low, high = -int(ends[0]), int(ends[1])
        if low != high:
            self._left = 0
            raise InputError(
                f"the micro-batches of this update pass between {low} and {high} BatchNorm layers, "
                "one after the other: with norm_batch_size='global' all of them must pass the same."
            )
        self._left = 2 * high
        return high

    def merge(self, layers: Sequence[Statistics]) -> None:
        """The moments of these layers over all ranks, in the order of the ranks."""
        if self.world_size == 1:
            return
        self._meet()
        for layer, rows in zip(layers, self._gathered([s.moments() for s in layers]), strict=True):
            layer.take(rows)

    def add_sums(self, layers: Sequence[Statistics]) -> None:
        """The sums of these layers' gradients over all ranks."""
        if not layers:
            return
        own = [layer.rank_sums() for layer in layers]
        if self.world_size > 1:
            self._meet()
            own = [rows.sum(0) for rows in self._gathered(own)]
        for layer, sums in zip(layers, own, strict=True):
            layer.sums = sums

    def _gathered(self, vectors: list[Tensor]) -> list[Tensor]:
        """All ranks' vectors [L], as the rows of a matrix [world_size, L] each."""
        return list(gather_rows(torch.cat(vectors)).split([len(v) for v in vectors], dim=1))

    def _meet(self) -> None:
        self._left -= 1
        failed, unlearned = self._status()
        if failed or unlearned:
            self._left = 0
            raise StoppedElsewhere if failed else NotLearned("masks of another rank were not known")

    def _status(self, *, failed: bool = False, unlearned: bool = False) -> list[float]:
        """How many ranks failed, and how many must learn their masks."""
        flags = torch.tensor([float(failed), float(unlearned)], device=self._device)
        dist.all_reduce(flags)
        return flags.tolist()
