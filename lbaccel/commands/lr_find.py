"""`lbaccel lr-find`: the range test of a recipe at its global batch, and its stable rate."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbaccel.errors import InputError
from lbaccel.launch import rank
from lbaccel.recipe import bounds
from lbaccel.recipe.options import Settings
from lbaccel.recipe.settings import read_settings, show_settings
from lbaccel.recipe.values import flag_of
from lbaccel.runs.figures import check_plot
from lbaccel.stability.limit import limits, rate_advice, rate_sentence
from lbaccel.stability.range_text import duration, in_words, plot, table
from lbaccel.text import printable

if TYPE_CHECKING:  # torch is imported after the flags were read
    from lbaccel.stability.curvature import Curvature
    from lbaccel.stability.range_test import LrRange

PROG = "lbaccel lr-find"
BELOW, ABOVE = 1000.0, 30.0  # the range's ends, from the recipe's own rate
CURVATURE_SAMPLES = 256
LEAST_UPDATES = 5  # that a range of rates needs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the test itself; all others are the recipe's."""
    parser.usage = f"{PROG} [flags of lbaccel train] [--num-updates U] [--plot FILE] ..."
    parser.description = (
        "Try learning rates at the global batch asked for: real updates at a rising rate, all "
        "of them taken back. Takes the flags of lbaccel train (--data, --model, "
        "--global-batch-size, --optimizer, --config ...), and writes no run folder."
    )
    parser.set_defaults(recipe_flags=())
    parser.add_argument(
        "--num-updates",
        type=bounds.whole_from(LEAST_UPDATES),
        default=30,
        metavar="U",
        help="(default: %(default)s)",
    )
    parser.add_argument(
        "--min-lr",
        type=bounds.positive,
        metavar="LR",
        help=f"first (default: the recipe's / {BELOW:g})",
    )
    parser.add_argument(
        "--max-lr",
        type=bounds.positive,
        metavar="LR",
        help=f"last (default: the recipe's x {ABOVE:g})",
    )
    parser.add_argument(
        "--curvature-samples",
        type=bounds.count_from_zero,
        default=CURVATURE_SAMPLES,
        metavar="N",
        help="that the stable rate is measured on; 0 leaves it out (default: %(default)s)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw loss over rate (.png)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON alone")


def run(own: argparse.Namespace) -> int:
    """Print the range and what it means, draw it where asked; 0.

    Raises:
        InputError: see `read_settings`, `built` and `range_test`.
        RunFailed: the loss is not finite before the first step, or another rank failed.
    """
    settings, show = read_settings(
        own.recipe_flags, prog=PROG, beside=[flag_of(name) for name in vars(own)]
    )
    if show:
        print(printable(show_settings(settings)))
        return 0
    for note in settings.notes if rank() == 0 else ():
        print(printable(note), file=sys.stderr)
    check_plot(own.plot)
    try:
        found = _measure(own, settings)
        if rank() == 0:
            _show(own, settings, found)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Nothing was written.") from None
    return 0


@dataclass(frozen=True, kw_only=True)
class RateMeasurements:
    """The range, the curvature where it was asked for, and the recipe's rates."""

    lr_range: LrRange
    own_lr: float  # of the parameters with the highest
    base_lr: float
    sgd: tuple[float, bool] | None  # momentum, and whether it is Nesterov's
    curvature: Curvature | None


def _measure(own: argparse.Namespace, settings: Settings) -> RateMeasurements:
    from lbaccel.recipe.built import built
    from lbaccel.stability.curvature import largest_curvature, sgd_momentum
    from lbaccel.stability.range_test import lr_find

    stream = sys.stderr if own.json else sys.stdout

    def say(text: str) -> None:
        if rank() == 0:
            print(printable(text), file=stream, flush=True)

    with built(settings, say=say) as b:
        own_lr = b.largest_lr  # the test's rates are those of the group with the highest
        min_lr, max_lr = own.min_lr or own_lr / BELOW, own.max_lr or own_lr * ABOVE
        if not min_lr < max_lr:
            raise InputError(
                f"--min-lr {min_lr:g} is not below --max-lr {max_lr:g}. Give a lower --min-lr."
            )
        size = b.large_batch.plan.global_batch_size
        say(
            f"range test: {own.num_updates} updates x {size} samples = {own.num_updates * size} "
            f"samples, lr {min_lr:.3g} to {max_lr:.3g}; all updates are taken back"
        )
        if own_lr != b.lr:
            say(f"rates here are those of the parameters with the highest, {own_lr / b.lr:g} x lr")
        sgd = sgd_momentum(b.optimizer)
        curvature = None
        start = time.perf_counter()
        if own.curvature_samples and sgd is not None:
            curvature = largest_curvature(
                b.large_batch, b.loader, b.loss_fn, num_samples=own.curvature_samples
            )
            seconds = time.perf_counter() - start
            say(
                f"curvature: lambda_max {curvature.lambda_max:.3g} on {curvature.num_samples} "
                f"samples, residual {curvature.residual:.2g} after {curvature.num_products} "
                f"products, {duration(seconds)}"
            )
        start = time.perf_counter()

        def after_update(done: int, loss: float, lr: float) -> None:
            if done == 1:
                seconds = time.perf_counter() - start
                say(f"one update: {seconds:.1f} s; about {duration(own.num_updates * seconds)}")

        found = lr_find(
            b.large_batch,
            b.loader,
            b.loss_fn,
            min_lr=min_lr,
            max_lr=max_lr,
            num_updates=own.num_updates,
            after_update=after_update,
        )
        return RateMeasurements(
            lr_range=found, own_lr=own_lr, base_lr=b.base_lr, sgd=sgd, curvature=curvature
        )


def _show(own: argparse.Namespace, settings: Settings, m: RateMeasurements) -> None:
    """On the first rank alone."""
    found, own_lr, curvature = m.lr_range, m.own_lr, m.curvature
    momentum, nesterov = m.sgd or (0.0, False)
    form: Any = {"momentum": momentum, "nesterov": nesterov}
    stability = None
    if curvature is not None:
        stability = asdict(curvature) | form | limits(curvature.lambda_max, **form)
    if own.plot is not None:
        stable = None if stability is None else stability["stable_rate"]
        batch = found.global_batch_size
        title = f"{settings.model.model}, {settings.data.data}, global batch {batch}"
        plot(found, own.plot, own_lr=own_lr, stable=stable, title=title)
    if own.json:
        about = {
            "own_lr": own_lr,
            "optimizer": settings.optimizer.optimizer,
            "stability": stability,
        }
        print(json.dumps(found.to_dict() | about, indent=2, allow_nan=False))
        return
    print("\n".join(table(found)))
    print("\n".join(in_words(found, own_lr=own_lr, base_lr=m.base_lr)))
    if m.sgd is None:
        print(f"stable rate: known for SGD, not for {settings.optimizer.optimizer}")
    if curvature is not None:
        for who, lr in (("recipe", own_lr), ("suggested", found.suggested_lr)):
            if lr is not None:
                text = rate_sentence(
                    lr, curvature.lambda_max, num_samples=curvature.num_samples, **form
                )
                print(f"{who}: {text}\n    {rate_advice(lr, curvature.lambda_max, **form)}")
    if own.plot is not None:
        print(own.plot)
