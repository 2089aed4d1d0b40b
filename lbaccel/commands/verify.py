"""`lbaccel verify`: the certificate of a timm model, on random images."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from lbaccel.commands.plan import add_model_kwargs
from lbaccel.errors import InputError
from lbaccel.network_arguments import SMALL_IMAGE, network_arguments
from lbaccel.recipe import bounds
from lbaccel.recipe.values import flag_of
from lbaccel.runs.waiting import Waiting
from lbaccel.text import printable

NUM_SAMPLES = 11  # prime: every cut is ragged
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
        type=bounds.pixels,
        metavar="PIXELS",
        help=f"a side (default: {SMALL_IMAGE}, where the model takes it, else the model's own)",
    )
    parser.add_argument(
        "--norm-batch-size",
        type=bounds.norm_samples,
        metavar="N|global|frozen",
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
        help="outputs (default: 10; with --pretrained or --checkpoint the model's own)",
    )
    add_model_kwargs(parser)
    parser.add_argument("--seed", type=bounds.seed, default=0, help="of weights, images and masks")
    parser.add_argument(
        "--tolerance", type=bounds.positive, default=1e-12, help="relative (default: %(default)s)"
    )
    parser.add_argument(
        "--compile", action="store_true", help="run the plans through torch.compile (minutes)"
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
    if a.compile and a.against is not None:
        raise InputError("--compile and --against ddp: only plans of one process are compiled.")
    from lbaccel.verification.ddp.against import verify_against_ddp
    from lbaccel.verification.of_timm import TimmNetwork, cross_entropy, random_samples
    from lbaccel.verification.verify import verify

    network = TimmNetwork(
        name=a.model,
        pretrained=a.pretrained,
        checkpoint=a.checkpoint,
        img_size=a.img_size,
        num_classes=a.num_classes,
        drop_path=a.drop_path,
        drop_rate=a.drop_rate,
        arguments=network_arguments(a.model_kwargs),
        seed=a.seed,
    )
    gpus, _, accumulation = _cut(a)
    num_samples = _num_samples(a)
    smaller = "--gpus, --per-gpu-batch" if a.against else "--norm-batch-size"
    network.check_memory(num_samples, a.img_size or SMALL_IMAGE, processes=gpus, smaller=smaller)
    model, size, num_classes = network.build()
    network.check_memory(num_samples, size, processes=gpus, smaller=smaller)
    samples = random_samples(num_samples, size, num_classes, a.seed)
    data = f"random images of {size} px, {network.origin}"
    common = {
        "norm_batch_size": a.norm_batch_size,
        "seed": a.seed,
        "tolerance": a.tolerance,
        "name": a.model,
    }
    with Waiting("verify", after=0.0) as waiting:
        if a.against == "ddp":
            certificate = verify_against_ddp(
                model,
                cross_entropy,
                samples,
                gpus=gpus,
                accumulation=accumulation,
                sync_bn=a.sync_bn,
                uneven=a.uneven,
                data=data,
                say=waiting.say,
                **common,
            )
        else:
            certificate = verify(
                model,
                cross_entropy,
                samples,
                data=f"{num_samples} {data}",
                compile=a.compile,
                say=waiting.say,
                **common,
            )
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
