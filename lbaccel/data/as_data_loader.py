"""Sentences for an `UpdateLoader` that is built or read as a plain DataLoader is."""

from __future__ import annotations

import dis
from collections.abc import Mapping
from types import FrameType
from typing import Any

from lbaccel.batch.plan import BatchPlan
from lbaccel.errors import InputError

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
        raise InputError(f"UpdateLoader({name}={value!r}): {instead}.")


def check_parts(dataset: Any, plan: Any) -> None:
    """Stop at a data set without a length, and at a plan that is none.

    Raises:
        InputError: either of them.
    """
    if not isinstance(plan, BatchPlan):
        raise InputError(
            f"UpdateLoader(dataset, {plan!r}): the second argument is the plan. Use "
            "BatchPlan(global_batch_size=..., micro_batch_size=...)."
        )
    if not hasattr(dataset, "__len__"):
        raise InputError(
            f"the training set, a {type(dataset).__name__}, has no length: which samples an update "
            "holds is computed from it. Use a map-style data set with __len__ and __getitem__."
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
