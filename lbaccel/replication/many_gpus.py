"""A recipe for many GPUs, as its own script means it: what every reader returns (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lbaccel.batch.duration import MOST_EPOCHS
from lbaccel.batch.stream import LastUpdate
from lbaccel.errors import InputError, check_whole


@dataclass(frozen=True)
class Translation:
    """One setting of the source and what it is in the contract.

    `setting` is an option of `lbaccel train`; None where the source's setting decides nothing of
    the result, so that the plan may choose.
    """

    source: str
    setting: str | None
    value: Any
    why: str


@dataclass(frozen=True)
class Gap:
    """A setting that the contract cannot express exactly, the reason, and the nearest setting."""

    what: str
    because: str
    nearest: str

    def __str__(self) -> str:
        return f"not carried over: {self.what}, because {self.because}; nearest: {self.nearest}"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """How an update is put together: samples of one forward on one GPU, GPUs, accumulation."""

    per_gpu: int
    gpus: int
    accumulation: int = 1
    sync_bn: bool = False
    said: str  # the source's own settings
    last: LastUpdate
    last_why: str

    def __post_init__(self) -> None:
        for name in ("per_gpu", "gpus", "accumulation"):
            check_whole(name, getattr(self, name))

    @property
    def size(self) -> int:
        """Samples an update: per-GPU batch x GPUs x accumulation."""
        return self.per_gpu * self.gpus * self.accumulation


@dataclass(frozen=True, kw_only=True)
class Rate:
    """The peak learning rate: `lr` at `base_batch_size` samples an update, scaled by `rule`.

    Without `base_batch_size` it is absolute: the rate of the recipe's own global batch.
    """

    said: str
    lr: float
    base_batch_size: int | None = None
    rule: Literal["linear", "sqrt", "none"] = "none"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The learning rate over the epochs.

    Args:
        said: settings of the decay, in the source's words.
        said_warmup: settings of the warmup.
        epochs: of the run, a warmup prefix included.
        warmup_epochs: length of the warmup.
        warmup: its shape.
        start: learning rate it starts at, or a share of the peak where `start_is_share`.
        decay: "cosine" and "step" have a period or an end, "milestones" epochs; "none" is constant;
            anything else is a name that the contract does not have.
        counts_warmup: whether the decay's epoch 0 is the run's, not the end of the warmup.
        period: epochs, of "step".
        milestones: epochs of the run, of "milestones".
        gamma: factor at each step.
        final_lr: where a cosine ends.
        per_epoch: whether the source moves the rate once an epoch, not at every update.
    """

    said: str
    said_warmup: str
    epochs: float
    warmup_epochs: float = 0.0
    warmup: Literal["gradual", "constant"] = "gradual"
    start: float = 0.0
    start_is_share: bool = False
    decay: str = "cosine"
    counts_warmup: bool = False
    period: float = 0.0
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    final_lr: float = 0.0
    per_epoch: bool = True

    def __post_init__(self) -> None:
        for name, value in (("epochs", self.epochs), ("warmup_epochs", self.warmup_epochs)):
            check_most_epochs(name, value)


def check_most_epochs(name: str, value: float) -> None:
    """Stop at a length that no run has: what follows goes through the epochs one by one.

    Raises:
        InputError: more than 1,000,000 epochs, or no number.
    """
    if not value <= MOST_EPOCHS:
        raise InputError(f"{name} {value:g} must be at most {MOST_EPOCHS:,.0f}. Correct it.")


@dataclass(frozen=True, kw_only=True)
class Average:
    """An average of the weights: avg <- decay avg + (1 - decay) w at every `every`-th update.

    Attributes:
        said: by the source.
        decay: at one of its moves.
        warmup: how it begins, as `--ema-warmup` has it.
        every: updates a move.
        formula: of the decay.
    """

    said: str
    decay: float
    warmup: str = "none"
    every: int = 1
    formula: str


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The recipe of one source. Its `rows` are the settings that translate one to one."""

    origin: str
    model: str | None
    said_model: str
    batch: Batch
    rate: Rate | None = None
    curve: Curve | None = None
    average: Average | None = None
    rows: tuple[Translation, ...] = ()
    gaps: tuple[Gap, ...] = ()
    unknown: tuple[str, ...] = ()  # keys that the reader has never heard of
    assumed: tuple[str, ...] = ()  # keys that the source leaves out, with the script's default
    equal_ranks: bool = True  # DDP with a BatchNorm of each rank's own


def one_number_of_gpus(asked: int | None, stated: Mapping[str, int], *, origin: str) -> int:
    """The GPUs of a recipe: what was asked for or what the source states, which must agree.

    Raises:
        InputError: neither says it, or they contradict each other.

    >>> one_number_of_gpus(8, {"--nproc_per_node 4": 4}, origin="flags")
    Traceback (most recent call last):
    lbaccel.errors.InputError: --gpus 8 contradicts --nproc_per_node 4 in flags, 4 GPUs. Leave
    --gpus out, or correct the source.
    """
    numbers = set(stated.values())
    if len(numbers) > 1:
        said = " and ".join(stated)
        raise InputError(f"{origin} contradicts itself: {said}. Correct one of them.")
    if not numbers:
        if asked is None:
            raise InputError(
                f"{origin} does not say on how many GPUs it ran, and the global batch is per-GPU "
                "batch x GPUs x accumulation. Add --gpus 8, or as many as there were."
            )
        check_whole("--gpus", asked)
        return asked
    (number,) = numbers
    if asked is not None and asked != number:
        raise InputError(
            f"--gpus {asked} contradicts {next(iter(stated))} in {origin}, {number} GPUs. Leave "
            "--gpus out, or correct the source."
        )
    return number
