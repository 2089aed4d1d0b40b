"""`--teacher`: a trained network that a run learns from, beside the labels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lbaccel.data.opening import some
from lbaccel.errors import InputError
from lbaccel.recipe.contract import names_allowed
from lbaccel.recipe.exported import imagenet_ids
from lbaccel.recipe.options import Settings
from lbaccel.recipe.settings import TEACHER
from lbaccel.recipe.trained_model import TrainedModel, read_trained
from lbaccel.runs.alike import check_alike
from lbaccel.runs.ranks import on_each_rank
from lbaccel.text import one_line, printable
from lbaccel.update.sharding.precision import autocast

FLAG = "--teacher"
Say = Callable[[str], object]


@dataclass(frozen=True, eq=False)
class Teacher:
    """A trained network that answers the images which another one is trained on.

    It is in evaluation mode and has no gradient, so an answer is a function of its image alone: no
    partition of an update, no rank and no second attempt changes it.

    Args:
        model: with its weights.
        scale, shift: [1, C, 1, 1]: images are normalised for the other network, and
            images * scale + shift are normalised for this one; None where both are alike.
        context: makes the context of its forward, such as the run's autocast.
        digest: of its weights and normalisation.
    """

    model: nn.Module
    scale: Tensor | None
    shift: Tensor | None
    context: Callable[[], AbstractContextManager[Any]]
    digest: str

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits [n, C] of normalised images [n, channels, H, W], in the dtype of the images."""
        given = images
        if self.scale is not None and self.shift is not None:
            given = torch.addcmul(self.shift, images, self.scale)
        with self.context():
            return self.model(given).to(images.dtype)

    def placed(self, device: torch.device, *, memory_format: str) -> Teacher:
        """The same on a device, in a memory format."""
        model = self.model.to(device)
        if memory_format == "channels_last":
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        scale, shift = (
            None if values is None else values.to(device) for values in (self.scale, self.shift)
        )
        return Teacher(model, scale, shift, self.context, self.digest)


def read_teacher(
    s: Settings,
    accelerator: Any,
    *,
    classes: Sequence[str],
    preprocessing: Mapping[str, Any],
    dtype: torch.dtype,
    say: Say,
) -> Teacher | None:
    """The teacher of a run, on the CPU, or None without one; a collective.

    Args:
        s: all settings.
        accelerator: its autocast holds for the teacher too.
        classes: of the training images, in order of the labels.
        preprocessing: of the network that is trained, as `build_model` gives it.
        dtype: of the run.
        say: prints a line.

    Raises:
        InputError: no trained model there, one that answers other images or classes, or other
            weights than the run began with.
    """
    path = s.data.teacher
    if path is None:
        return None

    def read() -> TrainedModel:
        found = _read(path)
        check_answers(found, classes=classes, preprocessing=preprocessing)
        return found

    trained = on_each_rank(accelerator, read)
    digest = digest_of_weights(trained)
    check_alike(accelerator, {f"weights of {FLAG}": digest})
    before = (s.contract or {}).get(TEACHER)
    if before not in (None, digest) and "teacher" not in names_allowed(s.run.allow_changed):
        raise InputError(
            f"{FLAG} {path} has other weights than when the run began, and they decide its result. "
            "Give the place of those weights, take these with --allow-changed teacher, or start a "
            "new run without --resume."
        )
    scale, shift = conversion(preprocessing, trained.preprocessing)
    alike = "normalised alike" if scale is None else "its own normalisation"
    say(
        printable(
            f"teacher: {trained.described}, {alike}; loss (1 - alpha) x labels + alpha x T^2 x KL, "
            f"alpha {s.data.distill_alpha:g}, T {s.data.distill_temperature:g}"
        )
    )
    return Teacher(
        trained.model.to(dtype).requires_grad_(False),
        None if scale is None else scale.to(dtype),
        None if shift is None else shift.to(dtype),
        lambda: autocast(accelerator),
        digest,
    )


def _read(path: str) -> TrainedModel:
    try:
        with torch.random.fork_rng(devices=[]):  # its first weights are drawn, and written over
            return read_trained(path)
    except InputError as error:
        raise InputError(f"{FLAG}: {error}") from error


def check_answers(
    trained: TrainedModel, *, classes: Sequence[str], preprocessing: Mapping[str, Any]
) -> None:
    """Let a teacher pass whose outputs are those of the student, for the student's images.

    Raises:
        InputError: other classes, another order of them or number of outputs, or images of another
            size or number of channels.
    """
    pre, where = trained.preprocessing, f"{FLAG} {one_line(trained.path)}"
    size, channels = pre["img_size"], pre["num_channels"]
    if channels != preprocessing["num_channels"]:
        raise InputError(
            f"{where} takes images of {channels} channels, and this run trains on "
            f"{preprocessing['num_channels']}. Use a teacher for images of as many."
        )
    if size != preprocessing["img_size"]:
        raise InputError(
            f"{where} takes images of {size} px, and this run trains on "
            f"{preprocessing['img_size']} px: the teacher sees the very images of the update, and "
            f"a resized one would be another. Use --img-size {size}, or a teacher that was trained "
            f"at {preprocessing['img_size']} px."
        )
    named = list(trained.classes[: trained.num_named])
    if list(classes) not in (named, imagenet_ids(trained.model, named)):
        raise InputError(
            f"{where} has {len(named)} classes, {some(named) or 'none with a name'}, and the data "
            f"have {len(classes)}, {some(classes)}: {_first_difference(named, classes)}. The "
            "outputs of both must mean the same, in one order. Use a teacher that was trained on "
            "these classes."
        )
    if len(trained.classes) != preprocessing["num_classes"]:
        raise InputError(
            f"{where} has {len(trained.classes)} outputs, and the network that is trained has "
            f"{preprocessing['num_classes']}. Use --num-classes {len(trained.classes)}."
        )


def _first_difference(named: Sequence[str], classes: Sequence[str]) -> str:
    for place, (theirs, ours) in enumerate(zip(named, classes, strict=False)):
        if theirs != ours:
            return f"output {place} is {one_line(theirs)!r} there and {one_line(ours)!r} here"
    return f"{len(named)} there and {len(classes)} here"


def conversion(
    ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift from images normalised by one mean and deviation to those by another.

    With pixels p, x = (p - m) / d and x' = (p - m') / d' = x d / d' + (m - m') / d'.

    Returns:
        Two tensors float64 [1, C, 1, 1]; None where nothing changes.
    """
    m, d, m_, d_ = (
        torch.tensor(list(pre[key]), dtype=torch.float64).view(1, -1, 1, 1)
        for pre in (ours, theirs)
        for key in ("mean", "std")
    )
    if torch.equal(m, m_) and torch.equal(d, d_):
        return None, None
    return d / d_, (m - m_) / d_


def digest_of_weights(trained: TrainedModel) -> str:
    """A digest of all that decides the answers: weights, buffers, mean and deviation.

    A run and its export have the same one, wherever they lie.
    """
    digest = hashlib.sha256()
    for name, value in sorted(trained.model.state_dict().items()):
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    normal = [list(map(float, trained.preprocessing[key])) for key in ("mean", "std")]
    digest.update(json.dumps(normal).encode())
    return digest.hexdigest()[:32]
