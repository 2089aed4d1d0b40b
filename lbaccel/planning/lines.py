"""The costs of micro-batches that are not traced, by the straight line through two that are."""

from __future__ import annotations

import math

from lbaccel.planning.candidates import Candidate, Checkpointing, Estimate, MemoryFormat
from lbaccel.planning.cost.chain import ChainCost, UnitCost
from lbaccel.planning.estimate import Estimator
from lbaccel.planning.segments import (
    Link,
    best_parts,
    best_runs,
    extra_seconds,
    predicted_peak,
    sent_bytes,
)

TRACED = 16  # samples of a first trace, where groups are smaller


class Lines:
    """Peaks, seconds and chains of any micro-batch of one network.

    Args:
        estimator: of the network and the contract.
        unit: samples of a group.
        most: samples of a rank's share of an update.
    """

    def __init__(self, estimator: Estimator, *, unit: int, most: int) -> None:
        self._estimator, self._most = estimator, most
        small = unit if unit > 4 else min(-(-TRACED // unit) * unit, most)
        self.sizes = (small, min(2 * small, most))  # that are traced

    def steps(self, size: int) -> int:
        """Micro-steps of an update."""
        return -(-self._most // size)

    def at(self, first: float, second: float, size: float) -> float:
        """A quantity at `size`, of which `first` and `second` are those at the traced sizes."""
        a, b = self.sizes
        return first if a == b else first + (second - first) * (size - a) / (b - a)

    def both(self, layout: MemoryFormat, how: Checkpointing) -> tuple[Estimate, Estimate]:
        """The estimates of both traced sizes."""
        a, b = self.sizes
        first = self._estimator.estimate(Candidate(a, layout, how))
        return first, self._estimator.estimate(Candidate(b, layout, how))

    def seconds(self, layout: MemoryFormat, how: Checkpointing, size: int) -> float:
        """Seconds of an update by the line through two traces."""
        first, second = self.both(layout, how)
        seconds = (first.micro_step_seconds, second.micro_step_seconds)
        launch = max(0.0, self.at(*seconds, 0))  # of a micro-step without samples
        work = self.at(*seconds, self._most) - self.at(*seconds, 0)
        return self.steps(size) * launch + work + first.commit_seconds

    def chain(self, layout: MemoryFormat, size: int) -> tuple[ChainCost, list[float]]:
        """The chain's costs at `size`, on the line through two traces."""
        first, second = self.both(layout, "none")
        assert first.chain is not None and second.chain is not None
        units: list[UnitCost] = []
        for one, two in zip(first.chain.units, second.chain.units, strict=True):
            fields = {
                key: math.ceil(self.at(value, getattr(two, key), size))
                for key, value in vars(one).items()
            }
            units.append(UnitCost(**fields))
        around = {
            key: math.ceil(self.at(getattr(first.chain, key), getattr(second.chain, key), size))
            for key in ("before", "head", "elsewhere")
        }
        forward = [  # never faster a sample than in the faster of both traces, let alone below 0
            max(
                self.at(one, two, size),
                size * min(one / self.sizes[0], two / self.sizes[1]),
            )
            for one, two in zip(first.forward_seconds, second.forward_seconds, strict=True)
        ]
        return ChainCost(tuple(units), **around, state=first.chain.state), forward

    def predicted(self, layout: MemoryFormat, size: int, share: float) -> tuple[int, float] | None:
        """(peak bytes, seconds of an update), untraced, with `share` of the activations kept.

        None where no recompute brings them down so far.
        """
        first, second = self.both(layout, "none")
        peak = self.at(first.peak, second.peak, size)
        plain = self.seconds(layout, "none", size)
        if share >= 1:
            return int(peak), plain
        if not self._estimator.units:
            return None
        chain, forward = self.chain(layout, size)
        traced = self.at(first.traced, second.traced, size)
        budget = int(chain.before + share * (traced - chain.before))
        runs = best_runs(chain, self._estimator.units, forward, budget)
        if runs is None:
            return None
        saved = traced - predicted_peak(chain, runs)
        return int(peak - saved), plain + self.steps(size) * extra_seconds(forward, runs)

    def predicted_offload(
        self, layout: MemoryFormat, size: int, share: float
    ) -> tuple[int, float, int] | None:
        """(bytes saved of the peak, seconds more, bytes sent), untraced, by offload alone.

        `share` of the activations is kept on the device. None where offload brings them not so far
        down.
        """
        if not self._estimator.units:
            return None
        first, second = self.both(layout, "none")
        chain, forward = self.chain(layout, size)
        traced = self.at(first.traced, second.traced, size)
        device, units = self._estimator.device, self._estimator.units
        link = Link(device.host_bandwidth, 2**62)
        budget = int(chain.before + share * (traced - chain.before))
        parts = best_parts(chain, units, forward, budget, link=link, recomputes=False)
        if parts is None:
            return None
        sent = sent_bytes(chain, parts.offloaded)
        saved = int(traced - predicted_peak(chain, [], parts.offloaded))
        return saved, self.steps(size) * link.seconds(sent), sent
