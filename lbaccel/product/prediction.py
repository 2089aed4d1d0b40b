"""A trained model on images without labels: an answer for each file, or why there is none."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbaccel.data.pipelines import evaluation_reader
from lbaccel.documents import Malformed, json_in
from lbaccel.errors import InputError, check_number, check_whole
from lbaccel.product.device import one_device
from lbaccel.product.evaluation import MADE_BY
from lbaccel.product.files import FIGURES
from lbaccel.product.inputs import files_named
from lbaccel.product.metrics import COLDEST, HOTTEST
from lbaccel.recipe.trained_model import TrainedModel, read_trained
from lbaccel.runs.folder import EVALUATIONS
from lbaccel.text import one_line

BATCH = 16  # images that are decoded at once, and go through the network together
THREADS = 4


@dataclass(frozen=True)
class Prediction:
    """The answer for one file.

    Args:
        file: its name, as it was given or found.
        classes: the k most probable ones, the best first; none where the file can't be read.
        probabilities: theirs, from 0 to 1.
        error: why the file can't be read; empty where it can.
        unsure: whether the first probability is below the threshold; None without a threshold.
    """

    file: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    error: str = ""
    unsure: bool | None = None


@dataclass(frozen=True)
class Temperature:
    """The number that logits are divided by before they become probabilities.

    Args:
        value: 1 leaves them as they are.
        source: the evaluation that fitted it; None where there is none.
    """

    value: float = 1.0
    source: Path | None = None

    def __str__(self) -> str:
        if self.source is None:
            return (
                "note: probabilities are as the network gives them, without a temperature: "
                "lbaccel eval RUN fits one, and predict RUN takes it"
            )
        return (
            f"note: probabilities are calibrated, with temperature {self.value:.3g} of "
            f"{self.source}"
        )


def predict(
    path: str | Path,
    files: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    topk: int = 5,
    threshold: float | None = None,
    ema: bool = False,
) -> list[Prediction]:
    """The most probable classes of each image, in the order of the files.

    Probabilities are softmax(logits / T). T is the temperature that `lbaccel eval` fitted for these
    weights, where the run has such an evaluation, and else 1.

    Args:
        path: a run folder (its best checkpoint), a checkpoint, an export, or hf-hub:OWNER/NAME.
        files: files, folders and patterns, or one of them.
        topk: classes of each image; no more than there are.
        threshold: of the first probability, below which a prediction is unsure.
        ema: the average of the run's weights.

    Returns:
        One for each file; a file that can't be read has its reason in `error`.

    Raises:
        InputError: a model that can't be used, a folder without images, or a pattern that fits
            none.

    >>> predict("runs/20261121-001312-resnet10t-gbs512", "new/")[0]  # doctest: +SKIP
    Prediction(file='new/1.png', classes=('7', '1'), probabilities=(0.98, 0.01))
    """
    named = [files] if isinstance(files, (str, os.PathLike)) else files
    found = files_named(named, stream=None)
    trained = read_trained(path, ema=ema)
    return list(predictions(trained, found, topk=topk, threshold=threshold))


def predictions(
    trained: TrainedModel,
    files: Sequence[str],
    *,
    topk: int = 5,
    threshold: float | None = None,
    temperature: Temperature | None = None,
) -> Iterator[Prediction]:
    """The same for a model that was read before, one file after the other.

    Raises:
        InputError: `topk` or `threshold` of no use, or images of other channels than 1 and 3.
    """
    check_whole("topk", topk)
    if threshold is not None:
        check_number("threshold", threshold, zero=True, at_most=1)
    channels = trained.preprocessing["num_channels"]
    if channels not in (1, 3):
        raise InputError(
            f"{trained.path} takes images of {channels} channels; files are read with 1 or 3."
        )
    t = temperature if temperature is not None else temperature_of(trained)
    device = one_device()
    model = trained.model.to(device)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    read = evaluation_reader(trained.preprocessing, exif_orientation=trained.upright)

    def ready(file: str) -> Tensor | str:
        try:
            return read(file)
        except InputError as error:
            return one_line(str(error))
        except MemoryError:
            return f"{one_line(file)} needs more memory than there is."

    with ThreadPoolExecutor(THREADS) as pool:
        for first in range(0, len(files), BATCH):
            some = files[first : first + BATCH]
            images = list(pool.map(ready, some))
            good = [image for image in images if isinstance(image, Tensor)]
            rows = iter(())
            if good:
                with torch.inference_mode():
                    logits = model(torch.stack(good).to(device, dtype)).double().cpu()
                rows = iter(_most_probable(trained, logits / t.value, topk))
            for file, image in zip(some, images, strict=True):
                if isinstance(image, str):
                    yield Prediction(file, (), (), error=image)
                else:
                    classes, shares = next(rows)
                    unsure = None if threshold is None else shares[0] < threshold
                    yield Prediction(file, classes, shares, unsure=unsure)


def _most_probable(
    trained: TrainedModel, logits: Tensor, topk: int
) -> list[tuple[tuple[str, ...], tuple[float, ...]]]:
    """Of the outputs that have a name, where any has one."""
    named = trained.num_named or logits.shape[1]
    found = logits[:, :named].softmax(1).topk(min(topk, named))
    return [
        (tuple(trained.classes[i] for i in places), tuple(shares))
        for shares, places in zip(found.values.tolist(), found.indices.tolist(), strict=True)
    ]


def temperature_of(trained: TrainedModel) -> Temperature:
    """The temperature of the newest evaluation of these weights on the run's own images.

    One of augmented or other images, or that lies at an end of what was tried, is passed over.
    """
    if trained.run is None:
        return Temperature()
    found = sorted(
        (trained.run / EVALUATIONS).glob(f"*/{FIGURES}"), key=lambda path: path.stat().st_mtime
    )
    for path in reversed(found):
        value = _fitted(path, trained.sha256)
        if value is not None:
            return Temperature(value, path.parent)
    return Temperature()


def _fitted(path: Path, sha256: str) -> float | None:
    try:
        content = json_in(path)
    except (Malformed, InputError):
        return None
    if not isinstance(content, dict) or content.get("made_by") != MADE_BY:
        return None
    parts: list[Any] = [content.get(key) for key in ("weights", "data", "calibration")]
    if not all(isinstance(part, dict) for part in parts):
        return None
    weights, data, found = parts
    if weights.get("sha256") != sha256 or data.get("named") or content.get("tta") is not None:
        return None
    value = found.get("temperature")
    if not isinstance(value, float) or not 1.01 * COLDEST < value < HOTTEST / 1.01:
        return None
    return value
