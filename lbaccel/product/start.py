"""From a folder of photographs to a recipe: each choice with its reason, none of them hidden."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
import yaml
from scipy.stats import binomtest
from torch import nn

from lbaccel.data.broken import without
from lbaccel.data.sources import Source
from lbaccel.network_arguments import as_words
from lbaccel.optim.defaults import default_base_lr
from lbaccel.product.device import one_device
from lbaccel.product.features import FirstFigure, first_figure
from lbaccel.product.scan import Scan, scan
from lbaccel.product.weights import find_backbone
from lbaccel.recipe.built import built
from lbaccel.recipe.images import open_data
from lbaccel.recipe.model import build_model
from lbaccel.recipe.options import OPTIONS, Settings
from lbaccel.recipe.rate import freezes_norm_alone
from lbaccel.recipe.settings import layered
from lbaccel.recipe.task import num_classes_of
from lbaccel.recipe.values import flag_of, shown, switch
from lbaccel.stability.range_test import LrRange, lr_find
from lbaccel.update.normalization import has_batch_norm

Say = Callable[[str], object]

MOST_EPOCHS = 30.0  # of a finetuning
UPDATES_AN_EPOCH = 25  # at least, where the set allows it
SMALLEST, LARGEST = 16, 128  # global batches that are chosen
FEW_UPDATES = 100  # of a run, below which the batch is called too large
_FIRST_FIGURE = (0.15, 75.0)  # of the minutes, and at most so many seconds
_RANGE_TEST = 0.1  # of the minutes
_RESERVE = 0.9  # of the time that is left: checkpoints, plots, an evaluation at the end
_WRITTEN = "# written by lbaccel start"


@dataclass(frozen=True)
class ReasonedValue:
    """The value of an option, and why."""

    name: str
    value: Any
    reason: str


@dataclass
class Start:
    """A recipe in the making: what was pinned, what was chosen, what was measured.

    Attributes:
        settings: pinned values and choices together.
        choices: in the order in which they were made.
        scan: of the images.
        first: the figure of the frozen backbone.
        seconds: that training is expected to take; None before it is known.
    """

    settings: Settings
    scan: Scan
    choices: list[ReasonedValue] = field(default_factory=list)
    first: FirstFigure | None = None
    seconds: float | None = None

    def choose(self, name: str, value: Any, reason: str) -> None:
        """Take a value, unless the user gave one."""
        if name in self.settings.given:
            return
        self.choices.append(ReasonedValue(name, value, reason))
        self.settings = layered(self.settings, {name: value}, origin="start")

    def command(self) -> str:
        """The line of `lbaccel train` that this recipe is."""
        return shlex.join(["lbaccel", "train", *self.flags()])

    def flags(self) -> list[str]:
        """The same as arguments."""
        flags: list[str] = []
        for name in self._named():
            value = self.settings.value(name)
            text = [] if OPTIONS[name].parse is switch and value is True else shown(value).split()
            if isinstance(value, str):
                text = [value]
            if isinstance(value, Mapping):
                text = as_words(value)
            flags += [flag_of(name), *text]
        return flags

    def yaml(self) -> str:
        """The same as a file for `lbaccel train --config`, with the reason for each value."""
        reasons = {choice.name: choice.reason for choice in self.choices}
        lines = [_WRITTEN]
        for name in self._named():
            value = self.settings.value(name)
            value = list(value) if isinstance(value, tuple) else value
            # flow style for the value alone: a mapping in braces would be no line of its own
            text = yaml.safe_dump([value], default_flow_style=True, width=2**20, allow_unicode=True)
            line = f"{name}: {text.strip()[1:-1]}"
            origin = self.settings.origin(name)
            yours = "yours" if origin == "flag" else f"yours, of {origin}"
            reason = reasons.get(name, yours)
            lines.append(f"{line:<32}  # {' '.join(reason.split())}")
        return "\n".join([*lines, ""])

    def _named(self) -> list[str]:
        return [name for name in OPTIONS if name in self.settings.given]


def is_written_here(text: str) -> bool:
    """Whether a file is one of `Start.yaml`."""
    return text.startswith(_WRITTEN)


def start(pinned: Settings, *, minutes: float, say: Say) -> Start:
    """Choose all that is not pinned, by a look at the images and a few timed updates.

    Args:
        pinned: with `data`, and whatever else the user decided.
        minutes: that all may take, training included.
        say: prints a line.

    Raises:
        InputError: images, weights or pinned settings of no use.
    """
    begin = time.perf_counter()
    source = open_data(pinned.data, seed=pinned.run.seed)
    num_classes = num_classes_of(pinned.model.num_classes, source, data=pinned.data.data)
    found = Start(pinned, scan(source))
    for line in found.scan.lines():
        say(line)
    if found.scan.broken:
        found.choose("skip_corrupt", True, f"{len(found.scan.broken)} files can't be read")
    if found.settings.data.skip_corrupt:
        source = without(source, found.scan.broken)
    device = one_device()
    _choose_backbone(found, device)
    model, preprocessing = build_model(
        found.settings.model, found.settings.data, source, num_classes=num_classes, say=say
    )
    share, most = _FIRST_FIGURE
    found.first = first_figure(
        model.to(device), source, preprocessing, device=device,
        seconds=min(most, share * 60 * minutes),
    )  # fmt: skip
    say(_of_the_first(found.first, found.scan))
    _choose_recipe(found, model, device)
    left = 60 * minutes - (time.perf_counter() - begin)
    found.seconds = _choose_by_updates(found, source, seconds=left, share=60 * minutes, say=say)
    _warn_of_large_batch(found, say=say)
    return found


def _choose_backbone(found: Start, device: torch.device) -> None:
    given, model = found.settings.given, found.settings.model
    backbone = find_backbone(
        model.model if "model" in given else None, model.checkpoint, device_type=device.type
    )
    found.choose("model", backbone.model, f"{backbone.origin}; pin another with --model")
    found.choose("pretrained", True, "finetuning starts from pretrained weights")


def _of_the_first(first: FirstFigure, scanned: Scan) -> str:
    interval = binomtest(first.hits, first.num_val).proportion_ci(method="wilson")
    part = "" if first.num_train >= scanned.num_train else f" of {scanned.num_train}"
    return (
        f"first figure: {100 * first.top1:.1f} % top-1 ({first.hits} of {first.num_val} validation "
        f"images, 95 % interval {100 * interval.low:.1f} to {100 * interval.high:.1f}), from a "
        f"linear classifier on the frozen backbone's features of {first.num_train}{part} training "
        f"images, in {first.seconds:.0f} s"
    )


def _choose_recipe(found: Start, model: nn.Module, device: torch.device) -> None:
    """Batch, optimizer, rate and plan, from the table of `docs/results/finetuning_defaults.md`."""
    num_train = found.scan.num_train
    size = 2 ** math.floor(math.log2(max(1, num_train // UPDATES_AN_EPOCH)))
    size = min(max(SMALLEST, min(LARGEST, size)), num_train)
    updates = math.ceil(num_train / size)
    found.choose(
        "global_batch_size",
        size,
        f"{updates} updates an epoch of {num_train} images; a larger batch has fewer",
    )
    if has_batch_norm(model) and found.settings.model.train != "head+norms":
        found.choose(
            "norm_batch_size", "frozen", "the statistics of the weights: few images move them badly"
        )
    found.choose("optimizer", "adamw", "level with SGD, or above it, on six measured pairs")
    optimizer = found.settings.optimizer.optimizer
    frozen = freezes_norm_alone(found.settings)
    rate = default_base_lr(optimizer, pretrained=True, frozen_norm=frozen)
    found.choose("base_lr", rate, f"of {optimizer} for finetuning, at 256 samples")
    if found.settings.batch.memory is not None or device.type == "cuda":
        found.choose("micro_batch_size", "auto", "the fastest plan that fits")
        found.choose("activation_checkpointing", "auto", "only where the plan needs it")


def _choose_by_updates(
    found: Start, source: Source, *, seconds: float, share: float, say: Say
) -> float:
    """The rate and the epochs, from timed updates at rising rates; seconds of the training."""
    tested, each = _range_test(found, seconds=_RANGE_TEST * share, say=say)
    if tested is not None:
        _lower_the_rate(found, tested, say=say)
    if found.settings.rate.max_minutes is not None:  # `train` finds the epochs
        return 60 * found.settings.rate.max_minutes
    num_train, num_val = len(source.train), len(source.val)
    first = found.first
    evaluation = first.seconds_per_image if first is not None else each / 3
    of_epoch = num_train * each + num_val * evaluation
    fitting = math.floor(_RESERVE * seconds / of_epoch)
    epochs = float(min(MOST_EPOCHS, max(1, fitting)))
    reason = f"{of_epoch:.0f} s each by {'timed updates' if tested else 'the frozen backbone'}"
    if fitting < 1:
        reason += "; one is more than the time given"
    elif epochs == MOST_EPOCHS:
        reason += f"; at most {MOST_EPOCHS:.0f}"
    found.choose("epochs", epochs, reason)
    return found.settings.rate.epochs * of_epoch


def _range_test(found: Start, *, seconds: float, say: Say) -> tuple[LrRange | None, float]:
    """The test and the seconds of a training image; no test where it would take too long."""
    first = found.first
    guess = 3.5 * first.seconds_per_image if first is not None else 0.1  # forward and backward
    size = min(found.settings.batch.first_size, found.scan.num_train)
    count = min(20, math.floor(seconds / (guess * size)))
    if count < 5:
        say(f"no range test: {5 * size} samples would take {5 * size * guess:.0f} s")
        return None, guess
    times = [time.perf_counter()]
    with built(_for_a_test(found.settings), say=lambda _: None) as b:
        tested = lr_find(
            b.large_batch,
            b.loader,
            b.loss_fn,
            min_lr=b.largest_lr / 30,
            max_lr=b.largest_lr * 10,
            num_updates=count,
            after_update=lambda *_: times.append(time.perf_counter()),
        )
        scale = b.largest_lr / b.base_lr
    steps = sorted(after - before for before, after in pairwise(times[1:]))
    say(
        f"range test: {count} updates of {size} samples, base rates {tested.lrs[0] / scale:.2g} to "
        f"{tested.lrs[-1] / scale:.2g}, all taken back"
    )
    return _at_base(tested, scale), (steps[len(steps) // 2] if steps else guess * size) / size


def _for_a_test(settings: Settings) -> Settings:
    return settings.with_values({"epochs": 1.0, "max_updates": None})


def _at_base(tested: LrRange, scale: float) -> LrRange:
    return replace(
        tested,
        lrs=tuple(lr / scale for lr in tested.lrs),
        diverged_at=None if tested.diverged_at is None else tested.diverged_at / scale,
    )


def _lower_the_rate(found: Start, tested: LrRange, *, say: Say) -> None:
    rate, largest = found.settings.rate.base_lr, tested.largest_lr
    if rate is None or largest is None or tested.is_noise or rate <= largest:
        return
    suggested = tested.suggested_lr or largest / 3
    if "base_lr" in {choice.name for choice in found.choices}:
        found.choices = [c for c in found.choices if c.name != "base_lr"]
        found.settings = layered(found.settings, {"base_lr": suggested}, origin="start")
        found.choices.append(
            ReasonedValue("base_lr", suggested, f"the range test bore {largest:.2g}, not {rate:g}")
        )
    else:
        say(f"warning: --base-lr {rate:g} is above {largest:.2g}, which the range test bore")


def _warn_of_large_batch(found: Start, *, say: Say) -> None:
    size = min(found.settings.batch.first_size, found.scan.num_train)
    updates = math.ceil(found.scan.num_train / size * found.settings.rate.epochs)
    pinned = "global_batch_size" not in {choice.name for choice in found.choices}
    if pinned and found.settings.rate.max_minutes is None and updates < FEW_UPDATES:
        say(
            f"a batch of {size} leaves {updates} updates: large batches do not help here, with "
            f"{found.scan.num_train} images. Leave out --global-batch-size for more updates."
        )
