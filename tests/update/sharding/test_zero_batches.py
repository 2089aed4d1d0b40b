"""The sizes that lbaccel is for, under DeepSpeed on two CPU ranks, and the shipped configs."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_zero import check
from test_zero import launch as launch_ranks
from test_zero_recipe import launch, metrics

from lbaccel.configs.shipped import shipped

ROOT = Path(__file__).parents[3]
SIZES = (2048, 4096, 8192, 16384)
ZERO = sorted(config.name for config in shipped() if config.name.startswith("zero"))


@pytest.mark.slow
def test_each_size_makes_two_updates_under_zero_of_all_its_samples_and_the_right_ones():
    found = launch_ranks(2, ",".join(map(str, SIZES)), script="zero_batches.py")
    runs = {(run["stage"], run["asked"]): run for run in found["runs"]}
    assert runs.keys() == {*((2, size) for size in SIZES), (3, SIZES[0])}
    for (_, size), run in runs.items():
        assert run["plan"] == run["engine"] == size
        assert (run["num_updates"], run["samples_seen"]) == (2, 2 * size)
        assert run["different"] == 2 * size and run["of_each_rank"] == [size, size]
        assert run["micro_steps"] == size // 2 // 512 and run["moved"]
    assert found["cells"].keys() == {"ZeRO-2, 2048", "ZeRO-3, 2048"}
    check(found["cells"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ZERO)
def test_a_shipped_config_trains_digits_on_two_cpu_ranks(name, tmp_path):
    config = ROOT / "accelerate_configs" / f"{name}.yaml"  # names its JSON from the root
    flags = ("--data", "digits", "--epochs", "2", "--log-with", "run_folder")
    said = launch(config, 2, *flags, "--output", str(tmp_path), folder=ROOT)
    assert "x 2 ranks" in said
    (run,) = tmp_path.iterdir()
    losses = metrics(run, "train/loss")
    assert len(losses) == 6 and losses[-1] < losses[0]  # 1438 samples, 512 an update, two epochs
    assert metrics(run, "val/top1")[-1] > 80  # a network that has not learned has 10


def test_the_shipped_zero_configs_are_all_there():
    assert ZERO == ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]
