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
from fractions import Fraction
from pathlib import Path
from typing import Any

from lbaccel.errors import InputError, RunFailed
from lbaccel.settings import read_settings, show_settings

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO)


def main(argv: Sequence[str] | None = None, *, prog: str = "lbaccel train") -> int:
    """Run the recipe; returns the exit code: 0 done, 1 run failed, 2 user's input, 130 stopped."""
    try:
        settings, origins, show = read_settings(sys.argv[1:] if argv is None else argv, prog=prog)
        if show:
            print(show_settings(settings, origins))
            return 0
        run(settings, origins)
    except InputError as error:
        return _fail(error, 2)
    except RunFailed as error:
        return _fail(error, 1)
    except OSError as error:  # any file of the run folder, such as metrics.jsonl
        if error.errno not in DISK_ERRORS:
            raise
        return _fail(
            f"{error}. What was saved before is kept. Free some space, or give another --output.", 1
        )
    except KeyboardInterrupt:
        return _fail("interrupted; the last checkpoint is kept.", 130)
    finally:
        _end_process_group()
    return 0


def run(settings: dict[str, Any], origins: dict[str, str]) -> Path | None:
    """Train as the settings say, and return the run folder (None for a dry run)."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from torch.nn import functional as F

    from lbaccel.batch import BatchPlan
    from lbaccel.checkpointing import apply_activation_checkpointing
    from lbaccel.checkpoints import save_checkpoint
    from lbaccel.data.augment import GroupMix
    from lbaccel.data.loader import UpdateLoader
    from lbaccel.data.pipelines import evaluation_batches, training_set
    from lbaccel.data.sources import ImageArray, open_source
    from lbaccel.engine import LargeBatch
    from lbaccel.evaluation import evaluate
    from lbaccel.normalization import has_batch_norm
    from lbaccel.progress import Progress, closing_table, peak_gib
    from lbaccel.recipe import (
        build_model,
        build_optimizer,
        check_numbers,
        choose_micro_batch_size,
        choose_norm_batch_size,
    )
    from lbaccel.schedulers import lr_scheduler
    from lbaccel.stream import UpdateStream

    s = check_numbers(settings)
    precision = s["precision"]
    accelerator = Accelerator(
        cpu=not _has_accelerator(),
        mixed_precision={"fp32": "no", "fp64": "no"}.get(precision, precision),
    )
    precision = (
        precision
        or {"no": "fp32"}.get(accelerator.mixed_precision)
        or (accelerator.mixed_precision)
    )
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError(
            "the launcher's mixed_precision: fp16 needs a GPU: there is none. Use --precision bf16 "
            "or fp32."
        )
    dtype = torch.float64 if precision == "fp64" else torch.float32
    say = accelerator.print
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
    model, preprocessing = build_model(s, source, num_classes=num_classes, say=say)
    model = model.to(dtype)
    if s["memory_format"] == "channels_last":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if s["activation_checkpointing"] == "full":
        say(str(apply_activation_checkpointing(model)))

    # -- the batch ----------------------------------------------------------------------------
    mixes = bool(s["mixup"] or s["cutmix"])
    num_samples = len(source.train)
    norm_batch_size = choose_norm_batch_size(
        s, has_batch_norm=has_batch_norm(model), num_samples=num_samples
    )
    s["micro_batch_size"] = choose_micro_batch_size(s, norm_batch_size=norm_batch_size)
    plan = BatchPlan(
        global_batch_size=s["global_batch_size"],
        micro_batch_size=s["micro_batch_size"],
        world_size=accelerator.num_processes,
        norm_batch_size=norm_batch_size,
        mix_pairs=mixes,
    )
    say(plan.explain(num_samples=num_samples, epochs=s["epochs"], last_update=s["last_update"]))
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
        num_workers=s["workers"],
        transform=mix,
    )
    stream: UpdateStream = loader.stream
    num_updates = stream.num_updates(s["epochs"])
    stop_at = min(num_updates, s["max_updates"] or num_updates)

    # -- learning rate, optimizer, schedule ---------------------------------------------------
    optimizer, schedule, lr_values = build_optimizer(s, model, plan=plan, stream=stream, say=say)
    scheduler = lr_scheduler(
        optimizer, schedule, samples_per_update=lambda update: stream.span(update)[1]
    )
    model.to(accelerator.device)
    ema = None
    if s["ema_decay"] is not None:
        from timm.utils.model_ema import ModelEmaV3

        ema = ModelEmaV3(model, decay=s["ema_decay"])
    large_batch = LargeBatch(
        accelerator,
        plan,
        clip_grad_norm=s["clip_grad_norm"],
        bn_statistics=s["bn_statistics"],
    )
    bare_model = model
    model, optimizer, loader, scheduler = large_batch.prepare(
        model, optimizer, loader, scheduler, ema=ema
    )
    set_seed(s["seed"], device_specific=True)  # dropout differs between ranks

    def loss_fn(model: Any, micro_batch: Any) -> Any:
        images, targets = micro_batch
        images = images.to(dtype)
        if s["memory_format"] == "channels_last":
            images = images.to(memory_format=torch.channels_last)
        if targets.is_floating_point():  # soft targets of mixup, smoothed already
            return F.cross_entropy(model(images), targets.to(dtype))
        return F.cross_entropy(model(images), targets, label_smoothing=s["label_smoothing"])

    def validate() -> dict[str, float]:
        metrics = {}
        for suffix, network in (("", bare_model), ("_ema", ema.module if ema else None)):
            if network is not None:
                batches = evaluation_batches(
                    source.val,
                    preprocessing=preprocessing,
                    batch_size=s["micro_batch_size"],
                    rank=accelerator.process_index,
                    world_size=accelerator.num_processes,
                    num_workers=0 if isinstance(source.val, ImageArray) else s["workers"],
                )
                found = evaluate(network, batches, accelerator, dtype=dtype)
                metrics.update({f"val/{key}{suffix}": value for key, value in found.items()})
        return metrics

    # -- the run folder -----------------------------------------------------------------------
    folder = None
    if not s["dry_run"]:
        plan_values = {
            "equation": str(plan),
            "world_size": plan.world_size,
            "gradient_accumulation_steps": plan.gradient_accumulation_steps,
            "num_updates": num_updates,
            "norm_batch_size": plan.norm_batch_size,
            "lr": lr_values.pop("lr"),
        }
        resolved = {**s, **lr_values, "precision": precision, "num_classes": num_classes}
        resolved |= {k: preprocessing[k] for k in ("img_size", "mean", "std", "interpolation")}
        resolved["norm_batch_size"] = plan.norm_batch_size
        folder = _open_run_folder(accelerator, resolved, plan_values, origins, say)
    else:
        stop_at = min(2, stop_at)

    # -- the loop -----------------------------------------------------------------------------
    eval_samples = Fraction(str(s["eval_every"])) * stream.samples_per_epoch  # exact
    next_eval = eval_samples
    best: dict[str, float] = {}
    window: list[tuple[float, int]] = []
    progress = Progress(stop_at, accelerator.is_main_process)
    started = time.perf_counter()
    training_seconds = 0.0
    status, reason = "done", ""
    latest: dict[str, float] = {}
    try:
        while large_batch.num_updates < stop_at:
            for update in loader:
                lr = max(scheduler.get_last_lr())
                before = time.perf_counter()
                result = large_batch.update(update, loss_fn)
                training_seconds += time.perf_counter() - before
                if not result.applied:
                    progress.note(f"update {update.index + 1}: fp16 overflow, skipped")
                    continue
                window.append((result.loss, result.num_samples))
                count, seen = result.num_updates, result.samples_seen
                at = {
                    "update": count,
                    "samples_seen": seen,
                    "epoch": seen / stream.samples_per_epoch,
                    "perf/seconds": time.perf_counter() - started,
                }
                last = count == stop_at
                if count % s["log_every"] == 0 or last:
                    weight = sum(n for _, n in window)
                    latest = {
                        "train/loss": sum(loss * n for loss, n in window) / weight,
                        "optim/lr": lr,
                        "optim/grad_norm": result.grad_norm,
                        "batch/global": result.num_samples,
                        "perf/samples_per_second": seen / training_seconds,
                        "memory/peak_gib": peak_gib(),
                    }
                    window = []
                    if folder is not None:
                        accelerator.log({**at, **latest}, step=count)
                evaluates = seen >= next_eval or last
                if evaluates and not s["dry_run"]:
                    next_eval = (seen // eval_samples + 1) * eval_samples
                    metrics = validate()
                    accelerator.log({**at, **metrics}, step=count)
                    latest |= metrics
                    improved = metrics["val/top1"] > best.get("val/top1", -1.0)
                    if improved:
                        best = {**at, **metrics}
                else:
                    improved = False
                every = s["checkpoint_every"]
                saves = count % every == 0 if every else evaluates
                if (saves or last or improved) and folder is not None:
                    if accelerator.is_main_process:
                        weights = {"model": bare_model.state_dict()}
                        if ema is not None:
                            weights["model_ema"] = ema.module.state_dict()
                        save_checkpoint(
                            folder / "checkpoints",
                            update=count,
                            weights=weights,
                            classes=source.train.classes,
                            preprocessing=preprocessing,
                            best=improved,
                            keep=s["keep"],
                        )
                    accelerator.wait_for_everyone()
                progress.show(count, {**at, **latest})
                if last:
                    break
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        reason = str(error) or type(error).__name__
        raise
    finally:
        progress.close()
        if folder is not None:
            summary = {
                "status": status,
                "exit_reason": reason,
                "model": s["model"],
                "num_updates": large_batch.num_updates,
                "samples_seen": large_batch.samples_seen,
                "seconds": time.perf_counter() - started,
                "peak_gib": peak_gib(),
                "samples_per_second": large_batch.samples_seen / max(training_seconds, 1e-9),
                "best_val_top1": best.get("val/top1"),
                "best_update": best.get("update"),
                **{k.replace("/", "_"): v for k, v in latest.items() if k[:4] in ("val/", "trai")},
            }
            # a full disk must not hide why the run failed
            with contextlib.suppress(OSError) if status != "done" else contextlib.nullcontext():
                _close_run_folder(accelerator, folder, summary, failed=status != "done")
    if folder is None:
        say(f"dry run: {stop_at} updates done, {peak_gib():.2f} GiB at the peak, nothing written")
        return None
    say(closing_table(summary))
    say(folder)
    return folder


def _has_accelerator() -> bool:
    """Whether there is a device to train on; Apple's MPS has no float64, which the sums need."""
    import torch

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device is not None and device.type != "mps"


def _open_run_folder(
    accelerator: Any,
    resolved: dict[str, Any],
    plan: dict[str, Any],
    origins: dict[str, str],
    say: Any,
) -> Path:
    from lbaccel.run_folder import new_run_folder, write_config, write_env
    from lbaccel.tracking import start_trackers

    s = resolved
    folder = Path(s["output"])
    if accelerator.is_main_process:
        name = f"{s['model']}-gbs{s['global_batch_size']}"
        folder = new_run_folder(folder, name)
        write_config(folder, {**s, "plan": plan, "origin": origins})
        write_env(folder, seed=s["seed"])
    line = start_trackers(
        accelerator,
        folder,
        config={**s, **{f"plan/{k}": v for k, v in plan.items()}},
        log_with=s["log_with"],
        project=s["wandb_project"],
        group=s["wandb_group"],
        name=s["wandb_name"],
        tags=s["wandb_tags"],
        mode=s["wandb_mode"],
    )
    if line:
        say(line)
    return folder


def _close_run_folder(
    accelerator: Any, folder: Path, summary: dict[str, Any], *, failed: bool
) -> None:
    from lbaccel.plots import plot_run
    from lbaccel.run_folder import write_summary
    from lbaccel.tracking import METRICS

    try:
        if accelerator.is_main_process:
            write_summary(folder, summary)
    finally:
        accelerator.end_training()
    if accelerator.is_main_process and not failed and (folder / METRICS).exists():
        plot_run(folder)


def _fail(error: object, code: int) -> int:
    """Print the message on the first rank, as the last line, and return the exit code."""
    import torch.distributed as dist

    sys.stdout.flush()
    if not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
        name = {2: "error", 1: "run failed"}.get(code)
        print(f"{name}: {error}" if name else str(error), file=sys.stderr, flush=True)
    return code


def _end_process_group() -> None:
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
