"""The two groups of `batch_schedule`'s arguments: the frame of a run, and its growth (no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lbaccel.batch.phases import check_size
from lbaccel.errors import InputError, check_choice, check_number, check_whole

PAST_MAX = ("drop", "lr")
_AT_MILESTONES = ("lrd", "bsi", "bsi-doubled-end", "mixed", "fast")
BY_EPOCH = ("fast", "instant")
_GROWING = ("bsi", "bsi-doubled-end", "mixed", "fast", "instant")
READ_BY = {  # the fields of `Growth`, each with the rules that read it
    "milestones": (*_AT_MILESTONES, "listed"),
    "factors": _AT_MILESTONES,
    "max_batch_size": _GROWING,
    "past_max": ("bsi", "bsi-doubled-end", "mixed"),
    "growth": BY_EPOCH,
    "lr_growth": BY_EPOCH,
    "first_epoch": BY_EPOCH,
    "batch_sizes": ("listed",),
    "lr_factors": ("listed",),
}


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Of a run, what no rule changes: the first batch, the length, the training set's size.

    Raises:
        InputError: a value out of its range.
    """

    global_batch_size: int
    epochs: float
    num_samples: int

    def __post_init__(self) -> None:
        check_whole("num_samples", self.num_samples)
        check_number("epochs", self.epochs)
        check_size("global_batch_size", self.global_batch_size, num_samples=self.num_samples)


@dataclass(frozen=True, kw_only=True)
class Growth:
    """When, by how much and how far batch and rate change; `batch_schedule` describes each field.

    None takes the rule's own value.

    Raises:
        InputError: an unknown `past_max`.
    """

    milestones: Sequence[float] | None = None
    factors: float | Sequence[float] | None = None
    max_batch_size: int | None = None
    past_max: str = "drop"
    growth: float | None = None
    lr_growth: float | None = None
    first_epoch: int | None = None
    batch_sizes: Sequence[int] | None = None
    lr_factors: Sequence[float] | None = None

    def __post_init__(self) -> None:
        check_choice("past_max", self.past_max, choices=PAST_MAX)

    def check(self, rule: str, frame: Frame) -> None:
        """Stop at a field that `rule` does not read, and at a batch that can't grow.

        Raises:
            InputError: one of these.
        """
        given = vars(self) | {"past_max": None if self.past_max == "drop" else self.past_max}
        for name, value in given.items():
            if value not in (None, ()) and rule not in READ_BY[name]:
                raise InputError(
                    f"rule={rule!r} does not read {name}={value!r}. Leave {name} out, or use rule="
                    f"{' or '.join(repr(other) for other in READ_BY[name])}."
                )
        largest, first = self.largest(frame), frame.global_batch_size
        check_size("max_batch_size", largest, num_samples=frame.num_samples)
        if rule in _GROWING and (largest < first or (largest == first and self.past_max == "drop")):
            raise InputError(
                f"max_batch_size={largest} leaves global_batch_size={first} no room to "
                f"grow under rule={rule!r}. Use max_batch_size > {first}, or a smaller "
                "global_batch_size, or rule='steady'."
            )

    def largest(self, frame: Frame) -> int:
        """Samples of an update that no growth exceeds."""
        return frame.num_samples if self.max_batch_size is None else self.max_batch_size
