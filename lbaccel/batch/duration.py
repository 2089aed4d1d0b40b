"""A length of training in updates, samples or epochs (no torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from lbaccel.errors import InputError, check_number

IMAGENET = 1_281_167  # training images of ImageNet-1k
MOST_EPOCHS = 1e6  # of a run: what goes through its epochs one by one then ends within a second


@dataclass(frozen=True, kw_only=True)
class Duration:
    """A length of training: exactly one of `updates`, `samples` and `epochs`, at least 0.

    Raises:
        InputError: none or several of the three, or one that is negative or not finite,
            or more than 1,000,000 epochs.

    >>> Duration(epochs=5).to_samples(global_batch_size=256, num_samples=50_000)
    250000.0
    >>> print(Duration(epochs=5))
    5 epochs
    """

    updates: float | None = None
    samples: float | None = None
    epochs: float | None = None

    def __post_init__(self) -> None:
        given = [u for u in ("updates", "samples", "epochs") if getattr(self, u) is not None]
        if len(given) != 1:
            raise InputError(
                f"a duration needs exactly one of updates, samples and epochs, and has "
                f"{' and '.join(given) or 'none'}. Use one, such as Duration(epochs=5)."
            )
        most = MOST_EPOCHS if given[0] == "epochs" else math.inf
        check_number(given[0], getattr(self, given[0]), zero=True, at_most=most)

    def to_samples(self, *, global_batch_size: int, num_samples: int) -> float:
        """In samples: `updates * global_batch_size`, `samples`, or `epochs * num_samples`.

        The product is exact and rounded once, so that an epoch's end is met even at 0.1 epochs.

        Args:
            global_batch_size: samples of an update. Where epochs end in a short update, state the
                duration in samples or epochs: u updates are then fewer than u full ones.
            num_samples: samples that one epoch consumes (whole updates only where the last
                incomplete one is dropped).

        Raises:
            InputError: a size that is not a positive finite number.
        """
        return float(self.exact_samples(global_batch_size, num_samples))

    def exact_samples(self, global_batch_size: int, num_samples: int) -> Fraction:
        """As `to_samples`, before it is rounded."""
        check_number("global_batch_size", global_batch_size)
        check_number("num_samples", num_samples)
        # str, since the user's 0.1 means one tenth, not the binary fraction beside it
        if self.updates is not None:
            return Fraction(str(self.updates)) * global_batch_size
        if self.epochs is not None:
            return Fraction(str(self.epochs)) * num_samples
        return Fraction(str(self.samples))

    def __str__(self) -> str:
        unit = next(u for u in ("updates", "samples", "epochs") if getattr(self, u) is not None)
        return f"{getattr(self, unit):.10g} {unit}"


def all_units(samples: Fraction, *, global_batch_size: int, num_samples: int) -> str:
    """A length as '98 updates (25000 samples, 0.5 epochs)'."""
    updates, epochs = float(samples / global_batch_size), float(samples / num_samples)
    return f"{updates:.6g} updates ({float(samples):.10g} samples, {epochs:.6g} epochs)"
