"""The network's own arguments among a run's settings (no torch)."""

from __future__ import annotations

from typing import Any

from lbaccel.errors import InputError
from lbaccel.network_arguments import ZERO_INIT_LAST
from lbaccel.recipe.options import Settings
from lbaccel.recipe.options_data import ModelOptions
from lbaccel.recipe.values import shown


def arguments_of(options: ModelOptions) -> dict[str, Any]:
    """The arguments of `--model-kwargs`, and that of `--zero-init-last`, for `create_backbone`."""
    last = {} if options.zero_init_last is None else {ZERO_INIT_LAST: options.zero_init_last}
    return {**(options.model_kwargs or {}), **last}


def check_arguments(settings: Settings) -> None:
    """Stop where the first gain of the blocks is said twice, or a file of weights says it.

    Raises:
        InputError: with both flags.
    """
    model = settings.model
    if model.zero_init_last is None:
        return
    flag = f"--zero-init-last {shown(model.zero_init_last)}"
    said = (model.model_kwargs or {}).get(ZERO_INIT_LAST)
    if said is not None:
        raise InputError(
            f"{flag} and --model-kwargs {ZERO_INIT_LAST}={said} say the same thing. Leave one of "
            "them out."
        )
    if model.checkpoint is not None and "zero_init_last" in settings.given:
        raise InputError(
            f"{flag}: the weights of --checkpoint {model.checkpoint} take the place of those that "
            "the network starts with. Leave one of them out."
        )
