"""The loader: one item an update, whose micro-batches are made when they are needed."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, default_collate

from lbaccel.batch.plan import BatchPlan, MicroBatch
from lbaccel.batch.stream import LastUpdate, UpdateStream
from lbaccel.data.as_data_loader import (
    check_how,
    check_options,
    check_parts,
    is_unpacking,
    taken_apart,
)
from lbaccel.data.order import (
    COMPUTED,
    SORTED,
    check_order,
    check_repeats,
    repeated_at,
    samples_at,
)
from lbaccel.data.slots import SHAPE, slots_for
from lbaccel.data.worker_side import (
    LOAD,
    Collate,
    KeyedBatches,
    KeyedSamples,
    as_it_is,
    checked,
)
from lbaccel.data.workers import let_the_parent_decide
from lbaccel.errors import MISSING, InputError, check_seed, check_state, check_whole

Transform = Callable[[Any, MicroBatch, NDArray[np.int64], NDArray[np.int64]], Any]
HALF_READ = -1
AT_ONCE = 1024  # samples whose places in the order are looked up together
FETCH = "__lbaccel_fetch__"  # no data set has it by chance
FINISH = "__lbaccel_finish__"


@dataclass
class Update:
    """One update's share of this rank: iterate it once for pairs (MicroBatch, data).

    `recut` makes the same samples anew in micro-batches of the size it is given, and changes
    nothing else; without it, an update that runs out of memory can't be done again. `loader` is
    where the update comes from: the size of the updates to come is set there.
    """

    index: int
    num_samples: int
    micro_batches: Iterable[tuple[MicroBatch, Any]]
    recut: Callable[[int], Iterable[tuple[MicroBatch, Any]]] | None = None
    loader: UpdateLoader | None = None

    def __iter__(self) -> Iterator[tuple[MicroBatch, Any]]:
        if is_unpacking(sys._getframe(1)):
            raise taken_apart("for images, labels in loader")
        return iter(self.micro_batches)

    def __getitem__(self, key: Any) -> NoReturn:
        raise taken_apart(f"batch[{key!r}]")


class UpdateLoader:
    """Takes the place of a DataLoader: yields the updates of an epoch, cut as the plan says.

    Indices are split, never tensors: at most the micro-batches in flight stand in memory. Which
    samples an update holds, in which order, and every random number that the data set's transforms
    draw from torch, numpy or random depend on (seed, epoch, sample index) alone. Each pass of
    `for update in loader` is one epoch, from where the loader stands; `len(loader)` is what that
    pass yields.

    Args:
        dataset: a map-style data set (`__len__` and `__getitem__`), or one that makes whole
            micro-batches: `__lbaccel_fetch__(indices, epochs)` of two int64 arrays [n] then
            returns the data of these n samples, in the main process. `__lbaccel_load__` is the
            same for data that take long to read: the workers call it, and the main process gives
            its result to `__lbaccel_finish__(data, indices, epochs)` where there is one. No
            generator is seeded for them. A method named `fetch` means nothing here.
        plan: the partition; a batch above the data set becomes full-batch training, with a
            warning.
        rank: this process, below `plan.world_size`.
        seed: of order and augmentation.
        last_update: what becomes of an epoch's remainder: "wrap", "keep" or "drop".
        growth: where the number of samples an update changes, see `UpdateStream`; sizes above the
            data set become the whole of it.
        repeats: how many samples of an update are one image, each with an augmentation of its own
            (repeated augmentation, Hoffer et al. 2020, arXiv 1901.09335; Berman et al. 2019, arXiv
            1902.05509); see `repeated_at`. An epoch keeps its number of samples, so it shows that
            many times fewer images. `epochs` of `fetch` and `transform` are then the numbers of
            draws, epoch x repeats + copy.
        num_workers: processes that load a map-style data set, or call `__lbaccel_load__`.
        collate_fn: makes a micro-batch of a list of samples.
        transform: (data, micro_batch, indices, epochs) -> data, in the main process.

    >>> plan = BatchPlan(global_batch_size=4, micro_batch_size=2)
    >>> loader = UpdateLoader(list(range(10)), plan)
    >>> len(loader), [micro_batch.num_samples for micro_batch, _ in next(iter(loader))]
    (3, [2, 2])
    """

    def __init__(
        self,
        dataset: Any = MISSING,
        plan: BatchPlan = MISSING,
        *,
        rank: int = 0,
        seed: int = 0,
        last_update: LastUpdate = "wrap",
        growth: Sequence[tuple[int, int]] = (),
        repeats: int = 1,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        transform: Transform | None = None,
        **of_a_data_loader: NoReturn,
    ) -> None:
        check_options(of_a_data_loader)
        check_parts(dataset, plan)
        if not len(dataset):
            raise InputError("the training set is empty: give a data set of at least one sample.")
        if not any(hasattr(dataset, name) for name in ("__getitem__", FETCH, LOAD)):
            raise InputError(
                f"the training set, a {type(dataset).__name__}, has neither __getitem__ nor "
                f"{FETCH}, so no sample can be read. Give it __getitem__(index), or {FETCH}"
                "(indices, epochs) that returns a whole micro-batch (a method named fetch was "
                "called so before)."
            )
        check_how(
            rank=rank,
            num_workers=num_workers,
            growth=growth,
            world_size=plan.world_size,
            collate_fn=collate_fn,
            transform=transform,
        )
        if plan.global_batch_size > len(dataset):
            warnings.warn(
                f"global_batch_size={plan.global_batch_size} is above the training set's "
                f"{len(dataset)} samples: every update sees the whole set once (full-batch "
                "training).",
                stacklevel=2,
            )
        self.dataset = dataset
        self.plan = plan.capped(len(dataset))
        self.rank = rank
        self.seed = check_seed("seed", seed)
        self.order = COMPUTED  # that of a state takes its place
        self.stream = UpdateStream(
            self.plan.global_batch_size,
            len(dataset),
            last_update,
            tuple((epoch, self._checked_size(size)) for epoch, size in growth),
        )
        check_whole("repeats", repeats)
        self.repeats = repeats
        sizes = (self.stream.global_batch_size, *(size for _, size in self.stream.growth))
        check_repeats(repeats, sizes)
        self._asked_growth = self.stream.growth
        self.num_workers = num_workers
        self.collate_fn = collate_fn or default_collate
        self.transform = transform
        self.next_update = 0
        self._batches: Iterator[Any] | None = None
        self._drawn = 0  # the update that `_batches` goes on with

    def _checked_size(self, size: int) -> int:
        """A size of updates that the ranks can share; at most the data set."""
        return (
            replace(self.plan, global_batch_size=size).capped(len(self.dataset)).global_batch_size
        )

    @property
    def epoch(self) -> int:
        """The epoch in which the next update starts."""
        position, _ = self.stream.span(self.next_update)
        return position // len(self.dataset)

    def __len__(self) -> int:
        return self.stream.first_update(self.epoch + 1) - self.next_update

    def __iter__(self) -> Iterator[Update]:
        last = self.next_update + len(self)
        while self.next_update < last:
            index = self.next_update
            self.next_update += 1
            yield self._update(index)
            if self._batches is not None and self._drawn != self.next_update:
                self._batches = None  # an update that was left half read: start the workers anew

    def grow(self, global_batch_size: int) -> int:
        """Another number of samples an update, from the epoch of the next update on.

        Call it between epochs.

        Returns:
            The size taken: at most the data set.

        Raises:
            InputError: in the middle of an epoch, or before the first.
        """
        size = self._checked_size(global_batch_size)
        if self.epoch == 0 or self.next_update != self.stream.first_update(self.epoch):
            where = "before the first update" if not self.next_update else "in the middle of one"
            raise InputError(
                f"grow({global_batch_size}) {where}: the size of updates changes where an epoch "
                "begins. Call it after a pass of `for update in loader`, or give the first size "
                "in the plan."
            )
        check_repeats(self.repeats, [size])
        growth = (*self.stream.growth, (self.epoch, size))
        self.stream = replace(self.stream, growth=growth)
        self._batches = None  # the workers load ahead in the old size
        return size

    def close(self) -> None:
        """End the workers now; the next update, if any, starts others.

        Without it they end where Python's collector finds the loader, which can be inside a worker
        of another loader.
        """
        self._batches = None

    def peek(self) -> Update:
        """The next update, which stays the next one."""
        return self._update(self.next_update)

    def set_micro_batch_size(self, micro_batch_size: int) -> None:
        """Cut the updates to come into micro-batches of another size; their samples stay.

        `LargeBatch` calls it where memory sets the size. Micro-batches that are being read stay as
        they are.

        Raises:
            InputError: a size that the plan can't have, such as one that cuts a ghost batch.
        """
        if micro_batch_size != self.plan.micro_batch_size:
            self.plan = replace(self.plan, micro_batch_size=micro_batch_size)
            self._batches = None  # the workers load ahead in the old size

    def _update(self, index: int) -> Update:
        num_samples = self.stream.span(index)[1]
        recut = partial(self._micro_batches, index)
        return Update(index, num_samples, self._micro_batches(index), recut, self)

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, how its updates have grown and will, and the rule of order."""
        growth = [list(change) for change in self.stream.growth]
        return {"next_update": self.next_update, "growth": growth, "order": self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from another place.

        How updates grew up to there is the state's; from there on it is this loader's own
        `growth`, where it was given one (a run made longer may have more of it than the state).
        The rule of order is the state's, and the first one where the state is older than the
        second (`lbaccel.data.order`).

        Raises:
            InputError: the state is of something else, or has a rule of a later lbaccel.
        """
        check_state("loader", state, "next_update")
        self.order = check_order(state.get("order", SORTED))
        self.next_update, self._batches = int(state["next_update"]), None
        if "growth" in state:  # not in those of lbaccel before batch-size schedules
            growth = tuple((int(epoch), int(size)) for epoch, size in state["growth"])
            self.stream = replace(self.stream, growth=growth)
            if self._asked_growth:
                past = tuple(change for change in growth if change[0] <= self.epoch)
                self.stream = stream = replace(self.stream, growth=past)
                ahead = (
                    (epoch, size)
                    for epoch, size in self._asked_growth
                    if epoch > (past[-1][0] if past else 0)
                    and stream.first_update(epoch) >= self.next_update
                )
                self.stream = replace(stream, growth=(*past, *ahead))

    def _keys(
        self, index: int, plan: BatchPlan
    ) -> Iterator[tuple[MicroBatch, NDArray[Any], NDArray[Any]]]:
        start, num_samples = self.stream.span(index)
        of_set = {"num_samples": len(self.dataset), "seed": self.seed, "order": self.order}
        first, ahead = 0, ()

        def drawn(within: int, count: int) -> tuple[NDArray[Any], NDArray[Any]]:
            if self.repeats == 1:
                return samples_at(start + within, count, **of_set)
            return repeated_at((start, num_samples), within, count, repeats=self.repeats, **of_set)

        for micro_batch in plan.partition(self.rank, num_samples):
            within, count = micro_batch.start, micro_batch.num_samples
            if not ahead or within < first or within + count > first + len(ahead[0]):
                first = within
                ahead = drawn(within, max(count, min(AT_ONCE, num_samples - within)))
            here = slice(within - first, within - first + count)
            yield micro_batch, ahead[0][here].copy(), ahead[1][here].copy()

    def _micro_batches(
        self, index: int, micro_batch_size: int | None = None
    ) -> Iterator[tuple[MicroBatch, Any]]:
        plan = self.plan
        if micro_batch_size is not None:
            plan = replace(plan, micro_batch_size=micro_batch_size)
        fetch, finish = (getattr(self.dataset, name, None) for name in (FETCH, FINISH))
        batches = None
        if fetch is None:
            batches = self._batches_from(index, plan)
        for micro_batch, indices, epochs in self._keys(index, plan):
            data = fetch(indices, epochs) if batches is None else checked(next(batches))  # type: ignore[misc]
            if finish is not None:
                data = finish(data, indices, epochs)
            if self.transform is not None:
                data = self.transform(data, micro_batch, indices, epochs)
            yield micro_batch, data
        if batches is not None and batches is self._batches:
            self._drawn = index + 1

    def _batches_from(self, index: int, plan: BatchPlan) -> Iterator[Any]:
        """Collated samples from an update on, without end.

        Those of the loader's own size go on where the update before ended, since the workers load
        ahead; another size has an iterator of its own, and leaves that one alone.
        """
        if plan != self.plan:
            return self._load_from(index, plan)
        if self._batches is None or self._drawn != index:
            self._batches = self._load_from(index, plan)
        self._drawn = HALF_READ
        return self._batches

    def _load_from(self, index: int, plan: BatchPlan) -> Iterator[Any]:
        whole = hasattr(self.dataset, LOAD)
        slots = slots_for(
            getattr(self.dataset, SHAPE, None),
            num_workers=self.num_workers,
            batch_size=plan.micro_batch_size,
        )
        loader = DataLoader(
            KeyedBatches(self.dataset, slots) if whole else KeyedSamples(self.dataset, self.seed),  # type: ignore[arg-type]
            batch_sampler=_KeyLists(self, index, plan),  # type: ignore[arg-type]
            num_workers=self.num_workers,
            collate_fn=as_it_is if whole else Collate(self.collate_fn),
            **worker_options(),
        )
        return iter(loader) if slots is None else slots.opened(loader)


def worker_options() -> dict[str, Any]:
    """Arguments of each DataLoader: workers outlive Ctrl-C, and no draw is the user's."""
    return {
        "worker_init_fn": let_the_parent_decide,
        "generator": torch.Generator(),  # else its base seed comes from the user's
        "pin_memory": torch.cuda.is_available(),
    }


class _KeyLists:
    """The keys (epoch, index) of all micro-batches of this rank from an update on, without end."""

    def __init__(self, loader: UpdateLoader, index: int, plan: BatchPlan) -> None:
        self.loader, self.index, self.plan = loader, index, plan

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        index = self.index
        while True:
            for _, indices, epochs in self.loader._keys(index, self.plan):
                yield list(zip(epochs.tolist(), indices.tolist(), strict=True))
            index += 1
