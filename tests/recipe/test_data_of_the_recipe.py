"""What the recipe says of the images that it is given, before it trains on them."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from runs_of_recipe import BASE, differences, run, stopped_at

from lbaccel import train

FLAGS = [
    "--global-batch-size",
    "8",
    "--norm-batch-size",
    "8",
    "--max-updates",
    "1",
    "--workers",
    "0",
]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make(*, classes, count=8):
    for split, step in (("train", 1), ("val", 2)):
        for row, label in enumerate(classes):
            folder = Path("images", split, label)
            folder.mkdir(parents=True)
            for i in range(count // step):
                color = (20 * i, 90 * row, 100 * step)
                Image.new("RGB", (8, 8), color).save(folder / f"{i}.png")


def train_on(capsys, *flags):
    code = train.main([*BASE, "--data", "folder:images", *FLAGS, *flags])
    return code, capsys.readouterr()


def test_images_that_train_and_validate_are_counted_once_a_run(capsys):
    make(classes=("cat", "dog"))
    code, said = train_on(capsys)
    assert code == 0 and "byte for byte" not in said.out + said.err
    for i in (1, 2):
        shutil.copy(f"images/train/cat/{i}.png", f"images/val/dog/{i}.png")
    code, said = train_on(capsys)
    assert code == 0
    assert (said.out + said.err).count(
        "warning: 2 of 8 validation images are training images too, byte for byte (as dog/1.png "
        "and cat/1.png)"
    ) == 1
    code, said = train_on(capsys, "--resume", "auto", "--max-updates", "2")
    assert code == 0 and "byte for byte" not in said.out + said.err


def test_one_class_is_refused(capsys):
    make(classes=("photos",))
    code, said = train_on(capsys)
    assert code == 2 and not Path("runs").exists()
    assert said.err == (
        "error: --data folder:images has one class, 'photos': there is nothing to tell apart. Give "
        "the folder that holds a sub-folder for each class.\n"
    )


def make_csv():
    make(classes=("cat", "dog"))
    lines = [
        f"{path.relative_to('images')},{path.parent.name},{path.parts[1]}"
        for path in sorted(Path("images").rglob("*.png"))
    ]
    Path("images", "table.csv").write_text("\n".join(["path,label,split", *lines]))
    return "csv:images/table.csv"


def make_tar():
    make(classes=("cat", "dog"))
    for split in ("train", "val"):
        with tarfile.open(f"{split}.tar", "w") as tar:
            tar.add(f"images/{split}", arcname="")
    return "timm:."


@pytest.mark.slow
@pytest.mark.parametrize("spec", [make_csv, make_tar, lambda: "synthetic:2x65"])
def test_each_source_trains_with_workers_and_goes_on_where_it_was_killed(spec):
    flags = ["--data", spec(), *FLAGS[:4], "--workers", "2", "--img-size", "8"]
    truth = run(*flags, "--max-updates", "3", output="whole")
    folder = stopped_at(2, *flags, "--max-updates", "3")
    assert train.main(["--resume", str(folder)]) == 0
    assert differences(folder, truth) == []
