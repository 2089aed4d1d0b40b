"""Generated photographs that a network can learn, and weights for timm's smallest networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

COLORS = {"blue": (40, 60, 200), "green": (60, 180, 70), "red": (200, 50, 40)}


def make_photographs(folder, *, train=24, val=8, classes=COLORS, size=48, seed=0):
    """Noise around a colour for each class, in `train/` and `val/`; the folder."""
    random = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        for name, color in classes.items():
            target = Path(folder, split, name)
            target.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = np.clip(random.normal(color, 40, (size, size, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(target / f"{i:03}.png")
    return Path(folder)


def make_weights(name, folder="."):
    """A file of ImageNet's shapes for a small network of timm: what `--pretrained` reads."""
    torch.manual_seed(0)
    path = Path(folder, f"{name}.safetensors")
    save_file(timm.create_model(name).state_dict(), path)
    return path
