"""A trained model, judged: logits gathered once, and all figures out of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from lbaccel.errors import InputError, check_choice
from lbaccel.product.judged import Judged, check_same_classes, judged_on
from lbaccel.product.logits import FLIP, Outputs, outputs_of
from lbaccel.product.metrics import TOP_K, Figures, Floats, Ints, McNemar, figures_of, mcnemar
from lbaccel.product.trained import Trained, read_trained
from lbaccel.recipe.accelerator import make_accelerator
from lbaccel.runs.environment import versions
from lbaccel.runs.ranks import on_each_rank

Say = Callable[[str], object]
MADE_BY = "lbaccel eval"


@dataclass(frozen=True, eq=False)
class Other:
    """The model that another one is compared with, on the same images.

    Args:
        trained: the second model, B.
        figures: its own.
        test: McNemar's, of A and B.
    """

    trained: Trained
    figures: Figures
    test: McNemar


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A trained model on a set of images: figures, and a prediction for each image.

    `top1_pct` is to the bit the run's own `val/top1` where the images are the run's own, the
    precision is float32 or float64, and the machine is the same.

    Args:
        trained: the model.
        judged: the images.
        outputs: logits and predictions, in the order of the images.
        figures: all figures.
        tta: test-time augmentation: "flip" or None.
        precision: of the forward pass.
        other: the model that it was compared with.
        folder: where the files lie; None where none were written.
    """

    trained: Trained
    judged: Judged
    outputs: Outputs
    figures: Figures
    tta: str | None
    precision: str
    other: Other | None = None
    folder: Path | None = None

    @property
    def top1(self) -> float:
        """Share of right predictions, from 0 to 1."""
        return self.figures.top1

    @property
    def top1_pct(self) -> float:
        """The same in %, as a run logs it."""
        return self.figures.top1_pct

    @cached_property
    def probabilities(self) -> Floats:
        """[n, outputs], without a temperature."""
        return softmax(self.outputs.logits, axis=1)

    @property
    def most_probable(self) -> Ints:
        """[n, k], the k <= 5 most probable outputs of each image, the best first."""
        order = np.argsort(-self.outputs.logits, axis=1, kind="stable")
        return order[:, : min(TOP_K, order.shape[1])]

    def as_json(self) -> dict[str, Any]:
        """The content of `eval.json`: plain values; shares are from 0 to 1."""
        figures = asdict(self.figures)
        confusion = figures.pop("confusion")
        calibrated = figures.pop("calibration")
        classes = figures.pop("classes")
        trained, judged = self.trained, self.judged
        content: dict[str, Any] = {
            "made_by": MADE_BY,
            "top1": self.top1,
            "top1_pct": self.top1_pct,
            **figures,
            "calibration": calibrated,
            "weights": {
                "path": trained.path,
                "model": trained.preprocessing["model"],
                "sha256": trained.sha256,
                "update": trained.update,
                "ema": trained.ema,
            },
            "data": {
                "data": judged.data,
                "split": judged.split,
                "named": judged.named,
                "description": judged.description,
                "fingerprint": judged.identity["fingerprint"],
            },
            "tta": self.tta,
            "precision": self.precision,
            "versions": versions(),
            "classes": classes,
            "outputs": list(trained.classes),
            "confusion": confusion.tolist(),
        }
        if self.other is not None:
            content["against"] = {
                "path": self.other.trained.path,
                "sha256": self.other.trained.sha256,
                "update": self.other.trained.update,
                "top1": self.other.figures.top1,
                "top1_pct": self.other.figures.top1_pct,
                **asdict(self.other.test),
                "in_words": str(self.other.test),
            }
        return content


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
        say: is told of what is not as usual, a line at a time.

    Raises:
        InputError: a model or images that can't be used, or a folder that holds other files.
        RunFailed: outputs that are not finite.

    >>> result = evaluate("runs/20261121-001312-resnet10t-gbs512")  # doctest: +SKIP
    >>> result.top1_pct, result.figures.calibration.error  # doctest: +SKIP
    (97.5, 0.021)
    """
    from lbaccel.product.files import check_folder, folder_for, write_files

    say = say or (lambda line: None)
    if tta is not None:
        check_choice("tta", tta, choices=(FLIP,))
    first = read_trained(path, ema=ema)
    second = None if against is None else read_trained(against, ema=ema)
    accelerator, precision = make_accelerator(_precision(first, say=say))
    judged = on_each_rank(accelerator, lambda: judged_on(first, data, split=split, say=say))
    if second is not None:
        _check_comparable(first, second, judged, precision=precision, say=say)
    folder = folder_for(first, judged, output, tta=tta)
    if folder is not None:
        on_each_rank(accelerator, lambda: check_folder(folder))
    found = outputs_of(first, judged.images, accelerator, tta=tta)
    result = Evaluation(
        trained=first,
        judged=judged,
        outputs=found,
        figures=_figures(first, judged, found),
        tta=tta,
        precision=precision,
        other=None
        if second is None
        else _other(first, second, judged, found, outputs_of(
            second, judged.images, accelerator, tta=tta)),
        folder=folder,
    )  # fmt: skip
    if folder is not None and accelerator.is_main_process:
        write_files(result, folder, say=say)
    return result


def _figures(trained: Trained, judged: Judged, found: Outputs) -> Figures:
    return figures_of(
        found.logits,
        judged.labels,
        found.predicted,
        classes=trained.classes,
        num_named=trained.num_named,
    )


def _other(
    first: Trained, second: Trained, judged: Judged, a: Outputs, b: Outputs
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
    first: Trained, second: Trained, judged: Judged, *, precision: str, say: Say
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


def _precision(trained: Trained, *, say: Say) -> str | None:
    """The run's own; None leaves it to the launcher."""
    import torch

    asked = trained.settings.batch.precision
    if asked == "fp16" and not torch.cuda.is_available():
        say("note: the run was made in fp16, which needs a GPU: it is evaluated in fp32")
        return "fp32"
    return asked
