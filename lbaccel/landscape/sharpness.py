"""`lbaccel.sharpness`: how sharp the minimum is that a run ended in, by three measures."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lbaccel.errors import InputError, RunFailed, check_number, check_seed, check_whole
from lbaccel.landscape.box import BoxSharpness, box_sharpness
from lbaccel.landscape.directions import WEIGHTS, random_direction
from lbaccel.landscape.images import Prepared, first_images, prepared, subset
from lbaccel.landscape.landscape import SPLITS
from lbaccel.landscape.mean_loss import MeanLoss
from lbaccel.landscape.network import Measure, MovedNetwork, cross_entropy
from lbaccel.landscape.surface import Plane, values_at
from lbaccel.landscape.work import described_model
from lbaccel.launch import asks_for_ranks
from lbaccel.product.device import one_device
from lbaccel.product.judged import Judged, judged_on
from lbaccel.recipe.trained_model import TrainedModel, read_trained
from lbaccel.runs.environment import versions
from lbaccel.stability.curvature import START_SEED
from lbaccel.stability.eigenvalues import Eigenvalues, largest_eigenvalues

logger = logging.getLogger("lbaccel")
Say = Callable[[str], object]
USUAL_SAMPLES = 256
MADE_BY = "lbaccel sharpness"


@dataclass(frozen=True)
class FilterSharpness:
    """The rise of the loss along random directions that are normalised filter by filter.

    Args:
        radius: r, in units of each filter's own norm.
        increases: for each direction d, (L(w + r d) + L(w - r d)) / 2 - L(w); None where a loss is
            not finite.
    """

    radius: float
    increases: tuple[float | None, ...]

    @property
    def finite(self) -> list[float]:
        """The increases that are numbers."""
        return [value for value in self.increases if value is not None]

    @property
    def mean(self) -> float | None:
        """Over the directions; None where no loss was finite."""
        return statistics.fmean(self.finite) if self.finite else None

    @property
    def deviation(self) -> float | None:
        """The standard deviation over directions (n - 1); None for fewer than two."""
        return statistics.stdev(self.finite) if len(self.finite) > 1 else None


@dataclass(frozen=True, eq=False)
class Sharpness:
    """How sharp a minimum is, by three measures on the same images.

    Args:
        loss: mean cross-entropy at the weights.
        top1_pct: right predictions in %.
        eigenvalues: the largest ones of the Hessian of the loss.
        box: Keskar's measure.
        filters: the filter-normalised measure.
        content: the model and the images, as `lbaccel sharpness --json` has them.
    """

    loss: float
    top1_pct: float
    eigenvalues: Eigenvalues
    box: BoxSharpness
    filters: FilterSharpness
    content: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Plain values: all three measures, the model, the images, the versions."""
        filters = asdict(self.filters) | {
            "mean": self.filters.mean,
            "deviation": self.filters.deviation,
        }
        return {
            "made_by": MADE_BY,
            **self.content,
            "loss": self.loss,
            "top1_pct": self.top1_pct,
            "hessian": asdict(self.eigenvalues),
            "box": asdict(self.box) | {"sharpness": self.box.sharpness},
            "filters": filters,
            "versions": versions(),
        }


def sharpness(
    path: str | Path,
    *,
    split: str = "train",
    images: str | None = None,
    samples: int | None = USUAL_SAMPLES,
    top: int = 3,
    epsilon: float = 1e-3,
    radius: float = 0.1,
    directions: int = 10,
    seed: int = 0,
    ema: bool = False,
    say: Say | None = None,
) -> Sharpness:
    """How sharp the loss is around trained weights; the model and its files stay as they are.

    The loss is the mean cross-entropy of images without augmentation, the network is in evaluation
    mode (BatchNorm's statistics are constants), in float32 (float64 where the run was), and all
    parameters count. Three measures:

    - the largest eigenvalues of the Hessian (`stability.eigenvalues.largest_eigenvalues`), each
      with its residual;
    - Keskar et al.'s (`landscape.box.box_sharpness`): the largest loss in a box of
      epsilon (|w_i| + 1);
    - the mean increase of the loss at a radius along filter-normalised random directions (Li et al.
      2018), which no rescaling of filters before a BatchNorm changes. The first two do change with
      it (Dinh et al. 2017, arXiv 1703.04933), so compare them only between runs of one recipe.

    Args:
        path: a run folder (its best checkpoint), a checkpoint, an export, or hf-hub:OWNER/NAME.
        split: train or val.
        images: as for `lbaccel train --data`; None takes the run's own images.
        samples: how many of them, always the same ones; None takes all.
        top: how many eigenvalues.
        epsilon: of Keskar's box.
        radius: of the filter-normalised measure: 0.1 moves each filter by a tenth of its norm.
        directions: how many random ones; both sides of each count.
        seed: of the directions and of Keskar's second start.
        ema: the average of the weights.
        say: is told of progress and of what is not as usual; None logs it.

    Raises:
        InputError: a model or images that can't be used, or several ranks.
        RunFailed: memory ran out, or the loss or its curvature is not finite.

    >>> found = sharpness("runs/20261121-001312-resnet10t-gbs512")  # doctest: +SKIP
    >>> found.eigenvalues.values[0], found.box.sharpness, found.filters.mean  # doctest: +SKIP
    (41.2, 3.7, 0.021)
    """
    say = say or logger.warning
    for name, count in (("top", top), ("directions", directions), ("samples", samples)):
        if count is not None or name != "samples":
            check_whole(name, count)
    check_number("epsilon", epsilon)
    check_number("radius", radius)
    check_seed("seed", seed)
    if asks_for_ranks():
        raise InputError(
            "sharpness works in one process, and a launcher started several. Type lbaccel "
            "sharpness without the launcher."
        )
    trained = read_trained(path, ema=ema)
    judged = judged_on(trained, images, split=split, say=say, splits=SPLITS, flag="--images")
    judged = replace(judged, images=subset(judged.images, samples))
    device = one_device()
    dtype = MovedNetwork(trained.model, device=torch.device("cpu")).dtype
    ready = prepared(trained, judged.images, device=device, dtype=dtype)
    options = {"top": top, "epsilon": epsilon, "radius": radius, "directions": directions}
    found = sharpness_of(trained.model, ready, device=device, seed=seed, say=say, **options)
    return replace(found, content={**_described(trained, judged), "seed": seed})


def _described(trained: TrainedModel, judged: Judged) -> dict[str, Any]:
    """The model and the images, for a reader."""
    return {
        "weights": described_model(trained),
        "data": {
            "data": judged.data,
            "split": judged.split,
            "description": judged.description,
            "fingerprint": judged.identity["fingerprint"],
            "num_samples": len(judged.images),
        },
    }


def sharpness_of(
    model: nn.Module,
    images: Prepared,
    *,
    device: torch.device,
    measure: Measure = cross_entropy,
    top: int = 3,
    epsilon: float = 1e-3,
    radius: float = 0.1,
    directions: int = 10,
    seed: int = 0,
    say: Say = logger.warning,
) -> Sharpness:
    """The three measures of any network on batches of images; see `sharpness`. Copies move alone.

    Raises:
        RunFailed: as `sharpness`.
    """
    network = MovedNetwork(model, device=device, images=first_images(images))
    loss, top1, filters = filter_sharpness(
        network, images, measure=measure, radius=radius, directions=directions, seed=seed
    )
    if loss is None:
        raise RunFailed("the loss is not finite at these weights, so their sharpness is not known.")
    mean_loss = MeanLoss(model, images, device=device, measure=measure)
    say("Hessian: products of it with vectors, up to some 60 of them")
    generator = torch.Generator().manual_seed(START_SEED)
    start = torch.randn(mean_loss.num_parameters, generator=generator, dtype=torch.float64)
    found = largest_eigenvalues(
        mean_loss.product, start.to(device, mean_loss.dtype), count=top, tolerance=0.01
    )
    say("Keskar's measure: L-BFGS-B in the box, twice 10 iterations")

    def at(w: Tensor) -> tuple[float, Tensor]:
        mean_loss.put(w)
        return mean_loss.value_and_gradient()

    box = box_sharpness(at, mean_loss.weights(), epsilon=epsilon, seed=seed)
    return Sharpness(loss, top1, found, box, filters, {})


def filter_sharpness(
    network: MovedNetwork,
    images: Prepared,
    *,
    measure: Measure = cross_entropy,
    radius: float = 0.1,
    directions: int = 10,
    seed: int = 0,
) -> tuple[float | None, float, FilterSharpness]:
    """Loss and top-1 in % at the weights, and the rise of the loss at a radius around them.

        (1 / D) sum over d of  (L(w + r d) + L(w - r d)) / 2 - L(w),    |d_i| = |w_i|

    i runs over the filters. Both sides of a direction are taken, so that the gradient cancels and
    the rise is that of the curvature. Tensors of one dimension stay (`ignore="biasbn"`).

    Args:
        network: is left at another point.
        images: that every point has.
        measure: of outputs and labels.
        radius: r.
        directions: D.
        seed: of the draws.
    """
    origin = network.tensors(WEIGHTS)
    ((loss, top1),) = values_at(
        network, Plane(origin, origin), [(0.0, 0.0)], images, measure=measure
    )
    increases: list[float | None] = []
    for number in range(directions):
        plane = Plane(origin, random_direction(origin, seed=seed, axis=number))
        sides = values_at(network, plane, [(radius, 0.0), (-radius, 0.0)], images, measure=measure)
        losses = [value for value, _ in sides if value is not None]
        whole = loss is not None and len(losses) == 2
        increases.append(sum(losses) / 2 - loss if whole and loss is not None else None)
    return loss, top1, FilterSharpness(radius, tuple(increases))
