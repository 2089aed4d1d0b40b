"""The points of a landscape, computed one by one: each rank its share, and none of them twice."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from lbaccel.errors import RunFailed
from lbaccel.landscape.images import Prepared
from lbaccel.landscape.network import Measure, MovedNetwork, cross_entropy
from lbaccel.runs.pace import clock_time
from lbaccel.update.memory.oom import is_out_of_memory

Place = tuple[float, float]
Found = tuple[float | None, float]
POINTS_A_PASS = 16  # of images that are decoded anew: each batch meets so many points
_SECONDS = 5.0  # between two lines on the progress


@dataclass(frozen=True, eq=False)
class Plane:
    """The plane, or the line, of the weights: w(x, y) = w_0 + x d_x + y d_y.

    Args:
        origin: w_0, a copy of the tensors that move, by name.
        x: d_x, or with `between` the tensors of the second model.
        y: d_y, or None.
        between: w_0 + x d_x is (1 - x) w_0 + x w_1, whose ends are exact.
    """

    origin: Mapping[str, Tensor]
    x: Mapping[str, Tensor]
    y: Mapping[str, Tensor] | None = None
    between: bool = False

    def to(self, device: torch.device) -> Plane:
        """The same on another device."""
        moved = [
            None if part is None else {name: t.to(device) for name, t in part.items()}
            for part in (self.origin, self.x, self.y)
        ]
        return Plane(moved[0] or {}, moved[1] or {}, moved[2], self.between)

    def at(self, x: float, y: float) -> dict[str, Tensor]:
        """The tensors at a point, by name."""
        found = {}
        for name, start in self.origin.items():
            along = self.x[name]
            value = torch.lerp(start, along, x) if self.between else start + x * along
            found[name] = value if self.y is None else value + y * self.y[name]
        return found


def values_at(
    network: MovedNetwork,
    plane: Plane,
    places: Sequence[Place],
    images: Prepared,
    *,
    measure: Measure = cross_entropy,
    pace: Callable[[int], object] = lambda _: None,
) -> Iterator[Found]:
    """Mean loss (None where it is not finite) and top-1 in % at each place, in their order.

    Images that are in memory are gone through once a point. Others are decoded once for 16 points.
    The sums are the same to the bit either way.

    Args:
        network: is left at the last point.
        plane: of the same tensors.
        places: (x, y) of each point.
        images: that every point has.
        measure: of outputs and labels.
        pace: is told how many points are done.

    Raises:
        RunFailed: memory ran out.
    """
    group = 1 if images.in_memory else POINTS_A_PASS
    done, rest = 0, iter(places)
    try:
        while some := list(islice(rest, group)):
            if images.in_memory:
                network.put(plane.at(*some[0]))
                sums = [network.count(images.batches(), measure)]
            else:
                sums = [torch.zeros(3, dtype=torch.float64) for _ in some]
                for batch in images.batches():
                    for place, total in zip(some, sums, strict=True):
                        network.put(plane.at(*place))
                        total += network.count([batch], measure)
            for total in sums:
                loss, hits, count = total.tolist()
                mean = loss / count
                yield (mean if math.isfinite(mean) else None, 100 * hits / count)
                done += 1
                pace(done)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise RunFailed(
            "memory ran out in a forward pass of the landscape; the points that are done are kept. "
            "Free some memory, and type the same line again."
        ) from error


class PointsDone:
    """Says how many points are done and how long the rest takes, at most every five seconds.

    Args:
        say: prints a line.
        num: of points that are to be computed here.
        where: after the number, such as " on each of 2 ranks".
    """

    def __init__(self, say: Callable[[str], object], num: int, where: str = "") -> None:
        self._say, self._num, self._where = say, num, where
        self._start = self._said = time.monotonic()

    def __call__(self, done: int) -> None:
        """Say it, where it is time."""
        now = time.monotonic()
        if now - self._said < _SECONDS or done == self._num:
            return
        self._said = now
        left = (now - self._start) / done * (self._num - done)
        self._say(f"point {done}/{self._num}{self._where}, {clock_time(left)} left")
