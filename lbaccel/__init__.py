"""lbaccel: the batch you ask for is a contract; how it fits in memory is lbaccel's problem.

Names are imported when they are first used: the arithmetic (`BatchPlan`, `scale_lr`, schedules)
needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lbaccel.batch import BatchPlan, MicroBatch
    from lbaccel.batch_schedules import batch_schedule
    from lbaccel.batch_segments import Segment, segment_updates
    from lbaccel.checkpointing import apply_activation_checkpointing, apply_segments
    from lbaccel.curvature import largest_curvature
    from lbaccel.data.augment import GroupMix, KeyedImages
    from lbaccel.data.loader import Update, UpdateLoader
    from lbaccel.data.sources import open_source
    from lbaccel.duration import Duration
    from lbaccel.engine import LargeBatch, UpdateResult
    from lbaccel.errors import InputError, RunFailed
    from lbaccel.momentum import correct_momentum
    from lbaccel.noise_scale import NoiseScale
    from lbaccel.normalization import convert_batch_norm, recalibrate
    from lbaccel.param_groups import scale_optimizer
    from lbaccel.planning.plan import Plan
    from lbaccel.planning.planner import plan
    from lbaccel.range_test import LrRange, lr_find
    from lbaccel.scaling import (
        legw,
        linear_scaling,
        no_scaling,
        per_samples_scaling,
        power_scaling,
        scale_lr,
        sqrt_scaling,
    )
    from lbaccel.schedulers import lr_scheduler
    from lbaccel.schedules import make_schedule
    from lbaccel.sheet.transfer import transfer
    from lbaccel.stability import stable_rate
    from lbaccel.stream import UpdateStream
    from lbaccel.verification.certificate import Certificate
    from lbaccel.verification.verify import verify

__version__ = "0.1.0"

_HOME = {
    "BatchPlan": "batch",
    "MicroBatch": "batch",
    "Segment": "batch_segments",
    "batch_schedule": "batch_schedules",
    "segment_updates": "batch_segments",
    "UpdateStream": "stream",
    "apply_activation_checkpointing": "checkpointing",
    "GroupMix": "data.augment",
    "KeyedImages": "data.augment",
    "Update": "data.loader",
    "UpdateLoader": "data.loader",
    "open_source": "data.sources",
    "LargeBatch": "engine",
    "UpdateResult": "engine",
    "InputError": "errors",
    "RunFailed": "errors",
    "NoiseScale": "noise_scale",
    "convert_batch_norm": "normalization",
    "recalibrate": "normalization",
    "Plan": "planning.plan",
    "plan": "planning.planner",
    "apply_segments": "checkpointing",
    "correct_momentum": "momentum",
    "scale_optimizer": "param_groups",
    "legw": "scaling",
    "linear_scaling": "scaling",
    "per_samples_scaling": "scaling",
    "power_scaling": "scaling",
    "no_scaling": "scaling",
    "scale_lr": "scaling",
    "sqrt_scaling": "scaling",
    "Duration": "duration",
    "LrRange": "range_test",
    "lr_find": "range_test",
    "largest_curvature": "curvature",
    "stable_rate": "stability",
    "lr_scheduler": "schedulers",
    "make_schedule": "schedules",
    "Certificate": "verification.certificate",
    "transfer": "sheet.transfer",
    "verify": "verification.verify",
}

__all__ = [
    "BatchPlan",
    "Certificate",
    "Duration",
    "GroupMix",
    "InputError",
    "KeyedImages",
    "LargeBatch",
    "LrRange",
    "MicroBatch",
    "NoiseScale",
    "Plan",
    "RunFailed",
    "Segment",
    "Update",
    "UpdateLoader",
    "UpdateResult",
    "UpdateStream",
    "apply_activation_checkpointing",
    "apply_segments",
    "batch_schedule",
    "convert_batch_norm",
    "correct_momentum",
    "largest_curvature",
    "legw",
    "linear_scaling",
    "lr_find",
    "lr_scheduler",
    "make_schedule",
    "no_scaling",
    "open_source",
    "per_samples_scaling",
    "plan",
    "power_scaling",
    "recalibrate",
    "scale_lr",
    "scale_optimizer",
    "segment_updates",
    "sqrt_scaling",
    "stable_rate",
    "transfer",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
