"""Which landscape is asked for: axes and options read, and two models compared."""

from __future__ import annotations

from typing import Any

from lbaccel.errors import InputError, brief, check_choice, check_seed
from lbaccel.landscape.axes import Axis, axis_of
from lbaccel.landscape.directions import BIAS_AND_NORM, IGNORED, NORMS, WEIGHTS
from lbaccel.network_arguments import ZERO_INIT_LAST
from lbaccel.product.judged import Judged, check_same_classes
from lbaccel.recipe.bounds import Unfit
from lbaccel.recipe.trained_model import TrainedModel
from lbaccel.runs.kinds import ARGUMENTS
from lbaccel.runs.saved_weights import arguments_of


def axis_from(given: Axis | str | None, usual: str, flag: str) -> Axis:
    """The axis that was asked for, or the usual one.

    Raises:
        InputError: text that is none.
    """
    try:
        return given if isinstance(given, Axis) else axis_of(given or usual)
    except Unfit as error:
        raise InputError(f"{flag}={error}.") from error


def random_options(
    norm: str | None, ignore: str | None, seed: int | None, *, is_random: bool
) -> Any:
    """The settings of a random direction, or None for each where there is none.

    Raises:
        InputError: a value that nothing has or reads.
    """
    given = {"norm": norm, "ignore": ignore, "seed": seed}
    unread = [name for name, value in given.items() if value is not None]
    if not is_random:
        if unread:
            raise InputError(
                f"--{unread[0]} is of random directions, and a line between two models has none. "
                f"Leave it out, or add --y -1:1:51 for a random direction beside the line."
            )
        return given
    norm, ignore = norm or NORMS[0], ignore or BIAS_AND_NORM
    check_choice("norm", norm, choices=NORMS)
    check_choice("ignore", ignore, choices=IGNORED)
    return {"norm": norm, "ignore": ignore, "seed": check_seed("seed", seed or 0)}


def check_comparable(first: TrainedModel, second: TrainedModel) -> None:
    """Stop where two models are not two sets of weights of one network on one kind of images.

    Raises:
        InputError: what differs.
    """
    names = (first.classes[: first.num_named], second.classes[: second.num_named])
    check_same_classes(*names, first.path, second.path)
    if names[0] != names[1]:
        raise InputError(
            f"{first.path} and {second.path} have the same classes in another order, so that their "
            "outputs can't be interpolated. Train both on the same data."
        )
    a, b = _seen_and_built(first), _seen_and_built(second)
    for key in a:
        if a[key] != b[key]:
            raise InputError(
                f"{second.path} has {key}={brief(b[key])}, and {first.path} has "
                f"{brief(a[key])}: there is a line only between two sets of weights of one "
                "network that sees the same images. Give two such models."
            )
    shapes = [{n: t.shape for n, t in m.model.state_dict().items()} for m in (first, second)]
    if shapes[0] != shapes[1]:
        raise InputError(f"{first.path} and {second.path} have tensors of different shapes.")


def _seen_and_built(trained: TrainedModel) -> dict[str, Any]:
    """All that two models have alike where a line lies between their weights alone."""
    pre = trained.preprocessing
    own = arguments_of(pre)
    own.pop(ZERO_INIT_LAST, None)  # it says where the weights began
    seen = {
        key: pre.get(key) for key in ("img_size", "num_channels", "mean", "std", "interpolation")
    }
    return {"model": pre.get("model"), ARGUMENTS: own, "stem": pre.get("stem"), **seen}


def notes_on_second(second: TrainedModel, judged: Judged, *, direction: str) -> list[str]:
    """Notes for a reader of the line between two models."""
    found = []
    if direction == WEIGHTS:
        found.append(
            "note: --direction weights leaves BatchNorm's statistics those of the first model, so "
            "that x = 1 is not the second one; --direction states moves them too"
        )
    identity = second.settings.identity
    if identity is not None and identity.get("fingerprint") != judged.identity["fingerprint"]:
        found.append(f"note: {second.path} was trained with another split or other images")
    return found
