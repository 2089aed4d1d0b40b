"""The average of the weights, and the statistics that BatchNorm has in it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lbaccel.batch.plan import BatchPlan
from lbaccel.data.loader import Update, UpdateLoader
from lbaccel.errors import RunFailed, told
from lbaccel.recipe.evaluation import NotEvaluated
from lbaccel.recipe.unforeseen import first_line, in_a_sentence
from lbaccel.runs.ranks import on_each_rank
from lbaccel.update.accumulation import gather_rows
from lbaccel.update.memory.oom import is_out_of_memory, let_go
from lbaccel.update.normalization import has_batch_norm
from lbaccel.update.recalibration import Taken, measuring, tracked_norms, write_statistics
from lbaccel.update.sharding.precision import autocast

MOST_IMAGES = 2048  # of the training set, in whole groups


@dataclass(frozen=True, eq=False)
class BegunAverage:
    """An average that begins with the weights of update 1, as timm's training script has it.

    Args:
        average: timm's; its decay is 0 at the first update.
        num_updates: says how many updates are done, the one that moves it included.
    """

    average: Any
    num_updates: Callable[[], int]

    @property
    def module(self) -> nn.Module:
        """The network with the averaged weights."""
        return self.average.module

    def update(self, model: nn.Module) -> None:
        """Move it by the weights of `model`."""
        self.average.update(model, step=self.num_updates())


def average_of(
    model: nn.Module, decay: float | None, *, warmup: str, num_updates: Callable[[], int]
) -> Any:
    """timm's average of the weights of `model`, as they are now; None without a decay D.

    After update u it is e <- d e + (1 - d) w.

    Args:
        model: with the weights w.
        decay: D.
        warmup: "none": d = D at each update; "first": d = 0 at u = 1, and D later; "power":
            d = min(D, 1 - u^(-2/3)).
        num_updates: says u at update u.
    """
    if decay is None:
        return None
    from timm.utils.model_ema import ModelEmaV3

    average = ModelEmaV3(model, decay=decay, use_warmup=warmup == "power")
    return average if warmup == "none" else BegunAverage(average, num_updates)


@dataclass(frozen=True, eq=False)
class AverageNorm:
    """Measures BatchNorm's statistics of the averaged weights over the first training images.

    Group k holds the samples k n to (k + 1) n - 1 of the first epoch's order, as training sees them
    (crops, mirror images, mixing), with n the `norm_batch_size`. Rank r of W takes the groups r,
    r + W, ...; their statistics are added in float64 in the order of the groups. So the result is a
    function of the averaged weights, the data, the seed and n alone.

    Args:
        network: with the averaged weights.
        loader: of the training, whose images are taken.
        accelerator: of all ranks.
        dtype: of the images.
        group_size: n.
        num_groups: K.
    """

    network: nn.Module
    loader: UpdateLoader
    accelerator: Any
    dtype: torch.dtype
    group_size: int
    num_groups: int

    @property
    def world_size(self) -> int:
        """Ranks that share the groups; 1, each rank for itself, where there are fewer groups."""
        ranks = self.accelerator.num_processes
        return ranks if ranks * self.group_size <= len(self.loader.dataset) else 1

    @property
    def num_images(self) -> int:
        """Of the training set that are taken, K n."""
        return self.group_size * self.num_groups

    def __str__(self) -> str:
        return (
            f"average: its BatchNorm is measured before each evaluation, over "
            f"{self.num_images:,} training images ({self.num_groups} x "
            f"{self.group_size})"
        )

    def measure(self) -> None:
        """Write the statistics of the weights as they are now; a collective.

        Raises:
            NotEvaluated: on every rank, and the statistics are as before. Its `error` is an
                InputError where an image of some rank can't be read, and a RunFailed where a group
                does not fit in memory.
        """
        world_size, total = self.world_size, None
        failed: BaseException | None = None
        loader = self._groups()
        updates = iter(loader)
        with measuring(self.network) as taken, closing(loader):
            for first in range(0, self.num_groups, world_size):
                row = None
                try:
                    row = self._statistics(next(updates), taken)
                except Exception as error:  # the other ranks wait for this one's
                    failed = in_a_sentence(told(error))
                rows = self._of_all_ranks(row)
                if rows is None:
                    total = None
                    break
                for statistics in rows[: self.num_groups - first]:
                    total = statistics.clone() if total is None else total + statistics
        if total is None or self.world_size < self.accelerator.num_processes:
            try:
                on_each_rank(self.accelerator, lambda: _raise(failed))
            except Exception as error:
                raise NotEvaluated(error) from error
        assert total is not None
        write_statistics(self.network, total / self.num_groups)

    def _groups(self) -> UpdateLoader:
        """Rounds of a group a rank; the last round may hold groups past the last that counts."""
        n, of_all, rank = self.group_size, self.world_size, 0
        if of_all > 1:
            rank = self.accelerator.process_index
        groups = UpdateLoader(
            self.loader.dataset,
            BatchPlan(
                global_batch_size=of_all * n,
                micro_batch_size=n,
                world_size=of_all,
                norm_batch_size=n,
            ),
            rank=rank,
            seed=self.loader.seed,
            num_workers=self.loader.num_workers,
            transform=self.loader.transform,
        )
        groups.order = self.loader.order  # an older run's, where it is one
        return groups

    def _statistics(self, update: Update, taken: Taken) -> Tensor:
        ((_, (images, _)),) = update
        images = images.to(self.accelerator.device, self.dtype)
        for last in (False, True):
            try:
                with torch.no_grad(), autocast(self.accelerator):
                    self.network(images)
                return taken()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if last:
                    raise _nothing_fits(error, self.group_size) from error
                let_go(error, self.accelerator.device)
                taken()  # a part of the layers ran
        raise AssertionError("the second attempt returns or raises")

    def _of_all_ranks(self, row: Tensor | None) -> Tensor | None:
        """[world_size, statistics] in the order of the ranks; None where one has none."""
        if self.world_size == 1:
            return None if row is None else row[None]
        size = 2 * sum(layer.num_features for layer in tracked_norms(self.network))
        vector = torch.zeros(1 + size, dtype=torch.float64, device=self.accelerator.device)
        if row is not None:
            vector[0], vector[1:] = 1, row
        rows = gather_rows(vector)
        return rows[:, 1:] if bool(rows[:, 0].all()) else None


def norm_of_average(
    how: str, ema: Any, loader: UpdateLoader, accelerator: Any, *, dtype: torch.dtype
) -> AverageNorm | None:
    """The part that measures the statistics of the average; None where none are measured.

    Args:
        how: "recalibrated", or "average": the statistics are averages like the weights.
        ema: the average, or None.
        loader: of the training; its plan says what BatchNorm sees.
        accelerator: of all ranks.
        dtype: of the images.
    """
    size = loader.plan.norm_batch_size
    if ema is None or how != "recalibrated" or not isinstance(size, int):
        return None
    if not has_batch_norm(ema.module):
        return None
    images = min(MOST_IMAGES, len(loader.dataset))
    size = min(size, len(loader.dataset))
    return AverageNorm(ema.module, loader, accelerator, dtype, size, max(1, images // size))


def _raise(error: BaseException | None) -> None:
    if error is not None:
        raise error


def _nothing_fits(error: Exception, size: int) -> RunFailed:
    return RunFailed(
        f"memory ran out where BatchNorm of the averaged weights is measured, in a group of {size} "
        f"samples ({first_line(error)}). Give the run more memory (--memory), or let the average "
        "keep averaged statistics: --ema-norm average."
    )
