"""Images where timm's own map-style readers find them: folders and tar files, in timm's order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from tarfile import TarError
from typing import Any

from PIL import Image
from timm.data.readers import create_reader

from lbaccel.data.hub import open_hf
from lbaccel.data.images import ImageFiles, decode_image, read_image
from lbaccel.data.names import Names
from lbaccel.data.opening import Opening, Sets, divided, some
from lbaccel.errors import InputError
from lbaccel.text import one_line

SPLITS = {"train": ("train",), "val": ("val", "validation"), "test": ("test",)}
ITERABLE = ("hfids", "tfds", "wds")  # timm's readers that give one sample after the other


def open_timm(name: str, wanted: Opening) -> Sets:
    """The images that a reader of timm's finds.

    Args:
        name: a folder or a tar file of images, in a folder for each class; a folder that holds
            train, val (or validation) and test, as folders or tar files; or hfds/OWNER/NAME.
        wanted: how they are to be split and read.

    Raises:
        InputError: nothing there, or an iterable reader.
    """
    prefix, _, rest = name.partition("/")
    if prefix.lower() in ITERABLE:
        raise InputError(
            f"timm:{name} is one of timm's iterable readers, which give their samples one after "
            "the other in an order of their own. lbaccel asks for each sample by its number, so "
            "that neither workers nor ranks nor a resume change the order. Use hf:OWNER/NAME, "
            "parquet:PATH or folder:PATH."
        )
    if prefix.lower() == "hfds":
        return open_hf(rest, wanted)
    if prefix.lower() == "torch":
        raise InputError(f"timm:{name} is torchvision's. Use cifar10, cifar100 or folder:PATH.")
    if not name:
        raise InputError("data='timm:' names no place. Use timm:PATH, a folder or a tar file.")
    root = Path(name).expanduser().absolute()
    parts = {split: _read(path, wanted) for split, path in _places(root).items()}
    train = parts["train"]
    number = {label: i for i, label in enumerate(train.classes)}
    test_note = ""
    for split in ("val", "test"):
        other = parts.get(split)
        if other is None:
            continue
        if strange := sorted(set(other.classes) - set(number)):
            if split == "test":  # training looks at none of them
                del parts[split]
                test_note = f"; its test images are not used: training has no class {some(strange)}"
                continue
            raise InputError(
                f"timm:{name}: validation has class {some(strange)}, of which training has no "
                "image. Both need the same classes."
            )
        labels = tuple(number[other.classes[label]] for label in other.labels)
        same = ImageFiles(other.samples, labels, train.classes, other.names, other.read)
        parts[split] = same
    sets = divided(parts, wanted)
    return sets._replace(how=sets.how + test_note)


def _places(root: Path) -> dict[str, Path]:
    """The folder or tar file of each set; the root itself holds the training images else."""
    found = {}
    for split, names in SPLITS.items():
        places = [root / f"{name}{ending}" for name in names for ending in ("", ".tar")]
        there = [path for path in places if path.exists()]
        if there:
            found[split] = there[0]
    return found if "train" in found else {"train": root}


def _read(root: Path, wanted: Opening) -> ImageFiles:
    is_tar = root.suffix == ".tar" and root.is_file()
    try:
        # a cached list of a tar file's content would be a pickle beside it
        options: dict[str, Any] = {"cache_tarinfo": False} if is_tar else {}
        reader: Any = create_reader("", str(root), **options)
    except (AssertionError, RuntimeError, OSError, TarError, ValueError) as error:
        reason = one_line(" ".join(str(error).split())) or "there is no such path"
        raise InputError(
            f"timm:{root} can't be read by timm's reader: {reason[:300]}. Give a folder or a .tar "
            "file of images, in a folder for each class."
        ) from error
    if is_tar:
        return _of_tar(reader, root, wanted)
    names = Names(reader.filenames())
    labels = tuple(int(label) for _, label in reader.samples)
    read = partial(read_image, exif_orientation=wanted.exif_orientation, root=str(root))
    return ImageFiles(names, labels, _classes(reader.class_to_idx), names, read)


def _of_tar(reader: Any, root: Path, wanted: Opening) -> ImageFiles:
    places, names = [], []
    for info, _, child in reader.samples:  # a tar file inside begins where its data begin
        start = info.offset_data + (0 if child is None else child.offset_data)
        places.append((start, info.size))
        names.append(info.path if child is None else f"{child.path}/{info.path}")
    labels = tuple(int(label) for label in reader.targets)
    read = TarImages(str(root), wanted.exif_orientation)
    classes = _classes(reader.class_name_to_idx)
    return ImageFiles(tuple(places), labels, classes, tuple(names), read)


def _classes(number_of: dict[str, int]) -> tuple[str, ...]:
    return tuple(sorted(number_of, key=number_of.__getitem__))


@dataclass(frozen=True)
class TarImages:
    """The image at a place of a tar file; each worker opens the file for itself."""

    path: str
    exif_orientation: bool = True

    def __call__(self, place: Sequence[int]) -> Image.Image:
        """The image of (first byte, number of bytes), as RGB.

        Raises:
            InputError: the file is absent, or these bytes are no image.
        """
        where = f"{one_line(self.path)}, byte {place[0]}"
        try:
            data = self.data_of(place)
        except OSError as error:
            raise InputError(f"{where} can't be read: {error.strerror}.") from error
        return decode_image(BytesIO(data), where, exif_orientation=self.exif_orientation)

    def name_of(self, place: Sequence[int]) -> str:
        """File without its folder, and the first byte."""
        return f"{Path(self.path).name}, byte {place[0]}"

    def data_of(self, place: Sequence[int]) -> bytes:
        """The encoded image of (first byte, number of bytes)."""
        start, size = place
        with Path(self.path).open("rb") as file:
            file.seek(start)
            return file.read(size)
