"""Which dimension of a tensor holds the samples, learned from how it follows them.

The first samples run through the network by twos and threes, without gradients. A dimension whose
size follows their number, as k n, holds them; a tensor without such a dimension (a table of
relative positions, a token of all samples) does not belong to a sample. Where k is above 1, the
samples may stand outside or inside (windows of an image one after the other, or tokens first): the
threes run again in another order, and the rows that moved show it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from lbaccel.randomness.in_graph import Masked

FEW, MORE, TURNED = (0, 1), (0, 1, 2), (1, 2, 0)
# A rounding error is far below a tenth of the difference between two samples.
TOLERANCE = 0.1


class NotLearned(Exception):
    """A micro-batch called for other masks than the network's first samples did."""

    def __init__(self, how: str) -> None:
        super().__init__(f"its calls are not those of the first samples: {how}")


class NoRows(Exception):
    """Nothing in a micro-batch can be taken by sample."""


@dataclass(frozen=True)
class SamplePlace:
    """Where a call's tensor holds the samples.

    `dim` has k n rows for n samples; None where no dimension holds them. `runs` is how many runs of
    n samples stand one after the other in it: 1 where a sample's k rows are neighbours, None for k.
    """

    dim: int | None = None
    runs: int | None = 1
    ndim: int = -1
    known: bool = True

    @classmethod
    def by_rows(cls, x: Tensor | Masked, num_samples: int) -> SamplePlace:
        """The guess of a tensor alone: rows that are a multiple of the samples are theirs."""
        rows = x.shape[0] if x.ndim else 0
        if rows == 1 and num_samples > 1:
            return cls()
        return cls(0) if rows and rows % num_samples == 0 else cls(known=False)

    def runs_of(self, x: Tensor | Masked, num_samples: int) -> int:
        """Runs of the samples along the dimension of `x`.

        Raises:
            NotLearned: its size is no multiple of what one sample takes.
        """
        assert self.dim is not None
        size = x.shape[self.dim]
        runs = size // num_samples if self.runs is None else self.runs
        if not size or size % (num_samples * runs):
            raise NotLearned(f"{size} rows for {num_samples} samples")
        return runs


@dataclass(frozen=True)
class Layouts:
    """The places of all calls of a forward pass, and in words what could not be learned."""

    places: tuple[SamplePlace, ...]
    not_known: tuple[str, ...] = ()

    @cached_property
    def all_known(self) -> bool:
        """Whether each call has a place."""
        return all(place.known for place in self.places)

    def place(self, call: int, x: Tensor | Masked) -> SamplePlace:
        """The place of a call's tensor.

        Raises:
            NotLearned: there is no such call, or its tensor has other dimensions.
        """
        if call >= len(self.places):
            raise NotLearned(f"more than {len(self.places)}")
        place = self.places[call]
        if place.known and x.ndim != place.ndim:
            raise NotLearned(f"{x.ndim} dimensions in place of {place.ndim} in call {call + 1}")
        return place


@dataclass(frozen=True)
class WatchedCall:
    """A call for a mask that was watched: the layer, the tensor's shape, what its rows sum up."""

    layer: str
    shape: tuple[int, ...]
    sums: tuple[Tensor, ...]  # float64 [size of the dimension], of the dimensions covered


Watching = Callable[[Callable[[Tensor, int], object]], Any]


def learn_layouts(
    run: Callable[[Any, int], object],
    watching: Watching,
    *,
    data: Any,
    num_samples: int,
    model: nn.Module,
) -> Layouts:
    """Learn where the tensors that are masked hold their samples: two or three small forwards.

    Args:
        run: (data, number of samples) runs the loss function, without gradients.
        watching: `KeyedRandomness.watching`.
        data: of a micro-batch; tensors with `num_samples` rows are taken by sample.
        num_samples: of the micro-batch.
        model: names its layers.

    Returns:
        The `Layouts`; what can't be known says so in `not_known`, by layer.

    Raises:
        NoRows: no tensor of the micro-batch has a row a sample.
    """

    def calls(order: Sequence[int]) -> list[WatchedCall]:
        found: list[WatchedCall] = []
        few, count = taken(data, order, num_samples)
        if not count:
            raise NoRows(f"no tensor of the micro-batch has {num_samples} rows")

        def watch(x: Tensor, covered: int) -> None:
            found.append(_call(layer(), x, covered))

        with _layer_of(model) as layer, watching(watch):
            run(few, len(order))
        return found

    few, more = calls(FEW), calls(MORE)
    if len(few) != len(more):
        return Layouts(
            (SamplePlace(known=False),) * len(more),
            (f"the number of masks follows the number of samples ({len(few)}, {len(more)})",),
        )
    several = any(_rows_of_a_sample(a, b) > 1 for a, b in zip(few, more, strict=True))
    turned = calls(TURNED) if several else more
    found = [_place(*three) for three in zip(few, more, turned, strict=True)]
    return Layouts(
        tuple(place for place, _ in found),
        tuple(dict.fromkeys(text for _, text in found if text)),
    )


def _call(layer: str, x: Tensor, covered: int) -> WatchedCall:
    return WatchedCall(layer, tuple(x.shape), tuple(_sums(x, d) for d in range(covered)))


def _sums(x: Tensor, dim: int) -> Tensor:
    """A weighted sum over all but one dimension: a mean of layer-normed values would be zero."""
    rows = x.detach().movedim(dim, 0).reshape(x.shape[dim], -1).double()
    weights = torch.arange(rows.shape[1], dtype=torch.float64, device=x.device).cos_()
    return (rows @ weights).cpu()


def _moved(few: WatchedCall, more: WatchedCall) -> list[int] | None:
    """The dimensions whose size follows the number of samples; None where they can't compare."""
    if len(few.shape) != len(more.shape):
        return None
    return [d for d, (a, b) in enumerate(zip(few.shape, more.shape, strict=True)) if a != b]


def _rows_of_a_sample(few: WatchedCall, more: WatchedCall) -> int:
    moved = _moved(few, more)
    if not moved or len(moved) > 1:
        return 0
    a, b = few.shape[moved[0]], more.shape[moved[0]]
    return b // len(MORE) if a * len(MORE) == b * len(FEW) else 0


def _place(few: WatchedCall, more: WatchedCall, turned: WatchedCall) -> tuple[SamplePlace, str]:
    """The place of a call, and why it is not known."""
    moved, ndim = _moved(few, more), len(more.shape)
    if moved == []:
        return SamplePlace(None, ndim=ndim), ""
    k = _rows_of_a_sample(few, more)
    shapes = f"{list(few.shape)} for {len(FEW)} samples, {list(more.shape)} for {len(MORE)}"
    if not moved or not k:
        return SamplePlace(known=False), f"{more.layer}: {shapes}: no dimension holds the samples"
    (dim,) = moved
    if k == 1 or dim >= len(more.sums):
        return SamplePlace(dim, 1, ndim), ""
    runs = _runs(more.sums[dim], turned.sums[dim] if dim < len(turned.sums) else None, k)
    if runs is None:
        return SamplePlace(
            known=False
        ), f"{more.layer}: {shapes}: its rows follow no order of samples"
    return SamplePlace(dim, None if runs == k else runs, ndim), ""


def _runs(straight: Tensor, turned: Tensor | None, k: int) -> int | None:
    """How many runs of the samples stand in k n rows: the order in which they moved shows it."""
    if turned is None or turned.shape != straight.shape:
        return None
    best: tuple[float, int] | None = None
    for runs in (r for r in range(1, k + 1) if k % r == 0):
        a, b = straight.view(runs, len(MORE), -1), turned.view(runs, len(MORE), -1)
        moved = a[:, list(TURNED)]
        spread = float((moved - a).abs().max())
        error = float((moved - b).abs().max())
        if error == 0.0 and spread == 0.0:  # samples of equal values: neighbours, as in timm
            return runs
        relative = error / max(spread, 1e-300)
        if best is None or relative < best[0]:
            best = relative, runs
    return best[1] if best is not None and best[0] < TOLERANCE else None


def taken(data: Any, order: Sequence[int], num_samples: int) -> tuple[Any, int]:
    """The samples of `data` in this order, made unlike each other, and of how many tensors.

    A micro-batch of fewer samples repeats its own. Floating values are scaled by up to a fifth,
    other for each sample and element, so that no two are equal; what was in [0, 1] stays there.
    """
    count = 0

    def rows(x: Tensor) -> Tensor:
        nonlocal count
        if not x.ndim or len(x) != num_samples:
            return x
        count += 1
        index = torch.tensor([i % num_samples for i in order], device=x.device)
        found = x.index_select(0, index)
        if not found.is_floating_point() or not found.numel():
            return found
        element = torch.arange(found[0].numel(), device=x.device, dtype=torch.float32)
        scale = torch.stack([0.9 + 0.1 * torch.cos(element * i) for i in order])
        return found * scale.view(found.shape).to(found.dtype)

    return recursively_apply(rows, data), count


@contextmanager
def _layer_of(model: nn.Module) -> Iterator[Callable[[], str]]:
    """Inside, the call tells the layer that runs."""
    names = {id(m): name or "the network" for name, m in model.named_modules()}
    stack: list[str] = []

    def enter(module: nn.Module, _: Any) -> None:
        stack.append(names.get(id(module), type(module).__name__))

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        stack.pop()

    with ExitStack() as around:
        around.callback(register_module_forward_pre_hook(enter).remove)
        around.callback(register_module_forward_hook(leave, always_call=True).remove)
        yield lambda: stack[-1] if stack else "the loss function"
