"""The bytes that each lever would save and the seconds it would cost, with a verdict in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lbaccel.planning.cost.devices import GIB
from lbaccel.planning.cost.zero_memory import BUCKET, Zero
from lbaccel.planning.estimate import Estimator
from lbaccel.planning.search import Choice, Search

LITTLE = 0.03  # of the peak: not worth a word more
STAGES = {
    1: ("ZeRO-1 (optimizer state divided)", "one reduction and one gathering an update"),
    2: ("ZeRO-2 (lbaccel: as ZeRO-1)", "the gradient is whole on a rank until its one reduction"),
    3: ("ZeRO-3 (gradients and weights at rest too)", "gathers and reduces in every micro-step"),
}
WITHOUT = "without ZeRO"
OFFLOAD = "optimizer offload to the host"
ACTIVATIONS = "activation offload"


@dataclass(frozen=True)
class Lever:
    """One lever against the plan that was chosen; a negative `time_pct` is a gain."""

    name: str
    gib_saved: float
    time_pct: float
    changes_result: bool
    verdict: str
    host_gib: float = 0.0  # of the host, that it takes


def levers(search: Search, choice: Choice) -> list[Lever]:
    """Every lever that this contract has, against `choice`."""
    return [
        *_of_the_plan(search, choice),
        *_of_the_devices(search, choice),
        *_of_the_contract(search, choice),
    ]


def _of_the_plan(search: Search, choice: Choice) -> Iterator[Lever]:
    candidate, size = choice.candidate, choice.candidate.micro_batch_size
    peak = choice.estimate.peak

    def lever(name: str, saved: float, seconds: float, gain: str) -> Lever:
        pct = 100 * (seconds / choice.seconds - 1)
        return Lever(name, saved / GIB, pct, False, _verdict(saved, peak, pct, gain))

    half = max(search.unit, size // 2 // search.unit * search.unit)
    if half < size and candidate.checkpointing == "none":
        smaller = search.choice(replace(candidate, micro_batch_size=half))
        yield lever(
            f"micro-batch {half}",
            peak - smaller.estimate.peak,
            smaller.seconds,
            "the first to pull",
        )
    if candidate.checkpointing == "none":
        kept = search.lines.predicted(candidate.memory_format, size, 1.0)
        for share in (0.75, 0.5):
            less = search.lines.predicted(candidate.memory_format, size, share)
            if kept is not None and less is not None:
                yield lever(
                    f"recompute to {share:.0%} of the activations",
                    kept[0] - less[0],
                    choice.seconds + less[1] - kept[1],
                    "when one group alone does not fit",
                )
        for full in search.with_every_block(candidate):
            yield lever(
                "recompute every block (timm's switch)",
                peak - full.estimate.peak,
                full.seconds,
                "the optimum above costs less at the same memory",
            )
    yield from _offloads(search, choice)
    yield from _fused_step(search, choice)
    other = "contiguous" if candidate.memory_format == "channels_last" else "channels_last"
    if candidate.checkpointing == "none":
        turned = search.choice(replace(candidate, memory_format=other))
        yield lever(other, peak - turned.estimate.peak, turned.seconds, "faster here")


def _offloads(search: Search, choice: Choice) -> Iterator[Lever]:
    """Activations on the host; on a CPU that is the memory that they lie in anyway."""
    candidate, device, peak = choice.candidate, search.estimator.device, choice.estimate.peak
    if device.kind == "cpu":
        yield Lever(
            f"{ACTIVATIONS} to the host",
            0.0,
            0.0,
            False,
            "saves no memory on a CPU, whose memory is the host's: leave it",
        )
    if device.kind == "cpu" or candidate.checkpointing != "none" or candidate.offload:
        return
    size = candidate.micro_batch_size
    for kept in (0.75, 0.5):
        found = search.lines.predicted_offload(candidate.memory_format, size, kept)
        if found is None:
            continue
        saved, seconds, sent = found
        pct = 100 * seconds / choice.seconds
        gain = (
            f"{sent / GIB:.2f} GiB of the host at {device.host_bandwidth / 1e9:g} GB/s; when "
            "recompute is not enough"
        )
        verdict = _verdict(saved, peak, pct, gain)
        name = f"{ACTIVATIONS}, {kept:.0%} kept"
        yield Lever(name, saved / GIB, pct, False, verdict, sent / GIB)


def _fused_step(search: Search, choice: Choice) -> Iterator[Lever]:
    estimator = search.estimator
    if estimator.steps_fused:
        gain = estimator.step_seconds(fused=False) - estimator.step_seconds()
        pct = 100 * gain / choice.seconds
        yield Lever("fused optimizer", 0.0, 0.0, False, f"taken: {pct:.1f} % an update faster")


def _of_the_devices(search: Search, choice: Choice) -> Iterator[Lever]:
    """The other stages, and DDP where the plan is under one; each with the plan's micro-batch."""
    estimator = search.estimator
    here, world = estimator.zero, estimator.plan.world_size
    over_all = estimator.plan.norm_batch_size == "global"
    if estimator.precision == "fp16" or over_all:  # lbaccel runs neither under DeepSpeed
        return
    peak = choice.estimate.peak
    bucket_size = here.bucket_size if here is not None else BUCKET

    def under(zero: Zero | None) -> tuple[int, float]:
        found = Search(estimator.under(zero), search.budget, search.pinned).choice(choice.candidate)
        return peak - found.estimate.peak, 100 * (found.seconds / choice.seconds - 1)

    if here is not None:
        saved, pct = under(None)
        yield Lever(WITHOUT, saved / GIB, pct, False, _verdict(saved, peak, pct, "no DeepSpeed"))
    for stage, (name, how) in STAGES.items():
        if here == Zero(stage, bucket_size=bucket_size):
            continue
        saved, pct = under(Zero(stage, bucket_size=bucket_size))
        if world == 1:
            verdict = "one device: there is nothing to divide"
            if saved < 0:
                verdict += f", and DeepSpeed's copies take {-saved / GIB:.2f} GiB more"
        elif 0 <= saved < LITTLE * peak:
            activations = choice.estimate.breakdown["activations"] / peak
            verdict = f"saves {saved / peak:.1%} here: activations are {activations:.0%}"
        else:
            verdict = _verdict(saved, peak, pct, how)
        yield Lever(name, saved / GIB, pct, False, verdict)
    offloaded = Zero(2, "optimizer", bucket_size)
    if estimator.device.kind == "cuda" and here != offloaded:
        saved, pct = under(offloaded)
        how = "under ZeRO-2; the step on the CPU is not in the time"
        yield Lever(OFFLOAD, saved / GIB, pct, False, _verdict(saved, peak, pct, how))


def _of_the_contract(search: Search, choice: Choice) -> Iterator[Lever]:
    estimator, peak = search.estimator, choice.estimate.peak

    def against(other: Estimator, name: str, why: str) -> Lever:
        found = Search(other, search.budget, search.pinned).choice(choice.candidate)
        saved, pct = peak - found.estimate.peak, 100 * (found.seconds / choice.seconds - 1)
        return Lever(name, saved / GIB, pct, True, _verdict(saved, peak, pct, why))

    if estimator.precision == "fp32":
        yield against(estimator.like(precision="bf16"), "bf16", "another rounding: yours to decide")
    states = estimator.state_bytes
    if estimator.zero is not None and estimator.zero.stage:
        states = choice.estimate.breakdown["optimizer"]  # a rank's part
    if states:
        moved = 1.5 * states / estimator.device.reached_bandwidth
        pct = -100 * moved / choice.seconds
        saved = 0.75 * states
        yield Lever(
            "8-bit optimizer state",
            saved / GIB,
            pct,
            True,
            _verdict(saved, peak, pct, "another update rule"),
        )
    if isinstance(estimator.plan.norm_batch_size, int):
        plan = replace(estimator.plan, norm_batch_size="frozen")
        frozen = estimator.like(plan=plan)
        yield against(frozen, "frozen BatchNorm", "for pretrained weights: any micro-batch then")


def _verdict(saved: float, peak: int, pct: float, gain: str) -> str:
    """Plain words of a lever: does it save, what does it cost."""
    if saved < LITTLE * peak:
        text = f"saves {saved / peak:.1%} of the peak" if saved > 0 else "saves no memory"
        if saved < 0:
            text = f"takes {-saved / peak:.1%} of the peak more"
        if pct < -1:
            return f"{-pct:.0f} % faster, {text}"
        return f"{text}: leave it"
    return f"saves {saved / peak:.0%} for {pct:+.1f} % time; {gain}"
