"""The candidates that a plan chooses between, and their costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lbaccel.planning.cost.chain import ChainCost, Unit

MemoryFormat = Literal["contiguous", "channels_last"]
Segments = tuple[tuple[str, ...], ...]
Checkpointing = Literal["none", "full"] | Segments


@dataclass(frozen=True)
class Candidate:
    """The settings that a plan chooses."""

    micro_batch_size: int
    memory_format: MemoryFormat = "contiguous"
    checkpointing: Checkpointing = "none"
    offload: Segments = ()  # runs of modules whose activations lie on the host


@dataclass(frozen=True)
class Estimate:
    """The bytes and seconds that a candidate costs."""

    peak: int  # bytes, all of `breakdown`
    traced: int  # bytes that the trace alone has
    breakdown: dict[str, int]
    accumulating: dict[str, int]  # parts at the peak of the micro-steps, the device's own left out
    first_step_seconds: float  # of the first micro-step, which has nothing to add its gradient to
    micro_step_seconds: float
    commit_seconds: float  # once an update: norm, clipping, step, reduction
    chain: ChainCost | None  # where nothing is recomputed
    forward_seconds: tuple[float, ...]  # of the chain's units
    host_bytes: int = 0  # that offloaded activations pin, on the host and in no part of the peak


@dataclass(frozen=True)
class Survey:
    """A first look at a network: one contiguous micro-step without recompute."""

    units: list[Unit]  # its chain
    seconds: float
    by_layout: float  # of them in kernels that a memory format can make faster
