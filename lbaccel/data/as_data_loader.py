"""Sentences for an `UpdateLoader` that is built or read as a plain DataLoader is."""

from __future__ import annotations

import dis
from collections.abc import Mapping
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader

from lbaccel.batch.plan import BatchPlan
from lbaccel.errors import MISSING, InputError, brief, kind_of, whole_number

LOOP = (
    "Write: for update in loader: result = large_batch.update(update, loss_fn), where "
    "loss_fn(model, micro_batch) begins with images, labels = micro_batch"
)
_INSTEAD = {
    "batch_size": "its batches are those of the plan. Use BatchPlan(global_batch_size=...)",
    "shuffle": "each epoch has an order of its own, a function of (seed, epoch). Leave it out, and "
    "give UpdateLoader(seed=...) for another order",
    "drop_last": 'use UpdateLoader(last_update="drop"), "keep" or "wrap"',
    "generator": "order and draws are functions of (seed, epoch, sample). Use "
    "UpdateLoader(seed=...)",
    "worker_init_fn": "each sample seeds torch, numpy and random by itself. Use "
    "UpdateLoader(seed=...)",
    "sampler": "the order is a function of (seed, epoch). Use a data set of the samples that you "
    "want, such as torch.utils.data.Subset, and UpdateLoader(seed=...)",
    "pin_memory": "memory is pinned where there is a GPU. Leave it out",
    "persistent_workers": "workers live from one epoch to the next. Leave it out",
}
_INSTEAD["batch_sampler"] = _INSTEAD["sampler"]


def check_options(options: Mapping[str, Any]) -> None:
    """Stop at keywords of a DataLoader that an `UpdateLoader` does not have.

    Raises:
        InputError: any keyword.
    """
    for name, value in options.items():
        instead = _INSTEAD.get(
            name,
            "known are rank, seed, last_update, growth, num_workers, collate_fn and transform. "
            "Leave it out",
        )
        raise InputError(f"UpdateLoader({name}={kind_of(value)}): {instead}.")


def check_parts(dataset: Any, plan: Any) -> None:
    """Stop at a data set that can't be read by number, and at a plan that is none.

    Raises:
        InputError: either of them.
    """
    if not isinstance(plan, BatchPlan):
        shown = ", ".join(kind_of(value) for value in (dataset, plan) if value is not MISSING)
        size = plan if type(plan) is int and plan > 0 else "..."
        raise InputError(
            f"UpdateLoader({shown}): the first argument is the data set, and the second argument "
            f"is the plan. Use BatchPlan(global_batch_size={size}, micro_batch_size=...)."
        )
    if isinstance(dataset, DataLoader):
        raise InputError(
            f"UpdateLoader({kind_of(dataset)}, plan): it takes the place of a DataLoader, "
            "and reads the data set itself. Use UpdateLoader(loader.dataset, plan), with "
            "num_workers and collate_fn as there."
        )
    if isinstance(dataset, (type, str, Mapping)) or dataset is MISSING or dataset is None:
        raise InputError(
            f"UpdateLoader({kind_of(dataset)}, plan): the first argument is a map-style data set, "
            "with __len__ and __getitem__(index), such as "
            "torchvision.datasets.ImageFolder(path, transform)."
        )
    if not hasattr(dataset, "__len__"):
        raise InputError(
            f"the training set, a {type(dataset).__name__}, has no length: which samples an update "
            "holds is computed from it. Use a map-style data set with __len__ and __getitem__."
        )


def _are_two_numbers(*values: Any) -> bool:
    return len(values) == 2 and None not in map(whole_number, values)


def _number(value: Any) -> int:
    number = whole_number(value)
    return -1 if number is None else number


def check_how(*, rank: Any, num_workers: Any, growth: Any, world_size: int, **called: Any) -> None:
    """Stop at arguments by name that are of another kind.

    Args:
        rank: of the loader.
        num_workers: processes that load.
        growth: pairs (epoch, size).
        world_size: of the plan.
        called: functions, by the name of the argument, or None.

    Raises:
        InputError: any of them.
    """
    if not 0 <= _number(rank) < world_size:
        raise InputError(
            f"rank={kind_of(rank)} is not in 0..{world_size - 1} (world_size). Use "
            "rank=accelerator.process_index."
        )
    if _number(num_workers) < 0:
        raise InputError(
            f"num_workers={kind_of(num_workers)} is not a whole number of at least 0. Use "
            "num_workers=0, which loads in this process, or 4."
        )
    for name, function in called.items():
        if function is not None and not callable(function):
            raise InputError(f"{name}={kind_of(function)} can't be called. Give a function.")
    pairs = list(growth) if isinstance(growth, (list, tuple)) else [growth]
    if not all(isinstance(p, (list, tuple)) and _are_two_numbers(*p) for p in pairs):
        raise InputError(
            f"growth={brief(growth)}: give pairs of an epoch, from 1 on, and the samples of an "
            "update from its start on, such as growth=[(30, 512), (60, 1024)]."
        )


def taken_apart(how: str) -> InputError:
    """The error of an update that is used as a batch of images and labels."""
    return InputError(
        f"{how}: an item of an UpdateLoader is an update, all micro-batches of this rank, and no "
        f"batch. {LOOP}. (Its micro-batches are list(update).)"
    )


def is_unpacking(frame: FrameType | None) -> bool:
    """Whether `frame` stands at `a, b = x`, as the loop `for images, labels in loader` does.

    Python calls the same `iter(x)` for it as for a loop over `x`, so the instruction tells them
    apart. Where an interpreter does not show it, nothing is refused.
    """
    if frame is None:
        return False
    code, at = frame.f_code.co_code, frame.f_lasti
    if not 0 <= at < len(code) - 1:
        return False
    return dis.opname[code[at]] == "UNPACK_SEQUENCE" and code[at + 1] > 1
