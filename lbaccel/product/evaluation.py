"""A trained model, judged: the figures, and a prediction for each image."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from lbaccel.product.judged import Judged
from lbaccel.product.logits import Outputs
from lbaccel.product.metrics import TOP_K, Figures, Floats, Ints
from lbaccel.product.shares import McNemar
from lbaccel.recipe.trained_model import TrainedModel
from lbaccel.runs.environment import versions

MADE_BY = "lbaccel eval"


@dataclass(frozen=True, eq=False)
class Other:
    """The model that another one is compared with, on the same images.

    Args:
        trained: the second model, B.
        figures: its own.
        test: McNemar's, of A and B.
    """

    trained: TrainedModel
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

    trained: TrainedModel
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
        confusion = figures.pop("confusion")  # triples: class, prediction, images
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
