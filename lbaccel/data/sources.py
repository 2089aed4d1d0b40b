"""Where images come from: a name or a path becomes a training and a validation set."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from tarfile import TarError
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torchvision.datasets import CIFAR10, CIFAR100

from lbaccel.data.csv_files import open_csv
from lbaccel.data.folders import open_folder
from lbaccel.data.hub import open_hf
from lbaccel.data.images import ImageArray, ImageFiles
from lbaccel.data.opening import AS_TEST, TEST_SPLITS, Opening, Sets
from lbaccel.data.parquet import open_parquet
from lbaccel.data.split import SPLIT, check_val_fraction, split_by_hash
from lbaccel.data.subset import limited
from lbaccel.data.synthetic import open_synthetic
from lbaccel.data.timm_readers import open_timm
from lbaccel.errors import InputError, RunFailed, check_choice, check_seed, check_whole
from lbaccel.text import one_line

__all__ = ["ImageArray", "ImageFiles", "Source", "open_source"]

FORMS = (
    *("digits", "cifar10", "cifar100", "folder:PATH", "parquet:PATH", "csv:FILE"),
    *("hf:OWNER/NAME[:split]", "timm:PATH", "synthetic[:CLASSESxSIZE]"),
)
CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}
CACHE = Path("~/.cache/lbaccel")


@dataclass(frozen=True, eq=False)
class Source:
    """A training and a validation set with the same classes, and one line that describes them."""

    train: ImageArray | ImageFiles
    val: ImageArray | ImageFiles
    name: str
    num_channels: int
    description: str
    held_out: bool = True  # the validation set is a share of the data, not one of their own
    test: ImageArray | ImageFiles | None = None  # never touched by training


def open_source(
    spec: str,
    *,
    val_fraction: float = 0.2,
    seed: int = 0,
    data_dir: Path | None = None,
    test_split: str = AS_TEST,
    exif_orientation: bool = True,
    max_train_samples: int | None = None,
    max_val_samples: int | None = None,
    decodes_test: bool = True,
) -> Source:
    """The images that `spec` names.

    Where the data have no validation set of their own, round(val_fraction * size) images of each
    class are held out, by a hash of (seed, file name): see `split_by_hash`.

    Args:
        spec: digits, cifar10, cifar100; folder:PATH (a sub-folder for each class, below train/,
            val/ and test/ or not); parquet:PATH (train-*.parquet, as on the Hugging Face hub);
            csv:FILE (columns path and label, split if wanted); hf:OWNER/NAME[:split], through the
            package datasets; timm:PATH, a folder or tar file in timm's order; or
            synthetic[:CLASSESxSIZE].
        val_fraction: the share of each class to hold out, between 0 and 1.
        seed: of the split.
        data_dir: where CIFAR lies or is downloaded to; ~/.cache/lbaccel if None.
        test_split: what a test set (test/, test-*.parquet) is where there is no validation set
            beside it: "test", so that validation is held out of the training images and nothing
            that trains looks at it, or "val". CIFAR's test set is always its validation set.
            "unused": validation is held out of the training images though there may be a
            validation set, and neither that nor a test set is opened.
        exif_orientation: turn photographs upright as their EXIF entry says.
        max_train_samples: training images to take, in proportion to the classes, the same for
            every seed: see `lbaccel.data.subset.drawn`. The validation set is held out before.
        max_val_samples: likewise of the validation images.
        decodes_test: read small images of a test set into memory too, as the others are; training
            leaves them in their files.

    Raises:
        InputError: `spec` is none of these, or the data are not as they must be.
        RunFailed: a download failed.

    >>> print(open_source("digits").description)
    digits: 1438 training and 359 validation images of 8x8x1, 10 classes, split by hash of the index
    """
    check_val_fraction(val_fraction)
    seed = check_seed("seed", seed)
    check_choice("test_split", test_split, choices=TEST_SPLITS)
    for name, most in (
        ("max_train_samples", max_train_samples),
        ("max_val_samples", max_val_samples),
    ):
        if most is not None:
            check_whole(name, most)
    wanted = Opening(
        val_fraction,
        seed,
        test_split,
        exif_orientation,
        max_train_samples,
        max_val_samples,
        decodes_test,
    )
    kind, colon, rest = spec.partition(":")
    if kind in AT_A_PATH and rest:
        sets = AT_A_PATH[kind](Path(rest).expanduser().absolute(), wanted)
    elif kind in BY_NAME and (colon or kind == "synthetic"):
        sets = BY_NAME[kind](rest, wanted)
    elif spec == "digits":
        sets = _digits(val_fraction, seed)
    elif spec in CIFAR:
        sets = _cifar(spec, data_dir or CACHE.expanduser())
    else:
        raise InputError(_unknown(spec))
    return _source(spec, limited(sets, wanted))


def _source(spec: str, sets: Sets) -> Source:
    train, val, how, test = sets
    num_channels, size = 3, ""
    if isinstance(train, ImageArray):
        num_channels, height, width = train.images.shape[1:]
        size = f" of {height}x{width}x{num_channels}"
    counted = f"{len(train)} training and {len(val)} validation"
    if test is not None:
        counted = f"{len(train)} training, {len(val)} validation and {len(test)} test"
    description = f"{spec}: {counted} images{size}, {len(train.classes)} classes, {how}"
    return Source(
        train, val, spec, num_channels, one_line(description), how.startswith(SPLIT), test
    )


def _unknown(spec: str) -> str:
    kind = spec.partition(":")[0].lower()
    near = difflib.get_close_matches(kind, [form.partition(":")[0] for form in FORMS], n=1)
    if Path(spec).expanduser().is_dir():
        meant = f" Did you mean folder:{spec}, or parquet:{spec}?"
    elif near:
        meant = f" Did you mean {next(form for form in FORMS if form.startswith(near[0]))}?"
    else:
        meant = ""
    return f"data={spec!r} is none of {', '.join(FORMS)}.{meant}"


def _digits(val_fraction: float, seed: int) -> Sets:
    from sklearn.datasets import load_digits  # a second to import, and needed here only

    images, targets = load_digits(return_X_y=True)
    pixels = torch.from_numpy(np.rint(images * 255 / 16).astype(np.uint8)).view(-1, 1, 8, 8)
    labels = torch.from_numpy(targets.astype(np.int64))
    classes = tuple("0123456789")
    train, val = split_by_hash(
        [str(index) for index in range(len(labels))],
        labels.tolist(),
        classes=classes,
        val_fraction=val_fraction,
        seed=seed,
    )
    return Sets(
        ImageArray(pixels[train], labels[train], classes),
        ImageArray(pixels[val], labels[val], classes),
        f"{SPLIT} of the index",
    )


def _cifar(name: str, folder: Path) -> Sets:
    def both(download: bool) -> tuple[Any, Any]:
        kind = CIFAR[name]
        return kind(folder, True, download=download), kind(folder, False, download=download)

    try:
        sets = both(False)
    except RuntimeError:  # not there, or its checksums don't fit
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f".{name}.lock"):  # the ranks of one machine come together
                sets = both(True)
        except (OSError, RuntimeError, EOFError, HTTPException, TarError) as error:
            kind = CIFAR[name]
            raise RunFailed(
                f"{name} is not in {folder} and could not be downloaded: {error}. Without network, "
                f"put {kind.filename} (from {kind.url}, md5 {kind.tgz_md5}) into {folder}, or use "
                "--data parquet:PATH with a copy from the Hugging Face hub."
            ) from error
    train, val = (
        ImageArray(
            torch.from_numpy(half.data).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(half.targets, dtype=torch.int64),
            tuple(half.classes),
        )
        for half in sets
    )
    return Sets(train, val, "validation is its test set")


# kind: the function that opens it at a path, as `open_folder` does
AT_A_PATH: dict[str, Callable[[Path, Opening], Sets]] = {
    "folder": open_folder,
    "parquet": open_parquet,
    "csv": open_csv,
}
# kind: the function that opens what follows the colon
BY_NAME: dict[str, Callable[[str, Opening], Sets]] = {
    "hf": open_hf,
    "timm": open_timm,
    "synthetic": open_synthetic,
}
