"""The recipe against formulas and plain timm: schedules, counts, averages, optimizer groups."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import recipes
import timm
import torch
from PIL import Image
from recipes import settings_of
from runs_of_recipe import break_inside
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torchvision.datasets import ImageFolder

from lbaccel import LargeBatch, train
from lbaccel.batch.plan import UpdateStream
from lbaccel.data.sources import open_source
from lbaccel.recipe.options_batch import BatchOptions
from lbaccel.recipe.sizes import choose_micro_batch_size

NUM_TRAIN = 1438  # of digits at seed 0: 1797 less round(0.2 n) of each class
SMALL = ["--model", "test_resnet", "--workers", "0", "--log-with", "run_folder"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*flags):
    """Exit code of the recipe, and the run folder that it made (None where it made none)."""
    before = set(Path("runs").glob("*"))
    code = train.main([*SMALL, *map(str, flags)])
    new = set(Path("runs").glob("*")) - before
    assert len(new) <= 1
    return code, next(iter(new), None)


def finish(*flags):
    code, folder = run(*flags)
    assert code == 0 and folder is not None
    return folder


def rows(folder, key="train/loss"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


def values(folder, key):
    return [row[key] for row in rows(folder, key)]


def make_images(root, counts, *, size=40):
    """Noise on a colour of its class, so that there is something to tell apart."""
    generator = np.random.default_rng(0)
    for split, count in counts.items():
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 200, (size, size, 3), dtype=np.uint8)
                pixels[..., label] += 20
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")


# -- counts, schedules and averages ---------------------------------------------------------------


def test_digits_hold_out_a_fifth_of_each_class():
    assert len(open_source("digits").train) == NUM_TRAIN


@pytest.mark.parametrize(
    ("policy", "sizes"),
    [
        ("wrap", [512] * math.ceil(2 * NUM_TRAIN / 512)),
        ("keep", [512, 512, NUM_TRAIN - 1024] * 2),
        ("drop", [512, 512] * 2),
    ],
)
def test_the_last_update_of_an_epoch_is_as_asked(policy, sizes):
    folder = finish("--epochs", 2, "--last-update", policy, "--warmup", "none")
    assert values(folder, "batch/global") == sizes
    seen = np.cumsum(sizes).tolist()
    assert (
        values(folder, "samples_seen")[: len(seen)]
        == sorted(values(folder, "samples_seen"))[: len(seen)]
    )
    updates = rows(folder)
    assert [row["samples_seen"] for row in updates] == seen
    per_epoch = 1024 if policy == "drop" else NUM_TRAIN
    assert [row["epoch"] for row in updates] == pytest.approx([s / per_epoch for s in seen])
    # evaluation: at the first update that has reached each epoch's end, once each
    ends = [next(i for i, s in enumerate(seen, 1) if s >= per_epoch * e) for e in (1, 2)]
    assert [row["update"] for row in rows(folder, "val/top1")] == ends
    total = seen[-1]
    truth = [0.2 * 0.5 * (1 + math.cos(math.pi * s / total)) for s in [0, *seen[:-1]]]
    assert [row["optim/lr"] for row in updates] == pytest.approx(truth, rel=1e-12)


def test_milestones_in_epochs_and_sqrt_scaling_make_the_learning_rate():
    text = "--epochs 3 --warmup none --schedule multistep --milestones 1 2 --gamma 0.5"
    folder = finish(
        *text.split(), "--optimizer", "adamw", "--base-lr", 0.002, "--global-batch-size", 512
    )
    updates = rows(folder)
    peak = 0.002 * math.sqrt(512 / 256)
    truth = [peak * 0.5 ** sum(512 * u >= NUM_TRAIN * m for m in (1, 2)) for u in range(9)]
    assert len(updates) == math.ceil(3 * NUM_TRAIN / 512) == 9
    assert [row["optim/lr"] for row in updates] == pytest.approx(truth, rel=1e-12)
    assert len(set(truth)) == 3


def test_warmup_from_zero_rises_by_update_and_max_updates_keeps_the_schedule():
    text = "--epochs 4 --warmup-epochs 2 --warmup-start zero --max-updates 4 --base-lr 0.1"
    folder = finish(*text.split(), "--eval-every", 9)
    truth = [0.2 * 512 * u / (2 * NUM_TRAIN) for u in range(4)]
    assert values(folder, "optim/lr") == pytest.approx(truth, rel=1e-12)
    assert [row["update"] for row in rows(folder, "val/top1")] == [4]  # the last one, always


def test_a_cosine_ends_at_the_final_rate_and_so_does_a_restart():
    text = "--epochs 2 --warmup none --base-lr 0.1 --base-batch-size 512 --final-lr 0.02"
    folder = finish(*text.split(), "--eval-every", 9)
    end = 6 * 512  # 2 epochs, the last update completed
    truth = [0.02 + 0.08 * (1 + math.cos(math.pi * 512 * u / end)) / 2 for u in range(6)]
    assert values(folder, "optim/lr") == pytest.approx(truth, rel=1e-12)
    code, _ = run("--resume", folder, "--epochs", 4, "--extend", "restart")
    assert code == 0
    last = 12 * 512
    later = [
        0.02 + 0.08 * (1 + math.cos(math.pi * (512 * u - end) / (last - end))) / 2
        for u in range(6, 12)
    ]
    assert values(folder, "optim/lr")[6:] == pytest.approx(later, rel=1e-12)


def test_a_bn_momentum_is_that_of_every_layer():
    """One update of one ghost batch: r = (1 - m) r0 + m s, so r - r0 is proportional to m."""
    moved = []
    for momentum in (0.1, 0.025):
        text = f"--max-updates 1 --precision fp64 --bn-momentum {momentum}"
        text += " --global-batch-size 64 --norm-batch-size 64"
        weights = load_file(finish(*text.split()) / "checkpoints" / "best" / "model.safetensors")
        moved.append(torch.cat([v for k, v in weights.items() if k.endswith("running_mean")]))
    torch.testing.assert_close(moved[0], 4 * moved[1], rtol=1e-9, atol=1e-12)
    assert moved[0].abs().max() > 0


def test_evaluation_comes_when_the_asked_part_of_an_epoch_is_seen():
    # 2 updates of 719 are an epoch. In floats 3 * 0.1 epochs are not 0.3: no double evaluation.
    folder = finish("--global-batch-size", 719, "--epochs", 3, "--eval-every", 1.5)
    assert [row["update"] for row in rows(folder, "val/top1")] == [3, 6]


def test_log_every_averages_over_samples_and_the_csv_holds_the_same():
    flags = ["--epochs", 2, "--last-update", "keep"]  # sizes 512, 512, 414, 512, 512, 414
    single = rows(finish(*flags))
    folder = finish(*flags, "--log-every", 4)
    groups = [single[:4], single[4:]]
    truth = [
        sum(r["train/loss"] * r["batch/global"] for r in g) / sum(r["batch/global"] for r in g)
        for g in groups
    ]
    found = rows(folder)
    assert [row["update"] for row in found] == [4, 6]
    assert [row["train/loss"] for row in found] == pytest.approx(truth, rel=1e-6)
    with (folder / "metrics.csv").open() as file:
        table = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert [float(row["train/loss"]) for row in table] == [row["train/loss"] for row in found]


def test_the_first_loss_is_that_of_the_classifier_on_plain_pixels():
    """Update 1 at learning rate x: the loss of the untouched model, ghost batch by ghost batch."""
    flags = ["--max-updates", 1, "--global-batch-size", 256, "--precision", "fp64"]
    flags += ["--label-smoothing", 0.1, "--norm-batch-size", 16]
    seen = []
    plain = LargeBatch.prepare

    def spy(self, model, optimizer, loader, *rest, **options):
        copy = timm.create_model("test_resnet", num_classes=10, in_chans=1).double()
        copy.conv1[0].stride, copy.maxpool = (1, 1), nn.Identity()
        copy.load_state_dict(model.state_dict())
        seen.extend([copy, loader.dataset, loader.plan])
        return plain(self, model, optimizer, loader, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LargeBatch, "prepare", spy)
        folder = finish(*flags)
    copy, dataset, _ = seen
    from lbaccel.data.order import epoch_order

    order = np.array(epoch_order(0, 0, NUM_TRAIN))[:256]
    images, labels = dataset.fetch(order, np.zeros(256, dtype=np.int64))
    total = 0.0
    with torch.no_grad():
        for part in np.split(np.arange(256), 16):  # plain BatchNorm, in training mode
            logits = copy.train()(images[part].double())
            total += F.cross_entropy(
                logits, labels[part], label_smoothing=0.1, reduction="sum"
            ).item()
    assert values(folder, "train/loss") == [pytest.approx(total / 256, rel=1e-10)]


# -- one contract, several plans ------------------------------------------------------------------


def test_same_seed_same_bits_and_another_seed_another_run():
    flags = ["--epochs", 1, "--max-updates", 2, "--mixup", 0.4, "--drop-rate", 0.2]
    first, again, other = (finish(*flags, "--seed", seed) for seed in (0, 0, 1))
    for key in ("train/loss", "val/loss", "val/top1", "optim/grad_norm"):
        assert values(first, key) == values(again, key)
    assert values(first, "train/loss") != values(other, "train/loss")
    one, two = (load_file(f / "checkpoints/last/model.safetensors") for f in (first, again))
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.slow
def test_twenty_updates_in_fp64_agree_within_a_control_run_under_every_plan():
    flags = "--precision fp64 --epochs 8 --max-updates 20 --global-batch-size 96 --eval-every 99"
    flags = [*flags.split(), "--base-lr", "0.05"]
    plain = LargeBatch.prepare

    def losses(*more, perturbed=None):
        def prepare(self, model, *rest, **options):
            if perturbed is not None:  # one rounding error in each weight, up or down
                generator = torch.Generator().manual_seed(perturbed)
                for p in model.parameters():
                    sign = torch.randint(2, p.shape, generator=generator).double() * 2 - 1
                    p.data *= 1 + sign * torch.finfo(torch.float64).eps
            return plain(self, model, *rest, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LargeBatch, "prepare", prepare)
            found = values(finish(*flags, *more), "train/loss")
        assert len(found) == 20
        return np.array(found)

    truth = losses("--micro-batch-size", 32)
    controls = np.array([abs(losses(perturbed=seed) - truth) for seed in range(2)])
    bound = 8 * np.maximum.accumulate(controls.max(0)) + 16 * np.finfo(float).eps * truth
    assert bound[-1] < 1e-6 * truth[-1]  # a bound that means something
    for more in (["--micro-batch-size", 96], ["--activation-checkpointing", "full"]):
        difference = abs(losses(*more) - truth)
        assert (difference <= bound).all(), (more, (difference / bound).max())
    assert truth[-1] < truth[0]


def test_the_average_of_the_weights_is_the_recursion_and_is_evaluated_beside():
    flags = ("--keep", 9, "--ema-decay", 0.75, "--ema-norm", "average")
    folder = finish("--epochs", 1, "--checkpoint-every", 1, *flags)
    files = sorted((folder / "checkpoints").glob("update_*"))
    assert len(files) == 3
    weights, averages = (
        [load_file(f / f"{stem}.safetensors") for f in files] for stem in ("model", "model_ema")
    )
    for before, new, after in zip(averages, weights[1:], averages[1:], strict=False):
        for key, value in after.items():
            if value.is_floating_point():
                torch.testing.assert_close(value, 0.75 * before[key] + 0.25 * new[key])
    (line,) = rows(folder, "val/top1_ema")
    assert line["val/loss_ema"] != line["val/loss"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["val_top1_ema"] == line["val/top1_ema"]


# -- the optimizer --------------------------------------------------------------------------------


def optimizer_of(model, *flags, batch=512):
    stream, said = UpdateStream(batch, NUM_TRAIN), []
    found = recipes.optimizer_of(settings_of(*flags), model, stream=stream, say=said.append)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {names[id(p)]: group for group in found[0].param_groups for p in group["params"]}
    assert groups.keys() == set(names.values())  # each parameter, once
    return groups, found[2], said


def test_weight_decay_leaves_out_biases_and_norms():
    model = timm.create_model("test_resnet", num_classes=3)
    groups, values, _ = optimizer_of(model, "--weight-decay", 0.03)
    spared = {
        f"{name}.{kind}".lstrip(".")
        for name, module in model.named_modules()
        for kind, _ in module.named_parameters(recurse=False)
        if kind == "bias" or isinstance(module, nn.BatchNorm2d)
    }
    assert {name for name, group in groups.items() if group["weight_decay"] == 0} == spared
    assert {g["weight_decay"] for n, g in groups.items() if n not in spared} == {0.03}
    assert spared and values.weight_decay == 0.03


@pytest.mark.parametrize("more", [[], ["--layer-decay", 0.5]])
def test_decay_all_decays_all(more):
    model = timm.create_model("test_resnet", num_classes=3)
    groups, _, _ = optimizer_of(model, "--weight-decay", 0.03, "--decay-all", *more)
    assert {group["weight_decay"] for group in groups.values()} == {0.03}


def test_layer_decay_is_a_power_of_the_distance_to_the_head():
    model = timm.create_model("test_vit", num_classes=3, img_size=16)
    groups, values, _ = optimizer_of(model, "--layer-decay", 0.5, "--optimizer", "adamw")
    depth = len(model.blocks)
    assert values.lr == 1e-3 * math.sqrt(2)
    for name, group in groups.items():
        if name.startswith("head."):
            power = 0
        elif name.startswith("blocks."):
            power = depth - int(name.split(".")[1])
        elif name.startswith("patch_embed."):
            power = depth + 1
        else:
            continue
        assert group["lr"] == pytest.approx(values.lr * 0.5**power, rel=1e-12), name


@pytest.mark.parametrize(
    ("flags", "peak", "decay", "words"),
    [
        ([], 0.1 * 2, 1e-4, "linear scaling. (sgd is of the SGD family"),
        (["--pretrained"], 0.01 * 2, 1e-4, "0.01 at 256"),
        (["--optimizer", "AdamW"], 1e-3 * 2**0.5, 0.05, "sqrt scaling. (adamw normalises"),
        (["--optimizer", "adamw", "--pretrained"], 1e-4 * 2**0.5, 0.05, "0.0001 at 256"),
        (["--optimizer", "lars", "--lr-scaling", "linear"], 1e-3 * 2, 0.05, "(as asked)"),
        (["--lr-scaling", "none", "--base-lr", 0.3], 0.3, 1e-4, "with no scaling"),
        (["--base-batch-size", 128], 0.1 * 4, 1e-4, "0.1 at 128"),
    ],
)
def test_defaults_and_the_sentence_follow_the_optimizer(flags, peak, decay, words):
    _, values, said = optimizer_of(timm.create_model("test_resnet", num_classes=3), *flags)
    assert values.lr == pytest.approx(peak, rel=1e-12) and values.weight_decay == decay
    assert words in said[0] and f"Learning rate ({peak:.6g})" in said[0]


@pytest.mark.parametrize(
    ("norm", "micro"), [(32, 64), (48, 48), (20, 60), (100, 100), ("frozen", 64), (None, 64)]
)
def test_the_micro_batch_by_default_holds_whole_ghost_batches(norm, micro):
    batch = BatchOptions()
    assert choose_micro_batch_size(batch, norm_batch_size=norm) == micro
    given = replace(batch, micro_batch_size=7)
    assert choose_micro_batch_size(given, norm_batch_size=norm) == 7


@pytest.mark.parametrize("batch", [1, 20, 33])
def test_any_global_batch_runs_without_another_flag(batch):
    layer_norm = ["--model", "test_vit", "--img-size", 16]
    assert run("--global-batch-size", batch, *layer_norm, "--dry-run")[0] == 0
    if batch > 1:  # BatchNorm over one sample of 1 x 1 pixels has no variance
        assert run("--global-batch-size", batch, "--dry-run")[0] == 0


# -- folders of images ----------------------------------------------------------------------------


def test_timms_own_evaluation_of_the_checkpoint_gives_the_logged_numbers():
    make_images(Path("images"), {"train": 20, "val": 15})
    flags = "--data folder:images --img-size 64 --global-batch-size 8 --epochs 2 --stem native"
    folder = finish(*flags.split(), "--micro-batch-size", 8, "--norm-batch-size", 8)
    last = folder / "checkpoints" / "last"
    pre = json.loads((last / "preprocessing.json").read_text())
    model = timm.create_model(
        "test_resnet", num_classes=2, checkpoint_path=str(last / "model.safetensors")
    )
    loader = timm.data.create_loader(
        ImageFolder("images/val"),
        input_size=(3, pre["img_size"], pre["img_size"]),
        batch_size=7,
        use_prefetcher=False,
        num_workers=0,
        persistent_workers=False,
        **{key: pre[key] for key in ("mean", "std", "interpolation", "crop_pct")},
    )
    losses, hits = [], []
    with torch.no_grad():
        for images, labels in loader:
            logits = model.eval()(images)
            losses += F.cross_entropy(logits, labels, reduction="none").tolist()
            hits += (logits.argmax(1) == labels).tolist()
    line = rows(folder, "val/top1")[-1]
    assert len(hits) == 30
    assert line["val/top1"] == pytest.approx(100 * sum(hits) / 30, abs=1e-9)
    assert line["val/loss"] == pytest.approx(sum(losses) / 30, rel=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_validation_image_is_named_without_the_traceback_of_a_worker(workers, capsys):
    make_images(Path("images"), {"train": 4, "val": 2})
    break_inside("images/val/dog/1.png")
    flags = ["--data", "folder:images", "--img-size", 32, "--global-batch-size", 8]
    code, folder = run(*flags, "--max-updates", 1, "--workers", workers)
    err = capsys.readouterr().err
    assert code == 2 and "Traceback" not in err and "Caught" not in err
    assert "images/val/dog/1.png can't be read as an image" in err.strip().splitlines()[-1]
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"


def test_a_batch_above_a_tiny_set_runs_without_another_flag_and_its_norm_is_checked(capsys):
    make_images(Path("images"), {"train": 5, "val": 2})
    flags = ["--data", "folder:images", "--img-size", 32, "--max-updates", 1]
    folder = finish(*flags)
    assert values(folder, "samples_seen")[0] == 10
    assert "full-batch training" in capsys.readouterr().out
    code, folder = run(*flags, "--norm-batch-size", 32)
    err = capsys.readouterr().err
    assert code == 2 and folder is None
    assert "--norm-batch-size 32 is above the training set's 10 samples" in err


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--epochs 2 --warmup-epochs 3", "--warmup-epochs 3 is longer than the run of --epochs 2"),
        ("--warmup none --warmup-epochs 3", "--warmup none does not read --warmup-epochs 3"),
        ("--warmup-epochs -1", "--warmup-epochs='-1' is not a number from 0 to 1,000,000"),
        ("--milestones 3 6", "--schedule cosine does not read --milestones 3 6"),
        ("--schedule step", "--schedule step needs one --milestones"),
        ("--schedule multistep", "--schedule multistep needs --milestones"),
        ("--global-batch-size -4", "--global-batch-size='-4' is not a whole number from 1"),
        ("--global-batch-size 20 --norm-batch-size 32", "larger than global_batch_size=20"),
        ("--norm-batch-size 0", "--norm-batch-size='0' is not a whole number from 1"),
        ("--mean nan", "--mean nan must be numbers from 0 to 1"),
        ("--std inf", "--std inf must be numbers above 0 to 1"),
        ("--std 0", "--std 0 must be numbers above 0 to 1, for pixels of 0..1."),
        ("--mean -0.1", "--mean -0.1 must be numbers from 0 to 1, for pixels of 0..1."),
        ("--mean 124 117 104", "Of 0..255 they are --mean 0.486 0.459 0.408."),
        ("--std 58.4 57.1 57.4", "Of 0..255 they are --std 0.229 0.224 0.225."),
        ("--mean 300", "--mean 300 must be numbers from 0 to 1, for pixels of 0..1."),
        ("--mixup nan", "--mixup='nan' is not a finite number of at least 0"),
        ("--cutmix inf", "--cutmix='inf' is not a finite number of at least 0"),
        ("--weight-decay nan", "--weight-decay='nan' is not a finite number"),
        ("--bn-momentum 0", "--bn-momentum='0' is not a number above 0 and at most 1"),
        ("--bn-momentum nan", "--bn-momentum='nan' is not a number above 0"),
        ("--model test_vit --img-size 16 --bn-momentum 0.1", "test_vit has no BatchNorm"),
        ("--final-lr -1", "--final-lr='-1' is not a finite number of at least 0"),
        ("--schedule constant --final-lr 0.1", "--schedule constant does not read --final-lr 0.1"),
        ("--final-lr 9", "final_lr=9.0 is not a finite number"),
        ("--layer-decay 0", "--layer-decay='0' is not a number above 0"),
        ("--layer-decay nan", "--layer-decay='nan' is not a number above 0"),
        ("--base-lr inf", "--base-lr='inf' is not a finite number above 0"),
        ("--seed -1", "--seed='-1' is not a whole number from 0"),
        ("--seed 99999999999", "--seed='99999999999' is not a whole number from 0 to 2^31 - 1"),
        ("--clip-grad-norm nan", "--clip-grad-norm='nan' is not a finite number above 0"),
        ("--keep 0", "--keep='0' is not a whole number from 1"),
        ("--optimizer adahessian", "--optimizer adahessian needs the gradient of the gradient"),
        ("--optimizer lookahead_sgd", "'lookahead_sgd' is none of timm.optim"),
        ("--model test_vit", "test_vit can't take images of 8 px"),
        ("--model resnet10t.nonsense", "resnet10t.c3_in1k"),
        ("--model test_vit --img-size 16 --norm-batch-size frozen", "test_vit has no BatchNorm"),
        ("--data folder:", "data='folder:' is none of"),
        ("--val-fraction 0", "--val-fraction='0' is not a number above 0 and below 1"),
        ("--log-with tensorbord", "tensorbord is not one of run_folder, wandb"),
        ("--wandb-mode on", "--wandb-mode='on' is not one of online"),
        ("--output taken", "output='taken' cannot hold run folders"),
        ("--output taken/deep", "output='taken/deep' cannot hold run folders"),
    ],
)
def test_bad_input_gets_one_line_exit_code_two_and_writes_nothing(flags, words, capsys):
    Path("taken").write_text("mine")
    code, folder = run(*flags.split())
    captured = capsys.readouterr()
    assert code == 2, captured.err
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("error: ") and words in line
    assert folder is None and [p.name for p in Path().iterdir()] == ["taken"]
    assert Path("taken").read_text() == "mine"


def test_an_optimizer_that_needs_what_is_not_here_is_refused(capsys):
    if torch.cuda.is_available():
        pytest.skip("timm's check is for CUDA")
    code, folder = run("--optimizer", "fusedadam")
    assert code == 2 and folder is None
    assert "--optimizer fusedadam can't be had here" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["metrics", "summary and checkpoint", "config"])
def test_a_full_disk_at_any_file_is_one_message_without_a_traceback(where, capsys, monkeypatch):
    import safetensors.torch

    from lbaccel.runs import folder as run_folder
    from lbaccel.runs import tracking

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "metrics":
        monkeypatch.setattr(tracking.RunFolderTracker, "log", full)
    elif where == "config":
        monkeypatch.setattr(run_folder, "atomic_write_text", full)
    else:
        monkeypatch.setattr(safetensors.torch, "save_file", full)
        monkeypatch.setattr(run_folder, "write_summary", full)
    code, _ = run("--max-updates", 1)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert code == 1 and line.startswith("run failed: ") and "No space left" in line
    assert "Free some space, or give another --output" in line
    if where == "summary and checkpoint":  # what failed first is what is said
        assert "the checkpoint of update 1 could not be saved" in line


def test_without_the_run_folder_tracker_a_run_ends_well():
    folder = finish("--max-updates", 1, "--log-with", "wandb", "--wandb-mode", "disabled")
    assert json.loads((folder / "summary.json").read_text())["status"] == "done"
    assert not (folder / "metrics.jsonl").exists()


def test_an_interrupt_keeps_the_checkpoint_before_it(monkeypatch, capsys):
    plain, calls = F.cross_entropy, [0]

    def interrupted(*args, **options):
        calls[0] += options.get("reduction") != "sum"  # evaluation sums
        if calls[0] > 2:  # one micro-batch an update: in update 3
            raise KeyboardInterrupt
        return plain(*args, **options)

    monkeypatch.setattr(F, "cross_entropy", interrupted)
    code, folder = run("--global-batch-size", 64, "--checkpoint-every", 1)
    assert code == 130 and "Traceback" not in capsys.readouterr().err
    assert (folder / "checkpoints/last").resolve().name == "update_000002"
    assert [row["update"] for row in rows(folder)] == [1, 2]  # nothing that was logged is lost
    assert (folder / "metrics.csv").exists()
    assert json.loads((folder / "summary.json").read_text())["num_updates"] == 2


def test_accelerate_launch_ends_with_the_run_folder(tmp_path):
    config = Path(__file__).parents[2] / "accelerate_configs" / "cpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["-m", "lbaccel.train", *SMALL, "--max-updates", "1"]
    root = str(Path(train.__file__).parent.parent)
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"PYTHONPATH": root},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.rstrip().splitlines()
    assert Path(lines[-1]).parent == Path("runs") and (tmp_path / lines[-1]).is_dir()
    assert lines[-4].startswith("peak memory") and lines[-2].startswith("critical batch")
