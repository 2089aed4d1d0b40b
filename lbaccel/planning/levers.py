"""What each lever would buy in bytes and cost in seconds, and what that means, in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lbaccel.planning.devices import GIB
from lbaccel.planning.estimate import Estimator
from lbaccel.planning.search import Choice, Search

LITTLE = 0.03  # of the peak: not worth a word more


@dataclass(frozen=True)
class Lever:
    """One lever against the plan that was chosen; a negative `time_pct` is a gain."""

    name: str
    gib_saved: float
    time_pct: float
    changes_result: bool
    verdict: str


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
        kept = search.predicted(candidate.memory_format, size, 1.0)
        for share in (0.75, 0.5):
            less = search.predicted(candidate.memory_format, size, share)
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
    yield from _fused_step(search, choice)
    other = "contiguous" if candidate.memory_format == "channels_last" else "channels_last"
    if candidate.checkpointing == "none":
        turned = search.choice(replace(candidate, memory_format=other))
        yield lever(other, peak - turned.estimate.peak, turned.seconds, "faster here")


def _fused_step(search: Search, choice: Choice) -> Iterator[Lever]:
    estimator = search.estimator
    if estimator.steps_fused:
        gain = estimator.step_seconds(fused=False) - estimator.step_seconds()
        pct = 100 * gain / choice.seconds
        yield Lever("fused optimizer", 0.0, 0.0, False, f"taken: {pct:.1f} % an update faster")


def _of_the_devices(search: Search, choice: Choice) -> Iterator[Lever]:
    estimator = search.estimator
    world = estimator.plan.world_size
    gradients, weights, states = (
        estimator.gradient_bytes,
        estimator.weight_bytes,
        estimator.state_bytes,
    )
    peak = choice.estimate.peak
    activations = choice.estimate.breakdown["activations"] / peak
    share = (world - 1) / world
    link = estimator.device.link_bandwidth
    steps = -(-search.most // choice.candidate.micro_batch_size)
    stages = (
        ("ZeRO-1 (optimizer state divided)", states, 0.0),
        ("ZeRO-2 (and gradients)", states + gradients, steps * gradients * share / link),
        (
            "ZeRO-3 (and weights)",
            states + gradients + weights,
            steps * (gradients + 2 * weights) * share / link,
        ),
    )
    for name, divided, seconds in stages:
        saved = divided * share
        pct = 100 * seconds / choice.seconds
        if world == 1:
            verdict = "one device: there is nothing to divide"
        elif saved < LITTLE * peak:
            verdict = f"saves at most {saved / peak:.1%} here: activations are {activations:.0%}"
        else:
            verdict = _verdict(
                saved, peak, pct, "paid in every micro-step" if pct else "nearly free"
            )
        yield Lever(name, saved / GIB, pct, False, verdict)
    moved = (gradients + weights) / estimator.device.host_bandwidth
    if estimator.device.kind == "cuda":
        pct = 100 * moved / choice.seconds
        yield Lever(
            "optimizer offload to the host",
            states / GIB,
            pct,
            False,
            _verdict(states, peak, pct, f"paid once an update, over {steps} micro-steps"),
        )


def _of_the_contract(search: Search, choice: Choice) -> Iterator[Lever]:
    estimator, peak = search.estimator, choice.estimate.peak

    def against(other: Estimator, name: str, why: str) -> Lever:
        found = Search(other, search.budget, search.pinned).choice(choice.candidate)
        saved, pct = peak - found.estimate.peak, 100 * (found.seconds / choice.seconds - 1)
        return Lever(name, saved / GIB, pct, True, _verdict(saved, peak, pct, why))

    if estimator.precision == "fp32":
        half = Estimator(estimator.network, estimator.plan, estimator.device, "bf16")
        yield against(half, "bf16", "another rounding: yours to decide")
    states = estimator.state_bytes
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
        frozen = Estimator(estimator.network, plan, estimator.device, estimator.precision)
        yield against(frozen, "frozen BatchNorm", "for pretrained weights: any micro-batch then")


def _verdict(saved: float, peak: int, pct: float, gain: str) -> str:
    """Plain words of a lever: does it save, what does it cost."""
    if saved < LITTLE * peak:
        text = f"saves {saved / peak:.1%} of the peak" if saved > 0 else "saves no memory"
        if pct < -1:
            return f"{-pct:.0f} % faster, {text}"
        return f"{text}: leave it"
    return f"saves {saved / peak:.0%} for {pct:+.1f} % time; {gain}"
