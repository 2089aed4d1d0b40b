"""`lbaccel lr-find`: the range test of a recipe at its global batch, and its stable rate."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbaccel.errors import InputError, RunFailed, check_number
from lbaccel.launch import rank
from lbaccel.recipe.ending import end_process_group, fail
from lbaccel.recipe.options import Settings
from lbaccel.recipe.settings import read_settings, show_settings
from lbaccel.stability.limit import rate_advice, rate_sentence, stability_limit, stable_rate

if TYPE_CHECKING:  # torch is imported after the flags were read
    from lbaccel.stability.curvature import Curvature
    from lbaccel.stability.range_test import LrRange

PROG = "lbaccel lr-find"
BELOW, ABOVE = 1000.0, 30.0  # the range's ends, from the recipe's own rate
CURVATURE_SAMPLES = 256
ROWS = 30


def make_parser() -> argparse.ArgumentParser:
    """The flags of the test itself; all others are the recipe's."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        usage=f"{PROG} [flags of lbaccel train] [--num-updates U] [--plot FILE] ...",
        description=(
            "Try learning rates at the global batch asked for: real updates at a rising rate, all "
            "of them taken back. Takes the flags of lbaccel train (--data, --model, "
            "--global-batch-size, --optimizer, --config ...), and writes no run folder."
        ),
        allow_abbrev=False,
    )
    parser.add_argument(
        "--num-updates", type=int, default=30, metavar="U", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--min-lr", type=float, metavar="LR", help=f"first (default: the recipe's / {BELOW:g})"
    )
    parser.add_argument(
        "--max-lr", type=float, metavar="LR", help=f"last (default: the recipe's x {ABOVE:g})"
    )
    parser.add_argument(
        "--curvature-samples",
        type=int,
        default=CURVATURE_SAMPLES,
        metavar="N",
        help="that the stable rate is measured on; 0 leaves it out (default: %(default)s)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw loss over rate (.png)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON alone")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code: 0 done, 1 failed, 2 user's input, 130 stopped."""
    try:
        own, rest = make_parser().parse_known_args(argv)
        settings, show = read_settings(rest, prog=PROG)
        if show:
            print(show_settings(settings))
            return 0
        _run(own, settings)
    except InputError as error:
        return fail(error, 2)
    except RunFailed as error:
        return fail(error, 1)
    except KeyboardInterrupt:
        return fail("interrupted. Nothing was written.", 130)
    finally:
        end_process_group()
    return 0


def _run(own: argparse.Namespace, settings: Settings) -> None:
    for name in ("min_lr", "max_lr"):
        if getattr(own, name) is not None:
            check_number(f"--{name.replace('_', '-')}", getattr(own, name))
    if own.curvature_samples < 0:
        raise InputError(f"--curvature-samples {own.curvature_samples} must be 0 or more.")
    if own.num_updates < 5:
        raise InputError(f"--num-updates {own.num_updates}: a range of rates needs at least 5.")
    if own.plot is not None and own.plot.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {own.plot}: give a name that ends in .png, .svg or .pdf.")
    if own.plot is not None and not own.plot.parent.is_dir():
        raise InputError(f"--plot {own.plot}: there is no folder {own.plot.parent}. Make it first.")

    from lbaccel.recipe.built import built
    from lbaccel.stability.curvature import largest_curvature, sgd_momentum
    from lbaccel.stability.range_test import lr_find

    stream = sys.stderr if own.json else sys.stdout

    def say(text: str) -> None:
        if rank() == 0:
            print(text, file=stream, flush=True)

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
            say(
                f"curvature: lambda_max {curvature.lambda_max:.3g} on {curvature.num_samples} "
                f"samples, residual {curvature.residual:.2g} after {curvature.num_products} "
                f"products, {_duration(time.perf_counter() - start)}"
            )
        start = time.perf_counter()

        def after_update(done: int, loss: float, lr: float) -> None:
            if done == 1:
                seconds = time.perf_counter() - start
                say(f"one update: {seconds:.1f} s; about {_duration(own.num_updates * seconds)}")

        found = lr_find(
            b.large_batch,
            b.loader,
            b.loss_fn,
            min_lr=min_lr,
            max_lr=max_lr,
            num_updates=own.num_updates,
            after_update=after_update,
        )
    if rank() != 0:
        return
    momentum, nesterov = sgd or (0.0, False)
    stability = _stability(curvature, momentum, nesterov)
    if own.plot is not None:
        stable = None if stability is None else stability["stable_rate"]
        title = f"{settings.model.model}, {settings.data.data}, global batch {size}"
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
    print("\n".join(in_words(found, own_lr=own_lr, base_lr=b.base_lr)))
    if sgd is None:
        print(f"stable rate: known for SGD, not for {settings.optimizer.optimizer}")
    if curvature is not None:
        form = {"momentum": momentum, "nesterov": nesterov}
        for who, lr in (("recipe", own_lr), ("suggested", found.suggested_lr)):
            if lr is not None:
                text = rate_sentence(
                    lr, curvature.lambda_max, num_samples=curvature.num_samples, **form
                )
                print(f"{who}: {text}\n    {rate_advice(lr, curvature.lambda_max, **form)}")
    if own.plot is not None:
        print(own.plot)


def _stability(
    curvature: Curvature | None, momentum: float, nesterov: bool
) -> dict[str, Any] | None:
    """The measured curvature and its limit, as JSON has it; no number for infinity."""
    if curvature is None:
        return None
    form = {"momentum": momentum, "nesterov": nesterov}
    rate = stable_rate(curvature.lambda_max, **form)
    found = {"limit": stability_limit(**form), "stable_rate": rate if math.isfinite(rate) else None}
    return asdict(curvature) | form | found


def _duration(seconds: float) -> str:
    """Seconds below two minutes, then minutes, then hours.

    >>> _duration(90), _duration(600), _duration(36000)
    ('90 s', '10 min', '10.0 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def table(found: LrRange) -> list[str]:
    """Lines of rate, loss after the step at it, smoothed loss, and what it is called."""
    names = {found.steepest_lr: "steepest"}
    names[found.largest_lr] = "largest" if found.largest_lr not in names else "steepest, largest"
    every = math.ceil(len(found.lrs) / ROWS) if found.lrs else 1
    lines = [f"{'lr':<10}{'loss after':<12}smoothed", f"{'-':<10}{found.start_loss:<12.4g}"]
    rows = zip(found.lrs, found.losses, found.smoothed, strict=True)
    for i, (lr, loss, smoothed) in enumerate(rows):
        if i % every == 0 or lr in names or i == len(found.lrs) - 1:
            line = f"{lr:<10.3g}{loss:<12.4g}{smoothed:<12.4g}{names.get(lr, '')}"
            lines.append(line.rstrip())
    return lines


def in_words(found: LrRange, *, own_lr: float, base_lr: float) -> list[str]:
    """What the test found, and what each rate means.

    Every scaling rule is a factor on `base_lr`, so the base for another peak is in proportion.
    """
    ends = {
        "max_lr": "nothing diverged up to the last rate",
        "diverged": f"diverged at {found.diverged_at or 0:.3g}: the loss rose above 4 times its "
        "best",
        "not finite": f"diverged at {found.diverged_at or 0:.3g}: the loss is not finite",
    }
    lines = [ends[found.ended]]
    if found.steepest_lr is None or found.largest_lr is None or found.suggested_lr is None:
        return [*lines, "the loss never fell: try a lower --min-lr, or more --num-updates"]
    lines.append(f"steepest  {found.steepest_lr:<8.3g} the loss fell most in one update")
    lines.append(
        f"largest   {found.largest_lr:<8.3g} the loss was lowest; above it, training lost ground"
    )
    if found.ended == "max_lr" and found.largest_lr == found.lrs[-1]:
        lines[-1] = (
            f"largest   {found.largest_lr:<8.3g} the loss still fell at the last rate: give a "
            "higher --max-lr"
        )
    lines.append(
        f"suggested {found.suggested_lr:<8.3g} the lower of steepest and a quarter of largest, as "
        f"the peak after a warmup: --base-lr {base_lr * found.suggested_lr / own_lr:.3g}"
    )
    lines.append(
        f"recipe's  {own_lr:<8.3g} {_times(own_lr / found.suggested_lr)} the suggested rate"
        + (", and above the largest" if own_lr > found.largest_lr else "")
    )
    lines.append(
        f"It says what the first {len(found.lrs)} updates from these weights bear, not which rate "
        "ends best: that takes training runs."
    )
    return lines


def _times(ratio: float) -> str:
    return f"{ratio:.2g} times"


def plot(found: LrRange, path: Path, *, own_lr: float, stable: float | None, title: str) -> None:
    """Draw the loss over the rate, with the rates that matter marked.

    Raises:
        RunFailed: the file can't be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    low, high = min(found.lrs, default=own_lr), max(found.lrs, default=own_lr)
    axes.set_xscale("log")
    axes.set_xlim(low / 1.5, 1.5 * high)
    axes.plot(found.lrs, found.losses, "o", markersize=3, color="0.6", label="loss of the update")
    axes.plot(found.lrs, found.smoothed, color="C0", label="smoothed")
    marks = (
        ("steepest", found.steepest_lr, "C2", "-"),
        ("largest", found.largest_lr, "C1", "-"),
        ("suggested", found.suggested_lr, "C2", "--"),
        ("recipe's own", own_lr, "k", ":"),
        ("stable rate", stable, "C3", "-."),
    )
    for name, lr, color, line in marks:
        if lr is not None and low / 1.5 <= lr <= 1.5 * high:
            axes.axvline(lr, color=color, linestyle=line, label=f"{name} {lr:.3g}")
    low = min((found.start_loss, *found.losses))
    high = min(max((found.start_loss, *found.losses)), found.start_loss + abs(found.start_loss))
    margin = 0.05 * (high - low) or 1.0
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlabel("learning rate of the step before")
    axes.set_ylabel("training loss")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise RunFailed(f"--plot {path} can't be written: {error.strerror}.") from None
