"""Residual networks for 32 px that timm lacks, as timm models: the source of each is named.

Importing this module registers them, so `timm.create_model("wide_resnet16_4")` builds one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import ClassifierHead, DropPath
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

__all__: list[str] = []  # timm's registry adds the name of each model

_CONFIG = {
    "url": "",
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": (0.4914, 0.4822, 0.4465),  # of CIFAR-10's training images
    "std": (0.2470, 0.2435, 0.2616),
    "first_conv": "conv1",
    "classifier": "head.fc",
}
_NAMES = ("cifar_resnet8", "cifar_resnet20", "wide_resnet16_4")
default_cfgs = generate_default_cfgs(dict.fromkeys(_NAMES, _CONFIG))


class PaddedShortcut(nn.Module):
    """He et al. 2016, option A: each second pixel, and zeros in the new channels; no parameters."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels, self.stride = new_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C + new, H / stride, W / stride]."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.new_channels))


class BasicBlock(nn.Module):
    """relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x)))))), both convolutions 3 x 3."""

    def __init__(
        self, channels: int, width: int, stride: int, *, projects: bool, drop_path: float
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.shortcut: nn.Module = nn.Identity()
        if projects and (stride > 1 or channels != width):
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )
        elif stride > 1 or channels != width:
            self.shortcut = PaddedShortcut(width - channels, stride)
        self.act2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, width, H / stride, W / stride]."""
        inside = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.act2(self.shortcut(x) + self.drop_path(inside))


class CifarResNet(nn.Module):
    """A stem of one 3 x 3 convolution, three stages of basic blocks, mean pooling, a linear layer.

    Convolutions start as He et al. 2015 have it (normal, fan-out), each BatchNorm's gain at 1.

    Args:
        num_blocks: in each of the three stages; the second and the third start with stride 2.
        stem: channels of the first convolution.
        widths: channels of the stages.
        projects: where shapes differ, the shortcut is a 1 x 1 convolution with BatchNorm (option
            B of He et al. 2016); else it pads with zeros (option A).
        zero_init_last: the gain of each block's last BatchNorm starts at 0 (Goyal et al. 2017,
            section 5.1).
        num_classes, in_chans, global_pool, drop_rate, drop_path_rate: as timm's ResNet has them.
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        stem: int = 16,
        widths: Sequence[int] = (16, 32, 64),
        projects: bool = False,
        zero_init_last: bool = False,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.drop_rate = num_classes, drop_rate
        self.grad_checkpointing = False
        self.conv1 = nn.Conv2d(in_chans, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.act1 = nn.ReLU(inplace=True)
        last = len(widths) * num_blocks - 1
        self.feature_info: list[dict[str, Any]] = []
        channels = stem
        for stage, width in enumerate(widths):
            blocks = []
            for block in range(num_blocks):
                stride = 2 if stage and not block else 1
                rate = drop_path_rate * (stage * num_blocks + block) / max(1, last)
                blocks.append(
                    BasicBlock(channels, width, stride, projects=projects, drop_path=rate)
                )
                channels = width
            name = f"layer{stage + 1}"
            self.add_module(name, nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": width, "reduction": 2**stage, "module": name})
        self.num_features = self.head_hidden_size = channels
        self.head = ClassifierHead(channels, num_classes, global_pool, drop_rate)
        self._init_weights(zero_init_last)

    def _init_weights(self, zero_init_last: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_last and isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Layers for layer-wise rates: stem, then stages or blocks."""
        blocks = r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"
        return {"stem": r"^conv1|bn1", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh linear layer of so many outputs."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, width, H / 4, W / 4]."""
        x = self.act1(self.bn1(self.conv1(x)))
        stages = [getattr(self, info["module"]) for info in self.feature_info]
        for stage in stages:
            if self.grad_checkpointing:
                x = checkpoint_seq(stage, x)
            else:
                x = stage(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [N, classes]; with `pre_logits` the pooled features [N, width]."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes]."""
        return self.forward_head(self.forward_features(x))


def _build(name: str, pretrained: bool, given: dict[str, Any], **own: Any) -> nn.Module:
    return build_model_with_cfg(CifarResNet, name, pretrained, **{**own, **given})


@register_model
def cifar_resnet8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """He et al. 2016, section 4.2, n = 1: 75,290 parameters of 10 classes."""
    return _build("cifar_resnet8", pretrained, kwargs, num_blocks=1)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """He et al. 2016, section 4.2, n = 3: 0.27 million parameters."""
    return _build("cifar_resnet20", pretrained, kwargs, num_blocks=3)


@register_model
def wide_resnet16_4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Zagoruyko and Komodakis 2016, depth 16, widening factor 4, with the stem widened to 64.

    Its blocks are those of He et al. 2016 (BatchNorm and ReLU after each convolution).
    """
    own: dict[str, Any] = {"num_blocks": 2, "stem": 64, "widths": (64, 128, 256), "projects": True}
    return _build("wide_resnet16_4", pretrained, kwargs, **own)
