"""Which micro-batch size a run works at: smaller when memory runs out, larger again later."""

from __future__ import annotations

from collections.abc import Callable

PATIENCE = 32  # updates at a smaller size before the larger one is tried again
MOST_PATIENCE = 4096


class MicroBatchSize:
    """Halves when memory runs out, and doubles again after `PATIENCE` updates that went well.

    A shrink that a passing neighbour on the device brought about is undone so; where the larger
    size fails again, the patience doubles, so that trying costs less and less. Sizes are whole
    groups (ghost batches). No clock, no memory reading: ranks that see the same events agree.

    Args:
        asked: samples, what the plan asks for; never exceeded.
        unit: samples of a group.

    >>> size = MicroBatchSize(asked=96, unit=32)
    >>> size.shrink(), size.shrink()
    (32, None)
    >>> {size.after_update() for _ in range(PATIENCE - 1)}, size.after_update()
    ({32}, 64)
    """

    def __init__(self, *, asked: int, unit: int) -> None:
        self.asked, self.unit = asked, unit
        self.current = asked
        self._patience = PATIENCE
        self._since = 0
        self._on_trial = False

    def shrink(self, used: int | None = None) -> int | None:
        """The next smaller size, or None where one group is all there is.

        Args:
            used: the largest micro-batch that really ran; the plan's may be larger than a rank's
                share of the batch.
        """
        groups = min(self.current, used or self.current) // self.unit
        if groups <= 1:
            return None
        if self._on_trial:
            self._patience = min(MOST_PATIENCE, 2 * self._patience)
        self.current = groups // 2 * self.unit
        self._since, self._on_trial = 0, False
        return self.current

    def after_update(self) -> int:
        """Count an update that went well; the size for the next one."""
        self._since += 1
        self._on_trial = False
        if self.current < self.asked and self._since >= self._patience:
            self.current = min(self.asked, 2 * self.current)
            self._since, self._on_trial = 0, True
        return self.current


def largest_that_fits(fits: Callable[[int], bool], *, unit: int, most: int) -> int | None:
    """The largest multiple of `unit` up to `most` that `fits`, or None: doubling, then bisection.

    Where a size fits, every smaller one is taken to fit. Tries about 2 log2(most / unit) sizes.

    >>> largest_that_fits(lambda size: size <= 300, unit=32, most=1024)
    288
    """
    best, bad = 0, most // unit + 1
    size = 1
    while size < bad:
        if not fits(size * unit):
            bad = size
            break
        best, size = size, min(2 * size, max(size + 1, bad - 1))
    while bad - best > 1:
        middle = (best + bad) // 2
        if fits(middle * unit):
            best = middle
        else:
            bad = middle
    return best * unit or None
