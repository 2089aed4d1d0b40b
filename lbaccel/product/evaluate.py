"""`lbaccel.evaluate`: a trained model judged on images with labels."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lbaccel.errors import InputError, RunFailed, check_choice
from lbaccel.product.evaluation import Evaluation, Other
from lbaccel.product.files import check_folder, folder_for, write_files
from lbaccel.product.judged import Judged, check_same_classes, judged_on
from lbaccel.product.logits import FLIP, Outputs, outputs_of
from lbaccel.product.metrics import Figures, figures_of
from lbaccel.product.shares import mcnemar
from lbaccel.recipe.accelerator import make_accelerator
from lbaccel.recipe.trained_model import TrainedModel, read_trained
from lbaccel.runs.ranks import on_each_rank

logger = logging.getLogger("lbaccel")
Say = Callable[[str], object]


def evaluate(
    path: str | Path,
    data: str | None = None,
    *,
    split: str = "val",
    tta: str | None = None,
    ema: bool = False,
    against: str | Path | None = None,
    output: str | Path | None = None,
    say: Say | None = None,
) -> Evaluation:
    """Judge a trained model on images with labels, and write what came of it to a folder.

    On several ranks all of them call it, each sample counts once, and every rank has the result.

    Args:
        path: a run folder (its best checkpoint), a checkpoint, an export, or hf-hub:OWNER/NAME.
        data: as for `lbaccel train --data`; None takes the run's own images, and refuses others.
        split: val, or test where the data have a test set.
        tta: "flip" means the probabilities of an image and of its mirror image.
        ema: the average of the run's weights.
        against: another trained model, for the same images.
        output: folder for the files; None is RUN/eval/NAME, or no files where there is no run.
        say: is told of what is not as usual, a line at a time; None logs it as a warning.

    Raises:
        InputError: a model or images that can't be used, or a folder that holds other files.
        RunFailed: outputs that are not finite, or an Accelerator of another precision than the
            run's, which a process can't have beside.

    >>> result = evaluate("runs/20261121-001312-resnet10t-gbs512")  # doctest: +SKIP
    >>> result.top1_pct, result.figures.calibration.error  # doctest: +SKIP
    (97.5, 0.021)
    """
    say = say or logger.warning
    if tta is not None:
        check_choice("tta", tta, choices=(FLIP,))
    first = read_trained(path, ema=ema)
    second = None if against is None else read_trained(against, ema=ema)
    accelerator, precision = _accelerator(first, say=say)
    judged = on_each_rank(accelerator, lambda: judged_on(first, data, split=split, say=say))
    if second is not None:
        _check_comparable(first, second, judged, precision=precision, say=say)
    folder = folder_for(first, judged, output, tta=tta)
    if folder is not None:
        on_each_rank(accelerator, lambda: check_folder(folder))
    found, other = outputs_of(first, judged.images, accelerator, tta=tta), None
    if second is not None:
        others = outputs_of(second, judged.images, accelerator, tta=tta)
        other = _other(first, second, judged, found, others)
    result = Evaluation(
        trained=first,
        judged=judged,
        outputs=found,
        figures=_figures(first, judged, found),
        tta=tta,
        precision=precision,
        other=other,
        folder=folder,
    )
    if folder is not None and accelerator.is_main_process:
        write_files(result, folder, say=say)
    return result


def _figures(trained: TrainedModel, judged: Judged, found: Outputs) -> Figures:
    return figures_of(
        found.logits,
        judged.labels,
        found.predicted,
        classes=trained.classes,
        num_named=trained.num_named,
    )


def _other(
    first: TrainedModel, second: TrainedModel, judged: Judged, a: Outputs, b: Outputs
) -> Other:
    """The second model's figures, with its outputs in the order of the first one's classes."""
    own = {name: i for i, name in enumerate(second.classes[: second.num_named])}
    order = [own[name] for name in first.classes[: first.num_named]]
    order += range(second.num_named, len(second.classes))
    place = np.argsort(np.asarray(order))
    aligned = Outputs(b.logits[:, order], place[b.predicted])
    names = (*first.classes[: first.num_named], *second.classes[second.num_named :])
    figures = figures_of(
        aligned.logits,
        judged.labels,
        aligned.predicted,
        classes=names,
        num_named=second.num_named,
    )
    right = (a.predicted == judged.labels, aligned.predicted == judged.labels)
    return Other(second, figures, mcnemar(*right))


def _check_comparable(
    first: TrainedModel, second: TrainedModel, judged: Judged, *, precision: str, say: Say
) -> None:
    """Stop where two models can't be judged on the same images.

    Raises:
        InputError: other classes, or a second run that was trained on some of these images.
    """
    names = (first.classes[: first.num_named], second.classes[: second.num_named])
    check_same_classes(*names, first.path, second.path)
    identity, own = second.settings.identity, judged.identity
    if identity is not None and identity.get("fingerprint") != own["fingerprint"]:
        if not judged.named:
            raise InputError(
                f"--against {second.path}: this run was trained and validated on other images, or "
                "with another split, so some of these may be its training images. Name images "
                "that neither has seen: --data folder:PATH."
            )
        say(f"note: {second.path} was trained with another split or other images")
    other = second.settings.batch.precision
    if second.run is not None and other not in (None, precision):
        say(f"note: {second.path} was trained in {other}; both are evaluated in {precision}")


def _accelerator(trained: TrainedModel, *, say: Say) -> tuple[Any, str]:
    asked = _precision(trained, say=say)
    try:
        return make_accelerator(asked)
    except ValueError as error:
        if "already been initialized" not in str(error):
            raise
        raise RunFailed(
            f"{trained.path} was trained in {asked}, and this process has an Accelerator of "
            f"another precision. Evaluate it in a process of its own: lbaccel eval {trained.path}"
        ) from error


def _precision(trained: TrainedModel, *, say: Say) -> str | None:
    """The run's own; None leaves it to the launcher."""
    asked = trained.settings.batch.precision
    if asked == "fp16" and not torch.cuda.is_available():
        say("note: the run was made in fp16, which needs a GPU: it is evaluated in fp32")
        return "fp32"
    return asked
