"""One attempt at an update: forward and backward of micro-batches, and what the ranks agree on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn

from lbaccel import accumulation
from lbaccel.accumulation import Agreement, LossFn, Scope, Stop, Sums
from lbaccel.batch import MicroBatch
from lbaccel.memory.oom import allocator_retries, let_go

MicroBatches = Iterable[tuple[MicroBatch, Any]]


def attempt(
    accelerator: Accelerator,
    model: nn.Module,
    micro_batches: MicroBatches,
    loss_fn: LossFn,
    *,
    num_samples: int,
    scopes: Sequence[Scope],
    parameters: list[nn.Parameter],
    stop: Stop | None = None,
) -> tuple[Agreement, bool]:
    """Add up gradients without reducing them, and learn whether all ranks could.

    Where memory ran out on some rank, what this rank's attempt holds is let go.

    Args:
        accelerator: its device, scaler and processes are used.
        model: prepared; under DDP nothing is synchronised.
        micro_batches: of this rank, moved to the device one at a time.
        loss_fn: as for `accumulate`.
        num_samples: of the update, over all ranks.
        scopes: entered around each micro-batch.
        parameters: those that may have a gradient.
        stop: this rank wants to end the run after this update.

    Returns:
        What the ranks agreed on, and whether the loss function returned weights.

    Raises:
        Exception: what this rank raised, other than a lack of memory.
        RunFailed: another rank failed.
    """
    device = accelerator.device
    retries = allocator_retries(device)
    sums, error = _try(accelerator, model, micro_batches, loss_fn, num_samples, scopes)
    agreement = accumulation.agree(
        sums,
        parameters,
        world_size=accelerator.num_processes,
        device=device,
        stop=stop,
        short_of_memory=allocator_retries(device) > retries,
        error=error,
    )
    if agreement.out_of_memory:
        let_go(error, device)
    return agreement, sums is not None and sums.own_weights


def _try(
    accelerator: Accelerator,
    model: nn.Module,
    micro_batches: MicroBatches,
    loss_fn: LossFn,
    num_samples: int,
    scopes: Sequence[Scope],
) -> tuple[Sums | None, BaseException | None]:
    device = accelerator.device
    on_device = ((m, send_to_device(data, device, non_blocking=True)) for m, data in micro_batches)
    try:
        with _no_sync(model), _autocast_cache(device.type):
            sums = accumulation.accumulate(
                model,
                on_device,
                loss_fn,
                num_samples=num_samples,
                scopes=scopes,
                backward=_backward(accelerator.scaler),
            )
    except Exception as error:
        return None, error
    return sums, None


def _no_sync(model: nn.Module) -> AbstractContextManager[Any]:
    return (
        model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()
    )


def _backward(scaler: Any) -> Callable[[Tensor], object]:
    if scaler is None:
        return Tensor.backward
    return lambda loss: scaler.scale(loss).backward()


def _autocast_cache(device_type: str) -> AbstractContextManager[Any]:
    """Keep autocast's cast weights over all micro-batches, changing nothing else.

    Autocast drops its casts where its outermost context ends; the model's own context (put there
    by `accelerator.prepare`) ends with each forward. This one is outside, in the state found.
    """
    return torch.autocast(
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
    )
