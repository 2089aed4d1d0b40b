"""Finetune a timm backbone on an ImageFolder with Accelerate: an ordinary script.

accelerate launch examples/finetune_accelerate.py DATA --model mobilenetv2_100
DATA holds train/ and val/, a folder a class. Its twin is finetune_lbaccel.py; see what differs by
diff -y --width 200 examples/finetune_accelerate.py examples/finetune_lbaccel.py
"""

import argparse
from pathlib import Path

import timm
import timm.data
import timm.optim
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder


def parse_arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--weights", type=Path, help="a file in place of timm's download")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.0001)
    parser.add_argument("--micro-batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    return parser.parse_args()


def loss_fn(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def main():
    args = parse_arguments()
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    set_seed(0)

    overlay = {"file": str(args.weights)} if args.weights else None
    classes = len(list((args.data / "train").iterdir()))
    model = timm.create_model(
        args.model, pretrained=True, num_classes=classes, pretrained_cfg_overlay=overlay
    )
    config = timm.data.resolve_model_data_config(model)
    train_set = ImageFolder(
        args.data / "train", timm.data.create_transform(**config, is_training=True)
    )
    val_set = ImageFolder(args.data / "val", timm.data.create_transform(**config))
    val_loader = DataLoader(val_set, args.micro_batch_size, num_workers=args.workers)

    loader = DataLoader(train_set, args.micro_batch_size, shuffle=True, num_workers=args.workers)
    lr = args.lr
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=lr, weight_decay=0.05)
    updates = args.epochs * len(loader)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    val_loader = accelerator.prepare(val_loader)

    for epoch in range(args.epochs):
        model.train()
        for batch in loader:
            loss = loss_fn(model, batch)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()

        model.eval()
        hits = torch.zeros((), device=accelerator.device)
        for images, labels in val_loader:
            with torch.no_grad():
                predicted = model(images).argmax(1)
            predicted, labels = accelerator.gather_for_metrics((predicted, labels))
            hits += (predicted == labels).sum()
        top1 = 100 * hits.item() / len(val_set)
        accelerator.print(f"epoch {epoch}: loss {loss.item():.4f}, validation top-1 {top1:.2f} %")
    accelerator.end_training()


if __name__ == "__main__":
    main()
