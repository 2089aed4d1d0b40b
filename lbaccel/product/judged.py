"""The images that a trained model is judged on: its run's own, or those that somebody names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lbaccel.data.identity import differences, identity_of
from lbaccel.data.images import ImageArray, ImageFiles
from lbaccel.data.opening import some
from lbaccel.data.sources import Source
from lbaccel.errors import InputError, check_choice
from lbaccel.recipe.images import open_data, read_skipped
from lbaccel.recipe.options_data import DataOptions
from lbaccel.recipe.trained_model import TrainedModel
from lbaccel.text import one_line

SPLITS = ("val", "test")
Say = Callable[[str], object]


@dataclass(frozen=True, eq=False)
class Judged:
    """A set of images with their labels.

    Args:
        images: of one split.
        data: the specification that they were opened by.
        split: val or test; train where that was asked for.
        named: whether somebody named the data, in place of the run.
        description: of the source, in words.
        identity: of the source's training and validation images.
    """

    images: ImageArray | ImageFiles
    data: str
    split: str
    named: bool
    description: str
    identity: Mapping[str, Any]

    @property
    def labels(self) -> NDArray[np.int64]:
        """The class of each image, an index into the classes of the set."""
        return np.asarray(self.images.labels, dtype=np.int64)

    @property
    def names(self) -> list[str]:
        """A name for each image, on one line: a file below its folder, or the place in its set."""
        if isinstance(self.images, ImageArray):
            return [f"{self.split}/{row}" for row in range(len(self.images))]
        return [one_line(name) for name in self.images.names]


def judged_on(
    trained: TrainedModel,
    data: str | None,
    *,
    split: str,
    say: Say,
    splits: Sequence[str] = SPLITS,
    flag: str = "--data",
) -> Judged:
    """The images, with labels that are outputs of the network.

    Args:
        trained: whose run's data are taken where `data` is None, and whose share of validation
            and seed decide what is held out.
        data: as for `lbaccel train --data`.
        split: one of `splits`; of train the images without augmentation.
        say: is told of images that are not those of the run.
        splits: that may be asked for.
        flag: that names other images, for the errors.

    Raises:
        InputError: no such data or split, other images than the run's, or other classes.
    """
    check_choice("split", split, choices=splits)
    source = _opened(trained, data, flag, say=say)
    _compare(trained, source, data, say=say, flag=flag)
    found = {"train": source.train, "val": source.val, "test": source.test}[split]
    if found is None:
        raise InputError(
            f"--split test: {source.name} has no test set. Put it beside train/ and val/, as "
            "test/ with the same sub-folders, or leave --split out."
        )
    if source.held_out and split == "val" and not trained.knows_data:
        say(
            "note: nothing says which images this model was trained with. A share of "
            f"{trained.settings.data.val_fraction:g} is held out by seed "
            f"{trained.settings.run.seed}, and some of it may be training images."
        )
    order = _places(found.classes, trained.classes[: trained.num_named], trained.path)
    return Judged(
        images=_relabelled(found, order, trained.classes),
        data=source.name,
        split=split,
        named=data is not None,
        description=source.description,
        identity=identity_of(source),
    )


def _opened(trained: TrainedModel, data: str | None, flag: str, *, say: Say) -> Source:
    options, seed = trained.settings.data, trained.settings.run.seed
    if data is not None:
        return _named(trained, replace(options, data=data), seed=seed, say=say)
    if trained.run is None:
        raise InputError(f"{trained.path} names no images. Give them: {flag} folder:PATH.")
    try:
        return open_data(options, seed=seed, skipped=read_skipped(trained.run) or ())
    except InputError as error:
        raise InputError(
            f"{error} These are the run's own images. Where they lie elsewhere now, say so: "
            f"{flag} folder:PATH."
        ) from error


def _named(trained: TrainedModel, options: DataOptions, *, seed: int, say: Say) -> Source:
    """The images that somebody names; those of the run, wherever they lie, as it took them."""
    if options.max_train_samples is None and options.max_val_samples is None:
        return open_data(options, seed=seed)
    if trained.settings.identity is not None:
        try:
            source = open_data(options, seed=seed)
        except InputError:  # fewer than the run took
            source = None
        if source is not None and differences(source, trained.settings.identity) is None:
            return source
    if options.max_val_samples is not None:
        say(
            f"note: the run was judged on {options.max_val_samples} validation images "
            f"(--max-val-samples), and these are all that {options.data} has"
        )
    whole = replace(options, max_train_samples=None, max_val_samples=None)
    return open_data(whole, seed=seed)


def _compare(
    trained: TrainedModel, source: Source, data: str | None, *, say: Say, flag: str
) -> None:
    differing = differences(source, trained.settings.identity)
    if differing is None:
        return
    if data is None:
        raise InputError(
            f"{source.name} holds other images than the run was trained with: {differing}. Its "
            "figure would not be the run's own. To evaluate on what is there now, name it: "
            f"{flag} {source.name}"
        )
    say(f"note: these are other images than the run's own: {differing}")


def _places(classes: Sequence[str], of_model: Sequence[str], path: str) -> list[int]:
    """The output for each class of the images, by name.

    Raises:
        InputError: the classes differ.
    """
    if len(of_model) == 0:
        raise InputError(
            f"{path} has no names of classes, so its outputs can't be compared with labels."
        )
    check_same_classes(classes, of_model, "the images", path)
    place = {name: i for i, name in enumerate(of_model)}
    return [place[name] for name in classes]


def check_same_classes(
    first: Sequence[str], second: Sequence[str], first_words: str, second_words: str
) -> None:
    """Let the same classes pass, in any order.

    Raises:
        InputError: they differ; the text names up to three on each side.
    """
    if sorted(first) == sorted(second):
        return
    sides = [
        f"{some(set(only) - set(other))} only in {one_line(words)}"
        for only, other, words in ((first, second, first_words), (second, first, second_words))
        if set(only) - set(other)
    ]
    raise InputError(
        f"the classes differ: {one_line(first_words)} {_have(first_words)} {len(first)}, "
        f"{one_line(second_words)} has {len(second)}; {'; '.join(sides) or 'a name comes twice'}. "
        "Both need the same classes, in any order."
    )


def _have(words: str) -> str:
    return "have" if words == "the images" else "has"


def _relabelled(
    images: ImageArray | ImageFiles, order: list[int], classes: tuple[str, ...]
) -> ImageArray | ImageFiles:
    if order == list(range(len(order))):
        return images
    if isinstance(images, ImageArray):
        return replace(images, labels=torch.tensor(order)[images.labels], classes=classes)
    return replace(images, labels=[order[label] for label in images.labels], classes=classes)
