"""Tables of a model card out of a run folder's values; what the folder does not hold has no row."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from timm.optim import get_optimizer_info

from lbaccel.errors import InputError
from lbaccel.export.shareable import without_folders
from lbaccel.optim.scaling import find_rule, scale_lr
from lbaccel.runs.compare import best_point
from lbaccel.runs.read import Point, Run
from lbaccel.text import in_code_span, in_markdown

Rows = list[tuple[str, str]]

_DATA = {
    "digits": "scikit-learn's handwritten digits, 8 x 8 pixels, grey",
    "cifar10": "CIFAR-10, 32 x 32 pixels",
    "cifar100": "CIFAR-100, 32 x 32 pixels",
    "folder": "a folder of images, a sub-folder a class",
    "parquet": "images in parquet files",
    "csv": "image files that a table lists",
    "hf": "a data set of the Hugging Face hub",
    "timm": "images in the order of timm's readers",
    "synthetic": "images that are made up",
}
_PACKAGES = ("lbaccel", "torch", "torchvision", "timm", "accelerate", "deepspeed", "numpy")
_KINDS = (("top1", "top-1", ".2f", " %"), ("loss", "loss", ".4g", ""))  # of validation metrics


def data(config: Mapping[str, Any], pre: Mapping[str, Any], *, num_classes: int) -> str:
    """Which images, and how evaluation reads them."""
    rows: Rows = []
    if config.get("data"):
        name = without_folders(str(config["data"]))
        form = name.partition(":")[0]
        rows.append(("data", in_code_span(name) + (f": {_DATA[form]}" if form in _DATA else "")))
    rows.append(("classes", f"{num_classes:,}"))
    rows += _given(config, "val_fraction", "share held out, where there is no validation set")
    rows += _given(config, "max_train_samples", "training images taken, of all there are")
    rows += _given(config, "max_val_samples", "validation images taken, of all there are")
    channels = pre["num_channels"]
    rows.append(("images", f"{pre['img_size']} px, {channels} channel{'s' * (channels > 1)}"))
    rows += [(key, ", ".join(f"{x:.4g}" for x in pre[key])) for key in ("mean", "std")]
    rows += [("interpolation", in_markdown(pre["interpolation"]))]
    if pre.get("exif_orientation") is not None:
        turned = "upright, as their EXIF entry says" if pre["exif_orientation"] else "as stored"
        rows.append(("photographs", turned))
    return table([*rows, ("share of the image kept in evaluation", f"{pre['crop_pct']:g}")])


def contract(run: Run) -> str:
    """The table of the settings that decide the result."""
    config = run.config
    batch = global_batch_size(config)
    grows = _batch_schedule(config)
    at_first = " at first" if grows else ""
    rows: Rows = [("global batch", f"{batch:,} samples an update{at_first}")] if batch else []
    rows += _known("batch schedule", grows)
    if "norm_batch_size" in config:
        n = config["norm_batch_size"]
        words = {
            "global": "all samples of an update (`norm_batch_size: global`)",
            "frozen": "its running statistics (frozen)",
            None: "no BatchNorm in this network",
        }
        rows.append(("BatchNorm over", words.get(n, f"{n} samples (`norm_batch_size`)")))
        if n not in words:
            rows += _given(config, "bn_statistics", "running statistics")
            rows += _given(config, "bn_momentum", "momentum of running statistics")
    rows += _known("learning rate", _learning_rate(config, batch))
    rows += _known("warmup", _warmup(config)) + _known("schedule", _schedule(config))
    rows += _known("optimizer", _optimizer(config))
    if config.get("weight_decay") is not None:
        where = "on all weights" if config.get("decay_all") else "biases and norms left out"
        rows.append(("weight decay", f"{config['weight_decay']:g}, {where}"))
    rows += _given(config, "layer_decay", "layer decay")
    rows += _given(config, "clip_grad_norm", "largest norm of the gradient")
    dropout = config.get("loss_dropout")
    if dropout and len(dropout) == 2:
        rows.append(("loss dropout", f"epochs {dropout[0]:g} to {dropout[1]:g}"))
    rows += _given(config, "precision", "precision of the forward pass")
    if "ema_decay" in config:
        decay = config["ema_decay"]
        rows.append(("EMA", "none" if decay is None else f"decay {decay:g} an update"))
        if decay is not None and isinstance(config.get("norm_batch_size"), int):
            rows += _given(config, "ema_norm", "statistics of BatchNorm in the EMA")
    rows += _known("teacher", _teacher(config))
    rows += _known("augmentation", _augmentation(config))
    rows += _given(config, "last_update", "an epoch's remainder")
    rows += _given(config, "seed", "seed") + _given(config, "epochs", "epochs")
    done, planned = total(run, "num_updates"), config.get("plan/num_updates")
    if done is not None:
        rows.append(("updates", f"{done:,}" + (f" of {planned:,}" if planned else "")))
    samples = total(run, "samples_seen")
    rows += [] if samples is None else [("samples seen", f"{samples:,}")]
    return table(rows)


def plan(config: Mapping[str, Any], resumes: Iterable[Mapping[str, Any]]) -> str:
    """How the batch was fitted, and the other ways of the resumes."""
    start = "plan/"
    of = {key.removeprefix(start): value for key, value in config.items() if key.startswith(start)}
    rows = _given(of, "equation", "partition")
    rows += _given(of, "micro_batch_size", "micro-batch (samples)")
    rows += _given(of, "gradient_accumulation_steps", "accumulation (micro-batches an update)")
    rows += _given(of, "world_size", "world size (processes)")
    rows += _given(of, "activation_checkpointing", "activation checkpointing")
    rows += _known("recomputed segments", of.get("segments") and str(len(of["segments"])))
    rows += _given(of, "memory_format", "memory format") + _given(of, "zero_stage", "ZeRO stage")
    for line in resumes:
        rows += _given(line, "plan", f"resumed after update {line['update']:,} as")
    return table(rows)


def metrics(run: Run, *, update: int, ema: bool) -> str:
    """Of the exported weights, the best and last ones of the run, and what the run took."""
    rows: Rows = []
    for key, title, spec, unit in _KINDS:
        series = run.history.get(f"val/{key}{'_ema' * ema}", ())
        own = next((point for point in series if point.update == update), None)
        rows += _at(own, f"**validation {title} of these weights**", spec=spec, unit=unit)
    for end, of in (("", ""), ("_ema", ", EMA")):
        for key, title, spec, unit in _KINDS:
            series = run.history.get(f"val/{key}{end}", ())
            ends = {
                "best": best_point(series, f"val/{key}"),
                "last": series[-1] if series else None,
            }
            for which, point in ends.items():
                rows += _at(
                    point, f"{which} validation {title}{of}", spec=spec, unit=unit, when=True
                )
    losses = run.history.get("train/loss", ())
    rows += _at(losses[-1] if losses else None, "final training loss", spec=".4g", when=True)
    for key, title, spec, unit in (
        ("samples_per_second", "samples a second in updates", ",.4g", ""),
        ("peak_gib", "peak memory of a process", ".2f", " GiB"),
        ("seconds", "seconds, validation included", ",.4g", ""),
    ):
        value = run.summary.get(key)
        rows += [] if value is None else [(title, format(value, spec) + unit)]
    return table(rows)


def hardware(env: Mapping[str, Any]) -> str:
    """Of `env.json`, without the kernel's name: it may tell the machine."""
    devices = Counter(in_markdown(str(device)) for device in env.get("devices") or [])
    rows = _known("devices", ", ".join(f"{n} x {name}" for name, n in devices.items()))
    rows += _given(env, "cpu_count", "CPU cores")
    rows += _known("system", in_markdown(str(env.get("platform") or "").partition("-")[0]))
    rows += _given(env, "python", "python")
    if set(devices) - {"cpu"}:
        rows += _given(env, "cuda", "CUDA")
    versions = env.get("versions") or {}
    return table(rows + [row for name in _PACKAGES for row in _given(versions, name, name)])


def global_batch_size(config: Mapping[str, Any]) -> int | None:
    """Samples an update had: a batch above the training set is cut to it, which the plan says.

    >>> global_batch_size({"global_batch_size": 4096, "plan/equation": "global batch 1438 = ..."})
    1438
    """
    found = re.match(r"global batch (\d+) = ", str(config.get("plan/equation", "")))
    return int(found[1]) if found else config.get("global_batch_size")


def total(run: Run, key: str) -> int | None:
    """`num_updates` or `samples_seen` of the summary, or else (a crash) of the last metrics."""
    if run.summary.get(key) is not None:
        return run.summary[key]
    points = [point for series in run.history.values() for point in series]
    values = [p.update if key == "num_updates" else p.samples_seen for p in points]
    return max((value for value in values if isinstance(value, int)), default=None)


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Markdown; nothing without rows.

    >>> table([("seed", "3")])
    '| | |\\n|---|---|\\n| seed | 3 |'
    """
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join(["| | |", "|---|---|", *lines]) if lines else ""


def _learning_rate(config: Mapping[str, Any], batch: int | None) -> str | None:
    """The peak rate with the equation that gives it; the rate alone where none does."""
    lr: float | None = config.get("plan/lr")
    if lr is None:
        return None
    base, base_batch = config.get("base_lr"), config.get("base_batch_size")
    rule = str(config.get("lr_scaling"))
    exponent = config.get("lr_exponent")
    sizes: dict[str, Any] = {"base_batch_size": base_batch, "global_batch_size": batch}
    try:
        scaled = scale_lr(base, **sizes, rule=rule, exponent=exponent)  # type: ignore[arg-type]
    except InputError:  # a setting is missing
        scaled = math.nan
    if not math.isclose(lr, scaled, rel_tol=1e-9):
        return f"{lr:.6g} at the peak"
    row = find_rule(rule)
    assert row is not None  # the rate was scaled by it
    factor = row.formula_at(f"{batch} / {base_batch}", exponent)
    times = "" if factor == "1" else f" x {factor}"
    return (
        f"{lr:.6g} at the peak = {base:g}{times} (rule: {rule}; base pair: "
        f"{base:g} at {base_batch} samples)"
    )


def _batch_schedule(config: Mapping[str, Any]) -> str | None:
    """The rule with what it was given, as `lbaccel schedule` takes it."""
    rule = config.get("batch_schedule")
    if rule in (None, "steady"):
        return rule
    parts = [in_markdown(str(rule))]
    for name in ("milestones", "factor", "growth", "lr_growth", "first_epoch", "max_batch_size"):
        value = config.get(name)
        if value not in (None, (), []):
            numbers = value if isinstance(value, (list, tuple)) else [value]
            parts.append(f"{name.replace('_', ' ')} {' '.join(f'{x:g}' for x in numbers)}")
    return ", ".join(parts)


def _warmup(config: Mapping[str, Any]) -> str | None:
    shape, epochs, start = (config.get(k) for k in ("warmup", "warmup_epochs", "warmup_start"))
    if shape in (None, "none") or not epochs:
        return shape and "none"
    if start == "reference":
        start = "the base learning rate"
    rule = find_rule(str(config.get("lr_scaling")))
    where = " at the base batch, times k" if rule is not None and rule.warmup_times_k else ""
    begins = "" if start is None else f", from {in_markdown(str(start))}"
    return f"{in_markdown(str(shape))}, {epochs:g} epochs{where}{begins}"


def _schedule(config: Mapping[str, Any]) -> str | None:
    name, milestones = config.get("schedule"), config.get("milestones")
    if name == "cosine" and config.get("final_lr") is not None:
        return f"cosine to {config['final_lr']:g}"
    if name in ("step", "multistep") and milestones and "gamma" in config:
        when = "every" if name == "step" else "at"
        return f"x {config['gamma']:g} {when} {', '.join(f'{x:g}' for x in milestones)} epochs"
    return name and in_markdown(str(name))


def _optimizer(config: Mapping[str, Any]) -> str | None:
    name = config.get("optimizer")
    if name is None:
        return None
    try:
        has_momentum = get_optimizer_info(name.lower()).has_momentum
    except ValueError:  # a name of another version of timm
        has_momentum = False
    shown = has_momentum and config.get("momentum") is not None
    return f"timm's {in_markdown(name)}" + (f", momentum {config['momentum']:g}" if shown else "")


def _teacher(config: Mapping[str, Any]) -> str | None:
    if not config.get("teacher"):
        return None
    where = in_code_span(without_folders(str(config["teacher"])))
    share, temperature = config.get("distill_alpha"), config.get("distill_temperature")
    return f"{where}, alpha {in_markdown(str(share))}, temperature {in_markdown(str(temperature))}"


def _augmentation(config: Mapping[str, Any]) -> str | None:
    """The settings that add to the recipe's crops and mirror images, which follow from the data."""
    names = ("mixup", "cutmix", "label_smoothing", "drop_rate", "drop_path", "auto_augment")
    names += ("scale", "ratio", "hflip", "color_jitter", "random_erasing")
    if not any(name in config for name in names):
        return None
    used = [f"{name} {in_markdown(str(config[name]))}" for name in names if config.get(name)]
    if config.get("aug_repeats", 1) != 1:
        used.append(f"aug_repeats {in_markdown(str(config['aug_repeats']))}")
    return ", ".join(["that of `lbaccel train` for these data", *used])


def _at(point: Point | None, title: str, *, spec: str, unit: str = "", when: bool = False) -> Rows:
    if point is None:
        return []
    text = "not finite" if point.value is None else format(point.value, spec) + unit
    return [(title + (f" (update {point.update:,})" if when else ""), text)]


def _known(title: str, text: str | None) -> Rows:
    return [(title, text)] if text else []


def _given(mapping: Mapping[str, Any], key: str, title: str) -> Rows:
    value = mapping.get(key)
    if value is None:
        return []
    return [(title, f"{value:g}" if isinstance(value, float) else in_markdown(str(value)))]
