"""lbaccel: the batch you ask for is a contract; how it fits in memory is lbaccel's problem.

Names are imported when they are first used: the arithmetic (`BatchPlan`, `scale_lr`, schedules)
needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lbaccel.batch.duration import Duration
    from lbaccel.batch.phases import Phase, phase_updates
    from lbaccel.batch.plan import BatchPlan, MicroBatch
    from lbaccel.batch.rules import batch_schedule
    from lbaccel.batch.stream import UpdateStream
    from lbaccel.data.augment import GroupMix, KeyedImages
    from lbaccel.data.loader import Update, UpdateLoader
    from lbaccel.data.sources import open_source
    from lbaccel.errors import InputError, RunFailed
    from lbaccel.finetuning import Finetuned, finetune
    from lbaccel.hyperparameters.transfer import transfer
    from lbaccel.landscape.landscape import loss_landscape
    from lbaccel.landscape.result import Landscape
    from lbaccel.landscape.sharpness import Sharpness, sharpness
    from lbaccel.noise.scale import NoiseScale
    from lbaccel.optim.groups import scale_optimizer
    from lbaccel.optim.momentum import correct_momentum
    from lbaccel.optim.scaling import (
        legw,
        linear_scaling,
        no_scaling,
        per_samples_scaling,
        power_scaling,
        scale_lr,
        sqrt_scaling,
    )
    from lbaccel.optim.scheduler import lr_scheduler
    from lbaccel.optim.schedules import make_schedule
    from lbaccel.planning.plan import Plan
    from lbaccel.planning.planner import plan
    from lbaccel.product.evaluate import evaluate
    from lbaccel.product.evaluation import Evaluation
    from lbaccel.product.prediction import Prediction, predict
    from lbaccel.runs.read import Run, load_run
    from lbaccel.stability.curvature import largest_curvature
    from lbaccel.stability.limit import stable_rate
    from lbaccel.stability.range_test import LrRange, lr_find
    from lbaccel.update.checkpointing import apply_activation_checkpointing, apply_segments
    from lbaccel.update.engine import LargeBatch, UpdateResult
    from lbaccel.update.normalization import (
        convert_batch_norm,
        recalibrate,
        restore_batch_norm,
    )
    from lbaccel.update.offload import apply_activation_offload
    from lbaccel.verification.certificate import Certificate
    from lbaccel.verification.verify import verify

__version__ = "0.1.0"

_HOME = {
    "BatchPlan": "batch.plan",
    "MicroBatch": "batch.plan",
    "Phase": "batch.phases",
    "batch_schedule": "batch.rules",
    "phase_updates": "batch.phases",
    "UpdateStream": "batch.stream",
    "apply_activation_checkpointing": "update.checkpointing",
    "apply_activation_offload": "update.offload",
    "GroupMix": "data.augment",
    "KeyedImages": "data.augment",
    "Update": "data.loader",
    "UpdateLoader": "data.loader",
    "open_source": "data.sources",
    "LargeBatch": "update.engine",
    "UpdateResult": "update.engine",
    "InputError": "errors",
    "RunFailed": "errors",
    "NoiseScale": "noise.scale",
    "convert_batch_norm": "update.normalization",
    "recalibrate": "update.normalization",
    "restore_batch_norm": "update.normalization",
    "Plan": "planning.plan",
    "plan": "planning.planner",
    "evaluate": "product.evaluate",
    "finetune": "finetuning",
    "Finetuned": "finetuning",
    "Evaluation": "product.evaluation",
    "Prediction": "product.prediction",
    "predict": "product.prediction",
    "Run": "runs.read",
    "load_run": "runs.read",
    "apply_segments": "update.checkpointing",
    "correct_momentum": "optim.momentum",
    "scale_optimizer": "optim.groups",
    "legw": "optim.scaling",
    "linear_scaling": "optim.scaling",
    "per_samples_scaling": "optim.scaling",
    "power_scaling": "optim.scaling",
    "no_scaling": "optim.scaling",
    "scale_lr": "optim.scaling",
    "sqrt_scaling": "optim.scaling",
    "Duration": "batch.duration",
    "LrRange": "stability.range_test",
    "lr_find": "stability.range_test",
    "largest_curvature": "stability.curvature",
    "stable_rate": "stability.limit",
    "Landscape": "landscape.result",
    "loss_landscape": "landscape.landscape",
    "Sharpness": "landscape.sharpness",
    "sharpness": "landscape.sharpness",
    "lr_scheduler": "optim.scheduler",
    "make_schedule": "optim.schedules",
    "Certificate": "verification.certificate",
    "transfer": "hyperparameters.transfer",
    "verify": "verification.verify",
}

__all__ = [
    "BatchPlan",
    "Certificate",
    "Duration",
    "Evaluation",
    "Finetuned",
    "GroupMix",
    "InputError",
    "KeyedImages",
    "Landscape",
    "LargeBatch",
    "LrRange",
    "MicroBatch",
    "NoiseScale",
    "Phase",
    "Plan",
    "Prediction",
    "Run",
    "RunFailed",
    "Sharpness",
    "Update",
    "UpdateLoader",
    "UpdateResult",
    "UpdateStream",
    "apply_activation_checkpointing",
    "apply_activation_offload",
    "apply_segments",
    "batch_schedule",
    "convert_batch_norm",
    "correct_momentum",
    "evaluate",
    "finetune",
    "largest_curvature",
    "legw",
    "linear_scaling",
    "load_run",
    "loss_landscape",
    "lr_find",
    "lr_scheduler",
    "make_schedule",
    "no_scaling",
    "open_source",
    "per_samples_scaling",
    "phase_updates",
    "plan",
    "power_scaling",
    "predict",
    "recalibrate",
    "restore_batch_norm",
    "scale_lr",
    "scale_optimizer",
    "sharpness",
    "sqrt_scaling",
    "stable_rate",
    "transfer",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
