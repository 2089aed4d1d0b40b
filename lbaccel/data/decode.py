"""Images in files as bytes [3, H, W]: JPEG by torchvision's decoder, all others by Pillow."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from lbaccel.data.images import EncodedImages, ImageFiles, read_image

try:  # deprecated since torchvision 0.29; without it Pillow gives the same pixels, a little later
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    ImageReadMode = decode_jpeg = None

FAST, PILLOW = "fast", "pillow"
DECODERS = (FAST, PILLOW)
_JPEG = b"\xff\xd8\xff"

# EXIF's orientation: what turns [C, H, W] upright (CIPA DC-008, tag 274)
_UPRIGHT: Mapping[int, Callable[[Tensor], Tensor]] = {
    2: lambda pixels: pixels.flip(2),
    3: lambda pixels: pixels.flip(1, 2),
    4: lambda pixels: pixels.flip(1),
    5: lambda pixels: pixels.transpose(1, 2),
    6: lambda pixels: pixels.transpose(1, 2).flip(2),
    7: lambda pixels: pixels.transpose(1, 2).flip(1, 2),
    8: lambda pixels: pixels.transpose(1, 2).flip(1),
}


def decoder_in(preprocessing: Mapping[str, Any]) -> str:
    """The decoder of images in files: Pillow where nothing names one, as in runs of before."""
    return preprocessing.get("decoder") or PILLOW


def pixels_of(images: ImageFiles, index: int) -> Tensor:
    """The pixels of a sample, uint8 [3, H, W], upright: those of `images.load(index)`.

    A JPEG of grey or colour is decoded by torchvision, in the memory that it returns. All else, a
    file that torchvision can't decode among it, is read by Pillow, which has the words for it.

    Raises:
        InputError: the image is absent or corrupt; the text names the file.
    """
    data, upright = _jpeg_of(images.read, images.samples[index])
    pixels = None if data is None else _decoded(data, upright=upright)
    return as_pixels(images.load(index)) if pixels is None else pixels


def as_pixels(image: Image.Image) -> Tensor:
    """The pixels of an image in memory, uint8 [C, H, W]; the channels of a pixel lie together."""
    pixels = torch.from_numpy(np.array(image))  # a copy: Pillow's own memory is read-only
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def _jpeg_of(read: Any, sample: Any) -> tuple[bytes | None, bool]:
    """The bytes of a JPEG, and whether it is to be turned upright; None where it is none."""
    options = read.keywords if isinstance(read, partial) else {}
    try:
        if getattr(read, "func", read) is read_image:
            upright = options.get("exif_orientation", True)
            with Path(options.get("root", ""), sample).open("rb") as file:
                head = file.read(len(_JPEG))
                return (head + file.read() if head == _JPEG else None), upright
        if isinstance(read, EncodedImages):
            data = read.data_of(sample)
            return (data if data.startswith(_JPEG) else None), getattr(
                read, "exif_orientation", True
            )
    except OSError:  # the reader itself says what it is
        pass
    return None, False


def _decoded(data: bytes, *, upright: bool) -> Tensor | None:
    """A JPEG's pixels; None where Pillow is to look at it."""
    if decode_jpeg is None or ImageReadMode is None:
        return None
    try:
        with Image.open(BytesIO(data)) as header:  # it refuses a size beyond its bound
            if header.format not in ("JPEG", "MPO") or header.mode not in ("L", "RGB"):
                return None
            orientation = _orientation(header) if upright else 1
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pixels: Any = decode_jpeg(encoded, mode=ImageReadMode.RGB)
    except MemoryError:
        raise
    except Exception:  # damaged, too large, or torchvision was built without libjpeg
        return None
    turn = _UPRIGHT.get(orientation)
    return pixels if turn is None else turn(pixels)


def _orientation(image: Image.Image) -> int:
    with suppress(Exception):  # an EXIF entry that is damaged says nothing of the orientation
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    return 1
