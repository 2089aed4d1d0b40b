"""A network of a few thousand weights that timm knows by name: BatchNorm, dropout and drop-path."""

from __future__ import annotations

from timm.layers.drop import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

default_cfgs = generate_default_cfgs(
    {
        "lbaccel_tiny.untrained": {
            "url": "",
            "num_classes": 10,
            "input_size": (3, 8, 8),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "conv",
            "classifier": "fc",
        }
    }
)


class Tiny(nn.Module):
    """Two convolutions; built in milliseconds, trained in tenths of a second."""

    def __init__(self, num_classes=10, in_chans=3, drop_rate=0.0, drop_path_rate=0.0, **_):
        super().__init__()
        self.num_classes, self.num_features = num_classes, 8
        self.conv = nn.Conv2d(in_chans, 8, 3, stride=2, bias=False)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1, bias=False))
                for _ in range(2)
            )
        )
        self.norm, self.path = nn.BatchNorm2d(8), DropPath(drop_path_rate)
        self.drop, self.fc = nn.Dropout(drop_rate), nn.Linear(8, num_classes)

    def get_classifier(self):
        return self.fc

    def forward(self, x):
        x = self.conv(x)
        for block in self.blocks:
            x = x + self.path(block(x))
        return self.fc(self.drop(self.norm(x).relu().mean((2, 3))))


@register_model
def lbaccel_tiny(pretrained=False, **kwargs):
    return build_model_with_cfg(Tiny, "lbaccel_tiny", pretrained, **kwargs)
