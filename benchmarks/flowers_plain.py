"""The plain loop beside `lbaccel start` on the flowers: batch 32, AdamW, BatchNorm as torch has it.

python benchmarks/flowers_plain.py DATA WEIGHTS --lr 1e-4 --epochs 12 --seed 0
"""

from __future__ import annotations

import argparse
import time

import timm
import torch
from timm.data.transforms_factory import create_transform
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

parser = argparse.ArgumentParser()
parser.add_argument("data")
parser.add_argument("weights")
parser.add_argument("--lr", type=float, default=1e-4)
parser.add_argument("--epochs", type=int, default=12)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

began, cpu = time.perf_counter(), time.process_time()
torch.manual_seed(args.seed)
norm = {"input_size": 224, "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
train = ImageFolder(f"{args.data}/train", create_transform(**norm, is_training=True))
val = ImageFolder(f"{args.data}/val", create_transform(**norm, crop_pct=0.875))
model = timm.create_model(
    "mobilenetv2_100", pretrained=True, num_classes=5, pretrained_cfg_overlay={"file": args.weights}
)
loader = DataLoader(train, 32, shuffle=True, num_workers=2, drop_last=True)
optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.05)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.epochs * len(loader))
for epoch in range(args.epochs):
    model.train()
    for images, labels in loader:
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    model.eval()
    with torch.inference_mode():
        hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in DataLoader(val, 50))
    seconds = f"{time.perf_counter() - began:.0f} s, {time.process_time() - cpu:.0f} s of CPU"
    print(f"epoch {epoch + 1}: loss {loss:.4f}, top-1 {100 * hits / len(val):.1f} %, {seconds}")
