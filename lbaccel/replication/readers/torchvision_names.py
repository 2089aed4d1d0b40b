"""The flags of torchvision's reference script, and its networks by timm's names."""

from __future__ import annotations

from typing import Any

SWITCH = "switch"

# flag: type and the script's default
FLAGS: dict[str, tuple[Any, Any]] = {
    "batch-size": (int, 32),
    "model": (str, "resnet18"),
    "epochs": (int, 90),
    "opt": (str, "sgd"),
    "lr": (float, 0.1),
    "momentum": (float, 0.9),
    "weight-decay": (float, 1e-4),
    "norm-weight-decay": (float, None),
    "bias-weight-decay": (float, None),
    "transformer-embedding-decay": (float, None),
    "label-smoothing": (float, 0.0),
    "mixup-alpha": (float, 0.0),
    "cutmix-alpha": (float, 0.0),
    "lr-scheduler": (str, "steplr"),
    "lr-warmup-epochs": (int, 0),
    "lr-warmup-method": (str, "constant"),
    "lr-warmup-decay": (float, 0.01),
    "lr-step-size": (int, 30),
    "lr-gamma": (float, 0.1),
    "lr-min": (float, 0.0),
    "sync-bn": (SWITCH, False),
    "auto-augment": (str, None),
    "ra-magnitude": (int, 9),
    "augmix-severity": (int, 3),
    "random-erase": (float, 0.0),
    "amp": (SWITCH, False),
    "world-size": (int, None),
    "model-ema": (SWITCH, False),
    "model-ema-steps": (int, 32),
    "model-ema-decay": (float, 0.99998),
    "interpolation": (str, "bilinear"),
    "val-resize-size": (int, 256),
    "val-crop-size": (int, 224),
    "train-crop-size": (int, 224),
    "clip-grad-norm": (float, None),
    "ra-sampler": (SWITCH, False),
    "ra-reps": (int, 3),
    "weights": (str, None),
    "pretrained": (SWITCH, False),  # until 0.12
    "resume": (str, ""),
    "data-path": (str, None),
}
ALIASES = {"batch-size": ("-b",), "weight-decay": ("--wd",)}
# no effect on the result
NEUTRAL: dict[str, Any] = {
    "device": str,
    "workers": int,
    "print-freq": int,
    "output-dir": str,
    "start-epoch": int,
    "cache-dataset": SWITCH,
    "test-only": SWITCH,
    "dist-url": str,
    "use-deterministic-algorithms": SWITCH,
    "backend": str,
    "use-v2": SWITCH,
}
# of run_with_submitit.py, which takes the script's flags too
LAUNCHER: dict[str, Any] = {"ngpus": int, "nodes": int}

# torchvision's names for networks that timm has under another one
MODELS = {
    "mobilenet_v2": "mobilenetv2_100",
    "mobilenet_v3_large": "mobilenetv3_large_100",
    "mobilenet_v3_small": "mobilenetv3_small_100",
    "mnasnet1_0": "mnasnet_100",
    "efficientnet_v2_s": "efficientnetv2_s",
    "efficientnet_v2_m": "efficientnetv2_m",
    "efficientnet_v2_l": "efficientnetv2_l",
    "regnet_y_400mf": "regnety_004",
    "regnet_y_800mf": "regnety_008",
    "regnet_y_1_6gf": "regnety_016",
    "regnet_y_3_2gf": "regnety_032",
    "regnet_y_8gf": "regnety_080",
    "regnet_y_16gf": "regnety_160",
    "regnet_y_32gf": "regnety_320",
    "regnet_x_400mf": "regnetx_004",
    "regnet_x_800mf": "regnetx_008",
    "regnet_x_1_6gf": "regnetx_016",
    "regnet_x_3_2gf": "regnetx_032",
    "regnet_x_8gf": "regnetx_080",
    "regnet_x_16gf": "regnetx_160",
    "regnet_x_32gf": "regnetx_320",
    "vit_b_16": "vit_base_patch16_224",
    "vit_b_32": "vit_base_patch32_224",
    "vit_l_16": "vit_large_patch16_224",
    "vit_l_32": "vit_large_patch32_224",
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_b": "swin_base_patch4_window7_224",
    "swin_v2_t": "swinv2_tiny_window8_256",
    "swin_v2_s": "swinv2_small_window8_256",
    "swin_v2_b": "swinv2_base_window8_256",
    "maxvit_t": "maxvit_tiny_tf_224",
}

AUGMENT = {
    "ra": "auto_augment rand-m9-mstd0.5, timm's RandAugment (its magnitudes go to 10, not 30)",
    "ta_wide": "auto_augment rand-m9-mstd0.5; TrivialAugment draws one operation and its magnitude",
    "augmix": "auto_augment augmix-m3-w3",
}
