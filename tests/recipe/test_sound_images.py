"""Files that can't be read stop a run before its first update, or are left out of it and listed."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import yaml
from forks import run_forked, values
from pictures import png, write_parquet
from runs_of_recipe import BASE, differences, make_images, rows, run, stopped_at

from lbaccel import train
from lbaccel.data.broken import Broken
from lbaccel.recipe import images
from lbaccel.recipe.images import read_skipped, write_skipped
from lbaccel.recipe.options_data import DataOptions

FLAGS = [
    *("--data", "folder:images", "--global-batch-size", "8", "--norm-batch-size", "8"),
    *("--workers", "0", "--epochs", "2"),
]
BROKEN = ("train/cat/3.png", "train/dog/0.png", "val/dog/1.png")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_images()


def break_files():
    content = Path("images", BROKEN[0]).read_bytes()
    Path("images", BROKEN[0]).write_bytes(content[:-30])
    Path("images", BROKEN[1]).write_bytes(b"")
    Path("images", BROKEN[2]).write_text("no image")


def test_without_the_flag_the_run_stops_before_its_first_update(capsys):
    break_files()
    assert run(*FLAGS, code=2) is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("error: 3 of the 22 images of --data folder:images can't be read: ")
    assert "images/train/dog/0.png (it is empty)" in said and "add --skip-corrupt" in said


def test_with_the_flag_they_are_left_out_and_listed(capsys):
    break_files()
    folder = run(*FLAGS, "--skip-corrupt")
    said = capsys.readouterr().out
    assert "skip: 3 of 22 images can't be read and are left out: " in said
    assert "images/train/cat/3.png (" in said
    listed = json.loads((folder / "skipped.json").read_text())["skipped"]
    assert [f"{row['split']}/{row['name']}" for row in listed] == list(BROKEN)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["skip_corrupt"] is True
    identity = config["data_identity"]
    assert (identity["num_train"], identity["num_val"]) == (14, 5)
    assert rows(folder)[-1]["update"] == 4  # 2 epochs of 14 samples at 8, the last one wraps
    # the same run as on a folder without these files
    for path in BROKEN:
        Path("images", path).unlink()
    assert differences(run(*FLAGS, output="other"), folder) == []


def test_a_resume_takes_the_list_and_reads_no_file_anew(capsys, monkeypatch):
    break_files()
    whole = run(*FLAGS, "--skip-corrupt", output="whole")
    folder = stopped_at(2, *FLAGS, "--skip-corrupt")

    def fail(*_, **__):
        raise AssertionError("looked again")

    with monkeypatch.context() as patch:
        patch.setattr(images, "broken_images", fail)
        assert train.main(["--resume", str(folder)]) == 0
    assert differences(folder, whole) == []


def test_a_list_that_is_lost_is_made_again():
    break_files()
    whole = run(*FLAGS, "--skip-corrupt", output="whole")
    folder = stopped_at(2, *FLAGS, "--skip-corrupt")
    (folder / "skipped.json").write_text("{")
    assert train.main(["--resume", str(folder)]) == 0
    assert differences(folder, whole) == []
    assert len(read_skipped(folder)) == 3


def test_a_run_goes_on_as_it_began(capsys, monkeypatch):
    folder = stopped_at(2, *FLAGS)
    assert train.main(["--resume", str(folder), "--skip-corrupt"]) == 2
    assert "--skip-corrupt True: the run in" in capsys.readouterr().err
    monkeypatch.setattr(images, "broken_images", lambda *_, **__: 1 / 0)
    assert train.main(["--resume", str(folder)]) == 0


def test_the_flag_is_refused_where_there_are_no_files(capsys):
    assert run("--skip-corrupt", code=2) is None
    assert "--data digits does not read --skip-corrupt true" in capsys.readouterr().err


def test_members_of_a_tar_file_are_left_out_too(capsys):
    break_files()
    for split in ("train", "val"):
        with tarfile.open(f"{split}.tar", "w") as tar:
            tar.add(f"images/{split}", arcname="")
    flags = [*FLAGS, "--data", "timm:."]
    assert run(*flags, code=2) is None
    said = capsys.readouterr().err
    assert said.startswith("error: 3 of the 22 images of --data timm:. can't be read: train.tar, b")
    folder = run(*flags, "--skip-corrupt", output="other")
    assert len(read_skipped(folder)) == 3
    stopped = stopped_at(2, *flags, "--skip-corrupt")
    assert train.main(["--resume", str(stopped)]) == 0
    assert differences(stopped, folder) == []


def test_the_flag_is_refused_where_all_images_are_in_memory(capsys):
    path = Path("rows", "train-0.parquet")
    write_parquet(path, [png(n) for n in range(20)], [n % 2 for n in range(20)])
    assert run(*FLAGS, "--data", "parquet:rows", "--skip-corrupt", code=2) is None
    assert "in memory, all of them decoded, so nothing reads" in capsys.readouterr().err


def test_sound_files_make_an_empty_list():
    folder = run(*FLAGS, "--skip-corrupt", "--max-updates", "1")
    assert read_skipped(folder) == ()


def test_the_list_is_read_as_it_was_written(tmp_path):
    broken = (Broken("val", "röse/\udcff\n.jpg", "it is empty"),)
    write_skipped(tmp_path, broken)
    assert read_skipped(tmp_path) == broken
    for text in ("[]", '{"skipped": 3}', '{"skipped": [{"split": 1, "name": 2, "reason": 3}]}'):
        (tmp_path / "skipped.json").write_text(text)
        assert read_skipped(tmp_path) is None


def on_ranks(rank, flags):
    import tiny  # noqa: F401

    return train.main(flags)


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_ranks_find_what_one_finds(world_size):
    break_files()
    flags = [*BASE, *FLAGS]
    assert values(run_forked(on_ranks, flags, world_size=world_size)) == [2] * world_size
    assert not Path("runs").exists()
    one = run(*FLAGS, "--skip-corrupt", "--norm-batch-size", "2", output="one")
    flags += ["--skip-corrupt", "--norm-batch-size", "2", "--output", "several"]
    assert values(run_forked(on_ranks, flags, world_size=world_size)) == [0] * world_size
    (several,) = Path("several").iterdir()
    assert read_skipped(several) == read_skipped(one) and len(read_skipped(one)) == 3
    assert [row["update"] for row in rows(several)] == [row["update"] for row in rows(one)]
    resumed = ["--resume", str(several), "--extend", "stretch", "--epochs", "3"]
    assert values(run_forked(on_ranks, resumed, world_size=world_size)) == [0] * world_size


def test_who_opens_the_images_of_a_run_leaves_them_out_too():
    skipped = [Broken("train", "cat/3.png", ""), Broken("val", "dog/1.png", "")]
    source = images.open_data(DataOptions(data="folder:images"), seed=0, skipped=skipped)
    assert (len(source.train), len(source.val)) == (15, 5)
