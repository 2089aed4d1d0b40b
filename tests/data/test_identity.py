"""The images are the contract of a resume, their path is not."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import tiny  # noqa: F401  registers lbaccel_tiny
import torch
import yaml
from PIL import Image
from runs_of_recipe import without_contract

from lbaccel import InputError, open_source, train
from lbaccel.data.identity import check_identity, identity_of


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_images(root, *, count=6):
    for label in ("cat", "dog"):
        folder = Path(root) / label
        folder.mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (20 * i, 99, len(label))).save(folder / f"{i}.png")


def test_a_copy_elsewhere_is_the_same():
    make_images("one")
    shutil.copytree("one", "elsewhere/two")
    first, second = (identity_of(open_source(f"folder:{p}")) for p in ("one", "elsewhere/two"))
    assert first == second
    assert first["num_train"] + first["num_val"] == 12 and first["num_classes"] == 2


def other_name():
    Path("images/cat/0.png").rename("images/cat/00.png")


def other_size():
    with Path("images/cat/0.png").open("ab") as file:
        file.write(b"more")


def other_class():
    Path("images/cat").rename("images/lynx")


def one_more():
    Image.new("RGB", (8, 8)).save("images/dog/99.png")


def one_label_moved():
    Path("images/cat/0.png").rename("images/dog/a.png")


def one_gone():
    Path("images/cat/0.png").unlink()


def five_more():
    for i in range(5):
        Image.new("RGB", (8, 8), (i, i, i)).save(f"images/dog/9{i}.png")


def labels_swapped():
    Path("images/cat").rename("images/z")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (one_gone, "5 images of 'cat' in place of 6"),
        (five_more, "11 images of 'dog' in place of 6"),
        (one_label_moved, "5 images of 'cat' in place of 6, 7 images of 'dog' in place of 6"),
        (labels_swapped, "class 'cat' is gone, class 'z' is new"),
        (other_name, "other names, labels or sizes of files"),
    ],
)
def test_a_refusal_says_what_changed(change, says):
    make_images("images")
    before = identity_of(open_source("folder:images"))
    change()
    with pytest.raises(InputError, match=says):
        check_identity(open_source("folder:images"), before, data="folder:images")


def test_other_bytes_of_the_same_size_are_seen_where_the_digest_of_bytes_was_asked_for(capsys):
    make_images("images")
    flags = [*FLAGS, "--data", "folder:images", "--max-updates", "2"]
    assert train.main([*flags, "--data-digest", "bytes"]) == 0
    (folder,) = Path("runs").iterdir()
    sizes = identity_of(open_source("folder:images"))
    path = Path("images/cat/0.png")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    assert identity_of(open_source("folder:images")) == sizes
    capsys.readouterr()
    assert train.main(["--resume", str(folder), "--max-updates", "3"]) == 2
    assert "other bytes in files of the same names and sizes" in capsys.readouterr().err
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    assert train.main(["--resume", str(folder), "--max-updates", "3"]) == 0


def test_a_digest_of_bytes_that_holds_is_no_change():
    make_images("images")
    source = open_source("folder:images")
    check_identity(source, identity_of(source, of_bytes=True), data="folder:images")


def test_a_digest_of_bytes_may_be_asked_for_later():
    make_images("images")
    flags = [*FLAGS, "--data", "folder:images", "--max-updates", "2"]
    assert train.main(flags) == 0
    (folder,) = Path("runs").iterdir()
    more = ["--resume", str(folder), "--max-updates", "3", "--data-digest", "bytes"]
    assert train.main(more) == 0
    assert "bytes" in yaml.safe_load((folder / "config.yaml").read_text())["data_identity"]


def test_an_identity_of_an_earlier_version_is_compared_in_what_it_has():
    make_images("images")
    before = identity_of(open_source("folder:images"))
    del before["images_of"]
    check_identity(open_source("folder:images"), before, data="folder:images")
    one_gone()
    with pytest.raises(InputError, match="other images"):
        check_identity(open_source("folder:images"), before, data="folder:images")


def test_changed_images_may_be_taken_by_name_and_that_is_recorded():
    make_images("images")
    assert train.main([*FLAGS, "--data", "folder:images", "--max-updates", "2"]) == 0
    (folder,) = Path("runs").iterdir()
    Path("images/cat/0.png").rename("images/dog/a.png")
    more = ["--resume", str(folder), "--max-updates", "3"]
    assert train.main(more) == 2
    assert train.main([*more, "--allow-changed", "data"]) == 0
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["data_identity"] == identity_of(open_source("folder:images"))
    assert config["changes"][0]["name"] == "data" and config["changes"][0]["update"] == 2
    assert train.main(["--resume", str(folder), "--max-updates", "4"]) == 0


@pytest.mark.parametrize("change", [other_name, other_size, other_class, one_more, one_label_moved])
def test_each_change_gives_another_identity_and_is_refused(change):
    make_images("images")
    before = identity_of(open_source("folder:images"))
    change()
    source = open_source("folder:images")
    assert identity_of(source) != before
    with pytest.raises(InputError, match="other images than the run began with"):
        check_identity(source, before, data="folder:images")
    check_identity(source, None, data="folder:images")  # a run of before knows none


def test_images_in_memory_are_told_apart_by_a_pixel():
    source = open_source("digits")
    images = source.train.images.clone()
    assert identity_of(source) == identity_of(open_source("digits"))
    images[7, 0, 3, 3] += 1
    other = dataclasses.replace(source, train=dataclasses.replace(source.train, images=images))
    assert identity_of(other) != identity_of(source)
    assert torch.equal(source.train.labels, other.train.labels)


FLAGS = [
    *("--model", "lbaccel_tiny", "--img-size", "8", "--workers", "0", "--global-batch-size", "4"),
    *("--micro-batch-size", "2", "--norm-batch-size", "2", "--epochs", "3"),
    *("--log-with", "run_folder", "--output", "runs", "--checkpoint-every", "1"),
]


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "checkpoints" / "last" / "model.safetensors")


def test_a_run_whose_data_moved_goes_on_to_the_bit_and_changed_data_are_refused(capsys):
    make_images("images")
    assert train.main([*FLAGS, "--data", "folder:images"]) == 0
    (whole,) = Path("runs").iterdir()
    truth = weights(whole)
    shutil.rmtree("runs")
    assert train.main([*FLAGS, "--data", "folder:images", "--max-updates", "3"]) == 0
    (folder,) = Path("runs").iterdir()
    shutil.move("images", "moved")
    resumed = ["--resume", str(folder), "--max-updates", "100"]
    assert train.main(resumed) == 2  # nothing lies at the old path
    capsys.readouterr()
    shutil.copytree("moved", "changed")
    Image.new("RGB", (8, 8)).save("changed/dog/99.png")
    assert train.main([*resumed, "--data", "folder:changed"]) == 2
    assert "other images than the run began with" in capsys.readouterr().err
    assert train.main([*resumed, "--data", "digits"]) == 2
    assert train.main([*resumed, "--data", "folder:moved"]) == 0
    found = weights(folder)
    assert all(torch.equal(found[key], truth[key]) for key in truth)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["data"] == "folder:moved" and config["data_identity"]["num_classes"] == 2
    assert train.main(resumed) == 0  # the new path is kept


def test_a_run_of_before_without_an_identity_still_needs_its_path(capsys):
    make_images("images")
    assert train.main([*FLAGS, "--data", "folder:images", "--max-updates", "2"]) == 0
    (folder,) = Path("runs").iterdir()
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    del config["data_identity"]
    without_contract(folder)
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    shutil.copytree("images", "copy")
    assert train.main(["--resume", str(folder), "--data", "folder:copy"]) == 2
    assert "this setting decides its result" in capsys.readouterr().err
    assert train.main(["--resume", str(folder), "--max-updates", "4"]) == 0
