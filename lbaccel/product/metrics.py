"""Figures of a classifier out of its logits: accuracy and its kin, calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.metrics import f1_score, precision_recall_fscore_support, recall_score

from lbaccel.errors import RunFailed
from lbaccel.product.shares import wilson

NUM_BINS = 15  # of the calibration error
TOP_K = 5
COLDEST, HOTTEST = 0.02, 50.0  # temperatures that are tried
_ZERO: dict[str, Any] = {"zero_division": 0}  # a figure over no image; None stands for it here
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ClassFigures:
    """A class of the evaluated images.

    Args:
        name: of the class.
        n: its images.
        recall: share of them that are predicted as it; None where n is 0.
        low, high: 95 % interval of the recall (Wilson 1927); None where n is 0.
        precision: share of the images predicted as it that are of it; None where there are none.
        f1: harmonic mean of both; 0 where nothing of it is right.
    """

    name: str
    n: int
    recall: float | None
    low: float | None
    high: float | None
    precision: float | None
    f1: float


@dataclass(frozen=True)
class Calibration:
    """How far the probability of a prediction is from the share of right ones.

    Args:
        error: expected calibration error of the probabilities as they are.
        temperature: that the logits are divided by, fitted on all these images.
        error_after: of the images of each half, with the temperature fitted on the other half.
    """

    error: float
    temperature: float
    error_after: float


@dataclass(frozen=True)
class Figures:
    """All figures of one evaluation; shares are from 0 to 1.

    Args:
        n: images.
        num_right: whose largest logit is that of their class.
        low, high: 95 % interval of top-1 (Wilson 1927).
        top5: share whose class is among the five largest logits; None for five outputs or fewer.
        loss: mean cross-entropy, in nats.
        balanced_accuracy: mean recall of the classes that have images.
        macro_f1: mean F1 of the classes that occur among labels or predictions.
        majority_class: the most frequent class of these images.
        majority: its share, which is the top-1 of always naming it.
        calibration: None for a single image.
        classes: one of each name.
        confusion: [m, 3], class, prediction and number of images, of each pair that occurs.
    """

    n: int
    num_right: int
    low: float
    high: float
    top5: float | None
    loss: float
    balanced_accuracy: float
    macro_f1: float
    majority_class: str
    majority: float
    calibration: Calibration | None
    classes: tuple[ClassFigures, ...]
    confusion: Ints

    @property
    def top1(self) -> float:
        """Share of right predictions, from 0 to 1."""
        return self.num_right / self.n

    @property
    def top1_pct(self) -> float:
        """The same in %, to the bit as a run logs `val/top1`."""
        return 100 * self.num_right / self.n

    def matrix(self, num_outputs: int) -> Ints:
        """[outputs, outputs], images by class (row) and prediction (column)."""
        dense = np.zeros((num_outputs, num_outputs), dtype=np.int64)
        dense[self.confusion[:, 0], self.confusion[:, 1]] = self.confusion[:, 2]
        return dense


def figures_of(
    logits: Floats, labels: Ints, predicted: Ints, *, classes: Sequence[str], num_named: int
) -> Figures:
    """All figures.

    Args:
        logits: [n, outputs], finite; log-probabilities will do.
        labels: [n], indices of outputs.
        predicted: [n], of the largest logit.
        classes: a name for each output.
        num_named: outputs that are classes of the data: the first ones.

    Raises:
        RunFailed: logits that are not finite.
    """
    if bad := int((~np.isfinite(logits)).any(axis=1).sum()):
        raise RunFailed(
            f"the network gives no finite numbers for {bad} of {len(labels)} images: its weights "
            "diverged. Take an earlier checkpoint."
        )
    right = predicted == labels
    counted = np.bincount(labels, minlength=len(classes))
    most = int(counted.argmax())
    low, high = wilson(int(right.sum()), len(labels))
    own = logits[np.arange(len(labels)), labels]
    above = (logits > own[:, None]).sum(axis=1)
    several = len(labels) > 1
    return Figures(
        n=len(labels),
        num_right=int(right.sum()),
        low=low,
        high=high,
        top5=float((above < TOP_K).mean()) if len(classes) > TOP_K else None,
        loss=negative_log_likelihood(logits, labels),
        balanced_accuracy=float(
            recall_score(labels, predicted, labels=np.unique(labels), average="macro")
        ),
        macro_f1=float(f1_score(labels, predicted, average="macro", **_ZERO)),
        majority_class=classes[most],
        majority=float(counted[most] / len(labels)),
        calibration=calibration(logits, labels, predicted) if several else None,
        classes=_class_figures(labels, predicted, classes=classes, num_named=num_named),
        confusion=_pairs(labels, predicted),
    )


def _pairs(labels: Ints, predicted: Ints) -> Ints:
    """Few also of 10,000 classes, whose matrix would have 100 million numbers."""
    pairs, counts = np.unique(np.stack([labels, predicted], axis=1), axis=0, return_counts=True)
    return np.concatenate([pairs, counts[:, None]], axis=1)


def _class_figures(
    labels: Ints, predicted: Ints, *, classes: Sequence[str], num_named: int
) -> tuple[ClassFigures, ...]:
    named, zero = np.arange(num_named), _ZERO
    found: Any = precision_recall_fscore_support(labels, predicted, labels=named, **zero)
    precision, recall, f1, n = found
    said = np.bincount(predicted, minlength=len(classes))
    right = np.bincount(labels[labels == predicted], minlength=len(classes))
    rows = []
    for i in range(num_named):
        there = int(n[i])
        low, high = wilson(int(right[i]), there) if there else (None, None)
        rows.append(
            ClassFigures(
                name=classes[i],
                n=there,
                recall=float(recall[i]) if there else None,
                low=low,
                high=high,
                precision=float(precision[i]) if said[i] else None,
                f1=float(f1[i]),
            )
        )
    return tuple(rows)


def negative_log_likelihood(logits: Floats, labels: Ints, *, temperature: float = 1.0) -> float:
    """Mean of -log softmax(logits / temperature) at the labels, in nats."""
    return -float(log_softmax(logits / temperature, axis=1)[np.arange(len(labels)), labels].mean())


def fit_temperature(logits: Floats, labels: Ints) -> float:
    """The T that minimises the mean of -log softmax(logits / T) (Guo et al. 2017, section 4.2).

    It is looked for from 0.02 to 50: where all predictions are right, it has no minimum.
    """

    def of_log(log_temperature: float) -> float:
        return negative_log_likelihood(logits, labels, temperature=math.exp(log_temperature))

    found: Any = minimize_scalar(
        of_log, bounds=(math.log(COLDEST), math.log(HOTTEST)), method="bounded"
    )
    return math.exp(float(found.x))


def confidence_of(logits: Floats, predicted: Ints, *, temperature: float = 1.0) -> Floats:
    """The probability of each prediction, [n]."""
    log_probabilities = log_softmax(logits / temperature, axis=1)
    return np.exp(log_probabilities[np.arange(len(predicted)), predicted])


def calibration_error(confidence: Floats, right: NDArray[np.bool_]) -> float:
    """Expected calibration error (Guo et al. 2017, equation 3).

    sum_m |B_m| / n * |acc(B_m) - conf(B_m)|, over the 15 bins ((m - 1) / 15, m / 15] of confidence.

    Args:
        confidence: [n], the probability of each prediction.
        right: [n], whether it is right.

    >>> round(calibration_error(np.array([0.9, 0.9]), np.array([True, False])), 9)
    0.4
    """
    bins = np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    gaps = np.bincount(bins, weights=right - confidence, minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / len(right))


def calibration(logits: Floats, labels: Ints, predicted: Ints) -> Calibration:
    """The calibration error before and after a temperature (Guo et al. 2017).

    A temperature that is measured on the images that it was fitted on looks better than it is. So
    the error after it is cross-fitted: images at even places take the temperature of those at odd
    places, and the other way round.
    """
    right = labels == predicted
    even = np.arange(len(labels)) % 2 == 0
    after = np.empty(len(labels))
    for half in (even, ~even):
        other = fit_temperature(logits[~half], labels[~half])
        after[half] = confidence_of(logits[half], predicted[half], temperature=other)
    return Calibration(
        error=calibration_error(confidence_of(logits, predicted), right),
        temperature=fit_temperature(logits, labels),
        error_after=calibration_error(after, right),
    )
