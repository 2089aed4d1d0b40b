"""`lbaccel.finetune`: what `lbaccel start DATA --run` does, in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from lbaccel import train
from lbaccel.errors import InputError, RunFailed
from lbaccel.product.evaluate import Evaluation, evaluate
from lbaccel.product.prediction import Prediction, predict
from lbaccel.product.start import Start, start
from lbaccel.recipe.options import OPTIONS, Settings
from lbaccel.recipe.settings import layered
from lbaccel.recipe.values import nearest_word, spec_of


@dataclass(frozen=True)
class Finetuned:
    """A finished finetuning.

    Attributes:
        folder: of the run; every command of lbaccel takes it.
        start: the recipe, each choice with its reason, and the first figure.
    """

    folder: Path
    start: Start

    def evaluate(self, data: str | None = None, **options: Any) -> Evaluation:
        """`lbaccel.evaluate` of the best checkpoint."""
        return evaluate(self.folder, data, **options)

    def predict(
        self, files: str | PathLike[str] | Iterable[str | PathLike[str]], **options: Any
    ) -> list[Prediction]:
        """`lbaccel.predict` with the best checkpoint."""
        return predict(self.folder, files, **options)


def finetune(
    data: str | PathLike[str],
    *,
    minutes: float = 30.0,
    say: Callable[[str], object] = print,
    **settings: Any,
) -> Finetuned:
    """Finetune a pretrained backbone on a folder of photographs: choose the recipe, and train it.

    Args:
        data: a folder with a sub-folder for each class, or what `lbaccel train --data` takes.
        minutes: that all may take.
        say: prints a line.
        settings: any of `lbaccel train` by its name, such as `model="resnet50"`; each pins that
            choice.

    Raises:
        InputError: images, weights or settings of no use.
        RunFailed: the run could not go on; what was kept is in its text.

    >>> result = finetune("photos", minutes=10, img_size=160)  # doctest: +SKIP
    >>> result.evaluate().top1_pct, result.predict("new")[0].classes[0]  # doctest: +SKIP
    (93.5, 'roses')
    """
    for name in settings:
        if name not in OPTIONS:
            raise InputError(
                f"finetune() has no argument {name!r}.{nearest_word(name, OPTIONS)} It takes the "
                "settings of lbaccel train."
            )
    given = {"data": spec_of(data), **settings}
    found = start(layered(Settings(), given, origin="finetune()"), minutes=minutes, say=say)
    folder = train.run(found.settings)
    if folder is None:
        raise RunFailed("dry_run=True leaves no run to use. Leave it out.")
    return Finetuned(folder, found)
