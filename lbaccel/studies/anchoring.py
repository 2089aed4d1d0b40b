"""Relative paths of a study made absolute: its runs go on from any folder (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lbaccel.studies.spec import Study

_KINDS = ("folder", "parquet", "csv", "timm")  # of data that lie at a path
_FILES = ("checkpoint", "teacher", "class_weights")


def anchored(study: Study) -> Study:
    """The study whose paths are those of the folder that it is begun from."""
    arms = tuple(
        replace(
            arm,
            settings=_anchored(arm.settings),
            per_batch={batch: _anchored(of) for batch, of in arm.per_batch.items()},
        )
        for arm in study.arms
    )
    return replace(study, settings=_anchored(study.settings), arms=arms)


def _anchored(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _absolute(name, value) for name, value in settings.items()}


def _absolute(name: str, value: Any) -> Any:
    if name == "data" and isinstance(value, str):
        kind, colon, path = value.partition(":")
        return (
            f"{kind}{colon}{Path(path).expanduser().absolute()}"
            if kind in _KINDS and path
            else value
        )
    if name in _FILES and isinstance(value, str) and Path(value).expanduser().exists():
        return str(Path(value).expanduser().absolute())
    return value
