"""Seconds of a kernel by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lbaccel.planning.cost.devices import CARDS, CPU
from lbaccel.planning.cost.time_model import MMAP_THRESHOLD, kernel_seconds
from lbaccel.planning.cost.trace import Kernel

GB = 10**9


def made(name, num_bytes, new_bytes):
    return Kernel(name, 0, num_bytes, 0, torch.float32, False, new_bytes=new_bytes)


def test_page_faults_count_once_whether_the_kernel_makes_its_result_or_is_given_a_place():
    device = replace(CPU, rates={"elementwise/fp32": 30 * GB, "norm/fp32/contiguous": 10 * GB})
    large, faults = GB, GB * (3 / device.reached_bandwidth - 3 / (30 * GB))
    assert faults > 0
    whole = kernel_seconds(made("aten.native_batch_norm", 2 * GB, large), device)
    place = kernel_seconds(made("aten.empty_like", 0, large), device)
    runs = 4 * kernel_seconds(made("aten.native_batch_norm", 2 * GB // 4, 0), device)
    assert whole == pytest.approx(2 * GB / (10 * GB) + faults)
    assert place + runs == pytest.approx(whole)


@pytest.mark.parametrize(
    ("name", "new_bytes", "device"),
    [
        ("aten.empty", GB, CPU),  # the images, which are there already
        ("aten.empty_like", MMAP_THRESHOLD, CPU),
        ("aten.empty_like", GB, CARDS["RTX 3090"]),
    ],
)
def test_a_place_costs_nothing_where_no_page_is_new(name, new_bytes, device):
    device = replace(device, rates={"elementwise/fp32": 30 * GB})
    assert kernel_seconds(made(name, 0, new_bytes), device) == 0
