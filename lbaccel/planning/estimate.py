"""Peak bytes and seconds of one candidate plan, from a trace of its update."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from lbaccel.batch.plan import BatchPlan
from lbaccel.errors import InputError
from lbaccel.planning.candidates import Candidate, Estimate, Survey
from lbaccel.planning.cost.chain import ChainFinder, Unit, chain_cost, mark_units
from lbaccel.planning.cost.cuda_limit import smallest_limit
from lbaccel.planning.cost.devices import Device
from lbaccel.planning.cost.host_store import LookingOn, TracedHost
from lbaccel.planning.cost.kept_kernels import kept_kernels
from lbaccel.planning.cost.known_calls import KnownCalls
from lbaccel.planning.cost.time_model import seconds
from lbaccel.planning.cost.trace import Kernel, Recorder, Trace, Workspace
from lbaccel.planning.cost.trace_parts import requests, step_kernels
from lbaccel.planning.cost.update import Network, Precision, trace_update
from lbaccel.planning.cost.workspace import CpuWorkspaces, Workspaces, cuda_workspace
from lbaccel.planning.cost.zero_memory import Sizes, Zero, added_seconds, held
from lbaccel.planning.kept_estimates import asked_for, kept_estimates
from lbaccel.update.accumulation import reduction_bytes
from lbaccel.update.checkpointing import apply_activation_checkpointing, apply_segments
from lbaccel.update.memory.reserve import state_tensors
from lbaccel.update.offload import hand_to

T = TypeVar("T", Estimate, Survey)


class Estimator:
    """Traces candidates of one network, precision and device, each of them once.

    Args:
        network: what is trained.
        plan: the contract; its micro-batch is replaced by a candidate's.
        device: whose rates, workspaces and allocator count.
        precision: of the forward pass.
    """

    def __init__(
        self, network: Network, plan: BatchPlan, device: Device, precision: Precision
    ) -> None:
        self.observe: Callable[[Candidate, int], Estimate] | None = None
        self.say: Callable[[str], object] = lambda _: None  # called before each trace
        self.network, self.plan, self.device = network, plan, device
        self.zero: Zero | None = None  # without: one process, or DDP
        self.precision: Precision = precision
        self._known: dict[tuple[Candidate, int], Estimate] = {}
        self._surveys: dict[int, Survey] = {}
        self._units: list[Unit] | None = None
        self.num_traces = 0
        self.cpu_workspaces = CpuWorkspaces()
        self._known_calls = KnownCalls()
        parameters = [p for p in network.model.parameters() if p.requires_grad]
        self.weight_bytes = sum(t.nbytes for t in _tensors(network.model))
        teacher = network.teacher
        self.teacher_bytes = 0 if teacher is None else sum(t.nbytes for t in _tensors(teacher))
        self.gradient_bytes = sum(p.nbytes for p in parameters)
        self._parameter_bytes = sum(p.nbytes for p in network.model.parameters())
        optimizer = network.optimizer
        self._states = [] if optimizer is None else state_tensors(optimizer)
        self.state_bytes = sum(s.nbytes for s in self._states)
        groups = [] if optimizer is None else optimizer.param_groups
        self.steps_fused = bool(groups) and all(group.get("fused") for group in groups)
        self._largest = max((p.nbytes for p in parameters), default=0)
        self._reduction_bytes = reduction_bytes([p.nbytes for p in parameters])
        self.kept = kept_estimates(network, self._states, device)

    @property
    def units(self) -> list[Unit]:
        """The chain of the network."""
        if self.observe is not None:
            return []
        if self._units is None:
            known = next(iter(self._surveys.values()), None)
            self._units = (known or self.survey(self.plan.group_size)).units
        return self._units

    @property
    def _margin(self) -> int:
        return 0 if self.device.kind == "cuda" else self.cpu_workspaces.margin

    @property
    def _workspace(self) -> Workspace:
        return cuda_workspace if self.device.kind == "cuda" else self.cpu_workspaces.later

    @property
    def _of_teacher(self) -> dict[str, int]:
        """Its part of a breakdown; none without one."""
        return {"teacher": self.teacher_bytes} if self.teacher_bytes else {}

    def workspaces(self) -> Workspaces | None:
        """Where a CPU's workspaces come from; None for a GPU, and where nothing is traced."""
        if self.device.kind == "cuda" or self.observe is not None:
            return None
        return self.cpu_workspaces.summary()

    def survey(self, size: int) -> Survey:
        """A first look at the network, at a micro-batch of `size`."""
        if self.observe is not None:
            return Survey([], self.estimate(Candidate(size)).first_step_seconds, math.inf)
        if size not in self._surveys:
            self._surveys[size] = self._kept(size, Survey) or self._survey(size)
        return self._surveys[size]

    def _survey(self, size: int) -> Survey:
        finders: list[ChainFinder] = []

        def find(model: nn.Module, recorder: Recorder) -> None:
            finders.append(ChainFinder(model, recorder))

        kernels = step_kernels(self._trace(Candidate(size), find, 1), 0).first
        turned = [k for k in kernels if "convolution" in k.name or "batch_norm" in k.name]
        found = Survey(
            finders[0].units(), seconds(kernels, self.device), seconds(turned, self.device)
        )
        self._keep(size, found)
        return found

    def like(
        self, *, plan: BatchPlan | None = None, precision: Precision | None = None
    ) -> Estimator:
        """One for another contract of the same network and device; the chain is shared."""
        other = copy.copy(self)
        other.plan, other.precision = plan or self.plan, precision or self.precision
        other._known, other._surveys, other.num_traces = {}, {}, 0
        other.cpu_workspaces = CpuWorkspaces()
        other._known_calls = self._known_calls.for_another_workspace()
        return other

    def of_world(self, world_size: int) -> Estimator:
        """The same on another number of devices; what was traced is shared."""
        other = copy.copy(self)
        other.plan = replace(self.plan, world_size=world_size)
        return other

    def under(self, zero: Zero | None) -> Estimator:
        """The same under a stage of DeepSpeed; what was traced is shared."""
        other = copy.copy(self)
        other.zero = zero
        return other

    def estimate(self, candidate: Candidate) -> Estimate:
        """Bytes and seconds of `candidate`."""
        size = candidate.micro_batch_size
        groups = -(-self.plan.num_groups(self.plan.global_batch_size) // self.plan.world_size)
        steps = min(2, -(-groups * self.plan.group_size // size))  # from the second on all alike
        if (candidate, steps) not in self._known:
            kept = None if self.observe else self._kept((candidate, steps), Estimate)
            estimated = self.observe or self._estimate
            self._known[candidate, steps] = kept or estimated(candidate, steps)
        found, world = self._known[candidate, steps], self.plan.world_size
        if self.zero is not None:
            return self._under_zero(found, self.zero)
        if world == 1:
            return found
        # DDP holds the gradients once more in its buckets, and the update's own reduction has a
        # buffer for its largest one.
        buckets = self.gradient_bytes + self._reduction_bytes
        breakdown = found.breakdown | {"gradients": found.breakdown["gradients"] + buckets}
        reduction = 2 * self.gradient_bytes * (world - 1) / world / self.device.link_bandwidth
        return replace(
            found,
            peak=found.peak + buckets,
            breakdown=breakdown,
            commit_seconds=found.commit_seconds + reduction,
        )

    def _under_zero(self, found: Estimate, zero: Zero) -> Estimate:
        world, device = self.plan.world_size, self.device
        loop = (
            1.0 if device.kind == "cuda" else 2.0
        )  # of a step that is not fused, on a flat vector
        sizes = Sizes(
            weights=self.weight_bytes,
            parameters=self._parameter_bytes,
            gradients=self.gradient_bytes,
            states=self.state_bytes,
            largest=self._largest,
            temporaries=0.0 if self.steps_fused else loop,
        )
        empty = dict.fromkeys(found.breakdown, 0)
        own = {key: found.breakdown.get(key, 0) for key in ("allocator", "context")}
        own |= self._of_teacher  # whole on each rank
        traced = {key: value for key, value in found.accumulating.items() if key != "teacher"}
        breakdown = empty | held(zero, sizes, traced, world_size=world) | own
        if device.kind == "cuda":  # the host's memory is not the device's
            breakdown["workspace"] += device.library_workspace
            breakdown.pop("host", None)
        added = added_seconds(
            zero,
            sizes,
            world_size=world,
            link=device.link_bandwidth,
            host=device.host_bandwidth,
            step=self.step_seconds(),
        )
        return replace(
            found,
            peak=sum(breakdown.values()),
            breakdown=breakdown,
            first_step_seconds=found.first_step_seconds + added.micro_step,
            micro_step_seconds=found.micro_step_seconds + added.micro_step,
            commit_seconds=found.commit_seconds + added.commit,
        )

    def _estimate(self, candidate: Candidate, steps: int) -> Estimate:
        how, moved = candidate.checkpointing, candidate.offload
        units = self.units if how == "none" and not moved else []

        def change(model: nn.Module, recorder: Recorder) -> None:
            if how == "full":
                apply_activation_checkpointing(model)
            elif how != "none":
                apply_segments(model, how)
            if moved:
                hand_to(TracedHost(recorder), model, moved)
            elif units:
                mark_units(model, recorder, units)
                if self.device.kind == "cuda":
                    hand_to(LookingOn(recorder), model, [[unit.name for unit in units]])

        trace = self._trace(candidate, change, steps)
        traced = trace.breakdown()
        breakdown = self._breakdown(trace, traced)
        by_step = step_kernels(trace, len(units))

        def timed(kernels: Sequence[Kernel]) -> float:
            return seconds(kernels, self.device)

        found = Estimate(
            peak=sum(breakdown.values()),
            traced=sum(traced.values()),
            breakdown=breakdown,
            accumulating=traced | {"workspace": traced["workspace"] + self._margin},
            first_step_seconds=timed(by_step.first),
            micro_step_seconds=timed(by_step.micro),
            commit_seconds=timed(by_step.commit) + self.step_seconds(),
            chain=chain_cost(trace, len(units)) if units else None,
            forward_seconds=tuple(timed(kernels) for kernels in by_step.forward),
            host_bytes=trace.host_bytes,
        )
        self._keep((candidate, steps), found)
        return found

    def _kept(self, what: Any, kind: type[T]) -> T | None:
        """The result that an earlier plan kept of this network."""
        kept = (
            None if self.kept is None else self.kept.get(asked_for(self.plan, self.precision, what))
        )
        return kept if isinstance(kept, kind) else None

    def _keep(self, what: Any, found: Estimate | Survey) -> None:
        kept_kernels().save()
        # a workspace that was assumed may be measured the next time
        if self.kept is not None and not self.cpu_workspaces.num_assumed:
            self.kept.put(asked_for(self.plan, self.precision, what), found)
            self.kept.save()

    def traced(self) -> list[Candidate]:
        """Each candidate that has its estimate already."""
        return list(dict.fromkeys(candidate for candidate, _ in self._known))

    def step_seconds(self, *, fused: bool | None = None) -> float:
        """Of the optimizer's step: a fused one reads each tensor once, a loop about twice."""
        moved = 2 * self.weight_bytes + self.gradient_bytes + 2 * self.state_bytes
        passes = 1 if (self.steps_fused if fused is None else fused) else 2
        return passes * moved / self.device.reached_bandwidth

    def _trace(
        self,
        candidate: Candidate,
        change: Callable[[nn.Module, Recorder], Any],
        steps: int,
    ) -> Trace:
        self.num_traces += 1
        size = candidate.micro_batch_size
        shown = candidate.checkpointing
        how = shown if isinstance(shown, str) else f"{len(shown)} segments"
        if candidate.offload:
            how += f", offload {len(candidate.offload)} runs"
        self.say(f"micro-batch {size}, recompute {how}, {candidate.memory_format}")
        plan = replace(
            self.plan, micro_batch_size=size, world_size=1, global_batch_size=steps * size
        )
        network = replace(self.network, memory_format=candidate.memory_format)
        try:
            return trace_update(
                network,
                plan,
                precision=self.precision,
                device_type=self.device.kind,
                workspace=self._workspace,
                change=change,
                states=self._states,
                known=self._known_calls,
                num_rows=self.plan.global_batch_size,
            )
        except InputError:
            raise
        except Exception as error:
            raise Untraceable(error) from error

    def _breakdown(self, trace: Trace, traced: dict[str, int]) -> dict[str, int]:
        """Bytes by part, from those of the trace; they add up to the peak."""
        found = dict(traced)
        held = sum(found.values())
        # The step has its own temporaries, at a time when the activations are gone.
        step = self.weight_bytes + self.gradient_bytes + self.state_bytes + self.teacher_bytes
        if not self.steps_fused:
            step += self.gradient_bytes if self.device.kind == "cuda" else 2 * self._largest
        if step > held:
            found = {
                "weights": self.weight_bytes,
                "gradients": self.gradient_bytes,
                "optimizer": self.state_bytes,
                "activations": 0,
                "workspace": step
                - (self.weight_bytes + self.gradient_bytes + self.state_bytes + self.teacher_bytes),
                **self._of_teacher,
            }
        found |= {"allocator": 0, "context": 0}
        if self.device.kind == "cuda":
            limit = smallest_limit(*requests(trace))
            found["allocator"] = max(0, limit - sum(found.values()))
            found["workspace"] += self.device.library_workspace
            found["context"] = self.device.context
        found["workspace"] += self._margin
        return found


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return list({id(t): t for t in (*model.parameters(), *model.buffers())}.values())


class Untraceable(InputError):
    """A model that does not run on tensors without values; `reason` names the operator."""

    def __init__(self, error: Exception) -> None:
        kernel = getattr(error, "func", None)
        what = f"the operator {kernel}" if kernel is not None else type(error).__name__
        reason = " ".join(str(error).split())[:200].rstrip(".")
        self.reason = f"the model can't be traced on tensors without values: {what}: {reason}."
        super().__init__(
            f"{self.reason} Plan on the device itself, for that device: there real micro-batches "
            "measure it."
        )
