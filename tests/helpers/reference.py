"""Slow, obvious references that share no code with lbaccel: plain torch, one ghost batch a time."""

from __future__ import annotations

import numpy as np
import timm
import torch
from torch import nn
from torch.nn import functional as F

MODELS = {
    "resnet10t": {},
    "mobilenetv2_050": {},
    "efficientnet_b0": {"drop_path_rate": 0.0},  # BatchNormAct2d, and squeeze-excite
    "convnext_atto": {},  # LayerNorm
    "vit_tiny_patch16_224": {"img_size": 32},  # LayerNorm
    "regnetx_002": {},  # BatchNormAct2d, without squeeze-excite
    "seresnet18": {},  # squeeze-excite, plain BatchNorm2d
    "resnet18_gn": {},  # GroupNorm
}
WITHOUT_BATCH_NORM = ("convnext_atto", "vit_tiny_patch16_224", "resnet18_gn")
NUM_CLASSES = 5


def make_model(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    if name == "resnet18_gn":
        model = timm.create_model(
            "resnet18", num_classes=NUM_CLASSES, norm_layer=timm.layers.GroupNorm
        )
    else:
        model = timm.create_model(name, num_classes=NUM_CLASSES, **MODELS[name])
    model = model.double().train()
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in model.parameters():  # timm starts some gains at 0, which would hide gradients
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.add_(0.05 * noise)
    return model


def make_samples(count: int, size: int = 32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)
    return images, torch.randint(NUM_CLASSES, (count,), generator=generator)


def ghost_batches(count: int, norm_batch_size: int) -> list[np.ndarray]:
    """ceil(count / n) runs of sample positions whose sizes differ by at most one."""
    return np.array_split(np.arange(count), -(-count // norm_batch_size))


def train_ghost_batches_in_turn(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, norm_batch_size: int | None
) -> tuple[float, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Loss, gradients and buffers of one update: plain BatchNorm, ghost batch after ghost batch.

    Without `norm_batch_size` the whole batch goes through in one forward.
    """
    count = len(images)
    groups = ghost_batches(count, norm_batch_size or count)
    total = 0.0
    for group in groups:
        loss = F.cross_entropy(model(images[group]), labels[group], reduction="sum") / count
        loss.backward()
        total += loss.item()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return total, gradients, dict(model.named_buffers())


def relative_error(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """|a - b| / |b| over all tensors as one vector."""
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    if not b:
        return 0.0
    difference = sum(float((a[k].double() - b[k].double()).square().sum()) for k in b)
    return (
        difference / max(sum(float(v.double().square().sum()) for v in b.values()), 1e-300)
    ) ** 0.5


def largest_relative_error(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest relative error of any single tensor."""
    return max((relative_error({k: a[k]}, {k: b[k]}) for k in b), default=0.0)
