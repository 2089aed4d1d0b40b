"""Images as data sets: small ones in memory, others that are opened when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image
from torch import Tensor

from lbaccel.errors import InputError


@dataclass(frozen=True, eq=False)
class ImageArray:
    """Small images of one size in memory: `images` uint8 [N, C, H, W], `labels` int64 [N]."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


def decode_image(file: str | PathLike[str] | IO[bytes], where: str) -> Image.Image:
    """The image in this file as RGB; `where` names it in the error.

    16-bit grey values are divided by 256; PIL's own conversion would clip them all to white.
    Transparency is dropped, not blended.

    Raises:
        InputError: PIL can't decode it, or its pixels are 32-bit numbers of unknown range.
    """
    try:
        with Image.open(file) as opened:
            image = opened
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise InputError(
                    f"{where} has 32-bit pixels (PIL's mode {image.mode}), whose range is unknown. "
                    "Save it with 8 or 16 bits."
                )
            if "transparency" in image.info:  # from a palette straight to RGB, PIL warns
                image = image.convert("RGBA")
            return image.convert("RGB")
    except (InputError, MemoryError):
        raise
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, EOFError, struct.error
        raise InputError(
            f"{where} can't be read as an image: {error}. Replace it, or take it out of the set."
        ) from error


def read_image(name: str, *, root: str = "") -> Image.Image:
    """The image in the file `root`/`name` as RGB.

    Raises:
        InputError: the file is absent or corrupt.
    """
    path = Path(root, name)
    return decode_image(path, str(path))


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images that are opened when they are asked for: `read(samples[index])` is one, as RGB.

    Loader workers get a copy each, so `samples`, `labels` and `names` hold no more than numbers
    and short strings, and `read` is a callable that can be pickled.
    """

    samples: Sequence[Any]
    labels: Sequence[int]
    classes: tuple[str, ...]
    names: Sequence[str]
    read: Callable[[Any], Image.Image] = read_image

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, index: int) -> Image.Image:
        """The image of this sample, as RGB.

        Raises:
            InputError: it is absent or corrupt; the text names the file.
        """
        return self.read(self.samples[index])


def folder_of(images: ImageArray | ImageFiles) -> Path | None:
    """The folder in which each of `images.samples` names a file; None where they are no files."""
    read: Any = images.read if isinstance(images, ImageFiles) else None
    if isinstance(read, partial) and "root" in read.keywords:
        return Path(read.keywords["root"])
    return None
