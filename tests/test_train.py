"""The recipe, in process: what it writes, what it prints, and what bad input gets."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from lbaccel import train
from lbaccel.data.sources import open_source

TINY = ["--global-batch-size", "256", "--max-updates", "3", "--log-with", "run_folder"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*flags, tiny=TINY):
    """Exit code of the recipe and the run folders it made."""
    code = train.main([*tiny, *map(str, flags)])
    return code, sorted(Path("runs").glob("*")) if Path("runs").exists() else []


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run that several tests look at."""
    import os

    here = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("finished"))
    try:
        flags = ["--epochs", "2", "--ema-decay", "0.5", "--clip-grad-norm", "1", "--seed", "3"]
        assert train.main(["--global-batch-size", "512", "--log-with", "run_folder", *flags]) == 0
        (folder,) = Path("runs").glob("*")
        return folder.resolve()
    finally:
        os.chdir(here)


def test_the_run_folder_holds_everything(finished):
    for name in (
        *("config.yaml", "env.json", "metrics.jsonl", "metrics.csv", "summary.json"),
        *("plots/loss.png", "plots/top1.png", "plots/lr.png"),
        *(f"checkpoints/{link}/{file}" for link in ("last", "best") for file in (
            "model.safetensors", "model_ema.safetensors", "classes.json", "preprocessing.json",
        )),
    ):  # fmt: skip
        assert (finished / name).stat().st_size > 0, name
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert (config["global_batch_size"], config["seed"], config["norm_batch_size"]) == (512, 3, 32)
    assert config["plan"]["lr"] == 0.1 * 512 / 256
    assert config["origin"]["seed"] == "flag" and config["origin"]["momentum"] == "default"
    assert config["plan"]["gradient_accumulation_steps"] == 512 // 64
    env = json.loads((finished / "env.json").read_text())
    assert env["seed"] == 3 and env["versions"]["torch"] == torch.__version__.split("+")[0]
    summary = json.loads((finished / "summary.json").read_text())
    num_train = len(open_source("digits", seed=3).train)
    updates = math.ceil(2 * num_train / 512)
    assert summary["status"] == "done"
    assert (summary["num_updates"], summary["samples_seen"]) == (updates, updates * 512)


def test_metrics_hold_a_line_an_update_and_an_evaluation(finished):
    rows = lines(finished)
    updates = [row for row in rows if "train/loss" in row]
    evaluations = [row for row in rows if "val/top1" in row]
    num_train = len(open_source("digits", seed=3).train)
    assert [row["update"] for row in updates] == list(range(1, len(updates) + 1))
    for row in rows:
        assert row["samples_seen"] == 512 * row["update"]
        assert row["epoch"] == pytest.approx(row["samples_seen"] / num_train)
    assert len(evaluations) == 2 and {"val/loss", "val/top1_ema"} <= evaluations[0].keys()
    for row in updates:  # warmup over a quarter of 2 epochs from 0.1, then cosine
        seen = row["samples_seen"] - 512
        total, warm = 512 * len(updates), 0.5 * num_train
        if seen < warm:
            truth = 0.1 + 0.1 * seen / warm
        else:
            truth = 0.2 * 0.5 * (1 + math.cos(math.pi * (seen - warm) / (total - warm)))
        assert row["optim/lr"] == pytest.approx(truth, rel=1e-9)


def test_plain_timm_loads_the_checkpoint_and_agrees_on_accuracy(finished):
    from lbaccel.models import adapt_stem

    best = finished / "checkpoints" / "last"
    pre = json.loads((best / "preprocessing.json").read_text())
    model = timm.create_model(
        "resnet10t", num_classes=10, in_chans=1, checkpoint_path=str(best / "model.safetensors")
    )
    assert pre["stem"] == "small"
    adapt_stem(model)
    val = open_source("digits", seed=3).val
    images = (val.images / 255 - pre["mean"][0]) / pre["std"][0]
    with torch.no_grad():
        top1 = (model.eval()(images).argmax(1) == val.labels).double().mean().item() * 100
    last = [row for row in lines(finished) if "val/top1" in row][-1]
    assert last["val/top1"] == pytest.approx(top1, abs=0.3)
    assert json.loads((best / "classes.json").read_text()) == list(val.classes)


def test_the_run_folders_own_config_repeats_the_run(finished):
    code, (folder,) = run("--config", finished / "config.yaml", tiny=[])
    assert code == 0
    truth = [row["train/loss"] for row in lines(finished) if "train/loss" in row]
    assert [row["train/loss"] for row in lines(folder) if "train/loss" in row] == truth


def test_what_is_printed(capsys):
    code, (folder,) = run("--epochs", 1)
    out = capsys.readouterr().out
    assert code == 0
    assert "global batch 256 = 4 micro-batches x 64 samples x 1 rank; BatchNorm over 32" in out
    assert "Learning rate (0.1) calculated from base learning rate (0.1 at 256)" in out
    assert "warning: global_batch_size=256 is 18% of the training set" in out
    assert "mean (0.449) (the backbone's data config)" in out
    assert "validation top-1" in out and "update 3/3" in out
    assert out.rstrip().splitlines()[-1] == str(folder)


def test_plans_change_nothing_but_the_seed_does():
    ends = []
    for flags in ([], ["--micro-batch-size", 128], ["--seed", 1]):
        Path("runs").rename(f"old{len(ends)}") if Path("runs").exists() else None
        _, (folder,) = run("--precision", "fp64", "--epochs", 1, "--max-updates", 2, *flags)
        ends.append([row["train/loss"] for row in lines(folder) if "train/loss" in row])
    assert ends[0] == pytest.approx(ends[1], rel=1e-12)
    assert ends[0] != pytest.approx(ends[2], rel=1e-3)


def test_a_dry_run_writes_nothing(capsys):
    code, folders = run("--dry-run")
    assert code == 0 and not folders and not list(Path().iterdir())
    assert "dry run: 2 updates done" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        ["--model", "vit_tiny_patch16_224", "--img-size", 32, "--drop-path", 0.1, "--mixup", 0.8],
        # bf16 is slow on a processor without kernels for it, so the network is a small one
        [
            "--cutmix",
            1,
            "--label-smoothing",
            0.1,
            "--precision",
            "bf16",
            "--optimizer",
            "lamb",
            "--model",
            "test_resnet",
        ],
        ["--model", "mobilenetv2_035", "--norm-batch-size", "frozen", "--layer-decay", 0.7],
        ["--activation-checkpointing", "full", "--memory-format", "channels_last"],
        ["--schedule", "multistep", "--milestones", 3, 6, "--gamma", 0.2, "--warmup", "none"],
        ["--bn-statistics", "per_update", "--decay-all", "--last-update", "keep"],
    ],
    ids=lambda flags: flags[0],
)
def test_options_run(flags):
    code, (folder,) = run("--epochs", 10, "--max-updates", 2, *flags)
    assert code == 0
    assert all(math.isfinite(row["train/loss"]) for row in lines(folder) if "train/loss" in row)


def test_log_every_averages_by_samples_and_checkpoints_are_kept_as_asked():
    _, (every,) = run("--epochs", 1, "--max-updates", 4)
    Path("runs").rename("old")
    every = Path("old") / every.name
    flags = ["--log-every", 2, "--checkpoint-every", 1, "--keep", 2, "--max-updates", 4]
    _, (folder,) = run("--epochs", 1, *flags)
    single = [row["train/loss"] for row in lines(every) if "train/loss" in row]
    pairs = [row["train/loss"] for row in lines(folder) if "train/loss" in row]
    assert pairs == pytest.approx([np.mean(single[:2]), np.mean(single[2:])])
    kept = {p.name for p in (folder / "checkpoints").iterdir() if not p.is_symlink()}
    assert kept == {"update_000003", "update_000004"}


# -- bad input ------------------------------------------------------------------------------------


def refused(capsys, *words, code=2):
    def check(result):
        found, folders = result
        err = capsys.readouterr().err
        assert found == code, err
        assert "Traceback" not in err
        assert err.strip().splitlines()[-1].startswith("error: " if code == 2 else "run failed: ")
        for word in words:
            assert str(word) in err, err
        return folders

    return check


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "resnet19"], ["'resnet19' is no timm model", "resnet18"]),
        (["--data", "folder:nowhere"], ["nowhere"]),
        (["--data", "digit"], ["digits"]),
        (["--global-batch-size", 0], ["--global-batch-size='0' is not a whole number from 1"]),
        (["--micro-batch-size", 48], ["nearest that fit are 32 and 64"]),
        (["--epochs", "many"], ["--epochs='many' is not a number"]),
        (["--epochs", -1], ["--epochs='-1' is not a number above 0"]),
        (["--seed", "1.5"], ["--seed='1.5' is not a whole number"]),
        (["--gobal-batch-size", 1], ["unknown flag --gobal-batch-size", "--global-batch-size"]),
        (["--schedule", "cosin"], ["Did you mean cosine?"]),
        (["--epochs", 2, "--warmup-epochs", 3], ["longer than the run"]),
        (["--optimizer", "sdg"], ["none of timm.optim", "sgd"]),
        (["--img-size", 0], ["--img-size='0' is not a whole number from 1 to 65,535"]),
        (["--num-classes", 3], ["below the 10 classes"]),
        (["--mean", 0.1, 0.2], ["mean has 2 values", "1 channel"]),
        (["--std", 0], ["above 0"]),
        (["--milestones", 3], ["milestones"]),
        (["--precision", "fp16"], ["needs a GPU"]),
        (["--log-with", "tensorbord"], ["tensorbord"]),
        (["--stem", "small", "--model", "vit_tiny_patch16_224"], ["no ResNet or MobileNetV2"]),
        (["--model", "test_vit", "--img-size", 16, "--norm-batch-size", 32], ["has no BatchNorm"]),
        (["--checkpoint", "nowhere.safetensors"], ["is no file"]),
        (["--config", "nowhere.yaml"], ["can't be read"]),
        (["--auto-augment", "rand-m9"], ["colour"]),
        (["--val-fraction", 1.5], ["--val-fraction='1.5' is not a number above 0 and below 1"]),
        (["--drop-rate", 1], ["--drop-rate='1' is not a number of at least 0 and below 1"]),
        (["--clip-grad-norm", 0], ["--clip-grad-norm='0' is not a finite number above 0"]),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else None,
)
def test_bad_input_gets_one_message_and_exit_code_two(flags, words, capsys):
    assert not refused(capsys, *words)(run(*flags))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gobal_batch_size: 8", ["'gobal_batch_size'", "Did you mean global_batch_size?"]),
        ("epochs: [1, 2]", ["epochs in"]),
        ("pretrained: maybe", ["true or false"]),
        ("- a\n- b", ["holds no mapping"]),
        ("a: [", ["is no YAML"]),
    ],
)
def test_a_bad_yaml_is_named(text, words, capsys):
    Path("c.yaml").write_text(text)
    assert not refused(capsys, "c.yaml", *words)(run("--config", "c.yaml"))


def test_flags_win_over_yaml_and_the_origin_is_shown(capsys):
    Path("c.yaml").write_text("epochs: 7\nmomentum: 0.5\n")
    assert train.main(["--config", "c.yaml", "--epochs", "3", "--print-config"]) == 0
    rows = {r.split()[0]: r.split()[1:] for r in capsys.readouterr().out.splitlines()}
    assert rows["epochs"] == ["3.0", "flag"] and rows["momentum"] == ["0.5", "c.yaml"]
    assert rows["gamma"] == ["0.1", "default"]


def make_images(root, *, size=64):
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for label in ("cat", "dog"):
            folder = Path(root) / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")


SMALL = ["--model", "mobilenetv2_035", "--img-size", "64", "--global-batch-size", "8"]
SMALL += ["--micro-batch-size", "4", "--norm-batch-size", "4", "--max-updates", "2"]
SMALL += ["--log-with", "run_folder", "--data", "folder:images"]


def test_a_folder_of_images_trains_and_a_corrupt_or_missing_one_is_named(capsys):
    make_images("images")
    code, (folder,) = run("--workers", 0, tiny=SMALL)
    assert code == 0 and (folder / "checkpoints/last/model.safetensors").exists()
    path = Path("images/train/dog/3.png")
    sound = path.read_bytes()
    path.write_bytes(b"no image")
    refused(capsys, "images/train/dog/3.png", "--skip-corrupt")(run("--workers", 0, tiny=SMALL))
    middle = sound.index(b"IDAT") + 6  # its end is there, so that only who decodes it can tell
    path.write_bytes(sound[:middle] + bytes(4) + sound[middle + 4 :])
    for workers in (0, 1):
        flags = ["--workers", workers, "--max-updates", 9]
        refused(capsys, "images/train/dog/3.png")(run(*flags, tiny=SMALL))
    for file in Path("images/train/cat").iterdir():
        file.unlink()
    refused(capsys, "cat")(run(tiny=SMALL))


def test_a_checkpoint_of_another_shape_names_the_tensor(capsys):
    make_images("images")
    save_file(timm.create_model("mobilenetv2_035", num_classes=3).state_dict(), "w.safetensors")
    refused(capsys, "classifier.weight is (3, 1280)", "(2, 1280)", "--pretrained")(
        run("--checkpoint", "w.safetensors", tiny=SMALL)
    )
    code, _ = run("--checkpoint", "w.safetensors", "--pretrained", "--workers", 0, tiny=SMALL)
    assert code == 0
    Path("w.safetensors").write_bytes(b"garbage")
    refused(capsys, "can't be read as weights")(run("--checkpoint", "w.safetensors", tiny=SMALL))


def test_pretrained_weights_of_a_file_are_those_that_training_starts_from():
    from lbaccel.models import create_backbone

    torch.manual_seed(5)
    source = timm.create_model("mobilenetv2_035", num_classes=3)
    save_file(source.state_dict(), "w.safetensors")
    model = create_backbone(
        "mobilenetv2_035", num_classes=2, pretrained=True, checkpoint=Path("w.safetensors")
    )
    for key, value in model.state_dict().items():
        if not key.startswith("classifier"):
            assert torch.equal(value, source.state_dict()[key]), key


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_good_checkpoint(capsys, monkeypatch):
    from torch.nn import functional as F

    plain, calls = F.cross_entropy, [0]

    def poisoned(*args, **options):
        calls[0] += options.get("reduction") != "sum"
        return plain(*args, **options) * (float("nan") if calls[0] == 10 else 1)

    monkeypatch.setattr(F, "cross_entropy", poisoned)
    words = ["the loss is nan", "at update 3 after 512 samples"]
    (folder,) = refused(capsys, *words, code=1)(run("--checkpoint-every", 1, "--max-updates", 9))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "failed" and summary["num_updates"] == 2
    weights = load_file(folder / "checkpoints/last/model.safetensors")
    assert all(torch.isfinite(w).all() for w in weights.values() if w.is_floating_point())
    assert (folder / "checkpoints/last").resolve().name == "update_000002"


def test_a_full_disk_keeps_the_previous_checkpoint(capsys, monkeypatch):
    import safetensors.torch

    plain, calls = safetensors.torch.save_file, [0]

    def full(tensors, path):
        calls[0] += 1
        if calls[0] == 3:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(tensors, path)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    words = ["update 3 could not be saved", "No space left", "update_000002 is kept"]
    (folder,) = refused(capsys, *words, code=1)(run("--checkpoint-every", 1, "--max-updates", 9))
    assert load_file(folder / "checkpoints/last/model.safetensors")
    names = {p.name for p in (folder / "checkpoints").iterdir()}
    assert names == {"last", "update_000001", "update_000002"}


def test_an_output_that_is_a_file_is_refused(capsys):
    Path("taken").write_text("")
    code, _ = run("--output", "taken")
    assert code in (1, 2) and "taken" in capsys.readouterr().err


def test_an_interrupt_ends_with_130_and_a_summary(monkeypatch):
    from torch.nn import functional as F

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(F, "cross_entropy", interrupt)
    code, (folder,) = run()
    assert code == 130
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"


def test_a_batch_above_the_training_set_is_full_batch_training(capsys):
    code, (folder,) = run("--global-batch-size", 5000, "--max-updates", 1)
    out = capsys.readouterr().out
    num_train = len(open_source("digits").train)
    assert code == 0 and "full-batch training" in out and "global_batch_size=5000" in out
    assert lines(folder)[0]["samples_seen"] == num_train


@pytest.mark.parametrize("name", ["resnet18", "resnet10t", "mobilenetv2_050"])
def test_the_small_stem_keeps_the_resolution(name):
    from lbaccel.models import adapt_stem

    model = timm.create_model(name, num_classes=2).eval()
    before = model.forward_features(torch.zeros(1, 3, 32, 32)).shape[-1]
    assert adapt_stem(model)
    assert model.forward_features(torch.zeros(1, 3, 32, 32)).shape[-1] == 4 * before
    assert adapt_stem(timm.create_model("convnext_atto")) is None
