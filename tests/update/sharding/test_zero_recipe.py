"""The very command of the README on CPU ranks: accelerate launch with a DeepSpeed config."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

from lbaccel import train
from lbaccel.models import adapt_stem

pytest.importorskip("deepspeed", reason="not run: pip install 'lbaccel[deepspeed]'")

ROOT = Path(__file__).parents[3]
FLAGS = [
    *("--data", "digits", "--epochs", "2", "--log-with", "run_folder", "--checkpoint-every", "3"),
    *("--drop-rate", "0.1", "--activation-checkpointing", "full"),
]


def write_configs(folder: Path, stage: int, bf16: bool | str = "auto") -> Path:
    ds = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 1000},
    }
    (folder / "ds.json").write_text(json.dumps(ds))
    accelerate = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "use_cpu": False,
        "num_machines": 1,
        "machine_rank": 0,
        "deepspeed_config": {
            "deepspeed_config_file": str(folder / "ds.json"),
            "zero3_init_flag": False,
        },
    }
    (folder / "zero.yaml").write_text(yaml.safe_dump(accelerate))
    return folder / "zero.yaml"


def command(config: Path, num_processes: int, *flags: str) -> list[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    launcher += ["--num_processes", str(num_processes), "--main_process_port", "0"]
    return [*launcher, "-m", "lbaccel.train", *flags]


def environment() -> dict[str, str]:
    ranks = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {**os.environ, "PYTHONPATH": str(ROOT), **ranks}


def launch(config: Path, num_processes: int, *flags: str, folder: Path, code: int = 0) -> str:
    done = subprocess.run(
        command(config, num_processes, *flags),
        env=environment(),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout + done.stderr


def launch_and_kill(config: Path, num_processes: int, *flags: str, folder: Path, at: str) -> Path:
    """SIGKILL to all its processes as soon as the checkpoint `at` is there; the run folder."""
    with (folder / "killed.log").open("w") as log:
        started = subprocess.Popen(
            command(config, num_processes, *flags),
            env=environment(),
            cwd=folder,
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + 300
        while not (found := list(folder.glob(f"runs/*/checkpoints/{at}"))):
            assert started.poll() is None, (folder / "killed.log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        launcher = psutil.Process(started.pid)  # the ranks have sessions of their own
        killed = [launcher, *launcher.children(recursive=True)]
        for process in killed:
            process.kill()
        started.wait()
        psutil.wait_procs(killed, timeout=20)
    return found[0].parent.parent


def metrics(run: Path, key: str) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row[key] for row in map(json.loads, lines) if key in row]


@pytest.mark.slow
def test_zero_3_trains_as_one_process_does_and_its_checkpoint_goes_on_without_it(tmp_path):
    config = write_configs(tmp_path, 3)
    launch(config, 3, *FLAGS, "--max-updates", "3", folder=tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    whole = load_file(run / "checkpoints" / "last" / "model.safetensors")
    model = timm.create_model("resnet10t", num_classes=10, in_chans=1)
    adapt_stem(model)
    model.load_state_dict(whole)  # every tensor in its whole shape
    assert train.main(["--resume", str(run), "--max-updates", "6"]) == 0

    assert train.main([*FLAGS, "--output", str(tmp_path / "plain")]) == 0
    (plain,) = (tmp_path / "plain").iterdir()
    losses, truth = metrics(run, "train/loss"), metrics(plain, "train/loss")
    assert len(losses) == len(truth) == 6
    assert losses[:3] == pytest.approx(truth[:3], rel=1e-4)
    assert losses == pytest.approx(truth, rel=0.05)  # float32 trajectories part slowly
    assert metrics(run, "val/top1")[-1] > 80 and torch.isfinite(whole["conv1.0.weight"]).all()


@pytest.mark.slow
def test_a_bf16_run_killed_under_zero_2_goes_on_in_one_process_and_under_zero_3(tmp_path):
    flags = [
        *FLAGS,
        "--model",
        "test_resnet",
        "--epochs",
        "20",
        "--precision",
        "bf16",
        "--checkpoint-every",
        "1",
    ]
    (tmp_path / "2").mkdir()
    config = write_configs(tmp_path / "2", 2)
    run = launch_and_kill(config, 2, *flags, folder=tmp_path, at="update_000002")
    done = max(int(p.name[-6:]) for p in (run / "checkpoints").glob("update_*"))
    assert train.main(["--resume", str(run), "--max-updates", str(done + 2)]) == 0
    (tmp_path / "3").mkdir()
    config = write_configs(tmp_path / "3", 3)
    more = ("--resume", str(run), "--max-updates", str(done + 4))
    launch(config, 3, *more, folder=tmp_path)
    weights = load_file(run / "checkpoints" / "last" / "model.safetensors")
    floats = [w for w in weights.values() if w.is_floating_point()]
    assert all(w.dtype == torch.float32 for w in floats)
    assert not any(torch.equal(w, w.bfloat16().float()) for w in floats if w.ndim > 1)

    plain = ["--max-updates", str(done + 4), "--output", str(tmp_path / "plain")]
    assert train.main([*flags, *plain]) == 0
    (truth,) = (tmp_path / "plain").iterdir()
    losses = metrics(run, "train/loss")
    assert len(losses) == done + 4
    assert losses == pytest.approx(metrics(truth, "train/loss"), rel=0.05)


@pytest.mark.slow
def test_deepspeeds_own_bf16_is_refused_with_what_to_type(tmp_path):
    config = write_configs(tmp_path, 1, bf16=True)
    said = launch(config, 2, *FLAGS, folder=tmp_path, code=1)  # accelerate launch's own
    assert 'Write "auto" for "enabled"' in said and "--precision bf16" in said
    said = launch(
        write_configs(tmp_path, 1), 2, *FLAGS, "--dry-run", "--precision", "bf16", folder=tmp_path
    )
    assert "autocast over float32 weights" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_growing_batch_under_zero_3_on_two_ranks_is_that_of_one_process(tmp_path):
    config = write_configs(tmp_path, 3)
    flags = "--data digits --epochs 3 --batch-schedule bsi --global-batch-size 128 --factor 2"
    flags += " --milestones 2 3 --base-lr 0.02 --log-with run_folder --max-updates 20"
    launch(config, 2, *flags.split(), folder=tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    assert train.main([*flags.split(), "--output", str(tmp_path / "one")]) == 0
    (one,) = (tmp_path / "one").iterdir()
    assert metrics(run, "batch/global") == metrics(one, "batch/global")
    assert metrics(run, "batch/global") == [*[128] * 11, 30, *[256] * 5, 158, 512, 512]
    assert metrics(run, "optim/lr") == metrics(one, "optim/lr")
    # float32: the same update, not the same trajectory
    assert metrics(run, "train/loss")[:3] == pytest.approx(metrics(one, "train/loss")[:3], rel=1e-4)
