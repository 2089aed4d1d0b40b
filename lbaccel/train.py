"""The recipe: train or finetune a timm backbone at any global batch, on lbaccel's public API.

`accelerate launch --config_file accelerate_configs/cpu.yaml -m lbaccel.train` runs it; so does
`lbaccel train`. Read `run` top to bottom: it is a training loop that you could write yourself.
"""

from __future__ import annotations

import contextlib
import errno
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lbaccel.errors import InputError, RankFailed, RunFailed
from lbaccel.launch import rank
from lbaccel.options import OPTIONS
from lbaccel.resume import resolve
from lbaccel.settings import read_settings, show_settings

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
        return _fail(error, 2)
    except RunFailed as error:
        return _fail(error, 1)
    except OSError as error:  # any file of the run folder, such as metrics.jsonl
        if error.errno not in DISK_ERRORS:
            raise
        return _fail(f"{error}. {FREE_SPACE}", 1)
    except KeyboardInterrupt as error:
        return _fail(f"interrupted. {error or 'Nothing was written.'}", 130)
    finally:
        _end_process_group()
    return 0


def run(settings: dict[str, Any], origins: dict[str, str]) -> Path | None:
    """Train as the settings say, and return the run folder (None for a dry run)."""
    import torch
    from accelerate.utils import set_seed
    from torch.nn import functional as F

    from lbaccel import auto_plan, growth
    from lbaccel.accelerator import make_accelerator, zero_stage
    from lbaccel.advice import closing_advice
    from lbaccel.batch import BatchPlan
    from lbaccel.data.augment import GroupMix
    from lbaccel.data.loader import UpdateLoader
    from lbaccel.data.pipelines import evaluation_batches, training_set
    from lbaccel.data.sources import ImageArray, open_source
    from lbaccel.engine import LargeBatch
    from lbaccel.evaluation import evaluate
    from lbaccel.normalization import has_batch_norm
    from lbaccel.param_groups import reference_lr
    from lbaccel.progress import Progress, closing_table, peak_gib
    from lbaccel.recipe import (
        build_model,
        build_noise_scale,
        build_optimizer,
        check_numbers,
        choose_micro_batch_size,
        choose_norm_batch_size,
        limit_for,
        loss_dropout,
        takes_fused_step,
    )
    from lbaccel.run_log import RunLog
    from lbaccel.run_session import Session, find_checkpoint, load_weights
    from lbaccel.schedulers import lr_scheduler
    from lbaccel.signals import graceful_signals
    from lbaccel.stream import UpdateStream

    s = check_numbers(settings)
    accelerator, precision = make_accelerator(s["precision"])
    dtype = torch.float64 if precision == "fp64" else torch.float32
    say = accelerator.print
    auto_resume = origins.get("resume") == "auto"
    if s["resume"] is None and auto_resume:
        say("resume: no run here was asked for with these settings; a new one starts")
    resume_from = find_checkpoint(accelerator, s["resume"], auto=auto_resume, say=say)
    set_seed(s["seed"])

    # -- data and model -----------------------------------------------------------------------
    source = open_source(s["data"], val_fraction=s["val_fraction"], seed=s["seed"])
    say(f"data: {source.description}")
    num_classes = len(source.train.classes)
    if s["num_classes"] is not None and s["num_classes"] < num_classes:
        raise InputError(
            f"--num-classes {s['num_classes']} is below the {num_classes} classes of "
            f"{s['data']}. Leave it out, or give at least {num_classes}."
        )
    num_classes = s["num_classes"] or num_classes
    model, preprocessing = build_model(
        s, source, num_classes=num_classes, say=say, load_weights=resume_from is None
    )
    model = model.to(dtype)

    # -- the batch ----------------------------------------------------------------------------
    mixes = bool(s["mixup"] or s["cutmix"])
    num_samples = len(source.train)
    norm_batch_size = choose_norm_batch_size(
        s, has_batch_norm=has_batch_norm(model), num_samples=num_samples
    )
    segments = growth.segments_of(s, num_samples=num_samples, say=say)
    sizes = growth.sizes(segments)
    auto = s["micro_batch_size"] == "auto"
    chosen = auto_plan.as_asked(s)
    if auto_plan.wants_plan(s):
        chosen = auto_plan.choose(
            {**s, "global_batch_size": max([s["global_batch_size"], *(b for _, b in sizes)])},
            model,
            accelerator=accelerator,
            norm_batch_size=norm_batch_size,
            num_samples=num_samples,
            image_shape=(source.num_channels, preprocessing["img_size"], preprocessing["img_size"]),
            dtype=dtype,
            precision=precision,
            say=say,
        )
    model = auto_plan.apply(model, chosen, say=say)
    searches = auto and chosen.micro_batch_size is None
    plan = BatchPlan(
        global_batch_size=s["global_batch_size"],
        micro_batch_size=chosen.micro_batch_size
        or choose_micro_batch_size(s, norm_batch_size=norm_batch_size),
        world_size=accelerator.num_processes,
        norm_batch_size=norm_batch_size,
        mix_pairs=mixes,
    )
    say(
        plan.explain(
            num_samples=num_samples,
            epochs=s["epochs"],
            last_update=s["last_update"],
            growth=sizes,
        )
    )
    plan = plan.capped(num_samples)
    if norm_batch_size == "frozen" and not (s["pretrained"] or s["checkpoint"]):
        say(
            "warning: BatchNorm is frozen in a network without pretrained weights, so it does not "
            "normalise at all. Use --norm-batch-size 32, or --pretrained."
        )
    mix = None
    if mixes:
        mix = GroupMix(num_classes, s["mixup"], s["cutmix"], s["label_smoothing"], s["seed"])
    loader = UpdateLoader(
        training_set(
            source.train,
            preprocessing=preprocessing,
            seed=s["seed"],
            mirror=source.name != "digits",
            auto_augment=s["auto_augment"],
        ),
        plan,
        rank=accelerator.process_index,
        seed=s["seed"],
        last_update=s["last_update"],
        growth=sizes,
        num_workers=s["workers"],
        transform=mix,
    )
    stream: UpdateStream = loader.stream
    num_updates = stream.num_updates(s["epochs"])
    stop_at = min(num_updates, s["max_updates"] or num_updates)

    # -- learning rate, optimizer, schedule ---------------------------------------------------
    optimizer, schedule, lr_values = build_optimizer(
        s,
        model,
        plan=plan,
        stream=stream,
        segments=segments,
        fused=takes_fused_step(s, accelerator, precision),
        say=say,
    )
    if segments:
        say(growth.explain(segments, stream=stream, epochs=s["epochs"], lr=lr_values["lr"]))
    scheduler = lr_scheduler(
        optimizer, schedule, samples_per_update=lambda update: stream.span(update)[1]
    )
    model.to(accelerator.device)
    ema = None
    if s["ema_decay"] is not None:
        from timm.utils.model_ema import ModelEmaV3

        ema = ModelEmaV3(model, decay=s["ema_decay"])
    if resume_from is not None:
        load_weights(resume_from, model, ema=ema)
    drops = loss_dropout(s, stream)
    noise_scale = build_noise_scale(s, plan, stream, accelerator, searches=searches, say=say)
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

    def loss_fn(model: Any, micro_batch: Any) -> Any:
        images, targets = micro_batch
        images = images.to(dtype)
        if chosen.memory_format == "channels_last":
            images = images.to(memory_format=torch.channels_last)
        if targets.is_floating_point():  # soft targets of mixup, smoothed already
            return F.cross_entropy(model(images), targets.to(dtype))
        return F.cross_entropy(model(images), targets, label_smoothing=s["label_smoothing"])

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
                    found = evaluate(network, batches, accelerator, dtype=dtype)
                    metrics.update({f"val/{key}{suffix}": value for key, value in found.items()})
        return metrics

    def more() -> dict[str, float]:
        """Metrics of parts that not every run has."""
        found = {} if noise_scale is None else noise_scale.metrics()
        return found if drops is None else {**found, "optim/num_dropped": drops.num_dropped}

    # -- the run on disk ------------------------------------------------------------------------
    log = RunLog(stream, log_every=s["log_every"], eval_every=s["eval_every"], stop_at=stop_at)
    parts = {
        "optimizer": large_batch.optimizer_state(),
        "scheduler": scheduler,
        "counters": large_batch,
        "loader": loader,
        "log": log,
    }
    if drops is not None:
        parts["loss_dropout"] = drops
    if accelerator.scaler is not None:
        parts["scaler"] = accelerator.scaler
    session = Session(accelerator, bare_model, large_batch.whole_model, parts, ema=ema)
    if resume_from is not None:
        done = session.restore(resume_from, say=say)
        if done > num_updates:
            raise InputError(
                f"--epochs {s['epochs']:g} are {num_updates} updates, and the run has done {done}. "
                "Use more epochs."
            )
        if done >= stop_at and session.was_closed():
            say(f"nothing left to do: {done} of {stop_at} updates are done in {session.folder}")
            return session.folder
    with contextlib.ExitStack() as around:
        line = around.enter_context(limit_for(s, accelerator.device, auto=auto))
        if line:
            say(line)
        if searches:
            found = large_batch.find_micro_batch_size(loader, loss_fn)
            say(f"micro-batch: {found} samples, the largest that fits\n{large_batch.plan}")
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
            resolved = {**s, **lr_values, "precision": precision, "num_classes": num_classes}
            resolved |= {k: preprocessing[k] for k in ("img_size", "mean", "std", "interpolation")}
            resolved["norm_batch_size"] = plan.norm_batch_size
            resolved["milestones"] = growth.milestones(s)
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
                for update in loader:
                    lr = reference_lr(scheduler.optimizer)
                    before = time.perf_counter()
                    if before > deadline:
                        large_batch.request_stop("time limit")
                    result = large_batch.update(update, loss_fn)
                    stop = result.stop
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
        say(closing_advice(noise_scale, plan.global_batch_size))
    if status == "stopped":
        say(f"stopped: the time limit of {s['max_hours']:g} h; {session.how_to_go_on()}")
    say(session.folder)
    return session.folder


def _fail(error: object, code: int) -> int:
    """Print the message on the first rank, as the last line, and return the exit code."""
    sys.stdout.flush()
    if rank() == 0 or isinstance(error, RankFailed):
        name = {2: "error", 1: "run failed"}.get(code)
        print(f"{name}: {error}" if name else str(error), file=sys.stderr, flush=True)
    return code


def _end_process_group() -> None:
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
