"""The facts that the ranks of an update must share, of the objects given to `LargeBatch`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from lbaccel.batch.plan import BatchPlan
from lbaccel.data.loader import UpdateLoader
from lbaccel.errors import InputError
from lbaccel.runs.alike import check_alike, digest_of, software
from lbaccel.runs.ranks import on_each_rank


def check_ranks_alike(
    accelerator: Any,
    plan: BatchPlan,
    model: nn.Module,
    optimizer: Any,
    loader: Any,
    scheduler: Any,
    **given: Any,
) -> None:
    """Stop on every rank where what the ranks prepare differs; a collective.

    The arguments behind `accelerator` are those of `facts_of`.

    Raises:
        InputError: what differs, and on which ranks; a loader of another rank.
    """
    rank = accelerator.process_index
    on_each_rank(accelerator, lambda: check_rank_of_loader(loader, rank))
    facts = facts_of(plan, model, optimizer, loader, scheduler, **given)
    check_alike(accelerator, {**facts, **software()})


def facts_of(
    plan: BatchPlan, model: nn.Module, optimizer: Any, loader: Any, scheduler: Any, **given: Any
) -> dict[str, Any]:
    """Plan, model, optimizer, data and order as plain values, under the names of the arguments.

    Weights are not compared: the first rank's are taken by all.

    Args:
        plan: of the batch.
        model: before it is prepared; names, shapes and dtypes are taken.
        optimizer: before it is prepared; its class and the hyper-parameters of its groups.
        loader: an `UpdateLoader`, or another iterable, of which nothing is known.
        scheduler: its class and where it stands, or None.
        given: further arguments of `LargeBatch`, such as its seed.
    """
    tensors = {
        name: [list(tensor.shape), str(tensor.dtype), tensor.requires_grad]
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    facts = {f"BatchPlan {name}": value for name, value in asdict(plan).items()}
    facts |= given
    facts |= {f"shape of {name}": shape for name, shape in list(tensors.items())[:1]}
    facts |= {"number of tensors": len(tensors), "model": digest_of(tensors)}
    return {**facts, **_of_optimizer(optimizer), **_of_loader(loader), **_of_scheduler(scheduler)}


def check_rank_of_loader(loader: Any, rank: int) -> None:
    """Stop at a loader that would read another rank's samples.

    Raises:
        InputError: its `rank` is not this process's.
    """
    if isinstance(loader, UpdateLoader) and loader.rank != rank:
        raise InputError(
            f"UpdateLoader(rank={loader.rank}) on rank {rank}: two ranks would train on the same "
            "samples. Use rank=accelerator.process_index."
        )


def _of_optimizer(optimizer: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {"optimizer": type(optimizer).__name__}
    groups: list[dict[str, Any]] = getattr(optimizer, "param_groups", [])
    for index, group in enumerate(groups):
        for name, value in group.items():
            if name == "params":
                facts[f"tensors in group {index} of the optimizer"] = len(value)
            else:
                facts[f"{name} in group {index} of the optimizer"] = _plain(value)
    return facts


def _of_loader(loader: Any) -> dict[str, Any]:
    if not isinstance(loader, UpdateLoader):
        return {}
    data = loader.dataset
    facts = {
        "samples in the data set": len(data),
        "seed of the UpdateLoader": loader.seed,
        "rule of order of the UpdateLoader": loader.order,
        "UpdateLoader's updates": str(loader.stream),
        "next update of the UpdateLoader": loader.next_update,
        "plan of the UpdateLoader": str(loader.plan),
    }
    for name in ("classes", "targets"):  # torchvision's names
        value = getattr(data, name, None)
        if isinstance(value, (list, tuple, torch.Tensor)):
            plain = value.tolist() if isinstance(value, torch.Tensor) else list(value)
            facts[f"{name} of the data set"] = digest_of(plain)
    return facts


def _of_scheduler(scheduler: Any) -> dict[str, Any]:
    if scheduler is None:
        return {"scheduler": None}
    at = getattr(scheduler, "last_epoch", None)
    return {"scheduler": type(scheduler).__name__, "last_epoch of the scheduler": _plain(at)}


def _plain(value: Any) -> Any:
    """Numbers and texts as they are; of anything else its type, since an address would differ."""
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 and value.device.type != "meta" else None
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else (
        type(value).__name__
    )  # fmt: skip
