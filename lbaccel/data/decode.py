"""Images in files as bytes [3, H, W]: JPEG by torchvision's decoder, all others by Pillow.

`draft.py` has the decoding at a smaller size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import ExifTags, Image
from torch import Tensor

from lbaccel.data.crops import ResizedBox, cropped, whole
from lbaccel.data.draft import Wanted, drafted, turned
from lbaccel.data.images import EncodedImages, ImageFiles, as_pixels, read_image
from lbaccel.errors import InputError

try:  # deprecated since torchvision 0.29; without it Pillow gives the same pixels, a little later
    from torchvision.io import ImageReadMode

    # the operator: torchvision's function around it warns, and no thread can be kept from warning
    # without a change of the filters of all
    decode_jpeg: Any = torch.ops.image.decode_jpeg
except (ImportError, AttributeError):
    ImageReadMode = decode_jpeg = None

FAST, DRAFT, PILLOW = "fast", "draft", "pillow"
DECODERS = (FAST, DRAFT, PILLOW)
_JPEG = b"\xff\xd8\xff"


def decoder_in(preprocessing: Mapping[str, Any]) -> str:
    """The decoder of images in files: Pillow where nothing names one, as in runs of before."""
    return preprocessing.get("decoder") or PILLOW


def check_kept(*, draft: bool, cache: object | None) -> None:
    """Stop where decoded images are to be kept of which each crop needs another size.

    Raises:
        InputError: `draft` beside a `cache`.
    """
    if draft and cache is not None:
        raise InputError(
            "decoder 'draft' decodes an image at another size for each crop, so there is no one "
            "image to keep for later epochs. Give no cache, or take the decoder 'fast'."
        )


def pixels_of(images: ImageFiles, index: int) -> Tensor:
    """The pixels of a sample, uint8 [3, H, W], upright: those of `images.load(index)`.

    A JPEG of grey or colour is decoded by torchvision, in the memory that it returns. All else, a
    file that torchvision can't decode among it, is read by Pillow, which has the words for it.

    Raises:
        InputError: the image is absent or corrupt; the text names the file.
    """
    return part_of(images, index, whole)[0]


def part_of(
    images: ImageFiles, index: int, wanted: Wanted, *, draft: str | None = None
) -> tuple[Tensor, ResizedBox]:
    """The pixels of a part of a sample, uint8 [3, H, W], upright; and that part.

    H and W are those of the part's box, or of the size that it is resized to where that is done.

    Args:
        images: of any kind.
        index: of the sample.
        wanted: the part of an image of this height and width.
        draft: decode a JPEG at a smaller size where the part has its pixels still, and resize it
            by this interpolation, "bilinear" or "bicubic".

    Raises:
        InputError: the image is absent or corrupt; the text names the file.
    """
    data, upright = _jpeg_of(images.read, images.samples[index])
    smaller = None if draft is None else partial(drafted, wanted=wanted, interpolation=draft)
    found = None if data is None else _decoded(data, upright=upright, smaller=smaller)
    pixels, part = (as_pixels(images.load(index)), None) if found is None else found
    if part is not None:
        return pixels, part
    part = wanted(*pixels.shape[1:])
    return cropped(pixels, part.box), part


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


def _decoded(
    data: bytes, *, upright: bool, smaller: Callable[..., Any] | None
) -> tuple[Tensor, ResizedBox | None] | None:
    """A JPEG's pixels, or what `smaller` makes of it; None: Pillow is to look at it."""
    try:
        with Image.open(BytesIO(data)) as header:  # it refuses a size beyond its bound
            if header.format not in ("JPEG", "MPO"):
                return None
            orientation = _orientation(header) if upright else 1
            if smaller is not None:
                found = smaller(header, orientation)
                if found is not None:
                    return found
            if header.mode not in ("L", "RGB") or decode_jpeg is None or ImageReadMode is None:
                return None
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        pixels: Tensor = decode_jpeg(encoded, ImageReadMode.RGB.value)
    except MemoryError:
        raise
    except Exception:  # damaged, too large, or torchvision was built without libjpeg
        return None
    return turned(pixels, orientation), None


def _orientation(image: Image.Image) -> int:
    with suppress(Exception):  # an EXIF entry that is damaged says nothing of the orientation
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    return 1
