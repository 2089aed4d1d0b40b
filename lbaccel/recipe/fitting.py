"""The length of a run that has so many minutes, fitted to the time that its own updates take."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from decimal import ROUND_DOWN, Context, Decimal
from fractions import Fraction
from itertools import islice
from statistics import median
from typing import Any

import torch
from accelerate.utils import DistributedType

from lbaccel.batch.duration import MOST_EPOCHS
from lbaccel.batch.stream import UpdateStream
from lbaccel.errors import InputError
from lbaccel.recipe.accelerator import make_accelerator
from lbaccel.recipe.checks import Checked, checked
from lbaccel.recipe.evaluation import NotEvaluated, evaluate
from lbaccel.recipe.images import Opened, sound_images
from lbaccel.recipe.options import default_of
from lbaccel.recipe.sizes import limit_for
from lbaccel.recipe.training import Training, build_training
from lbaccel.recipe.values import flag_of, shown
from lbaccel.runs.ranks import decided

Say = Callable[[str], object]

RESERVE = 0.1  # of the minutes: checkpoints, plots, the start of the processes that load images
MOST_TIMED = 5  # updates, after one that warms up
_SHARE = 0.1  # of the minutes, in which updates are timed
_BATCHES = 8  # of the validation set on each rank, which are timed

clock = time.perf_counter


@dataclass(frozen=True)
class Timing:
    """Seconds of the slowest rank, and what they were measured over.

    Attributes:
        update: the median of an update.
        evaluation: a whole one, of the weights and, where there is one, of their average.
        spent: since the start, with the time that building the run again will take.
        num_timed: updates that were timed.
    """

    update: float
    evaluation: float
    spent: float
    num_timed: int


def fitted(s: Checked, accelerator: Any, *, begun: float, say: Say) -> tuple[Checked, Opened]:
    """The settings with the epochs that fit in `max_minutes`, and the images; a collective.

    A run of the same settings is built, makes a few updates and a part of an evaluation, and is
    thrown away: the run that follows begins from its seed, as with --epochs. All ranks take the
    number of the first, from the times of the slowest.

    Args:
        s: with `max_minutes`.
        accelerator: of all ranks.
        begun: what `clock` said at the start.
        say: prints a line.

    Raises:
        InputError: not even one update fits, or none can be made and thrown away.
    """
    minutes = s.rate.max_minutes
    assert minutes is not None
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        raise InputError(
            f"--max-minutes {minutes:g} under DeepSpeed and FSDP2: no second model can be built "
            "beside the one that is timed. Use --epochs, and --max-hours to stop in time."
        )
    opened = sound_images(s, accelerator, say=say, fresh=True)
    longest = max(float(default_of("epochs")), *_least_epochs(s).values())
    trial = Checked(s.with_values({"epochs": longest}))
    timing, stream = timed(trial, opened, begun=begun, most=_SHARE * 60 * minutes)
    gc.collect()  # the trial is in circles with what was prepared, which no frame holds any more
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    budget = 60 * minutes * (1 - RESERVE) - timing.spent
    epochs = decided(
        accelerator,
        lambda: epochs_within(
            budget,
            stream,
            of_update=timing.update,
            of_evaluation=timing.evaluation,
            eval_every=s.run.eval_every,
        ),
    )
    if epochs is None:
        raise InputError(
            f"--max-minutes {minutes:g}: {max(0.0, budget):.3g} s are left for updates, and one of "
            f"them takes {timing.update:.3g} s and an evaluation {timing.evaluation:.3g} s. Use "
            "more minutes, a smaller model or image, or a smaller --global-batch-size."
        )
    _check_length(s, epochs)
    said = _in_words(timing, epochs, stream, minutes=minutes, eval_every=s.run.eval_every)
    say(f"epochs: {said}")
    origins = {**s.origins, "epochs": said}
    return checked(replace(s.with_values({"epochs": epochs}), origins=origins)), opened


def _least_epochs(s: Checked) -> dict[str, float]:
    """The epochs that a run must have for a setting to be of use, by the name of the setting."""
    found = {"warmup_epochs": s.rate.warmup_epochs or 0.0}
    if s.optimizer.loss_dropout:
        found["loss_dropout"] = float(s.optimizer.loss_dropout[0])
    return found


def _check_length(s: Checked, epochs: float) -> None:
    for name, least in _least_epochs(s).items():
        if least > math.ceil(epochs) or (name == "warmup_epochs" and least > epochs):
            raise InputError(
                f"--max-minutes {s.rate.max_minutes:g} has time for {epochs:g} epochs, and "
                f"{flag_of(name)} {shown(s.value(name))} needs at least {least:g}. Use more "
                "minutes, or a smaller number there."
            )


def epochs_within(
    seconds: float,
    stream: UpdateStream,
    *,
    of_update: float,
    of_evaluation: float,
    eval_every: float,
) -> float | None:
    """The most epochs, to three digits, of u updates and v evaluations with

        u of_update + v of_evaluation <= seconds

    where v counts the ends of each `eval_every` epochs and the end of the run. None where one
    update and one evaluation are too many.

    Args:
        seconds: that may be spent.
        stream: where updates lie; their size stays.
        of_update, of_evaluation: seconds of one, the first above 0.
        eval_every: epochs between evaluations.

    >>> stream = UpdateStream(10, 100, "wrap")
    >>> epochs_within(130.0, stream, of_update=1.0, of_evaluation=3.0, eval_every=1.0)
    10.0
    """

    def takes(updates: int) -> float:
        evaluations = _num_evaluations(updates, stream, eval_every)
        return updates * of_update + evaluations * of_evaluation

    low, high = 0, min(stream.num_updates(MOST_EPOCHS), math.floor(max(0, seconds) / of_update))
    while low < high:  # `takes` rises
        middle = (low + high + 1) // 2
        low, high = (middle, high) if takes(middle) <= seconds else (low, middle - 1)
    if not low:
        return None
    exact = Decimal(stream.samples_seen(low)) / Decimal(stream.samples_per_epoch)
    epochs = float(Context(prec=3, rounding=ROUND_DOWN).plus(exact))
    return min(epochs, float(MOST_EPOCHS))


def _num_evaluations(updates: int, stream: UpdateStream, eval_every: float) -> int:
    each = Fraction(str(eval_every)) * stream.samples_per_epoch
    seen, before = (stream.samples_seen(n) for n in (updates, max(0, updates - 1)))
    last = seen // each == before // each  # the last update is evaluated in any case
    return min(updates, int(seen // each) + last)


def _in_words(
    timing: Timing, epochs: float, stream: UpdateStream, *, minutes: float, eval_every: float
) -> str:
    updates = stream.num_updates(epochs)
    evaluations = _num_evaluations(updates, stream, eval_every)
    of = "one update" if timing.num_timed == 1 else f"the median of {timing.num_timed} updates"
    return (
        f"{epochs:g}, fitted to --max-minutes {minutes:g}: {updates:,} updates of "
        f"{timing.update:.3g} s ({of}, slowest rank) and {evaluations} evaluation"
        f"{'s' * (evaluations > 1)} of {timing.evaluation:.3g} s, after {timing.spent:.3g} s; "
        f"{RESERVE:.0%} of the time is kept back"
    )


def timed(s: Checked, opened: Opened, *, begun: float, most: float) -> tuple[Timing, UpdateStream]:
    """Seconds of the parts of a run, from one that is built and thrown away.

    Args:
        s: of the run.
        opened: its images.
        begun: what `clock` said at the start.
        most: seconds after which no further update is timed.
    """
    start = clock()
    accelerator, precision = make_accelerator(s.batch.precision)  # one of its own
    trial = build_training(
        s,
        accelerator,
        precision,
        resume_from=None,
        say=lambda _: None,
        opened=opened,
    )
    with limit_for(s.batch, accelerator.device):
        trial.search(say=lambda _: None)
        built = clock() - start
        updates = _seconds_of_updates(trial, most=most)
        evaluation = _seconds_of_evaluation(trial)
    stream = trial.loader.stream
    trial.loader.close()
    trial.validation.close()
    accelerator.free_memory()
    of_update = median(updates[1:] or updates)
    slowest = torch.tensor(
        [of_update, evaluation, clock() - begun + built],
        dtype=torch.float64,
        device=accelerator.device,
    )
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX)
    update, evaluation, spent = slowest.tolist()
    timing = Timing(
        update=update, evaluation=evaluation, spent=spent, num_timed=max(1, len(updates) - 1)
    )
    return timing, stream


def _seconds_of_updates(trial: Training, *, most: float) -> list[float]:
    """Of a first update and at most `MOST_TIMED` more, while `most` seconds are not over."""
    found: list[float] = []
    start = clock()
    for update in islice(_without_end(trial.loader), 1 + MOST_TIMED):
        before = clock()
        trial.large_batch.update(update, trial.task.loss_fn)
        _wait(trial.accelerator.device)
        found.append(clock() - before)
        if not decided(trial.accelerator, lambda: clock() - start < most):
            break
    return found


def _without_end(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def _seconds_of_evaluation(trial: Training) -> float:
    """Of a whole one: its first batch, and the others by the time of a few on this rank."""
    ranks = trial.accelerator.num_processes
    size = trial.settings.batch.val_batch_size or trial.large_batch.plan.micro_batch_size
    of_rank = -(-len(trial.task.source.val) // ranks)
    timed = min(of_rank, _BATCHES * size)
    images = of_rank
    if trial.ema is not None:
        images *= 2
    if trial.norm_of_average is not None:
        images += -(-trial.norm_of_average.num_images // ranks)

    def takes(count: int) -> float:
        before = clock()
        try:
            with trial.large_batch.whole_model() as whole:
                evaluate(
                    whole,
                    lambda start, size: islice(trial.validation(start, size), count),
                    trial.accelerator,
                    dtype=trial.task.dtype,
                    batch_size=size,
                )
        except NotEvaluated as failed:
            raise failed.error from None
        _wait(trial.accelerator.device)
        return clock() - before

    if trial.validation.num_workers:
        takes(1)  # with the start of its workers, which stay for all evaluations
    first = takes(1)
    if timed <= size:
        return first * images / timed
    each = max(0.0, takes(_BATCHES) - first) / (timed - size)  # of an image
    return first + each * max(0, images - size)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
