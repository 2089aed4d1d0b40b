"""The file that `lbaccel plan --report` writes: a plan's prediction beside what it really costs."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lbaccel import __version__
from lbaccel.errors import InputError, RunFailed
from lbaccel.models import create_backbone
from lbaccel.planning.measure import (
    Measured,
    check_measurable,
    measure,
    predicted_peaks,
)
from lbaccel.planning.network import image_shape, random_images
from lbaccel.planning.plan import Plan
from lbaccel.runs.environment import driver, versions
from lbaccel.runs.folder import atomic_write_text, strict_json
from lbaccel.runs.outputs import writable


def environment() -> dict[str, Any]:
    """Versions that a measurement depends on; None for what is not there."""
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    return {
        "python": platform.python_version(),
        **versions(),
        "lbaccel": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": cudnn,
        "driver": driver(),
    }


def check_report(path: Path) -> None:
    """Stop before the work where its report could not be written.

    Raises:
        InputError: a file that is there already, or a folder that can't be written.
    """
    if path.exists():
        raise InputError(f"report={str(path)!r} is there already. Remove it, or name another file.")
    writable(path, "--report")


def write_report(
    plan: Plan,
    path: Path,
    *,
    num_classes: int,
    img_size: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], str]:
    """Measure a plan of a timm model by name, and write it as JSON with the prediction.

    Args:
        plan: of a model by name.
        path: a file that is not there yet; it appears whole or not at all.
        num_classes: that the plan was made with.
        img_size: likewise; default: the model's.
        model_kwargs: likewise; default: none.

    Returns:
        The written report, and one line that has both figures.

    Raises:
        InputError: see `check_report` and `measure`.
        RunFailed: the plan does not fit, or memory runs out.
    """
    check_report(path)
    check_measurable(plan)
    if not plan.fits:
        raise RunFailed(
            f"no report: the plan does not fit in {plan.budget_gib:.2f} GiB, so it is not run. "
            "Give more --memory, or a smaller --micro-batch-size."
        )
    model = create_backbone(
        plan.model, num_classes=num_classes, img_size=img_size, arguments=model_kwargs
    )
    images = random_images(*image_shape(model, img_size))
    measured = measure(plan, model, images, optimizer=plan.optimizer)
    found = as_report(plan, measured)
    atomic_write_text(path, strict_json(found, indent=1) + "\n")
    return found, f"{_line(found)}; written to {path}"


def as_report(plan: Plan, measured: Measured) -> dict[str, Any]:
    """Plan, prediction, measurement and 100 (predicted / measured - 1), ready for JSON."""
    allocated, reserved = predicted_peaks(plan)
    predicted: dict[str, float | None] = {
        "peak_allocated_gib": allocated,
        "peak_reserved_gib": reserved,
        "seconds_per_update": plan.predicted_seconds_per_update,
    }
    seen = asdict(measured) | {"seconds_per_update": measured.seconds_per_update(plan)}
    return {
        "predicted": predicted,
        "measured": seen,
        "error_pct": {key: _error_pct(value, seen[key]) for key, value in predicted.items()},
        "versions": environment(),
        "plan": plan.to_dict(),
    }


def _error_pct(predicted: float | None, measured: float | None) -> float | None:
    return 100 * (predicted / measured - 1) if predicted is not None and measured else None


def _line(found: dict[str, Any]) -> str:
    predicted, measured, error = found["predicted"], found["measured"], found["error_pct"]
    on_cpu = measured["peak_reserved_gib"] is None
    key, time_key = "peak_allocated_gib" if on_cpu else "peak_reserved_gib", "seconds_per_update"
    return (
        f"measured on {measured['device']}: peak {measured[key]:.3f} GiB (predicted "
        f"{predicted[key]:.3f}, {error[key]:+.1f} %), {measured[time_key]:.3g} s an update "
        f"(predicted {predicted[time_key]:.3g}, {error[time_key]:+.0f} %)"
    )
