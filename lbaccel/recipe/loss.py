"""The loss of the recipe, with class weights, of each class by itself, or with a teacher; hits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lbaccel.update.accumulation import LossFn
from lbaccel.update.distillation import distance_to_teacher

HITS = "top1"  # of `UpdateResult.sums`: samples whose largest logit is their label's


@dataclass(frozen=True)
class Distillation:
    """The part of a loss that learns from a teacher.

    Args:
        teacher: images [n, ...] to its logits [n, C], without a gradient.
        alpha: share of its part in the loss, above 0 and at most 1.
        temperature: of both softmaxes, above 0.
    """

    teacher: Callable[[Tensor], Tensor]
    alpha: float
    temperature: float


def loss_of(
    name: str,
    *,
    dtype: torch.dtype,
    memory_format: str,
    label_smoothing: float,
    class_weights: Tensor | None = None,
    distillation: Distillation | None = None,
) -> LossFn:
    """The loss function of a run, for `LargeBatch.update`.

    With logits z of n samples in C classes, p = softmax(z), smoothed targets t of labels y and
    class weights w, the losses of a micro-batch and the weights that it counts by are

        ce    -sum_i sum_c w_c t_ic log p_ic / W,    W = sum_i w_(y_i), and n for soft targets
        bce   the mean over i and c of -t_ic log s_ic - (1 - t_ic) log(1 - s_ic),  s = sigmoid(z)

    `ce` is `torch.nn.functional.cross_entropy`: the weighted mean over micro-batches is its mean
    over the whole batch, class weights and soft targets included. `bce` is timm's
    `BinaryCrossEntropy` without its options: targets are 1 - s + s / C and s / C under a smoothing
    of s, and the mean is over samples and classes (Wightman et al. 2021, arXiv 2110.00476).

    With a teacher, whose logits v are those of the very images that the network sees,

        (1 - alpha) ce + alpha sum_i a_i T^2 KL(softmax(v_i / T) || softmax(z_i / T)) / W

    where a sample counts as its label does: a_i = w_(y_i), sum_c w_c t_ic for soft targets, and 1
    without class weights. Both parts then have one W, so their sum is a mean over any partition.

    Of hard labels it hands on how many samples the logits have right. A sample that is mixed of two
    has no one label, so there is nothing to count under mixup and cutmix.

    Args:
        name: "ce" or "bce".
        dtype: of images and soft targets.
        memory_format: of images, "contiguous" or "channels_last".
        label_smoothing: s; soft targets come smoothed.
        class_weights: w [C], on the device of the logits; of `ce` alone.
        distillation: teacher, alpha and T; of `ce` alone.
    """
    assert distillation is None or name == "ce", "the settings are checked"

    def loss_fn(model: Any, micro_batch: Any) -> Any:
        images, targets = micro_batch
        images = images.to(dtype)
        if memory_format == "channels_last":
            images = images.to(memory_format=torch.channels_last)
        # first, while no activation of the network is held
        answers = None if distillation is None else distillation.teacher(images)
        logits = model(images)
        is_soft = targets.is_floating_point()  # of mixup, smoothed already
        if is_soft:
            targets = targets.to(dtype)
        loss = _loss(name, logits, targets, class_weights, 0.0 if is_soft else label_smoothing)
        weight = None
        if class_weights is not None and not is_soft:
            weight = class_weights[targets].sum()
        if distillation is not None and answers is not None:
            alpha, temperature = distillation.alpha, distillation.temperature
            apart = distance_to_teacher(logits, answers, temperature=temperature)
            mean = _mean(apart, targets, class_weights)
            loss = (1 - alpha) * loss + alpha * mean
        if is_soft:
            return loss
        hits = (logits.detach().argmax(1) == targets).sum()
        return loss, weight, {HITS: hits}

    return loss_fn


def _mean(values: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """sum_i a_i x_i / W of values [n], where a sample counts as its label does in `ce`."""
    if weights is None:
        return values.mean()
    weights = weights.to(values.dtype)
    if targets.is_floating_point():
        return (targets.to(values.dtype) @ weights * values).mean()
    counts = weights[targets]
    return (counts * values).sum() / counts.sum()


def _loss(
    name: str, logits: Tensor, targets: Tensor, weights: Tensor | None, smoothing: float
) -> Tensor:
    if name == "ce":
        weights = None if weights is None else weights.to(logits.dtype)
        return F.cross_entropy(logits, targets, weights, label_smoothing=smoothing)
    if not targets.is_floating_point():
        off = smoothing / logits.shape[1]
        labels, targets = targets, torch.full_like(logits, off)
        targets.scatter_(1, labels[:, None], 1 - smoothing + off)
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))
