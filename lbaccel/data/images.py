"""Images as data sets: small ones in memory, others that are opened when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import IO, Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lbaccel.data.names import Names
from lbaccel.errors import InputError
from lbaccel.text import one_line


@dataclass(frozen=True, eq=False)
class ImageArray:
    """Small images of one size in memory: `images` uint8 [N, C, H, W], `labels` int64 [N]."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


def decode_image(
    file: str | PathLike[str] | IO[bytes],
    where: str | Callable[[], str],
    *,
    exif_orientation: bool = True,
) -> Image.Image:
    """The image in this file as RGB; `where` names it in the error, or makes its name then.

    With `exif_orientation` a photograph is turned upright as its EXIF entry says: cameras store
    one that was taken with the camera on its side lying down. Of an animation it is the first
    picture. 16-bit grey values are divided by 256; PIL's own conversion would clip them all to
    white. Transparency is dropped, not blended.

    Raises:
        InputError: PIL can't decode it, or its pixels are 32-bit numbers of unknown range.
    """
    try:
        with Image.open(file) as opened:
            image = opened
            if exif_orientation:
                _turn_upright(image)
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise InputError(
                    f"{_said(where)} has 32-bit pixels (PIL's mode {image.mode}), whose range is "
                    "unknown. Save it with 8 or 16 bits."
                )
            if "transparency" in image.info:  # from a palette straight to RGB, PIL warns
                image = image.convert("RGBA")
            return image.convert("RGB")
    except (InputError, MemoryError):
        raise
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, EOFError, struct.error
        raise InputError(
            f"{_said(where)} can't be read as an image: {error}. Replace it, or take it out of the "
            "set."
        ) from error


def _said(where: str | Callable[[], str]) -> str:
    return where if isinstance(where, str) else where()


def _turn_upright(image: Image.Image) -> None:
    image.load()  # an image that is cut off is an error, and is so here
    with suppress(Exception):  # an EXIF entry that is damaged says nothing of the orientation
        ImageOps.exif_transpose(image, in_place=True)


def as_pixels(image: Image.Image) -> Tensor:
    """The pixels of an image in memory, uint8 [C, H, W]; the channels of a pixel lie together."""
    pixels = torch.from_numpy(np.array(image))  # a copy: Pillow's own memory is read-only
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def read_image(name: str, *, root: str = "", exif_orientation: bool = True) -> Image.Image:
    """The image in the file `root`/`name` as RGB.

    Raises:
        InputError: the file is absent or corrupt.
    """
    path = Path(root, name)
    return decode_image(path, one_line(str(path)), exif_orientation=exif_orientation)


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images that are opened when they are asked for: `read(samples[index])` is one, as RGB.

    Loader workers get a copy each, so `samples` and `labels` hold no more than numbers and short
    strings, `names` are kept as `Names`, and so are `samples` where they are the names. `read` is a
    callable that can be pickled.
    """

    samples: Sequence[Any]
    labels: Sequence[int]
    classes: tuple[str, ...]
    names: Sequence[str]
    read: Callable[[Any], Image.Image] = read_image

    def __post_init__(self) -> None:
        names = self.names if isinstance(self.names, Names) else Names(self.names)
        if self.samples is self.names:  # one buffer in memory, and in each worker's pickle
            object.__setattr__(self, "samples", names)
        object.__setattr__(self, "names", names)

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, index: int) -> Image.Image:
        """The image of this sample, as RGB.

        Raises:
            InputError: it is absent or corrupt; the text names the file.
        """
        return self.read(self.samples[index])

    def only(self, rows: Sequence[int]) -> ImageFiles:
        """The set of the samples at these positions, in this order."""
        samples = names = cast(Names, self.names).take(rows)
        if self.samples is not self.names:
            samples = tuple(self.samples[row] for row in rows)
        labels = tuple(self.labels[row] for row in rows)
        return replace(self, samples=samples, labels=labels, names=names)


@runtime_checkable
class EncodedImages(Protocol):
    """A reader of images whose bytes stand in no files of their own: rows, parts of an archive."""

    def name_of(self, sample: Any) -> str:
        """The place of its bytes without the folder; no other sample of the set has it."""
        ...

    def data_of(self, sample: Any) -> bytes:
        """Its bytes, and none where there are none; raises OSError."""
        ...

    def __call__(self, sample: Any) -> Image.Image:
        """The image, as RGB."""
        ...


def taken(images: ImageArray | ImageFiles, rows: Sequence[int]) -> ImageArray | ImageFiles:
    """The images at these positions, in this order."""
    if isinstance(images, ImageFiles):
        return images.only(rows)
    chosen = torch.as_tensor(rows, dtype=torch.long)
    return replace(images, images=images.images[chosen], labels=images.labels[chosen])


def folder_of(images: ImageArray | ImageFiles) -> Path | None:
    """The folder in which each of `images.samples` names a file; None where they are no files."""
    read: Any = images.read if isinstance(images, ImageFiles) else None
    if isinstance(read, partial) and "root" in read.keywords:
        return Path(read.keywords["root"])
    return None
