"""A first figure in a minute: a linear classifier on the features of the frozen backbone."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lbaccel.data.images import ImageArray, ImageFiles, taken
from lbaccel.data.pipelines import evaluation_batches
from lbaccel.data.sources import Source

BATCH = 16
LEAST = 2  # images a class, below which nothing can be learnt and judged


@dataclass(frozen=True)
class FirstFigure:
    """Validation top-1 of the linear classifier, as a share, and what it cost.

    Attributes:
        hits: validation images that it has right, of `num_val`.
        num_train: training images whose features it learnt from.
        seconds_per_image: of the frozen backbone, decoding included.
        seconds: in all.
    """

    hits: int
    num_val: int
    num_train: int
    seconds_per_image: float
    seconds: float

    @property
    def top1(self) -> float:
        """Share of the validation images."""
        return self.hits / self.num_val


def first_figure(
    model: nn.Module,
    source: Source,
    preprocessing: Mapping[str, Any],
    *,
    device: torch.device,
    seconds: float,
) -> FirstFigure:
    """Fit scikit-learn's logistic regression to features of as many images as time allows.

    The images are taken evenly over the set, so that each class has its share. The backbone is in
    evaluation mode and sees each image once, as evaluation does; it is left as it was.

    Args:
        model: of timm: `forward_features`, `forward_head(..., pre_logits=True)`.
        source: training and validation images.
        preprocessing: of the model, as a checkpoint has it.
        device: where the model is.
        seconds: that all may take, about.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    start = time.perf_counter()
    was_training = model.training
    model.eval()
    try:
        _features(model, _evenly(source.val, BATCH), preprocessing, device)  # warms up
        begin = time.perf_counter()
        trial, _ = _features(model, _evenly(source.val, 2 * BATCH), preprocessing, device)
        each = (time.perf_counter() - begin) / len(trial)
        count = max(1, int((seconds - (time.perf_counter() - start)) / each))
        least = LEAST * len(source.train.classes)
        num_val = min(len(source.val), max(least, count // 3))
        parts = (
            _evenly(source.train, max(least, count - num_val)),
            _evenly(source.val, num_val),
        )
        (x, y), (x_val, y_val) = (_features(model, p, preprocessing, device) for p in parts)
    finally:
        model.train(was_training)
    hits = int((y_val == y[0]).sum())
    if len(np.unique(y)) > 1:
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
        hits = int((classifier.fit(x, y).predict(x_val) == y_val).sum())
    return FirstFigure(hits, len(y_val), len(y), each, time.perf_counter() - start)


def _features(
    model: Any, images: ImageArray | ImageFiles, preprocessing: Mapping[str, Any], device: Any
) -> tuple[np.ndarray, np.ndarray]:
    rows, labels = [], []
    with torch.inference_mode():
        for batch, label in _batches(images, preprocessing):
            found = model.forward_features(batch.to(device))
            rows.append(model.forward_head(found, pre_logits=True).flatten(1).cpu())
            labels.append(label)
    return torch.cat(rows).float().numpy(), torch.cat(labels).numpy()


def _batches(
    images: ImageArray | ImageFiles, preprocessing: Mapping[str, Any]
) -> Iterator[tuple[Tensor, Tensor]]:
    return evaluation_batches(images, preprocessing=dict(preprocessing), batch_size=BATCH)


def _evenly(images: ImageArray | ImageFiles, count: int) -> ImageArray | ImageFiles:
    """At most `count` of the images, each class with its share, in the order of the set."""
    if count >= len(images):
        return images
    labels = np.asarray(images.labels)
    by_class = np.argsort(labels, kind="stable")
    rows = np.sort(by_class[np.linspace(0, len(labels) - 1, count).round().astype(int)])
    return taken(images, rows.tolist())
