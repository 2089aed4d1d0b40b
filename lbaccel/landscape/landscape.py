"""`lbaccel.loss_landscape`: loss and accuracy around trained weights, or between two of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lbaccel.errors import check_choice, check_whole
from lbaccel.landscape import folder as files
from lbaccel.landscape.axes import Axis, check_grid
from lbaccel.landscape.directions import (
    DIRECTIONS,
    STATES,
    WEIGHTS,
)
from lbaccel.landscape.images import first_images, prepared, subset
from lbaccel.landscape.network import MovedNetwork
from lbaccel.landscape.pictures import draw
from lbaccel.landscape.request import (
    axis_from,
    check_comparable,
    notes_on_second,
    random_options,
)
from lbaccel.landscape.result import Landscape
from lbaccel.landscape.surface import PointsDone, values_at
from lbaccel.landscape.work import Work, folder_of
from lbaccel.product.judged import judged_on
from lbaccel.recipe.accelerator import make_accelerator
from lbaccel.recipe.trained_model import read_trained
from lbaccel.runs.lock import give_back, take
from lbaccel.runs.ranks import decided, on_each_rank

logger = logging.getLogger("lbaccel")
Say = Callable[[str], object]
SPLITS = ("train", "val")
AROUND, BETWEEN = "-1:1:51", "-0.5:1.5:51"  # the axes of Li et al.'s figures


def loss_landscape(
    path: str | Path,
    second: str | Path | None = None,
    *,
    x: Axis | str | None = None,
    y: Axis | str | None = None,
    direction: str | None = None,
    norm: str | None = None,
    ignore: str | None = None,
    split: str = "train",
    images: str | None = None,
    samples: int | None = None,
    seed: int | None = None,
    ema: bool = False,
    output: str | Path | None = None,
    say: Say | None = None,
) -> Landscape:
    """The loss around trained weights, or on the line between two models, as Li et al. draw it.

        L(x, y) = mean over images of CE(f(image; w + x d_x + y d_y), label)

    d_x and d_y are Gaussian directions that are normalised by the weights (see
    `landscape.directions.random_direction`); with a second model d_x = w_2 - w. Images are those of
    the run without augmentation, the network is in evaluation mode, in float32 (float64 where the
    run was), and neither the files of the model nor a model in memory changes. A folder that holds
    a part of the same landscape is gone on with, point by point. On several ranks all of them call
    it and each computes a share of the points; the surface is the same to the bit.

    The figures are those of Li et al. 2018 (arXiv 1712.09913).

    Args:
        path: a run folder (its best checkpoint), a checkpoint, an export, or hf-hub:OWNER/NAME.
        second: another model of the same network, at x = 1.
        x: LOW:HIGH:POINTS; None is -1:1:51, and -0.5:1.5:51 with a second model.
        y: the same for a second, random direction; None draws a curve.
        direction: "weights" moves the parameters; "states" moves BatchNorm's running means and
            variances too. None is "weights", and "states" with a second model.
        norm: filter, layer or weight: of a random direction; None is filter.
        ignore: "biasbn" leaves tensors of one dimension where they are, "none" moves them along
            themselves; None is biasbn.
        split: train or val.
        images: as for `lbaccel train --data`; None takes the run's own images.
        samples: how many of them, always the same ones; None takes all.
        seed: of the random directions; None is 0.
        ema: the average of the weights, of both models.
        output: folder for the files; None is RUN/landscapes/NAME, or none where there is no run.
        say: is told of progress and of what is not as usual; None logs it.

    Raises:
        InputError: a model, images or an axis that can't be used, two models that differ in more
            than their weights, or a folder that holds something else.
        RunFailed: memory ran out, or another process writes into the folder.

    >>> surface = loss_landscape("runs/20261121-001312-resnet10t-gbs512")  # doctest: +SKIP
    >>> surface.loss[25], surface.top1_pct[25]  # at x = 0  # doctest: +SKIP
    (0.0113, 99.8)
    """
    say = say or logger.warning
    axes = (
        axis_from(x, BETWEEN if second else AROUND, "x"),
        None if y is None else axis_from(y, "", "y"),
    )
    check_grid(*axes)
    direction = direction or (STATES if second else WEIGHTS)
    check_choice("direction", direction, choices=DIRECTIONS)
    options = random_options(norm, ignore, seed, is_random=not second or y is not None)
    if samples is not None:
        check_whole("samples", samples)
    first = read_trained(path, ema=ema)
    other = None if second is None else read_trained(second, ema=ema)
    accelerator, _ = make_accelerator(None)
    judged = on_each_rank(
        accelerator,
        lambda: judged_on(first, images, split=split, say=say, splits=SPLITS, flag="--images"),
    )
    if other is not None:
        check_comparable(first, other)
        for line in notes_on_second(other, judged, direction=direction):
            say(line)
    judged = replace(judged, images=subset(judged.images, samples))
    work = Work(first, other, judged, axes, {"direction": direction, **options})
    folder = folder_of(work, output)
    if folder is None:
        return work.result(_computed(work, accelerator, {}, None, say=say), None)
    return _in_folder(work, accelerator, folder, say=say)


def _in_folder(work: Work, accelerator: Any, folder: Path, *, say: Say) -> Landscape:
    """The landscape with its files; a folder that holds a part of it is gone on with."""

    def opened() -> files.Points:
        files.check_own(folder)
        folder.mkdir(parents=True, exist_ok=True)
        take(folder, say=say)
        return files.open_folder(folder, work.identity)

    try:
        known = decided(accelerator, opened)
        points = _computed(work, accelerator, known, folder, say=say)
        result = work.result(points, folder)
        if accelerator.is_main_process:
            write_files(result, folder)
    finally:
        if accelerator.is_main_process:
            give_back(folder)
    return result


def write_files(result: Landscape, folder: Path) -> None:
    """Write surface, table and pictures of a whole landscape."""
    files.write_surface(folder, result.content, result.points)
    files.write_table(folder, result.content, result.points)
    files.remove_parts(folder)
    draw(result, folder)


def _computed(
    work: Work, accelerator: Any, known: files.Points, folder: Path | None, *, say: Say
) -> files.Points:
    """All points: those that are known, and the rest, of which each rank computes a share."""
    places, world_size = work.places(), accelerator.num_processes
    missing = [i for i in range(len(places)) if i not in known]
    if not missing:
        return known
    if known:
        say(f"{len(known)} of {len(places)} points are there, {len(missing)} are to be computed")

    def share() -> files.Points:
        mine = missing[accelerator.process_index :: world_size]
        where = f" on each of {world_size} ranks" if world_size > 1 else ""
        file = None if folder is None else files.points_file(folder, accelerator.process_index)
        with nullcontext() if file is None else closing(file):
            return _share(work, accelerator.device, mine, file, PointsDone(say, len(mine), where))

    try:
        found = on_each_rank(accelerator, share)
    except KeyboardInterrupt:
        if folder is None:
            raise
        raise KeyboardInterrupt(
            f"The points that are done lie in {folder}: the same line goes on from there."
        ) from None
    parts: list[Any] = [found]
    if world_size > 1:
        parts = [None] * world_size
        torch.distributed.all_gather_object(parts, found)
    return {place: point for part in (known, *parts) for place, point in part.items()}


def _share(
    work: Work, device: torch.device, mine: list[int], file: Any, pace: PointsDone
) -> files.Points:
    """The points of this rank, each written to its file when it is done."""
    if not mine:
        return {}
    plain = MovedNetwork(work.first.model, device=device)
    images = prepared(work.first, work.judged.images, device=device, dtype=plain.dtype)
    network = MovedNetwork(work.first.model, device=device, images=first_images(images))
    plane, places, found = work.plane.to(device), work.places(), {}
    chosen = [places[i] for i in mine]
    for place, point in zip(
        mine, values_at(network, plane, chosen, images, pace=pace), strict=True
    ):
        found[place] = point
        if file is not None:
            files.add_point(file, place, *point)
    return found
