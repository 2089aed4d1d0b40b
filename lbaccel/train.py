"""The recipe: train or finetune a timm backbone at any global batch, on lbaccel's public API.

`accelerate launch --config_file accelerate_configs/cpu.yaml -m lbaccel.train` runs it; so does
`lbaccel train`. Read `run` top to bottom: it is a training loop that you could write yourself.
"""

from __future__ import annotations

import contextlib
import errno
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lbaccel.errors import InputError, RunFailed
from lbaccel.recipe.ending import end_process_group, fail
from lbaccel.recipe.options import OPTIONS
from lbaccel.recipe.resume import resolve
from lbaccel.recipe.settings import read_settings, show_settings

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO)

FREE_SPACE = "Free some space, or give another --output."


def main(argv: Sequence[str] | None = None, *, prog: str = "lbaccel train") -> int:
    """Run the recipe; returns the exit code: 0 done, 1 run failed, 2 user's input, 130 stopped."""
    try:
        settings, origins, show = read_settings(sys.argv[1:] if argv is None else argv, prog=prog)
        settings, origins = resolve(settings, origins)
        if show:
            print(show_settings({name: settings[name] for name in OPTIONS}, origins))
            return 0
        run(settings, origins)
    except InputError as error:
        return fail(error, 2)
    except RunFailed as error:
        return fail(error, 1)
    except OSError as error:  # any file of the run folder, such as metrics.jsonl
        if error.errno not in DISK_ERRORS:
            raise
        return fail(f"{error}. {FREE_SPACE}", 1)
    except KeyboardInterrupt as error:
        return fail(f"interrupted. {error or 'Nothing was written.'}", 130)
    finally:
        end_process_group()
    return 0


def run(settings: dict[str, Any], origins: dict[str, str]) -> Path | None:
    """Train as the settings say, and return the run folder (None for a dry run)."""
    from lbaccel.data.pipelines import evaluation_batches
    from lbaccel.data.sources import ImageArray
    from lbaccel.noise.advice import closing_advice
    from lbaccel.optim.groups import reference_lr
    from lbaccel.optim.scheduler import AdaScaleLR, refresh
    from lbaccel.recipe import growth
    from lbaccel.recipe.accelerator import make_accelerator, zero_stage
    from lbaccel.recipe.evaluation import evaluate
    from lbaccel.recipe.measured import (
        build_auto_batch,
        build_noise_scale,
        build_scheduler,
        check_measurable,
        loss_dropout,
        rate_factor,
    )
    from lbaccel.recipe.model import build_optimizer, check_numbers, limit_for, takes_fused_step
    from lbaccel.recipe.signals import graceful_signals
    from lbaccel.recipe.task import build_task
    from lbaccel.runs.folder import DECISIONS, atomic_write_text
    from lbaccel.runs.log import RunLog
    from lbaccel.runs.progress import Progress, closing_table, peak_gib
    from lbaccel.runs.session import Session, find_checkpoint, load_weights
    from lbaccel.update.engine import LargeBatch

    s = check_numbers(settings)
    accelerator, precision = make_accelerator(s["precision"])
    say = accelerator.print
    auto_resume = origins.get("resume") == "auto"
    if s["resume"] is None and auto_resume:
        say("resume: no run here was asked for with these settings; a new one starts")
    resume_from = find_checkpoint(accelerator, s["resume"], auto=auto_resume, say=say)

    # -- data, model and batch ------------------------------------------------------------------
    task = build_task(s, accelerator, precision, say=say, load_weights=resume_from is None)
    source, model, plan, loader = task.source, task.model, task.plan, task.loader
    chosen, preprocessing, loss_fn = task.chosen, task.preprocessing, task.loss_fn

    # -- learning rate, optimizer, schedule ---------------------------------------------------
    optimizer, schedule, lr_values = build_optimizer(
        s,
        model,
        plan=plan,
        stream=loader.stream,
        factor=rate_factor(s, task.segments, loader),
        fused=takes_fused_step(s, accelerator, precision),
        say=say,
    )
    if task.segments:
        epochs, lr = s["epochs"], lr_values["lr"]
        say(growth.explain(task.segments, stream=loader.stream, epochs=epochs, lr=lr))
    searches = task.searches
    noise_scale = build_noise_scale(s, loader, accelerator, searches=searches, say=say)
    auto_batch = build_auto_batch(s, loader, noise_scale)
    scheduler = build_scheduler(s, optimizer, schedule, loader=loader, noise_scale=noise_scale)
    adascale = scheduler if isinstance(scheduler, AdaScaleLR) else None

    def planned_updates() -> int:
        """As far as it is known: a growing batch makes it smaller."""
        num_updates = loader.stream.num_updates(s["epochs"])
        if adascale is not None and adascale.finished:
            return adascale.num_updates
        if adascale is not None:  # at least one update of the base batch each
            num_updates = -(-num_updates * plan.global_batch_size // s["base_batch_size"])
        return num_updates

    def last_update() -> int:
        return int(min(planned_updates(), s["max_updates"] or math.inf))

    num_updates, stop_at = planned_updates(), last_update()
    model.to(accelerator.device)
    ema = None
    if s["ema_decay"] is not None:
        from timm.utils.model_ema import ModelEmaV3

        ema = ModelEmaV3(model, decay=s["ema_decay"])
    if resume_from is not None:
        load_weights(resume_from, model, ema=ema)
    drops = loss_dropout(s, lambda: loader.stream)
    large_batch = LargeBatch(
        accelerator,
        plan,
        clip_grad_norm=s["clip_grad_norm"],
        bn_statistics=s["bn_statistics"],
        seed=s["seed"],
        drops=drops,
        noise_scale=noise_scale,
    )
    bare_model = model
    model, optimizer, loader, scheduler = large_batch.prepare(
        model, optimizer, loader, scheduler, ema=ema
    )

    def validate() -> dict[str, float]:
        metrics = {}
        with large_batch.whole_model() as whole:
            for suffix, network in (("", whole), ("_ema", ema.module if ema else None)):
                if network is not None:
                    batches = evaluation_batches(
                        source.val,
                        preprocessing=preprocessing,
                        batch_size=large_batch.plan.micro_batch_size,
                        rank=accelerator.process_index,
                        world_size=accelerator.num_processes,
                        num_workers=0 if isinstance(source.val, ImageArray) else s["workers"],
                    )
                    found = evaluate(network, batches, accelerator, dtype=task.dtype)
                    metrics.update({f"val/{key}{suffix}": value for key, value in found.items()})
        return metrics

    def more() -> dict[str, float]:
        """Metrics of parts that not every run has."""
        found = {} if noise_scale is None else noise_scale.metrics()
        found |= {} if adascale is None else adascale.metrics()
        return found if drops is None else {**found, "optim/num_dropped": drops.num_dropped}

    # -- the run on disk ------------------------------------------------------------------------
    log = RunLog(
        loader.stream, log_every=s["log_every"], eval_every=s["eval_every"], stop_at=stop_at
    )
    parts = {
        "optimizer": large_batch.optimizer_state(),
        "scheduler": scheduler,
        "counters": large_batch,
        "loader": loader,
        "log": log,
    }
    if drops is not None:
        parts["loss_dropout"] = drops
    if auto_batch is not None:
        parts["auto_batch"] = auto_batch
    if accelerator.scaler is not None:
        parts["scaler"] = accelerator.scaler
    session = Session(accelerator, bare_model, large_batch.whole_model, parts, ema=ema)
    if resume_from is not None:
        done = session.restore(resume_from, say=say)
        num_updates, stop_at = planned_updates(), last_update()
        log.stop_at = stop_at
        if done > stop_at:
            given = f"--epochs {s['epochs']:g} are {num_updates} updates"
            if stop_at < num_updates:
                given = f"--max-updates {stop_at}"
            raise InputError(f"{given}, and the run has done {done}. Use more of them.")
        if done >= stop_at and session.was_closed():
            say(f"nothing left to do: {done} of {stop_at} updates are done in {session.folder}")
            return session.folder
    auto = s["micro_batch_size"] == "auto"
    with contextlib.ExitStack() as around:
        limited = around.enter_context(contextlib.ExitStack())
        line = limited.enter_context(limit_for(s, accelerator.device, auto=auto))
        if line:
            say(line)
        if searches:
            found = large_batch.find_micro_batch_size(loader, loss_fn)
            say(f"micro-batch: {found} samples, the largest that fits\n{large_batch.plan}")
            check_measurable(s, large_batch.plan)
        if s["dry_run"]:
            stop_at = log.stop_at = min(2, stop_at)
        else:
            plan_values = {
                "equation": str(large_batch.plan),
                "world_size": plan.world_size,
                "micro_batch_size": large_batch.plan.micro_batch_size,
                "gradient_accumulation_steps": large_batch.plan.gradient_accumulation_steps,
                "activation_checkpointing": chosen.checkpointing,
                "segments": [list(segment) for segment in chosen.segments],
                "memory_format": chosen.memory_format,
                "zero_stage": zero_stage(accelerator),
                "num_updates": num_updates,
                "norm_batch_size": plan.norm_batch_size,
                "lr": lr_values.pop("lr"),
            }
            resolved = {**s, **lr_values, "precision": precision, "num_classes": task.num_classes}
            if resolved.pop("auto_batch"):
                resolved["global_batch_size"] = "auto"
            resolved |= {k: preprocessing[k] for k in ("img_size", "mean", "std", "interpolation")}
            resolved["norm_batch_size"] = plan.norm_batch_size
            resolved["milestones"] = growth.milestones(
                s["milestones"], rule=s["batch_schedule"], epochs=s["epochs"]
            )
            if not auto:
                resolved["micro_batch_size"] = plan.micro_batch_size
            line = session.open(resolved, plan_values, origins)
            if line:
                say(line)
        progress = around.enter_context(
            contextlib.closing(Progress(stop_at, accelerator.is_main_process))
        )
        around.enter_context(graceful_signals(large_batch.request_stop))

        # -- the loop ---------------------------------------------------------------------------
        deadline = time.perf_counter() + 3600 * (s["max_hours"] or float("inf"))
        status, reason, stop = "failed", "", None
        try:
            while large_batch.num_updates < stop_at and stop is None:
                decision = None if auto_batch is None else auto_batch.before_epoch()
                if decision is not None and auto_batch is not None:
                    refresh(scheduler)
                    if not s["dry_run"]:
                        stop_at = log.stop_at = progress.total = last_update()
                    progress.note(str(decision))
                    if session.folder is not None and accelerator.is_main_process:
                        atomic_write_text(session.folder / DECISIONS, auto_batch.text())
                for update in loader:
                    lr = reference_lr(scheduler.optimizer)
                    before = time.perf_counter()
                    if before > deadline:
                        large_batch.request_stop("time limit")
                    result = large_batch.update(update, loss_fn)
                    stop = result.stop
                    if adascale is not None and adascale.finished:
                        stop_at = log.stop_at = progress.total = last_update()
                    if not (result.applied or result.dropped):
                        progress.note(f"update {update.index + 1}: fp16 overflow, skipped")
                        if stop is None:
                            continue
                    else:
                        seconds = time.perf_counter() - before
                        metrics = log.after_update(result, lr=lr, seconds=seconds, more=more)
                        if metrics is not None and session.folder is not None:
                            line = {**log.where(result), **metrics}
                            accelerator.log(line, step=result.num_updates)
                    last = result.num_updates == stop_at
                    counted = result.applied or result.dropped
                    evaluates = counted and log.evaluates(result) and not s["dry_run"]
                    improved = False
                    if evaluates:
                        metrics = validate()
                        accelerator.log({**log.where(result), **metrics}, step=result.num_updates)
                        improved = log.after_evaluation(result, metrics)
                    every = s["checkpoint_every"]
                    saves = result.num_updates % every == 0 if every else evaluates
                    if saves or improved or last or stop is not None:
                        session.save(
                            update=result.num_updates,
                            best=improved,
                            keep=s["keep"],
                            classes=source.train.classes,
                            preprocessing=preprocessing,
                        )
                    progress.show(result.num_updates, {**log.where(result), **log.latest})
                    if last or stop is not None:
                        break
            finished = large_batch.num_updates >= stop_at
            status = "interrupted" if stop == "interrupt" else "stopped"
            status = "done" if finished else status
            reason = "" if finished else f"{stop} after update {large_batch.num_updates}"
        except BaseException as error:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            reason = str(error) or type(error).__name__
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(session.how_to_go_on()) from error
            if isinstance(error, (RunFailed, InputError)):
                raise type(error)(f"{error} {session.how_to_go_on()}") from error
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise RunFailed(f"{error}. {FREE_SPACE} {session.how_to_go_on()}") from error
            progress.note(session.how_to_go_on())
            raise
        finally:
            summary = {
                "status": status,
                "exit_reason": reason,
                "model": s["model"],
                **log.summary(large_batch),
            }
            limited.close()  # plots are none of the training's memory
            # a full disk must not hide why the run failed
            with contextlib.suppress(OSError) if status == "failed" else contextlib.nullcontext():
                session.close(summary, failed=status != "done")
    if session.folder is None:
        say(f"dry run: {stop_at} updates done, {peak_gib():.2f} GiB at the peak, nothing written")
        return None
    if status == "interrupted":
        raise KeyboardInterrupt(
            f"Update {large_batch.num_updates} was finished, {session.how_to_go_on()}"
        )
    say(closing_table(summary))
    if noise_scale is not None:
        last = loader.stream.size_of(max(0, large_batch.num_updates - 1))
        say(closing_advice(noise_scale, last))
    if status == "stopped":
        say(f"stopped: the time limit of {s['max_hours']:g} h; {session.how_to_go_on()}")
    say(session.folder)
    return session.folder


if __name__ == "__main__":
    sys.exit(main())
