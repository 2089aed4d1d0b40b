"""The recipe's settings: one table of options, read from defaults, a YAML file and flags."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lbaccel.errors import InputError

EPILOG = """examples:
  lbaccel train
      a small ResNet on handwritten digits at global batch 512, in two minutes on a CPU
  lbaccel train --data folder:flowers --model mobilenetv2_100 --pretrained \\
      --global-batch-size 512 --micro-batch-size 8 --norm-batch-size frozen
      finetune at 224 px on the memory of 8 images
  accelerate launch --config_file accelerate_configs/multi_gpu.yaml -m lbaccel.train \\
      --config recipe.yaml --global-batch-size 4096
      the settings of a file on several GPUs, one of them changed
"""


def _switch(text: Any) -> bool:
    if isinstance(text, bool):
        return text
    if str(text).lower() in ("true", "yes", "on", "1"):
        return True
    if str(text).lower() in ("false", "no", "off", "0"):
        return False
    raise ValueError("true or false")


def _floats(text: Any) -> tuple[float, ...]:
    parts = text.replace(",", " ").split() if isinstance(text, str) else text
    return tuple(float(p) for p in (parts if isinstance(parts, (list, tuple)) else [parts]))


def _words(text: Any) -> tuple[str, ...]:
    parts = text.replace(",", " ").split() if isinstance(text, str) else text
    return tuple(str(p) for p in parts)


def _norm_batch_size(text: Any) -> int | str:
    return "frozen" if text == "frozen" else int(text)


def _warmup_start(text: Any) -> float | str:
    return text if text in ("reference", "zero") else float(text)


def _whole(text: Any) -> int:
    if isinstance(text, bool) or (isinstance(text, float) and not text.is_integer()):
        raise ValueError("a whole number")
    return int(text)


@dataclass(frozen=True)
class Option:
    """One setting: its flag is `--name` with dashes, its YAML key `name`."""

    name: str
    parse: Callable[[Any], Any]
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    shown: str = ""  # the default in words, where it depends on other settings
    may_be_none: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "may_be_none", self.default is None)


GROUPS: dict[str, tuple[Option, ...]] = {
    "model": (
        Option("model", str, "resnet10t", "any timm model"),
        Option("pretrained", _switch, False, "start from timm's weights, or from --checkpoint"),
        Option("checkpoint", str, None, "weights file (.safetensors, .pth) to start from"),
        Option("num_classes", _whole, None, "outputs", shown="the data's classes"),
        Option("drop_rate", float, 0.0, "dropout before the classifier, probability"),
        Option("drop_path", float, 0.0, "stochastic depth, probability"),
    ),
    "data": (
        Option("data", str, "digits", "digits, cifar10, cifar100, folder:PATH or parquet:PATH"),
        Option("val_fraction", float, 0.2, "share held out where the data has no validation set"),
        Option("workers", _whole, 2, "processes that load image files, per rank"),
        Option("img_size", _whole, None, "pixels a side", shown="small images: their own; else the model's"),
        Option("stem", str, "auto", "small: stride 1 for images below 64 px", ("auto", "small", "native")),
        Option("mean", _floats, None, "per channel, of 0..1", shown="the model's"),
        Option("std", _floats, None, "per channel, of 0..1", shown="the model's"),
        Option("interpolation", str, None, "bilinear or bicubic", ("bilinear", "bicubic"), "the model's"),
        Option("crop_pct", float, None, "share of the image kept in evaluation", shown="the model's"),
        Option("label_smoothing", float, 0.0, "0..1"),
        Option("mixup", float, 0.0, "alpha; 0 is off"),
        Option("cutmix", float, 0.0, "alpha; 0 is off"),
        Option("auto_augment", str, None, "timm's policy, such as rand-m9-mstd0.5", shown="none"),
    ),
    "batch": (
        Option("global_batch_size", _whole, 512, "samples an update, over all ranks"),
        Option("micro_batch_size", _whole, 64, "samples a forward of one rank; no effect on the result"),
        Option("norm_batch_size", _norm_batch_size, None, "samples BatchNorm sees at once, or 'frozen'", shown="32, at most the global batch"),
        Option("bn_statistics", str, "per_ghost", "running statistics move once a ghost batch or once an update", ("per_ghost", "per_update")),
        Option("last_update", str, "wrap", "an epoch's remainder: into the next epoch, a short update, or left out", ("wrap", "keep", "drop")),
        Option("activation_checkpointing", str, "none", "recompute in the backward pass; no effect on the result", ("none", "full")),
        Option("memory_format", str, "contiguous", "of weights and images", ("contiguous", "channels_last")),
        Option("precision", str, None, "of the forward pass; fp64 proves a plan", ("fp32", "bf16", "fp16", "fp64"), "the launcher's, else fp32"),
    ),
    "learning rate": (
        Option("epochs", float, 40.0, "passes over the training set"),
        Option("max_updates", _whole, None, "stop after so many updates; the schedule stays that of --epochs", shown="no limit"),
        Option("base_lr", float, None, "learning rate at --base-batch-size", shown="0.1 (SGD) or 0.001; pretrained 0.01 or 0.0001"),
        Option("base_batch_size", _whole, 256, "samples that --base-lr was tuned at"),
        Option("lr_scaling", str, "auto", "rule from the base to the global batch; auto: linear for SGD, else sqrt", ("auto", "linear", "sqrt", "none")),
        Option("warmup", str, "gradual", "shape of the warmup", ("gradual", "constant", "stairs", "none")),
        Option("warmup_epochs", float, None, "length of the warmup, epochs", shown="5, at most a tenth of --epochs"),
        Option("warmup_start", _warmup_start, "reference", "learning rate at the start: reference (base lr), zero or a number"),
        Option("schedule", str, "cosine", "decay after the warmup", ("constant", "cosine", "step", "multistep")),
        Option("milestones", _floats, (), "epochs: the period of step, the steps of multistep", shown="none"),
        Option("gamma", float, 0.1, "factor at each step"),
    ),
    "optimizer": (
        Option("optimizer", str, "sgd", "any name of timm.optim (sgd is Nesterov's)"),
        Option("momentum", float, 0.9, "of SGD and its kin"),
        Option("weight_decay", float, None, "on weights; biases and norms are left out", shown="1e-4 (SGD) or 0.05"),
        Option("decay_all", _switch, False, "weight decay on biases and norms too"),
        Option("layer_decay", float, None, "learning-rate factor from layer to layer downwards", shown="none"),
        Option("clip_grad_norm", float, None, "largest norm of the summed gradient", shown="no clipping"),
        Option("ema_decay", float, None, "of an average of the weights, per update", shown="no average"),
    ),
    "run": (
        Option("seed", _whole, 0, "of weights, order, augmentation and split"),
        Option("output", str, "runs", "folder of run folders"),
        Option("log_every", _whole, 1, "updates a line of metrics.jsonl"),
        Option("eval_every", float, 1.0, "epochs between evaluations"),
        Option("checkpoint_every", _whole, None, "updates between checkpoints", shown="at evaluations"),
        Option("keep", _whole, 1, "newest checkpoints kept, besides the best"),
        Option("dry_run", _switch, False, "build everything, run two updates, write nothing"),
        Option("log_with", _words, ("run_folder", "wandb"), "trackers: run_folder, wandb"),
        Option("wandb_project", str, "lbaccel", "wandb project"),
        Option("wandb_group", str, None, "wandb group", shown="none"),
        Option("wandb_name", str, None, "wandb run name", shown="the run folder's"),
        Option("wandb_tags", _words, (), "wandb tags", shown="none"),
        Option("wandb_mode", str, None, "online, offline or disabled", ("online", "offline", "disabled"), "online if logged in, else offline"),
    ),
}  # fmt: skip

OPTIONS = {option.name: option for group in GROUPS.values() for option in group}


def make_parser(prog: str = "lbaccel train") -> argparse.ArgumentParser:
    """The command line of the recipe; a flag that was not typed is absent from its result."""
    parser = _Parser(
        prog=prog,
        description="Train or finetune a timm backbone at a global batch that does not fit.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="YAML", help="a file of these settings; flags win")
    parser.add_argument(
        "--print-config", action="store_true", help="print each value and its origin, and stop"
    )
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title)
        for option in options:
            flag = "--" + option.name.replace("_", "-")
            shown = option.shown or option.default
            if isinstance(shown, tuple):
                shown = " ".join(shown)
            text = f"{option.help} (default: {shown})".replace("%", "%%")
            if option.parse is _switch:
                group.add_argument(
                    flag, nargs="?", const=True, metavar="BOOL", dest=option.name, help=text
                )
            elif option.parse in (_floats, _words):
                group.add_argument(flag, nargs="+", metavar="X", dest=option.name, help=text)
            else:
                choices = "{" + ",".join(option.choices) + "}" if option.choices else "X"
                group.add_argument(flag, metavar=choices, dest=option.name, help=text)
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        words = message.rsplit(": ", 1)
        if words[0] == "unrecognized arguments":
            flag = words[1].split()[0].split("=")[0]
            flags = ["--" + name.replace("_", "-") for name in OPTIONS]
            message = f"unknown flag {flag}.{_nearest(flag, flags)} See --help."
        raise InputError(message)


def read_settings(
    argv: Sequence[str], *, prog: str = "lbaccel train"
) -> tuple[dict[str, Any], dict[str, str], bool]:
    """Values, the origin of each, and whether --print-config was given; flags win over YAML.

    Raises:
        InputError: an unknown flag or key (with the nearest that exists), or a value of no use.
    """
    typed = vars(make_parser(prog).parse_args(argv))
    config, show = typed.pop("config", None), typed.pop("print_config", False)
    values = {name: option.default for name, option in OPTIONS.items()}
    origins = dict.fromkeys(OPTIONS, "default")
    layers: list[tuple[str, Mapping[str, Any]]] = [("flag", typed)]
    if config is not None:
        layers.insert(0, (config, _read_yaml(Path(config))))
    for origin, layer in layers:
        for name, raw in layer.items():
            values[name] = _parse(OPTIONS[name], raw, origin)
            origins[name] = origin
    return values, origins, show


def show_settings(values: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    """A line a setting: name, value, origin; aligned."""
    rows = [(name, str(values[name]), origins.get(name, "")) for name in values]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return "\n".join(f"{n:<{widths[0]}}  {v:<{widths[1]}}  {o}".rstrip() for n, v, o in rows)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {path} can't be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())
        raise InputError(f"--config {path} is no YAML: {problem}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"--config {path} holds no mapping; write lines such as 'epochs: 10'.")
    layer = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name in ("plan", "origin", "resolved"):  # what config.yaml of a run folder adds
            continue
        if name not in OPTIONS:
            raise InputError(
                f"--config {path}: unknown key {key!r}.{_nearest(name, OPTIONS)} "
                "lbaccel train --help lists them all."
            )
        layer[name] = value
    return layer


def _parse(option: Option, raw: Any, origin: str) -> Any:
    flag = "--" + option.name.replace("_", "-")
    where = flag if origin == "flag" else f"{option.name} in {origin}"
    if raw is None or (option.may_be_none and raw == "none" and "none" not in option.choices):
        if option.may_be_none:
            return None
        raise InputError(f"{where} is empty; leave it out for its default, {option.default!r}.")
    if isinstance(raw, list) and option.parse is _floats:
        raw = [part for item in raw for part in str(item).replace(",", " ").split()]
    try:
        if isinstance(raw, (list, dict)) and option.parse not in (_floats, _words):
            raise ValueError("one value")
        value = option.parse(raw)
    except (ValueError, TypeError):
        kind = {_whole: "a whole number", float: "a number", _floats: "numbers"}.get(option.parse)
        kind = kind or {
            _switch: "true or false",
            _norm_batch_size: "a whole number or 'frozen'",
        }.get(option.parse, "a value as --help says")
        raise InputError(f"{where}={raw!r} is not {kind}.") from None
    if option.choices and value not in option.choices:
        near = _nearest(str(value), option.choices)
        raise InputError(f"{where}={value!r} is not one of {', '.join(option.choices)}.{near}")
    return value


def _nearest(word: str, words: Any) -> str:
    found = difflib.get_close_matches(word, list(words), n=1)
    return f" Did you mean {found[0]}?" if found else ""
