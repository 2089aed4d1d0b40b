"""--cache-images changes the time of a run and nothing else, and a resume may change it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import yaml
from forks import run_forked, values
from runs_of_recipe import check_refused, differences, make_images, run, stopped_at

from lbaccel.data.sources import open_source
from lbaccel.errors import InputError
from lbaccel.recipe.kept_images import kept_images

FLAGS = [
    *("--data", "folder:images", "--global-batch-size", "8", "--norm-batch-size", "8"),
    *("--workers", "0", "--epochs", "3"),
]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_images()


def test_a_run_is_the_same_with_and_without_and_says_once_what_is_kept(capsys):
    plain = run(*FLAGS, output="plain")
    assert "cache:" not in capsys.readouterr().out
    kept = run(*FLAGS, "--cache-images", "1MiB", output="kept")
    assert differences(kept, plain) == []
    said = capsys.readouterr()
    lines = [x for x in (said.out + said.err).splitlines() if "cache:" in x]
    assert len(lines) == 2
    assert "at most 0.000977 GiB of this machine's memory" in lines[0]
    assert "cache: 22 of 22 images (100 %) are kept decoded, in 3.93e-06 GiB" in lines[1]


def test_a_resume_may_begin_and_end_to_keep_images():
    pillow = (*FLAGS, "--decoder", "pillow")
    truth = run(*pillow, output="truth")
    part = stopped_at(3, *pillow, "--cache-images", "1MiB")
    assert yaml.safe_load((part / "config.yaml").read_text())["cache_images"] == "1MiB"
    assert differences(run(*pillow, "--resume", part, "--cache-images", "none"), truth) == []
    other = stopped_at(3, *pillow, output="other")
    found = run(*pillow, "--resume", other, "--cache-images", "2kB", output="other")
    assert differences(found, truth) == []


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--data digits --cache-images 1GiB", "--data digits does not read --cache-images 1GiB"),
        ("--data synthetic --cache-images 1GiB", "held in memory, decoded once, so nothing reads"),
        ("--data folder:images --cache-images 1", "--cache-images='1' is no size. Use a number"),
        ("--data folder:images --cache-images 90000GiB", "GiB of this machine's memory are free"),
        ("--data folder:images --cache-images 0.5kB --global-batch-size 8",
         "no room for the index of 22"),
    ],
)  # fmt: skip
def test_where_it_can_not_help_it_is_refused(flags, says, capsys, tmp_path):
    check_refused(flags, says, capsys, tmp_path)


class Ranks:
    """What `kept_images` asks of an Accelerator, for ranks of machines of two."""

    def __init__(self, rank, world_size):
        self.process_index, self.num_processes = rank, world_size
        self.local_process_index = rank % 2
        self.is_main_process = rank == 0


def shares(rank, world_size):
    dist.init_process_group("gloo")
    source = open_source("folder:images")
    kept = kept_images("1MiB", source, Ranks(rank, world_size), say=lambda _: None)
    if rank % 2 == 0:
        kept.training.pixels(3, lambda: torch.full((3, 2, 2), 5 + rank, dtype=torch.uint8))
    dist.barrier()
    found = kept.training.pixels(3, lambda: torch.zeros(3, 2, 2, dtype=torch.uint8))
    dist.barrier()
    return int(found[0, 0, 0])


def test_the_ranks_of_a_machine_share_one_cache_and_machines_do_not():
    outcomes = run_forked(shares, 4, world_size=4)
    assert values(outcomes) == [5, 5, 7, 7]


def too_much(rank, world_size):
    dist.init_process_group("gloo")
    source = open_source("folder:images")
    asked = "90000GiB" if rank == 0 else "1MiB"
    try:
        kept_images(asked, source, Ranks(rank, world_size), say=lambda _: None)
    except InputError as error:
        return str(error)
    return None


def test_an_error_of_the_rank_that_makes_it_is_told_to_all():
    texts = values(run_forked(too_much, 2, world_size=2))
    assert len(set(texts)) == 1 and "--cache-images 90000GiB" in texts[0]


def test_what_is_said_names_the_share_that_is_kept():
    source = open_source("folder:images")
    kept = kept_images("1MiB", source, Ranks(0, 1), say=lambda _: None)
    assert kept.before_epoch() is None
    assert kept.before_epoch() == (
        "cache: 0 of 22 images (0 %) are kept decoded, in 0 GiB; the others are decoded each time"
    )
    assert kept.before_epoch() is None
