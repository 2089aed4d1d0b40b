"""One rank decides, or each does its own part: either way all ranks hear, an error too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist
from accelerate.utils import broadcast_object_list

from lbaccel.errors import CannotRead, InputError, RunFailed, told

T = TypeVar("T")
_KINDS: dict[str, type[Exception]] = {  # the narrower first: a caller may tell them apart
    "CannotRead": CannotRead,
    "InputError": InputError,
    "RunFailed": RunFailed,
}


def decided(accelerator: Any, decide: Callable[[], T]) -> T:
    """The value that the main process decides on, on every rank; a collective.

    Args:
        accelerator: of all ranks.
        decide: is called on the main process alone; its value can be pickled.

    Raises:
        InputError, RunFailed: what `decide` raised, on every rank; any other error of it is raised
            on the main process, and a RunFailed with its text on the others.
    """
    if accelerator.num_processes == 1:
        return decide()
    said: list[Any] = [None, None, None]
    raised: Exception | None = None
    if accelerator.is_main_process:
        try:
            said[0] = decide()
        except Exception as error:
            raised, said[1:] = told(error), _text(error)
    broadcast_object_list(said)
    if raised is not None:
        raise raised
    if said[1] is not None:
        raise _KINDS[said[1]](said[2])
    return cast(T, said[0])


def on_each_rank(accelerator: Any, do: Callable[[], T]) -> T:
    """The value of this rank's own part; where one rank fails, all do; a collective.

    Args:
        accelerator: of all ranks.
        do: calls no collective: a rank that fails in one can't tell the others, which wait in it.

    Raises:
        InputError, RunFailed: the error of the first rank that failed, on every rank, so that the
            first rank prints it.
    """
    if accelerator.num_processes == 1:
        return do()
    value, raised = None, None
    try:
        value = do()
    except Exception as error:
        raised = told(error)
    said: list[Any] = [None] * accelerator.num_processes
    dist.all_gather_object(said, None if raised is None else _text(raised))
    first = next(((rank, text) for rank, text in enumerate(said) if text is not None), None)
    if first is None:
        return cast(T, value)
    if raised is not None and not isinstance(raised, (InputError, RunFailed)):
        raise raised  # with its traceback
    rank, (kind, text) = first
    raise _KINDS[kind](text if kind != "RunFailed" else f"rank {rank}: {text}") from raised


def _text(error: Exception) -> tuple[str, str]:
    """The kind that the others raise, and what they are told."""
    for name, kind in _KINDS.items():
        if isinstance(error, kind):
            return name, str(error)
    return "RunFailed", f"{type(error).__name__}: {error}"
