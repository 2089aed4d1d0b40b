"""`lbaccel verify`: the certificate of a timm model, on random images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lbaccel.errors import InputError, RunFailed, check_number, check_seed, check_whole
from lbaccel.models import SMALL_IMAGE, create_backbone
from lbaccel.recipe.values import flag_of, group_samples
from lbaccel.text import printable
from lbaccel.verification.ddp.against import verify_against_ddp
from lbaccel.verification.verify import verify

NUM_SAMPLES = 11  # prime: every cut is ragged
NUM_CLASSES = 10
NOISE = 0.05
GPUS = 4
PER_GPU_BATCH = 4
OF_DDP = ("gpus", "per_gpu_batch", "accumulation", "sync_bn", "uneven")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `lbaccel verify`."""
    parser.description = (
        "Prove that an update of a model is the same however its batch is cut: whole, in micro-"
        "batches, recomputed, and on two ranks; or name the layer and the cause where it is not. "
        "With --against ddp: that one process does the update of several GPUs under DDP."
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="any timm model")
    parser.add_argument("--pretrained", action="store_true", help="with timm's weights")
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", help="with a file's weights")
    parser.add_argument(
        "--img-size",
        type=int,
        metavar="PIXELS",
        help=f"a side (default: {SMALL_IMAGE}, where the model takes it, else the model's own)",
    )
    parser.add_argument(
        "--norm-batch-size",
        type=_norm_batch_size,
        metavar="N|frozen",
        help="samples of a BatchNorm statistic (default: BatchNorm as it is in the model)",
    )
    parser.add_argument("--drop-path", type=float, default=0.0, metavar="P", help="probability")
    parser.add_argument("--drop-rate", type=float, default=0.0, metavar="P", help="probability")
    parser.add_argument(
        "--num-classes",
        type=int,
        metavar="C",
        help=f"outputs (default: {NUM_CLASSES}; with --pretrained or --checkpoint the model's own)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, images and masks")
    parser.add_argument(
        "--tolerance", type=float, default=1e-12, help="relative (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the certificate as JSON alone")
    ddp = parser.add_argument_group("against real DistributedDataParallel")
    ddp.add_argument("--against", choices=("ddp",), help="compare with ranks under DDP")
    ddp.add_argument("--gpus", type=int, metavar="W", help=f"ranks (default: {GPUS})")
    ddp.add_argument(
        "--per-gpu-batch",
        type=int,
        metavar="B",
        help=f"samples of a rank's micro-batch (default: {PER_GPU_BATCH})",
    )
    ddp.add_argument("--accumulation", type=int, metavar="K", help="micro-batches a rank (1)")
    ddp.add_argument("--sync-bn", action="store_true", help="BatchNorm over all ranks")
    ddp.add_argument("--uneven", action="store_true", help="the last rank's last one is halved")


def _norm_batch_size(text: str) -> Any:
    try:
        value = group_samples(text)
        check_whole("N", 1 if value == "frozen" else value)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a whole number of at least 1 nor 'frozen'"
        ) from None
    return value


def run(arguments: argparse.Namespace) -> int:
    """Print the certificate; 0 where the model is equivalent, 1 where it is not.

    Raises:
        InputError: an unknown model, or sizes that it can't take.
        RunFailed: pretrained weights that can't be had, or a loss that is not finite.
    """
    a = arguments
    for name in ("drop_path", "drop_rate"):
        check_number(name, getattr(a, name), zero=True, at_most=1.0)
    for name in ("img_size", "num_classes"):
        if getattr(a, name) is not None:
            check_whole(name, getattr(a, name))
    typed = [flag_of(name) for name in OF_DDP if getattr(a, name)]
    if typed and a.against is None:
        raise InputError(f"{typed[0]} is of --against ddp. Add that, or leave it out.")
    torch.manual_seed(check_seed("--seed", a.seed))
    model, size, num_classes = _build(a)
    if not a.pretrained and a.checkpoint is None:
        _add_noise(model, a.seed)
    if a.against == "ddp":
        return _against_ddp(a, model, size, num_classes)
    n = a.norm_batch_size
    num_samples = max(3 * n - 1, NUM_SAMPLES) if isinstance(n, int) else NUM_SAMPLES
    certificate = verify(
        model,
        _cross_entropy,
        _samples(num_samples, size, num_classes, a.seed),
        norm_batch_size=n,
        seed=a.seed,
        tolerance=a.tolerance,
        name=a.model,
        data=f"{num_samples} random images of {size} px, {_weights(a)}",
        say=_progress,
    )
    _progress("")
    print(certificate.to_json() if a.json else printable(str(certificate)))
    return 0 if certificate.equivalent else 1


def _against_ddp(a: argparse.Namespace, model: nn.Module, size: int, num_classes: int) -> int:
    gpus, per_gpu = (
        default if value is None else value
        for value, default in ((a.gpus, GPUS), (a.per_gpu_batch, PER_GPU_BATCH))
    )
    accumulation = 1 if a.accumulation is None else a.accumulation
    sizes = {"--gpus": gpus, "--per-gpu-batch": per_gpu, "--accumulation": accumulation}
    for name, value in sizes.items():
        check_whole(name, value)
    num_samples = gpus * per_gpu * accumulation
    certificate = verify_against_ddp(
        model,
        _cross_entropy,
        _samples(num_samples, size, num_classes, a.seed),
        gpus=gpus,
        accumulation=accumulation,
        sync_bn=a.sync_bn,
        uneven=a.uneven,
        norm_batch_size=a.norm_batch_size,
        seed=a.seed,
        tolerance=a.tolerance,
        name=a.model,
        data=f"random images of {size} px, {_weights(a)}",
        say=_progress,
    )
    _progress("")
    print(certificate.to_json() if a.json else printable(str(certificate)))
    return 0 if certificate.equivalent else 1


def _build(a: argparse.Namespace) -> tuple[nn.Module, int, int]:
    """The model at the size asked for, or at the smallest that it takes."""
    known = timm.is_model(a.model.split(".")[0])
    config = timm.get_pretrained_cfg(a.model) if known else None
    own_classes = getattr(config, "num_classes", NUM_CLASSES)
    loaded = a.pretrained or a.checkpoint is not None
    num_classes = a.num_classes or (own_classes if loaded else NUM_CLASSES)
    own_size = config.input_size[-1] if config is not None else SMALL_IMAGE
    sizes = [a.img_size] if a.img_size else sorted({min(SMALL_IMAGE, own_size), own_size})
    for size in sizes:
        try:
            model = create_backbone(
                a.model,
                num_classes=num_classes,
                img_size=size,
                pretrained=a.pretrained,
                checkpoint=a.checkpoint,
                drop_rate=a.drop_rate,
                drop_path=a.drop_path,
            )
            _try_image(model, size)
        except RunFailed:
            raise
        except (AssertionError, RuntimeError, ValueError, ZeroDivisionError) as error:
            if isinstance(error, InputError) and (size == sizes[-1] or not known):
                raise
            if size == sizes[-1]:
                reason = " ".join(str(error).split())[:200].rstrip(".")
                raise InputError(
                    f"{a.model} can't take images of {size} px: {reason}. Give another --img-size."
                ) from error
        else:
            return model, size, num_classes
    raise AssertionError("the last size returns or raises")


def _try_image(model: nn.Module, size: int) -> None:
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size))
    model.train()


def _add_noise(model: nn.Module, seed: int) -> None:
    """Move fresh weights a little: a gain of 0, as timm starts some, would hide gradients."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += NOISE * torch.randn(parameter.shape, generator=generator)


def _samples(count: int, size: int, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, size, size, generator=generator)
    return images, torch.randint(num_classes, (count,), generator=generator)


def _cross_entropy(model: Any, micro_batch: Any) -> Tensor:
    images, labels = micro_batch
    return F.cross_entropy(model(images), labels)


def _weights(a: argparse.Namespace) -> str:
    drops = [f"drop-path {a.drop_path:g}"] * bool(a.drop_path)
    drops += [f"drop-rate {a.drop_rate:g}"] * bool(a.drop_rate)
    origin = "fresh weights and noise"
    if a.checkpoint is not None:
        origin = f"weights of {a.checkpoint}"
    elif a.pretrained:
        origin = "pretrained weights"
    return ", ".join([origin, *drops])


def _progress(line: str) -> None:
    """One line on a terminal's standard error, overwritten; nothing where it is a file."""
    if sys.stderr.isatty():
        text = f"verify: {line} " if line else ""
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
