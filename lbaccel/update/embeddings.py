"""The embeddings of a batch: the rows that a coupled loss compares, of all micro-batches and ranks.

`Coupled` holds the two functions of such a loss. `embed` makes rows of a micro-batch's samples, and
`loss_fn` takes the rows of the whole batch, in order of the samples' positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lbaccel.batch.plan import MicroBatch
from lbaccel.errors import InputError, kind_of

Embed = Callable[[Any, Any], "Tensor | tuple[Tensor, ...]"]
"""(model, micro-batch) -> rows of its samples: a tensor [n, ...], or a tuple of them."""

EMBED = (
    "Write: def embed(model, micro_batch): images, labels = micro_batch; return model(images), "
    "labels"
)


@dataclass(frozen=True)
class Coupled:
    """A loss on the rows of the whole batch; called as a loss function, it runs `embed`.

    Args:
        loss_fn: (model, rows of the whole batch) -> mean loss [], or (mean loss, None, sums).
        embed: (model, micro-batch) -> rows of its samples.
        trial: some micro-batches stand for the update: their rows are repeated, and all kept.
    """

    loss_fn: Callable[[Any, Any], Any]
    embed: Embed
    trial: bool = False

    def __call__(self, model: Any, data: Any) -> Any:
        """The rows of a micro-batch."""
        return self.embed(model, data)

    def whole(self, model: Any, data: Any) -> Any:
        """The loss of a batch that fits in memory: one forward of all its samples."""
        return self.loss_fn(model, self.embed(model, data))

    @property
    def functions(self) -> Mapping[str, Callable[..., Any]]:
        """Both, by the names that begin the paths of their tensors."""
        return {"loss_fn": self.loss_fn, "embed": self.embed}


def coupled(loss_fn: Any, embed: Any, *, trial: bool = False) -> Coupled:
    """A loss and the function of its rows, looked at.

    Raises:
        InputError: `embed` can't be called as `embed(model, micro_batch)`.
    """
    check_embed(embed)
    return Coupled(loss_fn, embed, trial)


@dataclass(frozen=True)
class Column:
    """One of the tensors of `embed`: what is the same for all its rows."""

    shape: tuple[int, ...]  # of a row
    dtype: torch.dtype
    trained: bool  # a gradient goes through it

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}{' with a gradient' * self.trained}"


@dataclass
class RankRows:
    """The rows of one rank's micro-batches, in order, without their graph."""

    columns: tuple[Column, ...] = ()
    kind: type = tuple
    micro_batches: list[MicroBatch] = field(default_factory=list)
    _parts: list[list[Tensor]] = field(default_factory=list)

    def add(self, out: Any, micro_batch: MicroBatch) -> None:
        """Take in what `embed` returned for a micro-batch; of a filler, nothing but the look.

        Raises:
            InputError: it is no tensor or tuple of them with a row a sample, or of another kind
                than that of the first micro-batch.
        """
        tensors = tensors_of(out, micro_batch)
        first = not self.columns
        if first:
            self.kind = type(out)
            self.columns = tuple(
                Column(tuple(t.shape[1:]), t.dtype, t.requires_grad) for t in tensors
            )
            self._parts = [[] for _ in tensors]
        found = tuple(
            Column(tuple(t.shape[1:]), t.dtype, c.trained)
            for t, c in zip(tensors, self.columns, strict=False)
        )
        if found != self.columns or len(tensors) != len(self.columns):
            raise _unequal(self.columns, found, "the first micro-batch", "a later one")
        self.micro_batches.append(micro_batch)
        if not micro_batch.is_filler:
            for part, tensor in zip(self._parts, tensors, strict=True):
                part.append(tensor.detach())

    @property
    def count(self) -> int:
        """Samples of this rank."""
        return sum(m.num_samples for m in self.micro_batches if not m.is_filler)

    def take(self) -> list[Tensor]:
        """Each column of this rank [count, ...]; the micro-batches' own tensors are let go."""
        parts, self._parts = self._parts, []
        return [torch.cat(part) for part in parts]

    def given(self, tensors: Sequence[Tensor]) -> Any:
        """Tensors as `embed` returns them: alone, or in a tuple of its own class."""
        if self.kind is Tensor or not issubclass(self.kind, tuple):
            return tensors[0]
        return getattr(self.kind, "_make", tuple)(tensors)


def tensors_of(out: Any, micro_batch: MicroBatch) -> list[Tensor]:
    """The tensors that `embed` returned, each looked at.

    Raises:
        InputError: it is no tensor or tuple of them with a row a sample.
    """
    tensors = list(out) if isinstance(out, tuple) else [out]
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            what = f"a tuple that holds {kind_of(tensor)}" if out is not tensor else kind_of(out)
            raise InputError(
                f"embed returned {what}: it returns a tensor, or a tuple of tensors, with one row "
                f"a sample. {EMBED}."
            )
        if not tensor.ndim or tensor.shape[0] != micro_batch.num_samples:
            raise InputError(
                f"embed returned a tensor of shape {tuple(tensor.shape)} for a micro-batch of "
                f"{micro_batch.num_samples} samples: its first dimension holds one row a sample, "
                f"as in [{micro_batch.num_samples}, ...]. Two views of a sample are two tensors of "
                "a tuple, or [samples, views, ...]; a number of the batch goes to loss_fn."
            )
    if not tensors:
        raise InputError(f"embed returned an empty tuple. {EMBED}.")
    return tensors


def _unequal(a: Sequence[Column], b: Sequence[Column], first: str, second: str) -> InputError:
    said = "; ".join(f"{w}: {', '.join(map(str, c))}" for w, c in ((first, a), (second, b)))
    return InputError(
        f"embed returned rows of different kinds ({said}). All rows of an update have one shape "
        "and dtype, in as many tensors: pad them to one length (torch.nn.functional.pad)."
    )


def check_columns(all_columns: Sequence[tuple[Column, ...]]) -> None:
    """Stop where the ranks' rows differ in kind; on each of them.

    Raises:
        InputError: the first two ranks that do.
    """
    for rank, columns in enumerate(all_columns):
        if columns != all_columns[0]:
            raise _unequal(all_columns[0], columns, "rank 0", f"rank {rank}")


def gather(own: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """The rows of all ranks, in order of rank, to the bit; one collective.

    Args:
        own: this rank's columns, each [n, ...].
        counts: n of each rank.
    """
    flat = [_bytes_of(t) for t in own]
    most = max(counts)
    packed = torch.cat(flat, 1)
    padded = packed.new_zeros(most, packed.shape[1])
    padded[: len(packed)] = packed
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    whole = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    columns = whole.split([f.shape[1] for f in flat], 1)
    return [
        column.contiguous().view(t.dtype).reshape(-1, *t.shape[1:])
        for column, t in zip(columns, own, strict=True)
    ]


def _bytes_of(tensor: Tensor) -> Tensor:
    rows = tensor.reshape(len(tensor), -1)
    return rows.contiguous().view(torch.uint8)


def check_embed(embed: Any) -> None:
    """Stop at what can't be called as `embed(model, micro_batch)`.

    Raises:
        InputError: no function, a class, or a function of other arguments.
    """
    if not callable(embed) or isinstance(embed, type):
        raise InputError(f"embed={kind_of(embed)} is no function. {EMBED}.")
    try:
        inspect.signature(embed).bind(None, None)
    except TypeError as error:
        raise InputError(
            f"embed is called with the model and a micro-batch, and this one does not take these "
            f"two ({error}). {EMBED}."
        ) from None
    except ValueError:  # a builtin that shows no signature
        return
