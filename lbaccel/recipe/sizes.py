"""Sizes that the settings leave open, and the memory that a run may take."""

from __future__ import annotations

import faulthandler
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from lbaccel.batch.plan import NormBatchSize
from lbaccel.errors import InputError
from lbaccel.launch import local_world_size
from lbaccel.optim.trained import FREEZES_NORM
from lbaccel.recipe.options_batch import BatchOptions
from lbaccel.recipe.options_data import ModelOptions
from lbaccel.update.memory.budget import default_budget, memory_limit, parse_memory


def choose_norm_batch_size(
    batch: BatchOptions,
    model: ModelOptions,
    *,
    has_batch_norm: bool,
    num_samples: int,
    say: Callable[[str], object] = lambda _: None,
) -> NormBatchSize:
    """The norm_batch_size given, by default 32 (Goyal et al. 2017: samples a worker).

    Where the layers around it are frozen, BatchNorm is too: its statistics are those of the weights
    that stay.

    Raises:
        InputError: an option of BatchNorm for a model without it or with all of it frozen, or more
            samples than there are.
    """
    given = batch.norm_batch_size
    if not has_batch_norm:
        if given is not None:
            raise InputError(
                f"--norm-batch-size {given}: {model.model} has no BatchNorm. Leave it out."
            )
        return None
    if model.train in FREEZES_NORM:
        if given not in (None, "frozen"):
            raise InputError(
                f"--norm-batch-size {given}: under --train {model.train} the network below the "
                "classifier is frozen, and BatchNorm with it, so nothing normalises by a batch. "
                "Leave it out, or use --train head+norms, which trains BatchNorm."
            )
        say(f"norm_batch_size: frozen, as the layers around BatchNorm (--train {model.train})")
        return "frozen"
    if given is None:
        return min(32, batch.first_size, num_samples)
    if not isinstance(given, str) and given > num_samples:
        raise InputError(
            f"--norm-batch-size {given} is above the training set's {num_samples} samples: "
            f"BatchNorm can't see more than an update has. Use at most {num_samples}."
        )
    return given


def choose_micro_batch_size(batch: BatchOptions, *, norm_batch_size: NormBatchSize) -> int:
    """The micro_batch_size given; by default 64, cut to whole ghost batches or pairs."""
    if batch.micro_batch_size is not None and batch.micro_batch_size != "auto":
        return batch.micro_batch_size
    unit = max(1, norm_batch_size) if isinstance(norm_batch_size, int) else 2
    return max(unit, 64 // unit * unit)


@contextmanager
def limit_for(batch: BatchOptions, device: torch.device) -> Iterator[str | None]:
    """Inside, the memory budget is enforced; yields a line that says so, or None.

    It is `memory`, by default what is free now less a margin: on a GPU always (a driver that
    spills into host memory would only get slow), on a CPU where a micro-batch is searched.
    """
    if batch.memory is None and device.type == "cpu" and batch.micro_batch_size != "auto":
        yield None
        return
    if batch.memory is None:
        num_bytes = default_budget(device, ranks=local_world_size())
    else:
        num_bytes = parse_memory(batch.memory)
    with memory_limit(num_bytes, device) as line:
        yield line if device.type != "cpu" else f"{line}. {_if_a_library_breaks()}"


def _if_a_library_breaks() -> str:
    """Make a crash write where it happened; the sentence that says beforehand how to go on."""
    if not faulthandler.is_enabled():
        with suppress(OSError, ValueError, AttributeError):  # standard error is no file
            faulthandler.enable()
    return (
        "A library that does not survive a refused allocation ends the process with a "
        "segmentation fault: go on with --resume auto and a smaller --micro-batch-size."
    )
