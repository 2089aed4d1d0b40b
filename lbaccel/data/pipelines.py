"""From a source to what the loader and the evaluation read: transforms for arrays and files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import timm.data
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms import Compose

from lbaccel.data.augment import KeyedImages
from lbaccel.data.crops import MOST_RATIO, RATIO, SCALE
from lbaccel.data.decode import DRAFT, PILLOW, check_kept, decoder_in
from lbaccel.data.images import as_pixels, read_image
from lbaccel.data.passes import BatchPasses
from lbaccel.data.photographs import Centre, Photographs
from lbaccel.data.pixel_cache import CachePart
from lbaccel.data.slots import Slots, loaded, slots_for
from lbaccel.data.sources import ImageArray, ImageFiles
from lbaccel.errors import InputError

COLOR_JITTER = 0.4  # timm's


@dataclass(frozen=True)
class TransformedImages:
    """A map-style data set of (transform(image), label)."""

    source: ImageArray | ImageFiles
    transform: Any
    cache: CachePart | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = _load(self.source, index, self.cache)
        return self.transform(image), int(self.source.labels[index])


@dataclass(frozen=True)
class _Evaluated:
    """Batches of images in files; one with an image that can't be read is this one's message.

    A worker would wrap what is raised in its own words.
    """

    source: ImageFiles
    how: Centre | Callable[[Image.Image], Tensor]
    cache: CachePart | None
    slots: Slots | None

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: Sequence[int]) -> Any:
        try:
            if isinstance(self.how, Centre):
                load = partial(self.how.load, self.source, indices, cache=self.cache)
                return loaded(load, self.slots, (len(indices), *self.how.bytes_shape))
            images = TransformedImages(self.source, self.how, self.cache)
            return default_collate([images[index] for index in indices])
        except InputError as error:
            return str(error)


def _load(source: ImageArray | ImageFiles, index: int, cache: CachePart | None) -> Image.Image:
    if isinstance(source, ImageFiles):
        if cache is None:
            return source.load(index)
        pixels = cache.pixels(index, lambda: as_pixels(source.load(index)))
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())
    pixels = source.images[index].permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels))


def training_set(
    source: ImageArray | ImageFiles,
    *,
    preprocessing: dict[str, Any],
    seed: int,
    mirror: bool = True,
    auto_augment: str | None = None,
    scale: tuple[float, ...] | None = None,
    ratio: tuple[float, ...] | None = None,
    hflip: float | None = None,
    color_jitter: float | None = None,
    random_erasing: float = 0.0,
    padding: str = "zero",
    cache: CachePart | None = None,
) -> Any:
    """The training images with their augmentation.

    Images in memory: a random crop of the frame padded by an eighth (as `padding` says), and a
    mirror image half of the time, a micro-batch at a time. Files under the decoders fast and draft:
    timm's random resized crop, mirror and colour, a micro-batch at a time (`Photographs`). Other
    files, and all images with `auto_augment`: timm's training transform itself, an image at a
    time. Every draw depends on (seed, epoch, sample index) alone: where timm's transform draws,
    the loader seeds the generators before each image.

    Args:
        source: the images.
        preprocessing: as `build_model` gives it.
        seed: of the draws.
        mirror: whether a mirror image shows the same class.
        auto_augment: a policy of timm's.
        scale, ratio: bounds of a crop's share of the area and of its width / height; timm's: 0.08
            to 1 and 3/4 to 4/3.
        hflip: probability of a mirror image; by default 0.5 where `mirror`, else 0.
        color_jitter: strength of brightness, contrast and saturation; timm's: 0.4.
        random_erasing: probability that a box of the normalised image becomes noise (Zhong et al.
            2020, arXiv 1708.04896; timm's "pixel").
        padding: "zero", "grey" or "reflect" around an image in memory.
        cache: keeps decoded images of files, and changes no pixel.

    Raises:
        InputError: an `auto_augment` that timm does not know, or a `cache` beside `draft`.
    """
    size, mean, std = (preprocessing[k] for k in ("img_size", "mean", "std"))
    flip = (0.5 if mirror else 0.0) if hflip is None else hflip
    if isinstance(source, ImageArray) and auto_augment is None:
        return KeyedImages(
            source,
            mean,
            std,
            seed=seed,
            pad=max(1, source.images.shape[-1] // 8),
            flip=flip,
            img_size=size,
            interpolation=preprocessing["interpolation"],
            padding=padding,
        )
    jitter = COLOR_JITTER if color_jitter is None else color_jitter
    if (
        isinstance(source, ImageFiles)
        and auto_augment is None
        and decoder_in(preprocessing) != PILLOW
    ):
        return Photographs(
            source,
            mean,
            std,
            size,
            seed=seed,
            interpolation=preprocessing["interpolation"],
            scale=scale or SCALE,
            ratio=ratio or RATIO,
            flip=flip,
            color_jitter=jitter,
            random_erasing=random_erasing,
            cache=cache,
            draft=decoder_in(preprocessing) == DRAFT,
        )
    if len(mean) != 3 and auto_augment is not None:
        raise InputError(
            f"auto_augment={auto_augment!r} works on colour images; these have {len(mean)} channel."
        )
    try:
        transform = timm.data.create_transform(
            input_size=(len(mean), size, size),
            is_training=True,
            scale=scale,  # type: ignore[arg-type]
            ratio=ratio,  # type: ignore[arg-type]
            hflip=flip,
            color_jitter=jitter,
            re_prob=random_erasing,
            re_mode="pixel",
            auto_augment=auto_augment,
            interpolation=preprocessing["interpolation"],
            mean=mean,
            std=std,
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise InputError(
            f"auto_augment={auto_augment!r} is no policy of timm's, such as "
            f"'rand-m9-mstd0.5': {error}"
        ) from error
    return TransformedImages(source, transform, cache)


def _not_too_long(image: Image.Image) -> Image.Image:
    """The middle of a strip of more than `MOST_RATIO`: the crop that follows lies inside it."""
    most = MOST_RATIO * min(image.size)
    if max(image.size) <= most:
        return image
    width, height = (min(side, most) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def evaluation_transform(preprocessing: Mapping[str, Any]) -> Callable[[Image.Image], Tensor]:
    """The transform that evaluation uses: resized, cropped in the middle, normalised [C, H, W].

    It is timm's own under the decoder Pillow, else its rule on bytes: `Centre`. An image in memory
    is decoded already: `evaluation_reader` decodes a file as `draft` does.

    Args:
        preprocessing: img_size, mean, std, interpolation, crop_pct; decoder, if it is known.
    """
    if decoder_in(preprocessing) != PILLOW:
        centre = _centre(preprocessing)
        return lambda image: centre.finish(centre.cut(as_pixels(image))[None])[0]
    size, mean, std = (preprocessing[k] for k in ("img_size", "mean", "std"))
    transform: Any = timm.data.create_transform(
        input_size=(len(mean), size, size),
        interpolation=preprocessing["interpolation"],
        crop_pct=preprocessing["crop_pct"],
        mean=mean,
        std=std,
    )
    return Compose([_not_too_long, transform])


def _centre(preprocessing: Mapping[str, Any]) -> Centre:
    names = ("mean", "std", "img_size", "crop_pct", "interpolation")
    given = {name: preprocessing[name] for name in names}
    return Centre(**given, draft=decoder_in(preprocessing) == DRAFT)


def evaluation_reader(
    preprocessing: Mapping[str, Any], *, exif_orientation: bool
) -> Callable[[str], Tensor]:
    """The function that gives [C, H, W] of a file, as evaluation sees it.

    Args:
        preprocessing: as for `evaluation_transform`; num_channels, 1 or 3, if it is known.
        exif_orientation: turn a photograph upright as its EXIF entry says.
    """
    read = partial(read_image, exif_orientation=exif_orientation)
    if decoder_in(preprocessing) == DRAFT:  # it must see the file before its pixels are decoded
        centre = _centre(preprocessing)

        def decoded(file: str) -> Tensor:
            of_one = ImageFiles((file,), (0,), ("",), (file,), read)
            return centre.finish(centre.read(of_one, 0)[None])[0]

        return decoded
    transform, grey = evaluation_transform(preprocessing), preprocessing.get("num_channels") == 1
    return lambda file: transform(read(file).convert("L") if grey else read(file))


class EvaluationBatches:
    """Batches of a set of images for evaluation, whose workers stay from one pass to the next.

    Args:
        source: the images.
        preprocessing: as `build_model` gives it.
        rank: takes every `world_size`-th sample from its own number on.
        world_size: number of ranks.
        num_workers: processes that read image files.
        cache: keeps decoded images of files, and changes no pixel.

    Raises:
        InputError: a `cache` beside the decoder `draft`.
    """

    def __init__(
        self,
        source: ImageArray | ImageFiles,
        *,
        preprocessing: Mapping[str, Any],
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        cache: CachePart | None = None,
    ) -> None:
        check_kept(draft=decoder_in(preprocessing) == DRAFT, cache=cache)
        self.source = source
        self.cache = cache
        self.preprocessing = preprocessing
        self.indices = range(rank, len(source), world_size)
        self.num_workers = 0 if isinstance(source, ImageArray) else num_workers
        self._passes: BatchPasses | None = None

    def __call__(self, start: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images [n, C, H, W] and labels [n], n <= size, from the sample `start` on.

        A pass ends where another one begins.

        Raises:
            InputError: an image that can't be read.
        """
        indices = self.indices[start:]
        batches = [list(indices[i : i + size]) for i in range(0, len(indices), size)]
        if isinstance(self.source, ImageArray):
            yield from self._in_memory(self.source, batches)
            return
        fast = decoder_in(self.preprocessing) != PILLOW
        how = (_centre if fast else evaluation_transform)(self.preprocessing)
        if self._passes is None:
            self._passes = self._passes_of(self.source, how, size)
        for batch in self._passes(batches):
            if isinstance(batch, str):
                raise InputError(batch)
            images, labels = batch
            if isinstance(how, Centre):
                images = how.finish(images, pinned=torch.cuda.is_available())
            yield images, labels

    def close(self) -> None:
        """End the workers now; another pass would start others."""
        if self._passes is not None:
            self._passes.close()

    def _in_memory(
        self, source: ImageArray, batches: list[list[int]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        size, mean, std, interpolation = (
            self.preprocessing[k] for k in ("img_size", "mean", "std", "interpolation")
        )
        images = KeyedImages(source, mean, std, img_size=size, interpolation=interpolation)
        for rows in batches:
            yield images.normalise(source.images[rows]), source.labels[rows]

    def _passes_of(self, source: ImageFiles, how: Any, size: int) -> BatchPasses:
        shape = how.bytes_shape if isinstance(how, Centre) else None
        workers = {"num_workers": self.num_workers}
        slots = partial(slots_for, shape, batch_size=size, **workers)
        return BatchPasses(partial(_Evaluated, source, how, self.cache), slots=slots, **workers)


def evaluation_batches(
    source: ImageArray | ImageFiles,
    *,
    preprocessing: Mapping[str, Any],
    batch_size: int,
    num_workers: int = 0,
    start: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass of `EvaluationBatches` in batches of this size, from the sample `start` on."""
    batches = EvaluationBatches(source, preprocessing=preprocessing, num_workers=num_workers)
    try:
        yield from batches(start, batch_size)
    finally:
        batches.close()
