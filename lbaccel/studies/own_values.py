"""The value that a study's run has for a setting which its file leaves out (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lbaccel.optim.defaults import default_base_lr, default_weight_decay
from lbaccel.recipe.options import OPTIONS, Settings
from lbaccel.recipe.rate import freezes_norm_alone
from lbaccel.recipe.settings import layered


def own_value(settings: Mapping[str, Any], name: str) -> Any:
    """The value of a setting that a grid of factors multiplies: as stated, or the default.

    Raises:
        InputError: a setting that is stated with a value of no use.

    >>> own_value({"pretrained": True}, "base_lr"), own_value({"base_lr": 0.3}, "base_lr")
    (0.01, 0.3)
    """
    if name not in OPTIONS:
        return None
    s = layered(Settings(), dict(settings), origin="the study")
    if s.value(name) is None and name == "base_lr":
        return default_base_lr(
            s.optimizer.optimizer,
            pretrained=s.model.pretrained,
            frozen_norm=freezes_norm_alone(s),
        )
    if s.value(name) is None and name == "weight_decay":
        return default_weight_decay(s.optimizer.optimizer)
    return s.value(name)
