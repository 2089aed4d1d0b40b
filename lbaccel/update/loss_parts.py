"""The parts of a loss function's result: mean loss, weight, and sums over samples beside them.

A loss function has the outputs of the network at hand, so it can count what they say of each
sample: hits, tokens, squared errors. Such a sum stays on the device through the accumulation, is
added over ranks in the update's own small all-reduce, and is read where the loss is read.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lbaccel.errors import InputError, brief

MOST_SUMS = 8
SLOTS = MOST_SUMS + 2  # their numbers, and two by which the ranks compare their names

Sums = Mapping[str, "Tensor | float"]


def parts_of(out: Any) -> tuple[Any, Any, Sums]:
    """(loss, weight or None, sums) of what a loss function returned.

    >>> parts_of((0.5, 3.0)), parts_of((0.5, None, {"hits": 2}))
    ((0.5, 3.0, {}), (0.5, None, {'hits': 2}))

    Raises:
        InputError: a tuple of another length, or sums that are no mapping.
    """
    if not isinstance(out, tuple):
        return out, None, {}
    sums = out[2] if len(out) == 3 else {}
    if len(out) not in (2, 3) or not isinstance(sums, Mapping):
        raise InputError(
            f"the loss function returned a tuple of {len(out)}: return the mean loss, (mean loss, "
            "weight), or (mean loss, weight or None, {name: sum over the micro-batch's samples})."
        )
    return out[0], out[1], sums


class SampleSums:
    """The sums of one rank's micro-batches in one attempt; no host synchronisation.

    >>> sums = SampleSums()
    >>> sums.add({"hits": torch.tensor(2)}, counts=True)
    >>> sums.add({"hits": torch.tensor(1)}, counts=True)
    >>> sums.read(sums.vector(torch.device("cpu")).tolist(), world_size=1)
    {'hits': 3.0}
    """

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor | float]] = {}

    def add(self, sums: Sums, *, counts: bool) -> None:
        """Take a micro-batch in; of one that does not count, a filler, the names alone.

        Raises:
            InputError: too many names, or a value that is no number.
        """
        for name, value in sums.items():
            values = self._values.setdefault(name, [])
            if isinstance(value, Tensor):
                value = self._number(name, value)
            elif isinstance(value, bool) or not isinstance(value, (int, float)):
                raise InputError(
                    f"the loss function returned the sum {name!r} as {brief(value)}, which is no "
                    "number."
                )
            if counts:
                values.append(value)
        if len(self._values) > MOST_SUMS:
            raise InputError(
                f"the loss function returned {len(self._values)} sums: an update adds up at most "
                f"{MOST_SUMS}."
            )

    def _number(self, name: str, value: Tensor) -> Tensor:
        if value.numel() != 1 or value.is_complex():
            raise InputError(
                f"the loss function returned the sum {name!r} in shape {tuple(value.shape)} and "
                f"{value.dtype}: a sum over the samples is one real number."
            )
        others = {v.device for v in self._values[name] if isinstance(v, Tensor)}
        if others - {value.device}:
            raise InputError(
                f"the loss function returned the sum {name!r} on {value.device}, and on "
                f"{others.pop()} before. Keep it on one device."
            )
        return value.detach().reshape(())

    def vector(self, device: torch.device | None) -> Tensor:
        """Float64 [SLOTS] to be added over the ranks, in the order of the names."""
        out = torch.zeros(SLOTS, dtype=torch.float64, device=device)
        for slot, name in enumerate(sorted(self._values)):
            values = self._values[name]
            tensors = [value for value in values if isinstance(value, Tensor)]
            if tensors:
                out[slot] = torch.stack(tensors).double().sum()
            out[slot] += sum(value for value in values if not isinstance(value, Tensor))
        mark = self._mark()
        out[-2], out[-1] = mark, mark**2
        return out

    def read(self, added: list[float], *, world_size: int) -> dict[str, float]:
        """Name to sum, from the vectors of all ranks added up.

        Raises:
            InputError: the ranks returned sums of different names; on all of them.
        """
        marks, squares = added[-2:]
        if world_size * squares != marks**2:  # the variance of equal numbers is 0
            raise InputError(
                "the loss function returned sums of other names on some ranks. Return the same "
                f"names everywhere; here they are {', '.join(sorted(self._values)) or 'none'}."
            )
        return dict(zip(sorted(self._values), added, strict=False))

    def _mark(self) -> float:
        """A number of 16 bits for the names: its square, added over ranks, is exact."""
        return float(zlib.crc32("\0".join(sorted(self._values)).encode()) & 0xFFFF)
