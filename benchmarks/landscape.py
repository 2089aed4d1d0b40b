"""The seconds of a loss landscape of 51 points: lbaccel's beside a plain loop, in this process.

    OMP_NUM_THREADS=1 python benchmarks/landscape.py RUN [--images folder:PATH] [--samples 256]

The plain loop is one as it is written by hand, and as Li et al.'s published code has it: for each
point the weights are set, and a DataLoader is gone through, which opens each image, decodes it
(JPEG or PNG as the files are; images that lbaccel holds in memory are stored as PNG), and applies
the transform of timm's evaluation. `arrays` is the same over images that lie decoded in memory, as
torchvision's CIFAR10 has them. Ours begins with encoded images as well, and its decoding counts.

Time is process time on one thread; variants take turns, and the least of several is shown. The
largest relative difference of a loss, and of the accuracy in points, is printed beside it.
"""

from __future__ import annotations

import argparse
import copy
import io
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lbaccel.data.images import ImageArray, ImageFiles
from lbaccel.data.pipelines import TransformedImages, evaluation_transform
from lbaccel.landscape import images as images_module
from lbaccel.landscape.axes import axis_of
from lbaccel.landscape.directions import WEIGHTS, random_direction
from lbaccel.landscape.network import MovedNetwork
from lbaccel.landscape.surface import Plane, values_at
from lbaccel.product.judged import judged_on
from lbaccel.recipe.trained_model import TrainedModel, read_trained
from lbaccel.runs.environment import processor, versions

CPU = torch.device("cpu")


class Encoded(Dataset):
    """Images in memory, each as the bytes of a PNG file."""

    def __init__(self, images: ImageArray, transform: Any) -> None:
        self.transform, self.labels, self.files = transform, images.labels.tolist(), []
        for pixels in images.images:
            file = io.BytesIO()
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "png")
            self.files.append(file.getvalue())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        with Image.open(io.BytesIO(self.files[index])) as image:
            return self.transform(image.convert("RGB")), self.labels[index]

    def decoded(self, images: ImageArray) -> ImageArray:
        """The same pixels, from the files: what opening the data set costs once."""
        arrays = [np.asarray(Image.open(io.BytesIO(f)).convert("RGB")) for f in self.files]
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
        return ImageArray(pixels, images.labels, images.classes)


def plain_loop(
    trained: TrainedModel, plane: Plane, places: list[tuple[float, float]], data: Any, batch: int
) -> list[tuple[float, float]]:
    """Set the weights, go through a DataLoader, for each point."""
    model, start = copy.deepcopy(trained.model).eval(), trained.model.state_dict()
    loader, found = DataLoader(data, batch_size=batch), []
    for x, _ in places:
        model.load_state_dict(
            {n: t + x * plane.x[n] if n in plane.x else t for n, t in start.items()}
        )
        loss, hits, count = 0.0, 0, 0
        with torch.no_grad():
            for images, labels in loader:
                logits = model(images)
                loss += F.cross_entropy(logits, labels, reduction="sum").item()
                hits += int((logits.argmax(1) == labels).sum())
                count += len(labels)
        found.append((loss / count, 100 * hits / count))
    return found


def ours(
    trained: TrainedModel,
    plane: Plane,
    places: list[tuple[float, float]],
    opened: Callable[[], ImageArray | ImageFiles],
    *,
    merge: bool = True,
    size: int | None = None,
) -> list[Any]:
    """The same by lbaccel, from encoded images on."""
    ready = images_module.prepared(trained, opened(), device=CPU, dtype=torch.float32, size=size)
    first = images_module.first_images(ready) if merge else None
    return list(
        values_at(MovedNetwork(trained.model, device=CPU, images=first), plane, places, ready)
    )


def several(
    trained: TrainedModel,
    plane: Plane,
    places: list[tuple[float, float]],
    opened: Callable[[], ImageArray | ImageFiles],
    num: int,
) -> list[Any]:
    """The same with `num` points a pass, through `torch.func.vmap` over the parameters."""
    ready = images_module.prepared(trained, opened(), device=CPU, dtype=torch.float32)
    model, found = trained.model.eval(), []
    forward = vmap(lambda w, x: functional_call(model, w, (x,)), in_dims=(0, None))
    for first in range(0, len(places), num):
        points = [plane.at(*place) for place in places[first : first + num]]
        stacked = {name: torch.stack([point[name] for point in points]) for name in plane.origin}
        loss, hits = torch.zeros(len(points), dtype=torch.float64), torch.zeros(len(points))
        with torch.no_grad():
            for images, labels in ready.batches():
                for k, logits in enumerate(forward(stacked, images)):
                    loss[k] += F.cross_entropy(logits.double(), labels, reduction="sum")
                    hits[k] += (logits.argmax(1) == labels).sum()
        found += zip((loss / ready.num_images).tolist(), hits.tolist(), strict=True)
    return [(loss, 100 * hits / ready.num_images) for loss, hits in found]


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of this process's processor, and the value."""
    start = time.process_time()
    value = run()
    return time.process_time() - start, value


def differences(found: Iterable[Any], truth: Iterable[Any]) -> tuple[float, float]:
    """The largest relative difference of the losses, and that of the accuracies in points."""
    pairs = list(zip(found, truth, strict=True))
    return max(abs(a[0] - b[0]) / b[0] for a, b in pairs), max(abs(a[1] - b[1]) for a, b in pairs)


def main() -> None:
    """Print a row for each variant."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--images")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vmap", type=int, nargs="*", default=[], help="points a pass, each a row")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    trained = read_trained(args.run)
    judged = judged_on(
        trained, args.images, split="train", say=print, splits=("train",), flag="--images"
    )
    images = images_module.subset(judged.images, args.samples)
    transform = evaluation_transform(trained.preprocessing)
    arrays = TransformedImages(images, transform)
    data: Any = arrays
    opened: Callable[[], ImageArray | ImageFiles] = lambda: images  # noqa: E731
    if isinstance(images, ImageArray):
        data = Encoded(images, transform)
        opened = lambda: data.decoded(images)  # noqa: E731
    origin = MovedNetwork(trained.model, device=CPU).tensors(WEIGHTS)
    plane = Plane(origin, random_direction(origin, seed=args.seed))
    places = [(x, 0.0) for x in axis_of("-1:1:51").values]
    variants: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain_loop(trained, plane, places, data, args.batch),
        "ours": lambda: ours(trained, plane, places, opened),
        "not merged": lambda: ours(trained, plane, places, opened, merge=False),
    }
    for num in args.vmap:
        variants[f"vmap {num}"] = lambda num=num: several(trained, plane, places, opened, num)
    if isinstance(images, ImageArray):
        variants["arrays"] = lambda: plain_loop(trained, plane, places, arrays, args.batch)
    best: dict[str, float] = {}
    values: dict[str, Any] = {}
    for _ in range(args.repeats):
        for name, run in variants.items():
            seconds, values[name] = timed(run)
            best[name] = min(best.get(name, seconds), seconds)
    shown = ", ".join(f"{n} {v}" for n, v in versions(("torch", "timm", "numpy")).items())
    print(f"{trained.preprocessing['model']} at {trained.preprocessing['img_size']} px, ", end="")
    print(f"{len(images)} images, 51 points, {args.repeats} repeats; {processor()}; {shown}")
    for name, seconds in best.items():
        loss, share = differences(values[name], values["plain"])
        print(
            f"{name:12} {seconds:8.2f} s  plain / this {best['plain'] / seconds:5.2f}  "
            f"loss differs by {loss:.1e}, accuracy by {share:.2g} points"
        )


if __name__ == "__main__":
    main()
