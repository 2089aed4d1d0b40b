"""`accelerate launch` with the shipped files, on CPU ranks: what the processes resolve to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from forks import free_port

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def start(config: str, out: Path, *flags: str) -> subprocess.Popen:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_"))}
    environment = {
        **kept,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", f"accelerate_configs/{config}.yaml", *flags]
    command += [str(HERE / "launched.py"), str(out)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def results(out: Path, *launchers: subprocess.Popen) -> list[dict]:
    try:
        for launcher in launchers:
            said, _ = launcher.communicate(timeout=300)
            assert launcher.returncode == 0, said
    finally:
        for launcher in launchers:
            launcher.kill()
            launcher.communicate()
    return sorted(map(json.loads, out.read_text().splitlines()), key=lambda line: line["rank"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_zero_config_starts_two_cpu_ranks_that_resolve_to_deepspeed_and_talk(stage, tmp_path):
    out = tmp_path / "ranks"
    flags = ("--num_processes", "2", "--main_process_port", str(free_port()))
    ranks = results(out, start(f"zero{stage}", out, *flags))
    assert [line["rank"] for line in ranks] == [0, 1]
    for line in ranks:
        assert (line["type"], line["processes"]) == ("DEEPSPEED", 2)
        assert (line["backend"], line["sum_of_ranks"]) == ("gloo", 1 + 2)
        assert line["config"]["zero_optimization"]["stage"] == stage
        assert line["config"]["gradient_accumulation_steps"] == "auto"
        assert line["config"]["bf16"] == {"enabled": False}


@pytest.mark.slow
def test_precision_is_given_on_the_command_line(tmp_path):
    out = tmp_path / "ranks"
    flags = ("--num_processes", "2", "--mixed_precision", "bf16")
    ranks = results(out, start("zero2", out, *flags, "--main_process_port", str(free_port())))
    assert [line["config"]["bf16"] for line in ranks] == [{"enabled": True}] * 2
    assert [line["config"]["fp16"] for line in ranks] == [{"enabled": False}] * 2


@pytest.mark.slow
def test_two_launchers_on_loopback_are_one_job_of_two_machines(tmp_path):
    """multi_node.yaml as it is but for addresses and sizes; the script's cpu=True makes its
    processes gloo ranks (MULTI_CPU), where GPUs would make them MULTI_GPU."""
    out = tmp_path / "ranks"
    port = str(free_port())
    flags = ("--num_processes", "2", "--main_process_port", port, "--mixed_precision", "no")
    machines = [start("multi_node", out, "--machine_rank", str(rank), *flags) for rank in (0, 1)]
    ranks = results(out, *machines)
    assert [(line["rank"], line["local_rank"]) for line in ranks] == [(0, 0), (1, 0)]
    for line in ranks:
        assert (line["type"], line["processes"]) == ("MULTI_CPU", 2)
        assert (line["backend"], line["sum_of_ranks"]) == ("gloo", 1 + 2)
