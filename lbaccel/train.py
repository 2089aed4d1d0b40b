"""The recipe: train or finetune a timm backbone at any global batch, on lbaccel's public API.

`accelerate launch --config_file accelerate_configs/cpu.yaml -m lbaccel.train` runs it; so does
`lbaccel train`. Read `run` top to bottom: it is a training loop that you could write yourself.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lbaccel.errors import InputError, RunFailed
from lbaccel.settings import read_settings, show_settings

PLAIN_LINES = 20  # progress lines of a run where there is no terminal


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

    from lbaccel.batch import BatchPlan, UpdateStream
    from lbaccel.checkpointing import apply_activation_checkpointing
    from lbaccel.checkpoints import save_checkpoint
    from lbaccel.data.augment import GroupMix
    from lbaccel.data.loader import UpdateLoader
    from lbaccel.data.pipelines import evaluation_batches, training_set
    from lbaccel.data.sources import ImageArray, open_source
    from lbaccel.engine import LargeBatch
    from lbaccel.evaluation import evaluate
    from lbaccel.normalization import has_batch_norm
    from lbaccel.schedules import lr_scheduler

    s = _checked(settings)
    precision = s["precision"]
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision={"fp32": "no", "fp64": "no"}.get(precision, precision),
    )
    precision = (
        precision
        or {"no": "fp32"}.get(accelerator.mixed_precision)
        or (accelerator.mixed_precision)
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
    model, preprocessing = _build_model(s, source, num_classes, say)
    model = model.to(dtype)
    if s["memory_format"] == "channels_last":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if s["activation_checkpointing"] == "full":
        say(str(apply_activation_checkpointing(model)))

    # -- the batch ----------------------------------------------------------------------------
    mixes = bool(s["mixup"] or s["cutmix"])
    plan = BatchPlan(
        global_batch_size=s["global_batch_size"],
        micro_batch_size=s["micro_batch_size"],
        world_size=accelerator.num_processes,
        norm_batch_size=_norm_batch_size(s, has_batch_norm(model)),
        mix_pairs=mixes,
    )
    explained = (
        plan.explain(
            num_samples=len(source.train), epochs=s["epochs"], last_update=s["last_update"]
        )
        if plan.global_batch_size <= len(source.train)
        else None
    )
    plan = plan.capped(len(source.train))
    say(explained or plan.explain(num_samples=len(source.train), epochs=s["epochs"]))
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
    optimizer, schedule, lr_values = _optimizer_and_schedule(s, model, plan, stream, say)
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
        }
        resolved = {**s, **lr_values, "precision": precision, "num_classes": num_classes}
        resolved |= {k: preprocessing[k] for k in ("img_size", "mean", "std", "interpolation")}
        resolved["norm_batch_size"] = plan.norm_batch_size
        folder = _open_run_folder(accelerator, resolved, plan_values, origins, say)
    else:
        stop_at = min(2, stop_at)

    # -- the loop -----------------------------------------------------------------------------
    eval_samples = s["eval_every"] * stream.samples_per_epoch
    next_eval = eval_samples
    best: dict[str, float] = {}
    window: list[tuple[float, int]] = []
    progress = _Progress(stop_at, accelerator.is_main_process)
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
                        "memory/peak_gib": _peak_gib(),
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
                "peak_gib": _peak_gib(),
                "samples_per_second": large_batch.samples_seen / max(training_seconds, 1e-9),
                "best_val_top1": best.get("val/top1"),
                "best_update": best.get("update"),
                **{k.replace("/", "_"): v for k, v in latest.items() if k[:4] in ("val/", "trai")},
            }
            _close_run_folder(accelerator, folder, summary, failed=status != "done")
    if folder is None:
        say(f"dry run: {stop_at} updates done, {_peak_gib():.2f} GiB at the peak, nothing written")
        return None
    say(_closing_table(summary))
    say(folder)
    return folder


def _checked(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, where their numbers can be used at all."""
    import torch

    s = dict(settings)
    above_zero = ("epochs", "eval_every", "log_every", "keep", "max_updates", "checkpoint_every")
    for name in (*above_zero, "base_lr", "base_batch_size", "img_size"):
        if s[name] is not None and not (s[name] > 0 and math.isfinite(s[name])):
            raise InputError(f"--{name.replace('_', '-')} {s[name]} must be above 0.")
    for name in ("drop_rate", "drop_path", "label_smoothing", "momentum", "ema_decay"):
        if s[name] is not None and not 0 <= s[name] < 1:
            raise InputError(f"--{name.replace('_', '-')} {s[name]} must be in 0..1, below 1.")
    for name in ("weight_decay", "workers", "seed", "mixup", "cutmix"):
        if s[name] is not None and s[name] < 0:
            raise InputError(f"--{name.replace('_', '-')} {s[name]} must not be below 0.")
    if s["crop_pct"] is not None and not 0 < s["crop_pct"] <= 1:
        raise InputError(f"--crop-pct {s['crop_pct']} must be in 0..1.")
    if s["precision"] == "fp16" and not torch.cuda.is_available():
        raise InputError("--precision fp16 needs a GPU: there is none. Use bf16 or fp32.")
    return s


def _norm_batch_size(s: dict[str, Any], has_batch_norm: bool) -> Any:
    given = s["norm_batch_size"]
    if not has_batch_norm:
        if isinstance(given, int):
            raise InputError(
                f"--norm-batch-size {given}: {s['model']} has no BatchNorm. Leave it out."
            )
        return None
    return min(32, s["global_batch_size"]) if given is None else given


def _build_model(s: dict[str, Any], source: Any, num_classes: int, say: Any) -> tuple[Any, Any]:
    """The backbone and what evaluation needs to know of its input; says where each comes from."""
    import timm

    from lbaccel.data.sources import ImageArray
    from lbaccel.models import SMALL_IMAGE, adapt_stem, create_backbone, preprocessing

    size, origin = s["img_size"], "flag"
    if size is None and isinstance(source.train, ImageArray):
        size, origin = source.train.images.shape[-1], "the images' own"
    model = create_backbone(
        s["model"],
        num_classes=num_classes,
        num_channels=source.num_channels,
        img_size=size,
        pretrained=s["pretrained"],
        checkpoint=None if s["checkpoint"] is None else Path(s["checkpoint"]),
        drop_rate=s["drop_rate"],
        drop_path=s["drop_path"],
    )
    if size is None:
        size, origin = timm.data.resolve_model_data_config(model)["input_size"][-1], "the model's"
    stem = "native"
    if s["stem"] == "small" or (s["stem"] == "auto" and size < SMALL_IMAGE and not s["pretrained"]):
        done = adapt_stem(model)
        if done is None and s["stem"] == "small":
            raise InputError(
                f"--stem small: {s['model']} is no ResNet or MobileNetV2. Leave it out."
            )
        if done is not None:
            stem = "small"
            say(f"stem: small, for images below {SMALL_IMAGE} px: {done}")
    values, origins = preprocessing(model, num_channels=source.num_channels, given=s)
    shown = ", ".join(
        f"{key} {_short(values[key])} ({origins[key]})" for key in ("mean", "std", "interpolation")
    )
    num_parameters = sum(p.numel() for p in model.parameters())
    say(f"model: {s['model']}, {num_parameters / 1e6:.2f} M parameters, {num_classes} classes")
    say(f"images: {size} px ({origin}), {shown}")
    values |= {"img_size": size, "num_channels": source.num_channels, "stem": stem}
    return model, values | {"model": s["model"], "num_classes": num_classes}


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(f"{x:.3f}" for x in value) + ")"
    return str(value)


def _optimizer_and_schedule(
    s: dict[str, Any], model: Any, plan: Any, stream: Any, say: Any
) -> tuple[Any, Any, dict[str, Any]]:
    """The optimizer at the scaled learning rate, the schedule, and the values they were made of."""
    import difflib

    from timm.optim import create_optimizer_v2, list_optimizers

    from lbaccel.scaling import choose_rule, explain_lr, scale_lr
    from lbaccel.schedules import Duration, make_schedule

    name = s["optimizer"].lower()
    if name not in list_optimizers():
        near = difflib.get_close_matches(name, list_optimizers(), n=3, cutoff=0.4)
        raise InputError(f"optimizer={name!r} is none of timm.optim. Nearest: {', '.join(near)}.")
    rule, why = choose_rule(name)
    is_sgd = rule == "linear"
    if s["lr_scaling"] != "auto":
        rule, why = s["lr_scaling"], "as asked"
    base_lr = s["base_lr"]
    if base_lr is None:
        base_lr = (0.1 if is_sgd else 1e-3) if not s["pretrained"] else (0.01 if is_sgd else 1e-4)
    weight_decay = s["weight_decay"]
    if weight_decay is None:
        weight_decay = 1e-4 if is_sgd else 0.05
    batch = {"base_batch_size": s["base_batch_size"], "global_batch_size": plan.global_batch_size}
    peak_lr = scale_lr(base_lr, **batch, rule=rule)
    say(f"{explain_lr(base_lr, **batch, rule=rule)} ({why})")
    warmup_epochs = s["warmup_epochs"]
    if warmup_epochs is None:
        warmup_epochs = min(5.0, s["epochs"] / 10)
    schedule = make_schedule(
        total=Duration(samples=stream.samples_seen(stream.num_updates(s["epochs"]))),
        base_lr=base_lr,
        peak_lr=peak_lr,
        global_batch_size=plan.global_batch_size,
        num_samples=stream.samples_per_epoch,
        decay=s["schedule"],
        warmup=s["warmup"],
        warmup_duration=Duration(epochs=warmup_epochs),
        start=s["warmup_start"],
        milestones=s["milestones"],
        gamma=s["gamma"],
    )
    options: dict[str, Any] = {} if s["layer_decay"] is None else {"layer_decay": s["layer_decay"]}
    optimizer = create_optimizer_v2(
        model,
        opt=name,
        lr=peak_lr,
        weight_decay=weight_decay,
        momentum=s["momentum"],
        filter_bias_and_bn=not s["decay_all"],
        **options,
    )
    for group in optimizer.param_groups:  # timm's own schedulers would apply it
        group["lr"] *= group.get("lr_scale", 1.0)
    values = {
        "base_lr": base_lr,
        "lr": peak_lr,
        "lr_scaling": rule,
        "weight_decay": weight_decay,
        "warmup_epochs": warmup_epochs,
    }
    return optimizer, schedule, values


def _open_run_folder(
    accelerator: Any,
    resolved: dict[str, Any],
    plan: dict[str, Any],
    origins: dict[str, str],
    say: Any,
) -> Path:
    from lbaccel.tracking import new_run_folder, start_trackers, write_config, write_env

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
    from lbaccel.tracking import write_summary

    if accelerator.is_main_process:
        write_summary(folder, summary)
    accelerator.end_training()
    if accelerator.is_main_process and not failed:
        plot_run(folder)


def _closing_table(summary: dict[str, Any]) -> str:
    rows = [
        ("validation top-1", _percent(summary.get("val_top1"))),
        ("best validation top-1", f"{_percent(summary['best_val_top1'])} "
         f"(update {summary['best_update']})"),
        ("train loss", f"{summary.get('train_loss', math.nan):.4f}"),
        ("updates", f"{summary['num_updates']:,}"),
        ("samples", f"{summary['samples_seen']:,}"),
        ("seconds", f"{summary['seconds']:.1f}"),
        ("samples a second in updates", f"{summary['samples_per_second']:,.0f}"),
        ("peak memory", f"{summary['peak_gib']:.2f} GiB"),
    ]  # fmt: skip
    if "val_top1_ema" in summary:
        rows.insert(1, ("validation top-1, EMA", _percent(summary["val_top1_ema"])))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def _peak_gib() -> float:
    """Peak memory: of the CUDA allocator, or of this process where there is no GPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib * (1 if sys.platform == "darwin" else 1024) / 2**30


class _Progress:
    """A bar on a terminal, plain lines elsewhere; silent on all ranks but the first."""

    def __init__(self, total: int, is_main_process: bool) -> None:
        self.total, self.is_main_process = total, is_main_process
        self.every = max(1, total // PLAIN_LINES)
        self.bar: Any = None
        if is_main_process and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, unit="update", dynamic_ncols=True)

    def show(self, update: int, metrics: dict[str, Any]) -> None:
        shown = {
            "epoch": f"{metrics['epoch']:.1f}",
            "loss": f"{metrics.get('train/loss', math.nan):.4f}",
            "lr": f"{metrics.get('optim/lr', math.nan):.4g}",
        }
        if "val/top1" in metrics:
            shown["val/top1"] = f"{metrics['val/top1']:.2f}"
        if self.bar is not None:
            self.bar.update(update - self.bar.n)
            self.bar.set_postfix(shown)
        elif self.is_main_process and (update % self.every == 0 or update == self.total):
            shown["samples/s"] = f"{metrics.get('perf/samples_per_second', math.nan):,.0f}"
            shown["peak"] = f"{metrics.get('memory/peak_gib', math.nan):.2f} GiB"
            line = "  ".join(f"{key} {value}" for key, value in shown.items())
            print(f"update {update}/{self.total}  {line}", flush=True)

    def note(self, text: str) -> None:
        if self.is_main_process:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


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
