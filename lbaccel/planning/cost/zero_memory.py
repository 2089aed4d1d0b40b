"""The bytes of a rank under DeepSpeed 0.19.8 as lbaccel drives it: formulas, no torch.

W weights, P parameters, G gradients, S optimizer state, L the largest parameter, B the reduce
bucket, N ranks; in float32. Read in DeepSpeed's stage_1_and_2.py and stage3.py, and measured
(docs/results/zero_memory.md):

- ZeRO-0: W + S + G; the reduction flattens the gradient, so G once more.
- ZeRO-1 and 2 alike: W + S/N and a flat copy P/N of the rank's own weights, in float32 too. lbaccel
  reduces once an update, so a rank holds G whole until then; the reduction adds the part of B
  that no gradient fills, and G/N or the sums of one bucket.
- ZeRO-3: 2P/N + S/N + G/N + B. All gathered weights lie there at the peak, P (measured; a smaller
  `stage3_max_reuse_distance` changed nothing), and at most three gathers of B + L besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lbaccel.errors import InputError

Offload = Literal["none", "optimizer", "optimizer+parameters"]
STAGES: dict[str, tuple[int, ...]] = {
    "none": (0, 1, 2, 3),
    "optimizer": (2, 3),
    "optimizer+parameters": (3,),
}
BUCKET = 5_000_000  # elements: 19 MiB in fp32, near DDP's 25 MiB; DeepSpeed's 5e8 takes 1.9 GiB
DEEPSPEEDS_BUCKET = 500_000_000  # where a config names none
GATHERS = 3  # in flight at once under ZeRO-3, at most (seen: 2 to 3)
Parts = dict[str, int]


@dataclass(frozen=True)
class Zero:
    """A stage, what is offloaded, and `reduce_bucket_size` in elements."""

    stage: int
    offload: Offload = "none"
    bucket_size: int = BUCKET

    def __post_init__(self) -> None:
        allowed = STAGES.get(self.offload)
        if allowed is None:
            raise InputError(f"offload={self.offload!r} is none of {', '.join(STAGES)}.")
        if self.stage not in allowed:
            raise InputError(
                f"zero_stage={self.stage} with offload={self.offload!r}: it goes with ZeRO-"
                f"{' and ZeRO-'.join(map(str, allowed))}. Use zero_stage={allowed[0]}."
            )


@dataclass(frozen=True)
class Sizes:
    """Bytes of a network and its training."""

    weights: int  # parameters and buffers
    parameters: int
    gradients: int
    states: int
    largest: int  # parameter
    temporaries: float  # of the optimizer's step, as a share of what it steps


def held(zero: Zero, sizes: Sizes, traced: Mapping[str, int], *, world_size: int) -> Parts:
    """Bytes of a rank by part at its peak; "host" is what offload moves there.

    Args:
        zero: the stage.
        sizes: of the network.
        traced: the parts at the peak of the micro-steps in one process.
        world_size: N.

    >>> sizes = Sizes(100, 100, 100, 100, 10, 0.0)
    >>> traced = {"weights": 100, "gradients": 100, "optimizer": 100, "activations": 900}
    >>> sum(held(Zero(2, bucket_size=5), sizes, traced, world_size=4).values())
    1150
    """
    own = _Own(sizes, world_size)
    bucket = 4 * zero.bucket_size
    if zero.stage == 0:
        fixed = {"weights": sizes.weights, "optimizer": sizes.states}
        reducing = {"gradients": sizes.gradients, "deepspeed": sizes.gradients}
        moments = [{**traced, **fixed}, {**fixed, **reducing}]
    elif zero.stage < 3:
        moments = _divided_once(zero, sizes, own, traced, bucket)
    else:
        moments = _divided_always(zero, sizes, own, traced, bucket)
    return max(moments, key=lambda parts: sum(parts.values()))


@dataclass(frozen=True)
class _Own:
    """A rank's own part of something."""

    sizes: Sizes
    world_size: int

    def __call__(self, num_bytes: int) -> int:
        return -(-num_bytes // self.world_size)


def _divided_once(
    zero: Zero, sizes: Sizes, own: _Own, traced: Mapping[str, int], bucket: int
) -> list[Parts]:
    gradients, flat = sizes.gradients, own(sizes.gradients)
    fixed = {"weights": sizes.weights, "optimizer": own(sizes.states), "deepspeed": flat}
    taken = flat  # of the reduced gradient
    if zero.offload != "none":
        on_host = 3 * flat + own(sizes.states) + sizes.largest  # with a copy to send, a gradient
        fixed = {
            "weights": sizes.weights,
            "optimizer": 0,
            "deepspeed": sizes.largest,
            "host": on_host,
        }
        taken = 0
    buffers = max(0, bucket - gradients) + max(taken, min(bucket, gradients))
    reducing = {"gradients": gradients, "deepspeed": fixed["deepspeed"] + buffers}
    stepping = {"gradients": 2 * taken, "workspace": int(sizes.temporaries * flat)}
    return [{**traced, **fixed}, {**fixed, **reducing}, {**fixed, **stepping}]


def _divided_always(
    zero: Zero, sizes: Sizes, own: _Own, traced: Mapping[str, int], bucket: int
) -> list[Parts]:
    part, flat, states = own(sizes.parameters), own(sizes.gradients), own(sizes.states)
    gathering = min(sizes.parameters, GATHERS * (bucket + sizes.largest))
    fixed = {"optimizer": states, "gradients": flat, "deepspeed": part + flat + bucket}
    stepped = {"gradients": 2 * flat, "workspace": int(sizes.temporaries * flat)}
    if zero.offload != "none":  # float32 weights, states, the sum of gradients and what is stepped
        fixed |= {"optimizer": 0, "gradients": 0, "deepspeed": part + bucket}
        fixed["host"] = 3 * flat + states
        stepped = {"workspace": int(sizes.temporaries * flat)}
    if zero.offload == "optimizer+parameters":
        fixed |= {"deepspeed": bucket, "host": fixed["host"] + part}
    gathered = {"weights": sizes.weights, "deepspeed": fixed["deepspeed"] + gathering}
    buffers = {"weights": sizes.weights - sizes.parameters}
    return [{**traced, **fixed, **gathered}, {**fixed, **buffers, **stepped}]


@dataclass(frozen=True)
class Seconds:
    """The seconds that a stage adds to a micro-step and to the end of an update."""

    micro_step: float
    commit: float


def added_seconds(
    zero: Zero, sizes: Sizes, *, world_size: int, link: float, host: float, step: float
) -> Seconds:
    """Seconds that a stage adds to an update of one process.

    Args:
        zero: the stage.
        sizes: of the network.
        world_size: N.
        link: bytes a second between devices.
        host: bytes a second between a device and the host.
        step: seconds of the optimizer's step in one process, which N ranks share from ZeRO-1 on.
    """
    share = (world_size - 1) / world_size
    own_step = -step * share if zero.stage else 0.0
    own = (sizes.gradients + sizes.parameters) / world_size
    if zero.stage < 3:
        moved = 2 * sizes.gradients + (sizes.parameters if zero.stage else 0)
        sent = own / host if zero.offload != "none" else 0.0
        return Seconds(0.0, moved * share / link + own_step + sent)
    micro = (sizes.gradients + sizes.parameters) * share / link
    if zero.offload != "none":  # the sum of gradients comes up and goes down
        micro += 2 * sizes.gradients / world_size / host
    if zero.offload == "optimizer+parameters":
        micro += sizes.parameters / world_size / host
    sent = own / host if zero.offload != "none" else 0.0
    return Seconds(micro, own_step + sent)
