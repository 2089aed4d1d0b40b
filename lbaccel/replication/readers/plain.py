"""A recipe in numbers: `--per-gpu-batch 128 --gpus 8 --sync-bn no`, and what else is typed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lbaccel.errors import InputError
from lbaccel.recipe.values import flag_of, shown
from lbaccel.replication.many_gpus import (
    Batch,
    Curve,
    Rate,
    Recipe,
    Translation,
    one_number_of_gpus,
)


@dataclass(frozen=True, kw_only=True)
class Said:
    """The settings that were typed beside the source; None where one was not typed."""

    per_gpu_batch: int | None = None
    accumulation: int | None = None
    global_batch_size: int | None = None
    sync_bn: bool | None = None
    model: str | None = None
    optimizer: str | None = None
    lr: float | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    epochs: float | None = None
    warmup_epochs: float | None = None
    img_size: int | None = None

    def refuse(self, origin: str, *, allowed: tuple[str, ...] = ()) -> None:
        """Stop at a flag of something that the source says itself.

        Raises:
            InputError: one was typed.
        """
        for field in fields(self):
            if getattr(self, field.name) is not None and field.name not in allowed:
                flag = flag_of(field.name)
                raise InputError(
                    f"{flag} {shown(getattr(self, field.name))}: {origin} says it itself. Leave "
                    f"{flag} out, and change the contract that is written."
                )


def read_plain(said: Said, *, gpus: int | None) -> Recipe:
    """The recipe in numbers that were typed.

    Raises:
        InputError: no per-GPU batch, or a global batch that does not come out of it.
    """
    number = one_number_of_gpus(gpus, {}, origin="--per-gpu-batch")
    accumulation, text = accumulation_of(said, gpus=number)
    batch = Batch(
        per_gpu=_needed(said),
        gpus=number,
        accumulation=accumulation,
        sync_bn=bool(said.sync_bn),
        said=text,
        last="wrap",
        last_why="nothing is said of an epoch's remainder: lbaccel's default, into the next epoch",
    )
    assumed = () if said.sync_bn is not None else ("--sync-bn no",)
    return Recipe(
        origin="flags",
        model=said.model,
        said_model="" if said.model is None else f"--model {said.model}",
        batch=batch,
        rate=None if said.lr is None else Rate(said=f"--lr {shown(said.lr)}", lr=said.lr),
        curve=curve_of(said),
        rows=tuple(rows_of(said)),
        assumed=assumed,
    )


def _needed(said: Said) -> int:
    if said.per_gpu_batch is None:
        raise InputError(
            "there is no source: give a file (timm's args.yaml, an accelerate YAML, torchvision's "
            "flags), a command after --, or numbers: --per-gpu-batch 128 --gpus 8."
        )
    return said.per_gpu_batch


def accumulation_of(said: Said, *, gpus: int) -> tuple[int, str]:
    """Micro-batches of one GPU in an update, from `--accumulation` or the global batch; and text.

    Raises:
        InputError: the global batch is smaller than one micro-batch of every GPU, no multiple of
            it, or contradicts `--accumulation`.
    """
    per_gpu = _needed(said)
    text = f"--per-gpu-batch {per_gpu} --accumulation {said.accumulation or 1}"
    total = said.global_batch_size
    if total is None:
        return said.accumulation or 1, text
    one = per_gpu * gpus
    if total < one:
        raise InputError(
            f"--global-batch-size {total} is smaller than {gpus} GPUs x --per-gpu-batch {per_gpu} "
            f"= {one}: every GPU runs at least one micro-batch. Use --per-gpu-batch "
            f"{max(1, total // gpus)}, or --global-batch-size {one}."
        )
    if total % one or said.accumulation not in (None, total // one):
        raise InputError(
            f"--global-batch-size {total} is not {gpus} GPUs x --per-gpu-batch {per_gpu} x "
            f"--accumulation {said.accumulation or total // one}. Leave --global-batch-size out, "
            f"or use {one * (said.accumulation or max(1, total // one))}."
        )
    return total // one, f"--per-gpu-batch {per_gpu} --global-batch-size {total}"


def curve_of(said: Said) -> Curve | None:
    """lbaccel's own cosine after a warmup from 0, where the length of the run is known."""
    if said.epochs is None:
        return None
    warmup = said.warmup_epochs or 0.0
    return Curve(
        said=f"--epochs {shown(said.epochs)}, no decay said",
        said_warmup=f"--warmup-epochs {shown(warmup)}",
        epochs=said.epochs,
        warmup_epochs=warmup,
        per_epoch=False,
    )


def rows_of(said: Said) -> list[Translation]:
    """The settings that have the same name and meaning here."""
    why: Mapping[str, str] = {
        "optimizer": "any name of timm.optim (sgd is Nesterov's; without it: momentum)",
        "momentum": "of SGD and its kin",
        "weight_decay": "on weights; biases and norms are left out",
        "img_size": "pixels a side",
    }
    rows: list[Translation] = []
    for name, reason in why.items():
        value: Any = getattr(said, name)
        if value is not None:
            flag = f"{flag_of(name)} {shown(value)}"
            rows.append(Translation(flag, name, value, reason))
    if said.lr is not None and said.epochs is None:
        reason = "an absolute rate has no smaller base that a warmup could start from"
        rows.append(Translation("no --epochs", "warmup_start", "zero", reason))
    return rows
