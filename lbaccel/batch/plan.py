"""The batch as a contract: how a global batch is cut over ranks and micro-batches (no torch)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from lbaccel.batch.stream import LastUpdate, UpdateStream
from lbaccel.errors import InputError, check_whole

NormBatchSize = int | Literal["frozen", "global"] | None

FEW_UPDATES = 500
LARGE_FRACTION = 0.1


def boundary(total: int, parts: int, index: int) -> int:
    """Start of part `index` where `total` things are cut into `parts` that differ by at most one.

    `boundary = index * q + min(index, r)` with `q, r = divmod(total, parts)`: the first r parts
    hold q + 1 things, the others q.

    >>> [boundary(10, 4, i) for i in range(5)]
    [0, 3, 6, 8, 10]
    """
    q, r = divmod(total, parts)
    return index * q + min(index, r)


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward of one rank: a run of whole groups of an update's samples.

    `start` is the sample position in the update, `group_sizes` the sizes of its ghost batches in
    order (one entry where nothing couples samples). A filler repeats the update's first group with
    weight zero, so that all ranks run the same number of micro-steps.
    """

    start: int
    group_sizes: tuple[int, ...]
    is_filler: bool = False

    @property
    def num_samples(self) -> int:
        """Samples in the forward pass."""
        return sum(self.group_sizes)


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """An exact partition of a global batch of any size over ranks and micro-batches.

    An update of b samples is cut by sample position into ceil(b / u) groups whose sizes differ by
    at most one; u is `norm_batch_size` where BatchNorm takes statistics (a group is a ghost batch),
    2 with `mix_pairs`, else 1. Ranks take whole groups in order, micro-batches whole groups of
    their rank, so neither `micro_batch_size` nor `world_size` changes what a group holds:

        global_batch_size = sum of the micro-batches of all ranks

    Args:
        global_batch_size: samples per optimizer update, over all ranks and micro-batches.
        micro_batch_size: most samples in one forward of one rank; a multiple of the group size.
        world_size: data-parallel processes.
        norm_batch_size: samples a BatchNorm statistic is computed over (an integer, or "global":
            all of the update), "frozen" where BatchNorm keeps its running statistics, None for a
            network without BatchNorm.
        mix_pairs: mixup or cutmix without ghost batches: neighbouring pairs stay together.

    Raises:
        InputError: a size below one, a rank without a group, or a micro-batch that is no multiple.

    >>> plan = BatchPlan(global_batch_size=512, micro_batch_size=64, norm_batch_size=32)
    >>> print(plan)
    global batch 512 = 8 micro-batches x 64 samples x 1 rank; BatchNorm over 32 samples (16 groups)
    >>> plan.gradient_accumulation_steps
    8
    """

    global_batch_size: int
    micro_batch_size: int
    world_size: int = 1
    norm_batch_size: NormBatchSize = None
    mix_pairs: bool = False

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "micro_batch_size", "world_size"):
            check_whole(name, getattr(self, name))
        n = self.norm_batch_size
        if isinstance(n, str) and n not in ("frozen", "global"):
            raise InputError(
                f"norm_batch_size={n!r} is not an integer, 'frozen', 'global' or None."
            )
        if n is not None and not isinstance(n, str):
            check_whole("norm_batch_size", n)
            if n > self.global_batch_size:
                raise InputError(
                    f"norm_batch_size={n} is larger than global_batch_size="
                    f"{self.global_batch_size}: BatchNorm can't see more samples than an update "
                    f"has. Use norm_batch_size <= {self.global_batch_size}."
                )
        unit = self.group_size
        groups = self.num_groups(self.global_batch_size)
        if groups < self.world_size:
            size = f"global_batch_size={self.global_batch_size} is"
            if unit > 1:
                size += f" {groups} group{'s' * (groups > 1)} of at most {unit} samples,"
            raise InputError(
                f"{size} {'smaller' if unit == 1 else 'fewer'} than world_size={self.world_size}: "
                f"every rank needs at least one {'sample' if unit == 1 else 'group'}. "
                f"Use world_size <= {groups}."
            )
        if self.micro_batch_size % unit:
            below = self.micro_batch_size // unit * unit
            nearest = (below, below + unit) if below else (unit, 2 * unit)
            rule = "norm_batch_size" if isinstance(n, int) else "the pairs of mixup, size"
            raise InputError(
                f"micro_batch_size={self.micro_batch_size} is no multiple of {rule}={unit}: a "
                f"micro-batch holds whole groups. The nearest that fit are {nearest[0]} and "
                f"{nearest[1]}"
                + (
                    f"; or change the contract: norm_batch_size={self.micro_batch_size}, 'frozen'."
                    if isinstance(n, int) and self.micro_batch_size <= self.global_batch_size
                    else "."
                )
            )

    @property
    def group_size(self) -> int:
        """Largest size of a group, the unit of cutting, in samples."""
        if isinstance(self.norm_batch_size, int):
            return self.norm_batch_size
        return min(2, self.global_batch_size) if self.mix_pairs else 1

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of one rank in a full update: derived, never asked for."""
        return self.num_micro_steps(self.global_batch_size)

    def num_groups(self, num_samples: int) -> int:
        """Ghost batches (or pairs, or samples) of an update of `num_samples`."""
        return -(-num_samples // self.group_size)

    def num_micro_steps(self, num_samples: int) -> int:
        """Micro-steps that every rank runs in an update of `num_samples` samples."""
        most = -(-self.num_groups(num_samples) // self.world_size)
        return -(-most // (self.micro_batch_size // self.group_size))

    def rank_groups(self, rank: int, num_samples: int) -> tuple[int, int]:
        """First and one-past-last group of `rank` in an update of `num_samples` samples."""
        groups = self.num_groups(num_samples)
        return boundary(groups, self.world_size, rank), boundary(groups, self.world_size, rank + 1)

    def partition(self, rank: int = 0, num_samples: int | None = None) -> tuple[MicroBatch, ...]:
        """The micro-batches of `rank` in an update of `num_samples` (default: a full one).

        >>> plan = BatchPlan(global_batch_size=10, micro_batch_size=4)
        >>> [m.num_samples for m in plan.partition()]
        [4, 4, 2]
        """
        total = self.global_batch_size if num_samples is None else num_samples
        check_whole("num_samples", total)
        groups = self.num_groups(total)
        first, last = self.rank_groups(rank, total)
        per_micro = self.micro_batch_size // self.group_size
        micro_batches: list[MicroBatch] = []
        for begin in range(first, last, per_micro):
            edges = [
                boundary(total, groups, g) for g in range(begin, min(begin + per_micro, last) + 1)
            ]
            sizes = tuple(b - a for a, b in pairwise(edges))
            if not isinstance(self.norm_batch_size, int) and self.group_size == 1:
                sizes = (sum(sizes),)  # nothing couples samples
            micro_batches.append(MicroBatch(edges[0], sizes))
        filler = MicroBatch(0, (boundary(total, groups, 1),), is_filler=True)
        missing = self.num_micro_steps(total) - len(micro_batches)
        return (*micro_batches, *[filler] * missing)

    def largest_micro_batch(self, num_samples: int | None = None) -> int:
        """Samples of the largest micro-batch that any rank runs, in whole groups."""
        total = self.global_batch_size if num_samples is None else num_samples
        spans = (self.rank_groups(rank, total) for rank in range(self.world_size))
        most = max(last - first for first, last in spans) * self.group_size
        return min(self.micro_batch_size, most)

    def capped(self, num_samples: int) -> BatchPlan:
        """The plan for a training set of `num_samples`: a batch above it is the whole set."""
        if self.global_batch_size <= num_samples:
            return self
        n = self.norm_batch_size
        n = min(n, num_samples) if isinstance(n, int) else n
        return replace(self, global_batch_size=num_samples, norm_batch_size=n)

    def __str__(self) -> str:
        b, m, w = self.global_batch_size, self.micro_batch_size, self.world_size
        ranks = f"{w} rank{'s' * (w > 1)}"
        sizes = [[x.num_samples for x in self.partition(r) if not x.is_filler] for r in range(w)]
        steps = self.gradient_accumulation_steps
        plural = f"micro-batch{'es' * (steps > 1)}"
        flat = {s for rank in sizes for s in rank}
        if len(flat) == 1 and all(len(rank) == steps for rank in sizes):
            equation = f"global batch {b} = {steps} {plural} x {flat.pop()} samples x {ranks}"
        else:
            shares = " + ".join(f"({_runs(rank)})" if w > 1 else _runs(rank) for rank in sizes)
            equation = (
                f"global batch {b} = {shares} samples, in at most {steps} {plural} of at most {m}"
                f" on {ranks}"
            )
        n = self.norm_batch_size
        if isinstance(n, int):
            groups = self.num_groups(b)
            equation += f"; BatchNorm over {n} samples ({groups} group{'s' * (groups > 1)})"
        elif n == "frozen":
            equation += "; BatchNorm frozen"
        elif n == "global":
            equation += f"; BatchNorm over all {b} samples"
        return equation

    def explain(
        self,
        *,
        num_samples: int,
        epochs: float,
        last_update: LastUpdate = "wrap",
        growth: tuple[tuple[int, int], ...] = (),
    ) -> str:
        """The equation, updates an epoch and in all, and the warnings, as lines of text."""
        if self.global_batch_size > num_samples:
            said = (
                f"global_batch_size={self.global_batch_size} is above the training set's "
                f"{num_samples} samples: every update sees the whole set once."
            )
            plan = self.capped(num_samples)
            rest = plan.explain(num_samples=num_samples, epochs=epochs, last_update=last_update)
            return f"{said}\n{rest}"
        stream = UpdateStream(self.global_batch_size, num_samples, last_update, growth)
        per_epoch = f"{num_samples / self.global_batch_size:.4g}"
        if last_update != "wrap":
            per_epoch = str(stream.updates_in_epoch(0))
        total = stream.num_updates(epochs)
        lines = [
            str(self),
            f"updates: {per_epoch} an epoch of {num_samples} samples{' at first' * bool(growth)}, "
            f"{total} in all "
            f"({epochs:g} epochs, last update: {last_update})",
        ]
        warnings = self.warnings(
            num_samples=num_samples, num_updates=total, last_update=last_update
        )
        return "\n".join(lines + [f"warning: {w}" for w in warnings])

    def warnings(
        self, *, num_samples: int, num_updates: int, last_update: LastUpdate = "wrap"
    ) -> tuple[str, ...]:
        """Warnings about this batch on this training set, for the user to read before the run."""
        b = self.global_batch_size
        found: list[str] = []
        if b >= num_samples:
            found.append(
                f"global_batch_size={b} is the whole training set ({num_samples} samples): "
                "this is full-batch training, one update an epoch."
            )
        elif b > LARGE_FRACTION * num_samples:
            found.append(
                f"global_batch_size={b} is {b / num_samples:.0%} of the training set "
                f"({num_samples} samples); above {LARGE_FRACTION:.0%} accuracy usually drops."
            )
        if num_updates < FEW_UPDATES:
            found.append(
                f"{num_updates} updates in all are few (below {FEW_UPDATES}): train for more "
                "epochs or take a smaller global batch if accuracy is short."
            )
        short = num_samples % b
        if last_update == "keep" and 0 < short < b / 4:
            found.append(
                f"each epoch's last update has {short} samples, below a quarter of {b}: its "
                "gradient is noisy at a learning rate made for the whole batch. "
                "Use --last-update wrap, or drop where the batch does not change."
            )
        return tuple(found)


def _runs(sizes: list[int]) -> str:
    """[64, 64, 32] as '2 x 64 + 32'."""
    parts: list[list[int]] = []
    for size in sizes:
        if parts and parts[-1][1] == size:
            parts[-1][0] += 1
        else:
            parts.append([1, size])
    return " + ".join(f"{count} x {size}" if count > 1 else str(size) for count, size in parts)
