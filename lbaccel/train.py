"""The recipe: train or finetune a timm backbone at any global batch, on lbaccel's public API.

`accelerate launch --config_file accelerate_configs/cpu.yaml -m lbaccel.train` runs it; so does
`lbaccel train`. `fit` is a training loop that you could write yourself; `run` builds what it needs,
opens the run folder, calls it, and closes.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbaccel.errors import Diverged, InputError, RunFailed, is_of_the_disk, way_out
from lbaccel.launch import asks_for_ranks, unsupported_platform
from lbaccel.recipe.ending import ending
from lbaccel.recipe.options import Settings
from lbaccel.recipe.resume import resolve
from lbaccel.recipe.settings import read_settings, show_settings
from lbaccel.recipe.unforeseen import in_a_sentence, workers_may_end
from lbaccel.text import printable

if TYPE_CHECKING:  # torch is imported after the settings were read
    from lbaccel.recipe.training import Training
    from lbaccel.runs.progress import Progress
    from lbaccel.update.result import UpdateResult

ELSEWHERE = "give another --output"


def main(argv: Sequence[str] | None = None, *, prog: str = "lbaccel train") -> int:
    """Run the recipe; returns the exit code: 0 done, 1 run failed, 2 user's input, 130 stopped."""

    def body() -> None:
        try:
            settings, show = read_settings(sys.argv[1:] if argv is None else argv, prog=prog)
            settings = resolve(settings)
        except InputError as error:
            if asks_for_ranks():
                from lbaccel.recipe.alike import tell

                tell(error)
            raise
        if show:
            print(printable(show_settings(settings)))
        else:
            run(settings)

    return ending(body, elsewhere=ELSEWHERE, interrupted="Nothing was written.")


def run(settings: Settings) -> Path | None:
    """Train as the settings say, and return the run folder (None for a dry run)."""
    with contextlib.ExitStack() as locks:
        return _run(settings, locks)


def _run(settings: Settings, locks: contextlib.ExitStack) -> Path | None:
    started = time.perf_counter()  # the first import of torch takes seconds
    from lbaccel.recipe import fitting
    from lbaccel.recipe.accelerator import make_accelerator
    from lbaccel.recipe.alike import check_started_alike, checked_on_each_rank
    from lbaccel.recipe.contract import check_chosen
    from lbaccel.recipe.resume import AUTO
    from lbaccel.recipe.signals import graceful_signals
    from lbaccel.recipe.sizes import limit_for
    from lbaccel.recipe.training import build_training
    from lbaccel.runs.progress import Progress
    from lbaccel.runs.session import find_checkpoint

    begun = fitting.clock() - (time.perf_counter() - started)
    s = checked_on_each_rank(settings)
    accelerator, precision = make_accelerator(s.batch.precision)
    check_started_alike(accelerator, settings)
    say, auto = accelerator.print, s.origin("resume") == AUTO
    unsupported = unsupported_platform()
    if unsupported is not None:
        say(unsupported)
    if s.run.resume is None and auto:
        say("resume: no run here was asked for with these settings; a new one starts")
    for note in s.notes:
        say(note)
    resume_from = find_checkpoint(accelerator, s.run.resume, auto=auto, say=say, locks=locks)
    if resume_from is not None:
        check_chosen(resume_from, s.contract)
    opened = None
    if s.rate.max_minutes is not None and resume_from is None:
        s, opened = fitting.fitted(s, accelerator, begun=begun, say=say)
    t = build_training(s, accelerator, precision, resume_from=resume_from, say=say, opened=opened)
    if t.large_batch.num_updates >= t.length.stop_at and t.session.was_closed():
        done, stop_at = t.large_batch.num_updates, t.length.stop_at
        why = f" ({t.log.early}; a larger --patience goes on)" if t.log.early else ""
        say(f"nothing left to do: {done} of {stop_at} updates are done in {t.session.folder}{why}")
        return t.session.folder
    with contextlib.ExitStack() as around:
        limited = around.enter_context(contextlib.ExitStack())
        line = limited.enter_context(limit_for(s.batch, accelerator.device))
        if line:
            say(line)
        t.search(say=say)
        if s.run.dry_run:
            t.length.limit(2)
        else:
            open_folder(t, locks)
        progress = Progress(t.length, accelerator.is_main_process)
        around.enter_context(contextlib.closing(progress))
        around.enter_context(graceful_signals(t.large_batch.request_stop))
        # the plots, drawn at the end, are none of the training's memory
        with kept(t, progress, before_closing=limited.close) as outcome:
            outcome.end(fit(t, progress), t)
    return closing_words(t, outcome)


def open_folder(t: Training, locks: contextlib.ExitStack) -> None:
    """Make the run folder, or go on in it, and start the trackers; `locks` keeps others out."""
    from lbaccel.recipe.contract import contract_of
    from lbaccel.recipe.images import write_skipped
    from lbaccel.runs.ranks import decided
    from lbaccel.runs.tracking import start_trackers
    from lbaccel.runs.wandb_tracker import summarize

    s, (taken, plan) = t.settings, t.describe()
    t.session.contract = contract_of(s, taken)
    name = f"{s.model.model}-gbs{s.batch.global_batch_size}"
    folder = t.session.open(
        Path(s.run.output),
        name=name,
        seed=s.run.seed,
        config=t.config(taken, plan),
        locks=locks,
    )
    if s.data.skip_corrupt:
        decided(t.accelerator, lambda: write_skipped(folder, t.task.skipped))
    line = start_trackers(
        t.accelerator,
        folder,
        config={**taken, **{f"plan/{k}": v for k, v in plan.items()}},
        log_with=s.run.log_with,
        project=s.run.wandb_project,
        group=s.run.wandb_group,
        name=s.run.wandb_name,
        tags=s.run.wandb_tags,
        mode=s.run.wandb_mode,
    )
    if line:
        t.accelerator.print(printable(line))
    begun = {"status": "running", "exit_reason": "", **t.log.best_so_far()}
    summarize(t.accelerator, begun)


def fit(t: Training, progress: Progress) -> str | None:
    """Do the updates that are left; returns why it stopped before the last one, or None."""
    from lbaccel.optim.groups import reference_lr

    if t.log.evaluation_due:  # of the update before a resume
        save(t, best=evaluated(t))
    deadline = time.perf_counter() + 3600 * (t.settings.run.max_hours or math.inf)
    while t.large_batch.num_updates < t.length.stop_at:
        for hook in t.hooks:
            note = hook.before_epoch()
            if note is not None:
                progress.note(note)
        for update in t.loader:
            lr = reference_lr(t.scheduler.optimizer)
            before = time.perf_counter()
            if before > deadline:
                t.large_batch.request_stop("time limit")
            result = t.large_batch.update(update, t.task.loss_fn)
            if result.applied or result.dropped:
                log_update(t, result, lr=lr, seconds=time.perf_counter() - before)
                note = t.log.notices.after_update(result.loss, result.num_samples, lr=lr)
                if note is not None:
                    progress.note(f"update {result.num_updates}: {note}")
            else:
                progress.note(f"update {update.index + 1}: fp16 overflow, skipped")
                if result.stop is None:
                    continue
            evaluate_and_save(t, result)
            progress.show(result.num_updates, {**t.log.where(result), **t.log.latest})
            if result.stop is not None:
                return result.stop
            if result.num_updates == t.length.stop_at:
                break
    return None


def log_update(t: Training, result: UpdateResult, *, lr: float, seconds: float) -> None:
    """Take an update into the means, and write their line where one is due."""
    write_line(t, result, t.log.after_update(result, lr=lr, seconds=seconds, more=t.metrics))


def write_line(t: Training, result: UpdateResult, metrics: dict[str, float] | None) -> None:
    """Hand the trackers the metrics of a line, where there are any."""
    if metrics is not None and t.session.folder is not None:
        t.accelerator.log({**t.log.where(result), **metrics}, step=result.num_updates)


def evaluate_and_save(t: Training, result: UpdateResult) -> None:
    """Evaluate and write a checkpoint, each where one is due after this update."""
    run = t.settings.run
    counted = result.applied or result.dropped
    evaluates = counted and t.log.evaluates(result) and not run.dry_run
    improved = evaluated(t) if evaluates else ()
    if t.log.early:
        write_line(t, result, t.log.rest())
    every, last = run.checkpoint_every, result.num_updates == t.length.stop_at
    saves = result.num_updates % every == 0 if every else evaluates
    stops = result.stop is not None
    if (saves or last) and not evaluates and not stops and not run.dry_run:
        measure_average(t)
    if saves or improved or last or stops:
        save(t, best=improved)


def save(t: Training, *, best: Collection[str]) -> None:
    """Write a checkpoint of the run as it stands; `best` are the links that name it."""
    t.session.save(
        update=t.large_batch.num_updates,
        best=best,
        keep=t.settings.run.keep,
        classes=t.task.source.train.classes,
        preprocessing=t.task.preprocessing,
    )


def measure_average(t: Training) -> None:
    """Give the average that is saved now the statistics of its own weights, as an evaluation does.

    A checkpoint of a stop has those of the last evaluation or save: who stops a run waits for none.
    """
    from lbaccel.recipe.evaluation import NotEvaluated

    if t.norm_of_average is not None:
        try:
            t.norm_of_average.measure()
        except NotEvaluated as failed:  # on every rank
            with contextlib.suppress(RunFailed), workers_may_end():
                save(t, best=())
            raise failed.error from None


def evaluated(t: Training) -> Collection[str]:
    """Evaluate and log it, where it fails save first; the links to a checkpoint of now."""
    from lbaccel.recipe.evaluation import NotEvaluated
    from lbaccel.runs.wandb_tracker import summarize

    now = t.large_batch
    try:
        metrics = {**validate(t), **t.log.target.line}
    except NotEvaluated as failed:  # on every rank
        t.log.evaluation_due = True
        # the first failure is the one to be told
        with contextlib.suppress(RunFailed), workers_may_end():
            save(t, best=())
        raise failed.error from None
    t.accelerator.log({**t.log.where(now), **metrics}, step=now.num_updates)
    improved = t.log.after_evaluation(now, metrics)
    if improved:
        summarize(t.accelerator, t.log.best_so_far())
    return improved


def validate(t: Training) -> dict[str, float]:
    """Loss, top-1 and, of more than 10 classes, top-5 over the validation set.

    Of the weights, and of their average.
    """
    from lbaccel.recipe.evaluation import evaluate

    metrics = {}
    size = t.settings.batch.val_batch_size or t.large_batch.plan.micro_batch_size
    with t.large_batch.whole_model() as whole:
        for suffix, network in (("", whole), ("_ema", t.ema.module if t.ema else None)):
            if network is None:
                continue
            if suffix and t.norm_of_average is not None:
                t.norm_of_average.measure()
            found = evaluate(
                network,
                t.validation,
                t.accelerator,
                dtype=t.task.dtype,
                batch_size=size,
                room=t.room,
                top5=t.task.num_classes > 10,
            )
            metrics |= {f"val/{key}{suffix}": value for key, value in found.items()}
    return metrics


@dataclass
class Outcome:
    """How a run ended."""

    status: str = "failed"
    reason: str = ""
    diverged: bool = False
    summary: dict[str, Any] = field(default_factory=dict)

    def end(self, stop: str | None, t: Training) -> None:
        """Take the end of `fit`: done, or stopped before the last update."""
        finished = t.large_batch.num_updates >= t.length.stop_at
        self.status = "interrupted" if stop == "interrupt" else "stopped"
        self.status = "done" if finished else self.status
        self.reason = (
            t.log.early if finished else f"{stop} after update {t.large_batch.num_updates}"
        )

    def fail(self, error: BaseException) -> None:
        """Take an error."""
        self.status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        self.reason = str(error) or type(error).__name__
        self.diverged = isinstance(error, Diverged)


@contextlib.contextmanager
def kept(t: Training, progress: Progress, *, before_closing: Any) -> Iterator[Outcome]:
    """However the run ends: its summary is written, and the error says how to go on with it."""
    from lbaccel.recipe.artifacts import log_artifact

    outcome, session, undisturbed = Outcome(), t.session, contextlib.ExitStack()
    try:
        try:
            yield outcome
        finally:  # an error of a dead worker that comes even here is caught below, and is the last
            undisturbed.enter_context(workers_may_end())
    except BaseException as raised:
        error = in_a_sentence(raised)
        outcome.fail(error)
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(session.how_to_go_on()) from error
        if isinstance(error, (RunFailed, InputError)):
            raise type(error)(f"{error} {session.how_to_go_on()}") from raised
        if isinstance(error, OSError) and is_of_the_disk(error):
            out = way_out(error, ELSEWHERE)
            raise RunFailed(f"{error}. {out} {session.how_to_go_on()}") from error
        progress.note(session.how_to_go_on())
        raise
    finally:
        before_closing()
        # a full disk must not hide why the run failed
        failed = outcome.status == "failed"
        outcome.summary = {
            "status": outcome.status,
            "exit_reason": outcome.reason,
            **({"diverged": True} if outcome.diverged else {}),
            "model": t.settings.model.model,
            **t.log.summary(t.large_batch),
        }
        with undisturbed, contextlib.suppress(OSError) if failed else contextlib.nullcontext():
            log_artifact(t, outcome.status)
            session.close(outcome.summary, failed=outcome.status != "done")


def closing_words(t: Training, outcome: Outcome) -> Path | None:
    """Print the result, and return the run folder.

    Raises:
        KeyboardInterrupt: the run was interrupted.
    """
    from lbaccel.noise.advice import closing_advice
    from lbaccel.runs.progress import closing_table, peak_gib

    say, session = t.accelerator.print, t.session
    if session.folder is None:
        peak, done = peak_gib(), t.length.stop_at
        say(f"dry run: {done} updates done, {peak:.2f} GiB at the peak, nothing written")
        return None
    if outcome.status == "interrupted":
        done = t.large_batch.num_updates
        raise KeyboardInterrupt(f"Update {done} was finished, {session.how_to_go_on()}")
    say(closing_table(outcome.summary))
    if t.noise_scale is not None:
        last = t.loader.stream.size_of(max(0, t.large_batch.num_updates - 1))
        say(closing_advice(t.noise_scale, last))
    if t.log.early:
        say(f"{t.log.early}; a larger --patience goes on with --resume {session.folder}")
    if outcome.status == "stopped":
        limit = t.settings.run.max_hours
        say(f"stopped: the time limit of {limit:g} h; {session.how_to_go_on()}")
    say(session.folder)
    return session.folder


if __name__ == "__main__":
    sys.exit(main())
