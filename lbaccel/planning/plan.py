"""A plan: how a contract fits in memory, what it costs, and what else there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lbaccel.batch.plan import BatchPlan
from lbaccel.planning.candidates import MemoryFormat
from lbaccel.planning.cost.devices import Device
from lbaccel.planning.cost.update import Precision
from lbaccel.planning.cost.workspace import Workspaces
from lbaccel.planning.levers import Lever
from lbaccel.planning.sweep import SweepPoint
from lbaccel.update.global_norm.ending import Passes


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """The same contract on another number of devices."""

    world_size: int
    micro_batch_size: int
    peak_gib: float
    seconds_per_update: float
    hours: float
    gpu_hours: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a contract fits: what was chosen, what it costs, and what else there is.

    Floats are in GiB and seconds. `batch` is the `BatchPlan` that `LargeBatch` takes, `segments`
    what `apply_segments` takes, and `activation_offload` what `apply_activation_offload` takes.
    """

    model: str
    device: Device
    budget_gib: float
    fits: bool
    batch: BatchPlan
    activation_checkpointing: Literal["none", "full", "segments"]
    segments: tuple[tuple[str, ...], ...]
    units: int  # of the chain that was found
    memory_format: MemoryFormat
    precision: Precision
    optimizer: str
    fused_optimizer: bool
    lr: float
    predicted_peak_gib: float
    predicted_seconds_per_update: float
    breakdown: Mapping[str, float]
    levers: Sequence[Lever] = ()
    alternatives: Sequence[Alternative] = ()
    num_updates: int = 0
    why: str = ""  # where it does not fit
    zero_stage: int | None = None  # of DeepSpeed; None: one process, or DDP
    offload: str = "none"
    activation_offload: tuple[tuple[str, ...], ...] = ()  # runs, as `apply_activation_offload` has
    host_gib: float = 0.0  # that they pin, of each device's host
    points: Sequence[SweepPoint] = ()
    workspaces: Workspaces | None = None  # of a traced plan for a CPU
    passes: Passes | None = None  # with BatchNorm over the whole batch
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def micro_batch_size(self) -> int:
        """Samples of one forward of one rank."""
        return self.batch.micro_batch_size

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches an update of one rank."""
        return self.batch.gradient_accumulation_steps

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON has it."""
        found: dict[str, Any] = {
            "model": self.model,
            "device": {"name": self.device.name, "rates": self.device.source},
            "budget_gib": self.budget_gib,
            "fits": self.fits,
            "global_batch_size": self.batch.global_batch_size,
            "world_size": self.batch.world_size,
            "norm_batch_size": self.batch.norm_batch_size,
            "micro_batch_size": self.micro_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "activation_checkpointing": {
                "policy": self.activation_checkpointing,
                "segments": [list(segment) for segment in self.segments],
            },
            "memory_format": self.memory_format,
            "zero_stage": self.zero_stage,
            "offload": self.offload,
            "activation_offload": {
                "runs": [list(run) for run in self.activation_offload],
                "host_gib": self.host_gib,
            },
            "precision": self.precision,
            "optimizer": self.optimizer,
            "fused_optimizer": self.fused_optimizer,
            "lr": self.lr,
            "predicted_peak_gib": self.predicted_peak_gib,
            "predicted_seconds_per_update": self.predicted_seconds_per_update,
            "breakdown": dict(self.breakdown),
            "workspaces": None if self.workspaces is None else vars(self.workspaces),
            "levers": [vars(lever) for lever in self.levers],
            "alternatives": [vars(alternative) for alternative in self.alternatives],
            "notes": list(self.notes),
        }
        if self.passes is not None:
            found["passes"] = vars(self.passes)
        if self.points:
            found["sweep"] = [vars(point) for point in self.points]
        if not self.fits:
            found["nearest"] = {
                "memory_gib": self.predicted_peak_gib,
                "micro_batch_size": self.micro_batch_size,
                "activation_checkpointing": found["activation_checkpointing"],
                "why": self.why,
            }
        return found
