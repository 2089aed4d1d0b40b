"""`lbaccel verify`: the certificate of a timm model, on random images."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lbaccel.commands.plan import add_model_kwargs
from lbaccel.errors import InputError, RunFailed
from lbaccel.models import SMALL_IMAGE, create_backbone
from lbaccel.network_arguments import as_words, network_arguments
from lbaccel.recipe import bounds
from lbaccel.recipe.values import flag_of
from lbaccel.text import printable
from lbaccel.update.memory.budget import default_budget
from lbaccel.update.memory.oom import is_out_of_memory
from lbaccel.verification.ddp.against import verify_against_ddp
from lbaccel.verification.verify import verify

NUM_SAMPLES = 11  # prime: every cut is ragged
NUM_CLASSES = 10
NOISE = 0.05
GPUS = 4
PER_GPU_BATCH = 4
BYTES_PER_VALUE = 64  # of an image, at the least: in float32 and float64, and a few feature maps
BYTES_PER_WEIGHT = 24  # in float32, in float64, and its gradient
BYTES_PER_PROCESS = 2**28
UNCHECKED_CLASSES = 10_000
UNCHECKED_BYTES = 2 * 2**30
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
        type=bounds.pixels,
        metavar="PIXELS",
        help=f"a side (default: {SMALL_IMAGE}, where the model takes it, else the model's own)",
    )
    parser.add_argument(
        "--norm-batch-size",
        type=bounds.norm_samples,
        metavar="N|frozen",
        help="samples of a BatchNorm statistic (default: BatchNorm as it is in the model)",
    )
    parser.add_argument(
        "--drop-path", type=bounds.below_one, default=0.0, metavar="P", help="probability"
    )
    parser.add_argument(
        "--drop-rate", type=bounds.below_one, default=0.0, metavar="P", help="probability"
    )
    parser.add_argument(
        "--num-classes",
        type=bounds.classes,
        metavar="C",
        help=f"outputs (default: {NUM_CLASSES}; with --pretrained or --checkpoint the model's own)",
    )
    add_model_kwargs(parser)
    parser.add_argument("--seed", type=bounds.seed, default=0, help="of weights, images and masks")
    parser.add_argument(
        "--tolerance", type=bounds.positive, default=1e-12, help="relative (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the certificate as JSON alone")
    ddp = parser.add_argument_group("against real DistributedDataParallel")
    ddp.add_argument("--against", choices=("ddp",), help="compare with ranks under DDP")
    ddp.add_argument("--gpus", type=bounds.ranks, metavar="W", help=f"ranks (default: {GPUS})")
    ddp.add_argument(
        "--per-gpu-batch",
        type=bounds.count,
        metavar="B",
        help=f"samples of a rank's micro-batch (default: {PER_GPU_BATCH})",
    )
    ddp.add_argument(
        "--accumulation", type=bounds.count, metavar="K", help="micro-batches a rank (1)"
    )
    ddp.add_argument("--sync-bn", action="store_true", help="BatchNorm over all ranks")
    ddp.add_argument("--uneven", action="store_true", help="the last rank's last one is halved")


def run(arguments: argparse.Namespace) -> int:
    """Print the certificate; 0 where the model is equivalent, 1 where it is not.

    Raises:
        InputError: an unknown model, or sizes that it can't take.
        RunFailed: pretrained weights that can't be had, or a loss that is not finite.
    """
    a = arguments
    typed = [flag_of(name) for name in OF_DDP if getattr(a, name)]
    if typed and a.against is None:
        raise InputError(f"{typed[0]} is of --against ddp. Add that, or leave it out.")
    torch.manual_seed(a.seed)
    num_samples = _num_samples(a)
    _check_memory(a, num_samples, a.img_size or SMALL_IMAGE)
    model, size, num_classes = _build(a)
    _check_memory(a, num_samples, size)
    if not a.pretrained and a.checkpoint is None:
        _add_noise(model, a.seed)
    if a.against == "ddp":
        return _against_ddp(a, model, size, num_classes)
    certificate = verify(
        model,
        _cross_entropy,
        _samples(num_samples, size, num_classes, a.seed),
        norm_batch_size=a.norm_batch_size,
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
    gpus, _, accumulation = cut = _cut(a)
    num_samples = math.prod(cut)
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


def _cut(a: argparse.Namespace) -> tuple[int, int, int]:
    """Ranks, samples of a micro-batch and micro-batches of a rank; without DDP one of each."""
    if a.against is None:
        return 1, 1, 1
    return a.gpus or GPUS, a.per_gpu_batch or PER_GPU_BATCH, a.accumulation or 1


def _num_samples(a: argparse.Namespace) -> int:
    """Samples of the update that is checked: every cut of them is ragged."""
    if a.against is not None:
        return math.prod(_cut(a))
    n = a.norm_batch_size
    return max(3 * n - 1, NUM_SAMPLES) if isinstance(n, int) else NUM_SAMPLES


def _check_memory(a: argparse.Namespace, num_samples: int, size: int) -> None:
    """Stop at images, outputs and processes that this machine can't hold, before the system does.

    Raises:
        InputError: what they need at the least, and what is free.
    """
    processes = _cut(a)[0]
    needed = num_samples * 3 * size**2 * BYTES_PER_VALUE + processes * BYTES_PER_PROCESS
    if (a.num_classes or 0) > UNCHECKED_CLASSES:
        with torch.device("meta"):
            model = create_backbone(
                a.model,
                num_classes=a.num_classes,
                img_size=a.img_size,
                arguments=network_arguments(a.model_kwargs),
            )
        needed += sum(p.numel() for p in model.parameters()) * BYTES_PER_WEIGHT * processes
    if needed <= UNCHECKED_BYTES:
        return
    free = default_budget(torch.device("cpu"))
    if needed > free:
        raise InputError(
            f"{num_samples:,} images of {size} px and {a.model} on {processes:,} "
            f"rank{'s' * (processes > 1)} take at least {needed / 2**30:,.1f} GiB, and "
            f"{free / 2**30:,.1f} GiB are free here. Use a smaller "
            f"{'--gpus, --per-gpu-batch' if a.against else '--norm-batch-size'}, --num-classes or "
            "--img-size."
        )


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
                arguments=network_arguments(a.model_kwargs),
            )
            _try_image(model, size)
        except RunFailed:
            raise
        except (AssertionError, RuntimeError, ValueError, ZeroDivisionError) as error:
            if is_out_of_memory(error):
                raise RunFailed(
                    f"no memory was left for {a.model} with {num_classes:,} classes at {size} px. "
                    "Use a smaller --num-classes or --img-size."
                ) from error
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
    drops += as_words(network_arguments(a.model_kwargs) or {})
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
