"""Repeated augmentation of timm's and torchvision's samplers, which are one code, in terms here.

Both repeat each index of an epoch's permutation, deal the list out to the GPUs in turn, and end
after as many samples as the training set has, rounded down to a multiple of 256.
"""

from __future__ import annotations

from lbaccel.recipe.values import shown
from lbaccel.replication.many_gpus import Batch, Gap, Translation

SETTING = "aug_repeats"


def repeats(said: str, number: float, batch: Batch) -> Translation | Gap | None:
    """The row of a number of repeats, or why there is none; None where nothing is repeated.

    Args:
        said: the setting, as the source has it.
        number: of samples of an update that are one image.
        batch: of the recipe, whose samples an update are told.
    """
    if number in (0, 1):
        return None
    update = batch.size
    if number != int(number):
        return Gap(
            said,
            "lbaccel repeats each image the same number of times",
            f"no repeats, or {SETTING} {int(number)} or {int(number) + 1}, as far as it divides "
            f"{update}",
        )
    count = int(number)
    if update % count:
        below, above = update // count * count, -(-update // count) * count
        return Gap(
            said,
            f"an update of {update} samples, which is no multiple of {count}, cuts the copies of "
            "an image apart in the source, and lbaccel's update holds all of them",
            f"no repeats; {SETTING} {count} with global_batch_size {f'{below} or ' * (below > 0)}"
            f"{above}",
        )
    return Translation(
        said,
        SETTING,
        count,
        f"an epoch of as many samples shows 1/{shown(count)} of the images; the source rounds its "
        "epoch down to a multiple of 256 samples",
    )


def put(found: Translation | Gap | None, rows: list[Translation], gaps: list[Gap]) -> None:
    """Add what `repeats` found to the list that it belongs to."""
    if isinstance(found, Translation):
        rows.append(found)
    elif found is not None:
        gaps.append(found)
